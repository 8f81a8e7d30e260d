"""CSR matrices in NumPy's zipped format, member by member: npz and lsr-benchmark."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..encoding.errors import DataError
from .weights import Array, Rows, Survey, Weights


def write_npz(weights: Weights, found: Survey, path: Path) -> None:
    """What ``scipy.sparse.load_npz`` reads, and ``ids``."""
    with zipfile.ZipFile(path, "w") as archive:
        _write_csr(weights, found, archive)
        _write_array(archive, "format", np.array(b"csr"))
        _write_array(archive, "shape", np.array([found.rows, weights.output.vocabulary_size], np.int64))
        width = max(found.longest_id, 1)
        ids = (_fixed_width(rows.ids.to_pylist(), width) for rows in weights)
        _write_stream(archive, "ids", f"<U{width}", found.rows, ids)


def write_lsr_benchmark(weights: Weights, found: Survey, folder: Path) -> None:
    """``doc/doc-embeddings.npz`` and ``doc/doc-ids.txt``, or ``query/…`` for texts encoded as queries."""
    kind = "query" if weights.output.manifest.get("options", {}).get("query") else "doc"
    (folder / kind).mkdir()
    with zipfile.ZipFile(folder / kind / f"{kind}-embeddings.npz", "w") as archive:
        _write_csr(weights, found, archive)
    with (folder / kind / f"{kind}-ids.txt").open("w", encoding="utf-8", newline="\n") as file:
        for rows in weights:
            file.writelines(f"{row}\n" for row in rows.ids.to_pylist())


def _fixed_width(ids: list[str], width: int) -> Array:
    for name in ids:
        if name.endswith("\0"):  # which NumPy takes for its padding
            raise DataError(f"id: expected one that does not end in a NUL character, got {name!r}")
    return np.array(ids, f"<U{width}")


def _write_csr(weights: Weights, found: Survey, archive: zipfile.ZipFile) -> None:
    index = "<i4" if found.terms < 2**31 else "<i8"
    _write_stream(archive, "data", "<f4", found.terms, (rows.values for rows in weights))
    _write_stream(archive, "indices", index, found.terms, (rows.indices for rows in weights))
    _write_stream(archive, "indptr", index, found.rows + 1, _row_pointers(weights))


def _row_pointers(weights: Weights) -> Iterator[Array]:
    yield np.zeros(1, np.int64)
    before = 0
    rows: Rows
    for rows in weights:
        yield rows.offsets[1:] + before
        before += int(rows.offsets[-1])


def _write_array(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    with _member(archive, name) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _write_stream(archive: zipfile.ZipFile, name: str, dtype: str, length: int, chunks: Iterator[Array]) -> None:
    """A vector of ``length`` that is never whole in memory."""
    with _member(archive, name) as file:
        header: dict[str, Any] = {"descr": dtype, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, np.dtype(dtype)).tobytes())


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A member without the time of its making, so that the same rows are the same bytes."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)
