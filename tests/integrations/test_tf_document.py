"""docs/transformers.md: its code runs, and its table is that of tests/tf_models.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tf_models
from tests.st_models import TEXTS, backbone, tokenizer

PAGE = Path(__file__).parents[2] / "docs/transformers.md"


def test_the_table_is_that_of_the_tests() -> None:
    """``make report`` writes it."""
    assert tf_models.block() in PAGE.read_text()


def test_the_command_writes_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{tf_models.BEGIN}\n\nold\n\n{tf_models.END}\n\nafter\n")
    tf_models.main(["--document", str(page)])
    assert page.read_text() == f"before\n\n{tf_models.block()}\n\nafter\n"


def test_the_code_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As printed, but for the names of the models: tiny ones."""
    (family,) = (one for one in tf_models.FAMILIES if one.name == "Qwen3")
    names = {"answerdotai/ModernBERT-base": backbone("modernbert"), "Qwen/Qwen3-0.6B": tmp_path / "qwen"}
    family.build(vocab_size=len(tokenizer())).save_pretrained(tmp_path / "qwen")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for code in (block for block in blocks if "peft" not in block):  # tests/repository/test_documents.py runs that one
        for name, folder in names.items():
            code = code.replace(name, str(folder))
        exec(code, found)

    vocabulary = len(tokenizer())
    assert found["logits"].shape[-1] == vocabulary
    assert found["embeddings"].shape == found["without_prompt"].shape == (2, vocabulary)
    assert bool((found["without_prompt"] <= found["embeddings"]).all())
    assert all(parameter.grad is not None for parameter in found["encoder"].parameters())
    assert any(getattr(module, "gradient_checkpointing", False) for module in found["encoder"].modules())
    with torch.no_grad():
        encoder = found["encoder"].eval()
        texts = list(TEXTS[:3])
        batch = found["tokenizer"](texts, padding=True, return_tensors="pt")
        expected = encoder(**batch)
        embeddings = found["sparse_encoder"].encode(texts, convert_to_sparse_tensor=False)
        torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(found["again"].eval()(**batch), expected)
        assert torch.equal(found["same"](**batch).logits, encoder.model(**batch).logits)
        whole = found["bidirectional"](**batch)
    assert whole.shape == (3, vocabulary)
    assert found["bidirectional"].activation_function == "log1p_relu"
    assert found["bidirectional"].config.is_causal is False
