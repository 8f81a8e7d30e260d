"""docs/formats.md: its table is that of the formats, and its commands and code run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splade_kernels.encoding.identity import tokenizer_sha256
from tests import export_formats
from tests.exporting.outputs import random_rows, write_output
from tests.exporting.test_export import run
from tests.st_models import backbone, tokenizer

PAGE = Path(__file__).parents[2] / "docs/formats.md"
ENGINES = {"duckdb": "duckdb", "pymilvus": "milvus_lite", "qdrant_client": "qdrant_client", "seismic": "seismic"}
ENGINES |= {"bmp": "bmp"}


def test_the_table_is_that_of_the_formats() -> None:
    assert export_formats.block() in PAGE.read_text()


def test_the_command_writes_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{export_formats.BEGIN}\n\nold\n\n{export_formats.END}\n\nafter\n")
    export_formats.main(["--document", str(page)])
    assert page.read_text() == f"before\n\n{export_formats.block()}\n\nafter\n"


def test_every_command_and_code_block_runs_and_finds_the_documents(tmp_path, monkeypatch) -> None:
    """In the order of the page; after each block of an engine, its hits are compared."""
    hashed = tokenizer_sha256(tokenizer())
    model = {"model": str(backbone()), "tokenizer_sha256": hashed}
    vocabulary = len(tokenizer())
    corpus = write_output(tmp_path / "corpus", random_rows(1200, vocabulary), vocabulary=vocabulary, **model)
    queries = random_rows(1, vocabulary, seed=1)
    write_output(tmp_path / "queries", queries, ["q0"], vocabulary=vocabulary, **model)
    query = np.zeros(vocabulary, np.float32)
    query[list(queries[0])] = list(queries[0].values())
    expected = corpus.top(query)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    compared = 0
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if language == "bash":
            program, command, *arguments = shlex.split(code)
            assert (program, command) == ("splade-kernels", "export")
            assert run(*arguments) == 0
            continue
        for engine, package in ENGINES.items():
            if f"import {engine}" in code or f"from {engine}" in code:
                pytest.importorskip(
                    package, reason=f"the package of {package} is not installed: pip install '.[engines]'"
                )
        names.pop("hits", None)
        exec(code, names)
        if "hits" in names:
            compared += 1
            least = 8 if "bmp" in code else 10
            assert len({row for row, _ in names["hits"]} & {row for row, _ in expected}) >= least, code
            if "bmp" not in code:
                scores = [score for _, score in expected]
                np.testing.assert_allclose([score for _, score in names["hits"]], scores, rtol=1e-3)
    assert compared == 6
