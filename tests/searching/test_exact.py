"""Exact search of an encoded corpus, against dense products in NumPy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from splade_kernels.encoding.errors import DataError
from splade_kernels.searching import documents, exact
from tests.searching.encoded import random_rows, to_csr, write_output

# In this order as UTF-8 bytes; as UTF-16 "𝐚" would come before "ｚ", and as numbers "10" after "9".
IDS = ["10", "9", "A", "a", "aa", "z", "é", "ｚ", "𝐚"]


def expected(ids: list[str], documents: Any, queries: Any, k: int) -> list[list[tuple[str, float]]]:
    """By sorting all scores in float64, of equal ones by the bytes of their ids."""
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    ranked = [sorted(zip(row, ids, strict=True), key=lambda pair: (-pair[0], pair[1].encode())) for row in scores]
    return [[(identifier, score) for score, identifier in row[:k] if score > 0] for row in ranked]


def found(hits: Any) -> list[list[tuple[str, float]]]:
    return [list(zip(ids, scores.tolist(), strict=True)) for ids, scores in hits]


def shuffled_ids(count: int, seed: int = 0) -> list[str]:
    """Random strings over several alphabets, all different, in no order."""
    generator = np.random.default_rng(seed)
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids["".join(generator.choice(list("09aZé٣ｚ𝐚"), generator.integers(1, 6)))] = None
    return list(ids)


@pytest.mark.parametrize("k", [1, 3, 40, 1000])
@pytest.mark.parametrize("rows", [5, 64, documents.ROWS])
def test_equal_scores_are_ordered_by_id_also_at_the_cut(k: int, rows: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Weights of 1 and 2 only, so that most scores are equal, in float32 and float64 alike, in and across blocks."""
    monkeypatch.setattr(exact, "MERGED", 4)
    monkeypatch.setattr(documents.blocks, "__defaults__", (rows, documents.VALUES))
    ids, corpus, queries = (
        shuffled_ids(300),
        random_rows(300, 20, 0.2, 1, levels=2),
        random_rows(11, 20, 0.3, 2, levels=2),
    )
    queries[4] = 0
    wanted = expected(ids, corpus, queries, k)
    assert sum(len({score for _, score in row}) for row in wanted) < 0.5 * sum(map(len, wanted)) or k < 10
    assert found(exact.search(write_output(tmp_path, ids, corpus), to_csr(queries), k)) == wanted
    assert wanted[4] == []


def test_ids_are_compared_as_utf8_bytes(tmp_path: Path) -> None:
    ids = [IDS[place] for place in (7, 2, 0, 8, 5, 3, 6, 1, 4)]
    for count in (1, 2):  # in one part, and each in a part
        output = write_output(
            tmp_path / str(count), ids, np.ones((9, 3), np.float32), rows_per_part=9 if count == 1 else 1
        )
        for k in range(1, 10):
            ((found_ids, _),) = exact.search(output, to_csr(np.ones((1, 3), np.float32)), k)
            assert found_ids == IDS[:k]


def test_scores_are_the_float64_products_but_for_rounding(tmp_path: Path) -> None:
    ids, corpus, queries = shuffled_ids(500), random_rows(500, 300, 0.2, 3), random_rows(20, 300, 0.1, 4)
    hits = exact.search(write_output(tmp_path, ids, corpus, rows_per_part=100), to_csr(queries), 50)
    scores = queries.astype(np.float64) @ corpus.astype(np.float64).T
    row_of = {identifier: row for row, identifier in enumerate(ids)}
    # A sum of at most 300 float32 products: relative error below 301 · 2^-24, since nothing cancels.
    bound = 301 * 2.0**-24
    for query, (found_ids, found_scores) in enumerate(hits):
        assert found_scores.dtype == np.float32
        true = scores[query, [row_of[identifier] for identifier in found_ids]]
        np.testing.assert_allclose(found_scores, true, rtol=bound)
        assert (np.diff(found_scores) <= 0).all()
        left_out = np.delete(scores[query], [row_of[identifier] for identifier in found_ids])
        assert len(found_ids) == 50 and true.min() >= left_out.max() * (1 - 2 * bound)


def test_blocks_are_bounded_and_hold_every_row_once(tmp_path: Path) -> None:
    ids, corpus = shuffled_ids(100), random_rows(100, 30, 0.5, 5)
    corpus[::9] = 0
    output = write_output(tmp_path, ids, corpus, rows_per_part=10)
    for rows, values in ((25, 10**6), (10**6, 400), (1, 1)):
        blocks = list(documents.blocks(output, rows, values))
        assert [identifier for block in blocks for identifier in block.ids.to_pylist()] == ids
        for block in blocks:
            fits = len(block) <= rows and len(block.values) <= values
            assert fits or len(block) == 10  # no less than what is read at a time
        stored = [(block.indices[first:last], block.values[first:last]) for block in blocks
                  for first, last in zip(block.offsets[:-1], block.offsets[1:], strict=True)]  # fmt: skip
        for row, (indices, stored_values) in zip(corpus, stored, strict=True):
            assert indices.tolist() == np.flatnonzero(row).tolist()
            assert stored_values.tolist() == row[row > 0].tolist()


def test_a_corpus_without_a_match_or_a_row(tmp_path: Path) -> None:
    queries = np.array([[1, 0], [0, 1]], np.float32)
    one_sided = write_output(tmp_path / "a", ["x", "y"], np.array([[2, 0], [0, 0]], np.float32))
    assert found(exact.search(one_sided, to_csr(queries), 5)) == [[("x", 2.0)], []]
    assert found(exact.search(write_output(tmp_path / "b", [], np.zeros((0, 2))), to_csr(queries), 5)) == [[], []]


@pytest.mark.parametrize(
    ("ids", "indices", "values", "message"),
    [
        (["d1", "d 2"], [[0], [1]], [[1.0], [1.0]], "id: expected no white space.*'d 2'"),
        (["d1", "d\u00a02"], [[0], [1]], [[1.0], [1.0]], "id: expected no white space"),
        (["d1", "d2"], [[0], [0, 3]], [[1.0], [1.0, 2.0]], r"document 'd2': expected indices below .* 3, got 3: 2.0"),
        (["d1", "d2"], [[], [-1]], [[], [1.0]], "document 'd2': expected indices below"),
        (["d1", "d2"], [[0], [1]], [[1.0], [float("nan")]], "document 'd2': expected finite values, got 1: nan"),
        (["d1", "d2"], [[0], [1]], [[float("inf")], [1.0]], "document 'd1': expected finite values, got 0: inf"),
        (["d1", "d2"], [[0], [1]], [[1.0], [1.0, 2.0]], "as many values as indices"),
        (["d1", None], [[0], [1]], [[1.0], [1.0]], "id: expected no nulls"),
        (["d1", "d2"], [[0], None], [[1.0], [1.0]], "indices: expected no nulls"),
        (["d1", "d2"], [[0], [1]], [[1.0], [None]], "values: expected no nulls"),
    ],
)
def test_broken_parts_are_refused(ids: Any, indices: Any, values: Any, message: str, tmp_path: Path) -> None:
    output = write_output(tmp_path, ["d1", "d2"], np.ones((2, 3), np.float32))
    schema = pq.read_schema(output.parts[0])
    pq.write_table(pa.table([ids, indices, values], schema=schema), output.parts[0])
    with pytest.raises(DataError, match=message):
        exact.search(output, to_csr(np.ones((1, 3), np.float32)), 5)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    output = write_output(tmp_path, ["d1"], np.ones((1, 3), np.float32))
    output.parts[0].unlink()
    with pytest.raises(DataError, match=r"part-00000\.parquet"):
        exact.search(output, to_csr(np.ones((1, 3), np.float32)), 5)


_PEAK = """
import re, sys
from pathlib import Path
import torch
from splade_kernels.encoding.output import open_output
from splade_kernels.searching import exact
from tests.searching.encoded import random_rows, to_csr

hits = exact.search(open_output(Path(sys.argv[1])), to_csr(random_rows(64, 2000, 0.02, 1)), 100)
assert [len(ids) for ids, _ in hits] == [100] * 64
# ru_maxrss would begin with the peak of the process that started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """4 times the documents, the same part over and over. The weights grow by 315 MB, half of what the process takes;
    what the allocators keep differs by some percent."""
    rows = documents.ROWS
    output = write_output(tmp_path, shuffled_ids(rows), random_rows(rows, 2000, 0.05, 2), rows_per_part=2000)
    manifest, peaks = dict(output.manifest), []
    for times in (4, 16):
        parts = output.manifest["parts"] * times
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "parts": parts, "rows": rows * times}))
        done = subprocess.run([sys.executable, "-c", _PEAK, tmp_path], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.15 * peaks[0], peaks
