"""The formats of one JSON object a line, read back as their readers' code reads them."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import numpy as np
import pytest

from splade_kernels.exporting.export import export
from tests.exporting.outputs import random_rows, write_output

# Ids that JSON has to escape, and those beyond ASCII.
IDS = ['a"b', "back\\slash", "line\nbreak", "tab\tbed", "é", "日本", "😀", "0", " ", "x" * 500]


@pytest.fixture
def encoded(tmp_path: Path):
    rows = random_rows(len(IDS) + 500)
    rows[3] = {}
    # Decimals that a shorter notation would lose.
    rows[4] = {1: 1.17549435e-38, 2: 0.1, 3: 1 / 3, 4: 16777217.0, 5: 1e-5, 6: 3.0, 7: 123456790.0}
    return write_output(tmp_path / "encoded", rows, [*IDS, *(f"d{row}" for row in range(500))])


def expected_rows(encoded) -> list[dict[str, float]]:
    matrix = encoded.matrix
    pairs = [(row.indices.tolist(), row.data.tolist()) for row in (matrix[i] for i in range(len(encoded.ids)))]
    return [dict(zip(map(str, indices), data, strict=True)) for indices, data in pairs]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def float32(found: dict[str, float]) -> dict[str, float]:
    """As a reader of 32-bit floats has them: Java's parseFloat, Rust's f32."""
    return {key: float(np.float32(value)) for key, value in found.items()}


def test_anserini_reads_the_integers(encoded, tmp_path) -> None:
    """JsonVectorCollection takes ``asInt()``, and JsonCollection the texts of ``id`` and ``contents``."""
    done = export(encoded.folder, "anserini", tmp_path / "out", names="ids", scale=10)
    found = read(tmp_path / "out")
    assert [document["id"] for document in found] == encoded.ids
    assert all(document["contents"] == "" for document in found)
    assert all(type(value) is int for document in found for value in document["vector"].values())
    expected = [{key: round(value * 10) for key, value in row.items()} for row in expected_rows(encoded)]
    expected = [{key: value for key, value in row.items() if value} for row in expected]
    assert [document["vector"] for document in found] == expected
    assert (done.rows, done.terms) == (510, sum(map(len, expected)))
    assert done.dropped == encoded.matrix.nnz - done.terms > 0


def test_seismic_reads_the_floats(encoded, tmp_path) -> None:
    export(encoded.folder, "seismic", tmp_path / "out", names="ids")
    found = read(tmp_path / "out")
    assert [document["id"] for document in found] == encoded.ids
    expected = [
        {key: min(value, 65504.0) for key, value in row.items() if value > 1e-7} for row in expected_rows(encoded)
    ]
    assert [float32(document["vector"]) for document in found] == expected


@pytest.mark.parametrize("name", ["opensearch", "elasticsearch"])
def test_bulk_bodies_are_pairs_of_lines(name: str, encoded, tmp_path) -> None:
    export(encoded.folder, name, tmp_path / "out")
    text = (tmp_path / "out").read_text(encoding="utf-8")
    assert text.endswith("\n")
    lines = read(tmp_path / "out")
    assert lines[::2] == [{"index": {"_id": row}} for row in encoded.ids]
    assert all(list(document) == ["splade"] for document in lines[1::2])
    assert [float32(document["splade"]) for document in lines[1::2]] == expected_rows(encoded)
    assert all(int(key) >= 0 for document in lines[1::2] for key in document["splade"])


def test_qdrant_reads_points(encoded, tmp_path) -> None:
    export(encoded.folder, "qdrant", tmp_path / "out")
    found = read(tmp_path / "out")
    assert [point["payload"]["id"] for point in found] == encoded.ids
    assert [point["id"] for point in found] == [str(uuid.uuid5(uuid.NAMESPACE_OID, row)) for row in encoded.ids]
    vectors = [point["vector"]["splade"] for point in found]
    rows = [dict(zip(map(str, v["indices"]), v["values"], strict=True)) for v in vectors]
    assert [float32(row) for row in rows] == expected_rows(encoded)


@pytest.mark.parametrize("name", ["anserini", "seismic", "opensearch", "elasticsearch", "qdrant"])
def test_a_corpus_without_rows_or_terms_is_written(name: str, tmp_path) -> None:
    empty = write_output(tmp_path / "empty", [])
    assert export(empty.folder, name, tmp_path / "none", names="ids").rows == 0
    assert (tmp_path / "none").read_bytes() == b""
    blank = write_output(tmp_path / "blank", [{}, {}])
    done = export(blank.folder, name, tmp_path / "out", names="ids")
    assert (done.rows, done.terms) == (2, 0)
    assert len(read(tmp_path / "out")) == (4 if name.endswith("search") else 2)
