"""Approximate search by pyseismic-lsr, against exact search."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splade_kernels.encoding.errors import DataError
from splade_kernels.searching import exact, seismic
from tests.searching.encoded import random_rows, to_csr, write_output
from tests.searching.scifact import weighted

pytest.importorskip("seismic", reason="the package pyseismic-lsr is not installed: pip install '.[seismic]'")
PAGE = Path(__file__).parents[2] / "docs/command-line.md"
# Of the exact result on SciFact, by k. docs/command-line.md says so.
LEAST = {10: 0.99, 100: 0.99, 1000: 0.97}
# Values are stored as float16.
ROUNDING = 2.0**-11


def recall(found: Any, exactly: Any) -> float:
    """Mean share of the exact result whose score, or a better one, was found: equal scores are as good."""
    shares = []
    for (_, scores), (_, best) in zip(found, exactly, strict=True):
        if len(best):
            shares.append((scores >= best[-1] * (1 - 2 * ROUNDING)).sum() / len(best))
    return float(np.mean(shares))


@pytest.mark.parametrize(
    ("documents", "queries"), [(600, 200), pytest.param(None, None, marks=pytest.mark.slow)], ids=["part", "whole"]
)
def test_recall_on_real_text(documents: int | None, queries: int | None, tmp_path: Path, capfd: Any) -> None:
    corpus = weighted(documents, queries)
    output = write_output(tmp_path, corpus.document_ids, corpus.documents, rows_per_part=2000)
    asked = to_csr(corpus.queries)
    found, exactly = seismic.search(output, asked, 1000, threads=2), exact.search(output, asked, 1000)
    assert capfd.readouterr().out == ""
    true = (corpus.queries @ corpus.documents.T).toarray()
    row_of = {identifier: row for row, identifier in enumerate(corpus.document_ids)}
    for query, (ids, scores) in enumerate(found):
        assert len(set(ids)) == len(ids)
        np.testing.assert_allclose(scores, true[query, [row_of[identifier] for identifier in ids]], rtol=2 * ROUNDING)
        assert list(zip(-scores, ids, strict=True)) == sorted(zip(-scores, ids, strict=True))
    for k, least in LEAST.items():
        if k > len(row_of):  # all that match is more than an approximate search is for
            continue
        cut = [[(ids[:k], scores[:k]) for ids, scores in hits] for hits in (found, exactly)]
        assert recall(*cut) >= least, k


def test_the_page_states_parameters_and_recall() -> None:
    page = " ".join(PAGE.read_text().split())
    for name, value in {**seismic.INDEX, **seismic.SEARCH}.items():
        assert f"`{name}={value}`" in page
    assert ", ".join(f"{least} of the exact top {k:,}" for k, least in LEAST.items()) in page


@pytest.mark.parametrize("size", [50, 70_000])
def test_small_and_wide_vocabularies(size: int, tmp_path: Path) -> None:
    """Beyond 65,536 terms the index is another class. A few documents are found exactly, but for rounding."""
    corpus, queries = np.zeros((40, size), np.float32), np.zeros((4, size), np.float32)
    corpus[:, :20], corpus[:, -20:] = random_rows(40, 20, 0.5, 1), random_rows(40, 20, 0.5, 2)
    queries[:, :20], queries[:, -20:] = random_rows(4, 20, 0.2, 3), random_rows(4, 20, 0.2, 4)
    corpus[7], queries[2] = 0, 0
    ids = [f"d{row}" for row in range(40)]
    found = seismic.search(write_output(tmp_path, ids, corpus), to_csr(queries), 40, threads=1)
    true = queries.astype(np.float64) @ corpus.T
    for query, (found_ids, scores) in enumerate(found):
        assert {*found_ids} == {identifier for identifier, score in zip(ids, true[query], strict=True) if score > 0}
        np.testing.assert_allclose(scores, true[query, [ids.index(name) for name in found_ids]], rtol=2 * ROUNDING)
    assert found[2].ids == []


def test_nothing_to_find(tmp_path: Path) -> None:
    queries = to_csr(np.ones((2, 3), np.float32))
    for name, count in (("none", 0), ("empty", 3)):
        output = write_output(tmp_path / name, ["a", "b", "c"][:count], np.zeros((count, 3), np.float32))
        assert [list(hits.ids) for hits in seismic.search(output, queries, 5)] == [[], []]


def test_without_the_library(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "seismic", None)
    with pytest.raises(DataError, match=r"pip install 'splade-kernels\[seismic\]'"):
        seismic.library()
