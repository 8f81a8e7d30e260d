"""Saved models of the tests of encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", reason="the package sentence-transformers is not installed")
pytest.importorskip("pyarrow", reason="the package pyarrow is not installed: pip install '.[cli]'")

from tests.st_models import sparse_encoder


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SPLADE model with prompts for both tasks, and another one."""
    model = sparse_encoder()
    model.prompts = {"query": "what is ", "document": "the sea ", "long": "the long red ones of the sky "}
    return save(model, tmp_path_factory.mktemp("splade"))
