"""Formats of one JSON object a line: Anserini, Seismic, OpenSearch, Elasticsearch, Qdrant."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from .formats import FIELD
from .weights import Rows, Weights


def write_lines(name: str, weights: Weights, terms: Sequence[str], file: BinaryIO) -> None:
    """Write every row of ``weights``; ``terms`` are the names of the terms, [V]."""
    line = _LINES[name]
    keys = pa.array([f"{_text(term)}:" for term in terms])
    for rows in weights:
        for text in line(rows, keys).to_pylist():
            file.write(text.encode())


def _anserini(rows: Rows, keys: pa.Array) -> pa.Array:
    return _joined('{"id":', _texts(rows.ids), ',"contents":"","vector":', _objects(rows, keys), "}\n")


def _seismic(rows: Rows, keys: pa.Array) -> pa.Array:
    return _joined('{"id":', _texts(rows.ids), ',"content":"","vector":', _objects(rows, keys), "}\n")


def _bulk(rows: Rows, keys: pa.Array) -> pa.Array:
    field = f'}}}}\n{{"{FIELD}":'
    return _joined('{"index":{"_id":', _texts(rows.ids), field, _objects(rows, keys), "}\n")


def _qdrant(rows: Rows, keys: pa.Array) -> pa.Array:
    points = pa.array([point_id(row) for row in rows.ids.to_pylist()], pa.string())
    indices = _lists(rows, pa.array(rows.indices).cast(pa.string()))
    head = _joined('{"id":"', points, '","payload":{"id":', _texts(rows.ids), f'}},"vector":{{"{FIELD}":{{"indices":[')
    return _joined("", head, "", indices, '],"values":[', _lists(rows, _numbers(rows)), "]}}}\n")


def point_id(row: str) -> str:
    """Qdrant's id of a point for the id of a row."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, row))


def _objects(rows: Rows, keys: pa.Array) -> pa.Array:
    """``{"token":weight,…}`` of every row."""
    pairs = pc.binary_join_element_wise(keys.take(pa.array(rows.indices)), _numbers(rows), "")
    return _joined("{", _lists(rows, pairs), "}")


def _numbers(rows: Rows) -> pa.Array:
    """Weights in decimal; a float as the shortest text that float32 reads back as the same."""
    return pa.array(rows.values).cast(pa.string())


def _lists(rows: Rows, texts: pa.Array) -> pa.Array:
    """The texts of each row, with commas between."""
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(rows.offsets, pa.int32()), texts), ",")


def _texts(ids: pa.Array) -> pa.Array:
    return pa.array([_text(row) for row in ids.to_pylist()], pa.string())


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _joined(*parts: Any) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


_LINES: dict[str, Callable[[Rows, pa.Array], pa.Array]] = {
    "anserini": _anserini,
    "seismic": _seismic,
    "opensearch": _bulk,
    "elasticsearch": _bulk,
    "qdrant": _qdrant,
}
