"""npz as SciPy reads it, lsr-benchmark as its loader reads it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from splade_kernels.encoding.errors import DataError
from splade_kernels.exporting.export import export
from tests.exporting.outputs import random_rows, write_output


@pytest.fixture
def encoded(tmp_path: Path):
    rows = random_rows(1000)
    rows[0] = rows[7] = rows[999] = {}
    return write_output(tmp_path / "encoded", rows, [f"é{row}" * (row % 3 + 1) for row in range(1000)])


def test_scipy_loads_the_matrix(encoded, tmp_path) -> None:
    done = export(encoded.folder, "npz", tmp_path / "out.npz")
    found = scipy.sparse.load_npz(tmp_path / "out.npz")
    assert found.format == "csr"
    assert found.dtype == np.float32
    assert found.shape == (1000, 300)
    assert found.nnz == done.terms == encoded.matrix.nnz
    assert (found != encoded.matrix).nnz == 0
    assert found.has_canonical_format
    assert np.load(tmp_path / "out.npz")["ids"].tolist() == encoded.ids


def test_npz_holds_what_scipy_itself_saves(encoded, tmp_path) -> None:
    export(encoded.folder, "npz", tmp_path / "out.npz")
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:
        assert {one.date_time for one in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    scipy.sparse.save_npz(tmp_path / "scipys.npz", encoded.matrix, compressed=False)
    found, expected = np.load(tmp_path / "out.npz"), np.load(tmp_path / "scipys.npz")
    for name in ("data", "indices", "indptr", "format", "shape"):
        assert np.array_equal(found[name], expected[name]), name
        assert found[name].dtype == expected[name].dtype or name in ("indptr", "indices"), name


def test_a_scale_is_applied(encoded, tmp_path) -> None:
    export(encoded.folder, "npz", tmp_path / "out.npz", scale=3)
    found = scipy.sparse.load_npz(tmp_path / "out.npz")
    assert np.array_equal(found.data, (encoded.matrix.data.astype(np.float64) * 3).astype(np.float32))


@pytest.mark.parametrize("query", [False, True])
def test_lsr_benchmark_loads_the_rows(query: bool, tmp_path) -> None:
    """As ``lsr_benchmark.irds.embeddings`` does: ids by line, columns as strings, rows cut at ``indptr``."""
    rows = random_rows(500)
    rows[7] = {}
    encoded = write_output(tmp_path / "encoded", rows, options={"query": query})
    export(encoded.folder, "lsr-benchmark", tmp_path / "out")
    kind = "query" if query else "doc"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [kind]
    arrays = np.load(tmp_path / "out" / kind / f"{kind}-embeddings.npz")
    ids = (tmp_path / "out" / kind / f"{kind}-ids.txt").read_text().strip().split("\n")
    assert ids == encoded.ids
    columns, first = arrays["indices"].astype("U30"), 0
    for row, last in zip(rows, arrays["indptr"][1:], strict=True):
        found = dict(zip(columns[first:last].tolist(), arrays["data"][first:last].tolist(), strict=True))
        assert found == {str(term): weight for term, weight in row.items()}
        first = last


@pytest.mark.parametrize("rows", [[], [{}]])
def test_nothing_is_an_empty_matrix(rows: list, tmp_path) -> None:
    encoded = write_output(tmp_path / "encoded", rows)
    export(encoded.folder, "npz", tmp_path / "out.npz")
    found = scipy.sparse.load_npz(tmp_path / "out.npz")
    assert (found.shape, found.nnz) == ((len(rows), 300), 0)
    assert np.load(tmp_path / "out.npz")["ids"].tolist() == encoded.ids


def test_ids_that_numpy_would_cut_are_refused(tmp_path: Path) -> None:
    encoded = write_output(tmp_path / "encoded", [{1: 1.0}] * 2, ["a", "a\0"])
    with pytest.raises(DataError, match=r"id: expected one that does not end in a NUL character, got 'a\\x00'"):
        export(encoded.folder, "npz", tmp_path / "out.npz")
    assert not list(tmp_path.glob("*.npz*"))
