"""Encoded documents as blocks of CSR arrays, checked: kernels that index with them do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..csr import DOCUMENTS
from ..encoding.errors import DataError
from ..encoding.output import Output
from .queries import has_white_space

# A block ends at whichever comes first: as many documents as `csr.search` scores at a time, or 64 MiB of values.
ROWS, VALUES = DOCUMENTS, 1 << 23


@dataclass(frozen=True)
class Block:
    """Documents: ``ids`` ``[n]`` strings, ``offsets`` ``[n + 1]``, ``indices`` int32, ``values`` float32."""

    ids: pa.Array
    offsets: Any
    indices: Any
    values: Any

    def __len__(self) -> int:
        return len(self.ids)


def blocks(output: Output, rows: int = ROWS, values: int = VALUES) -> Iterator[Block]:
    """The documents of an encoded corpus in the order of the input, a bounded number of rows and values at a time.

    Raises:
        DataError: a part is broken: a null, an index outside of the vocabulary, a value that is not finite; or an id
            has white space, which a TREC run cannot hold.
    """
    waiting: list[Block] = []
    held_rows = held_values = 0
    for batch in output.batches():
        block = _checked(batch, output)
        if waiting and (held_rows + len(block) > rows or held_values + len(block.values) > values):
            yield _join(waiting)
            waiting, held_rows, held_values = [], 0, 0
        waiting.append(block)
        held_rows, held_values = held_rows + len(block), held_values + len(block.values)
    if waiting:
        yield _join(waiting)


def _checked(batch: pa.RecordBatch, output: Output) -> Block:
    ids, indices, values = (batch.column(name) for name in ("id", "indices", "values"))
    for name, column in (("id", ids), ("indices", indices), ("values", values)):
        if column.null_count or (name != "id" and column.flatten().null_count):
            raise DataError(f"{output.folder}: {name}: expected no nulls, got some in the part of {ids[0]}")
    for identifier in ids.to_pylist():
        if has_white_space(identifier):
            raise DataError(
                f"{output.folder}: id: expected no white space, since a run is split at it, got {identifier!r}"
            )
    lengths = np.diff(indices.offsets.to_numpy())
    if not np.array_equal(lengths, np.diff(values.offsets.to_numpy())):
        raise DataError(f"{output.folder}: expected as many values as indices in every row, got others after {ids[0]}")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    flat_indices, flat_values = indices.flatten().to_numpy(), values.flatten().to_numpy()

    def refuse(wrong: Any, what: str) -> None:
        if wrong.any():
            place = int(wrong.argmax())
            row = int(np.searchsorted(offsets, place, side="right")) - 1
            got = f"{flat_indices[place]}: {flat_values[place]}"
            raise DataError(f"{output.folder}: document {ids[row].as_py()!r}: expected {what}, got {got}")

    size = output.vocabulary_size
    refuse((flat_indices < 0) | (flat_indices >= size), f"indices below the vocabulary's size, {size}")
    refuse(~np.isfinite(flat_values), "finite values")
    return Block(ids, offsets, flat_indices, flat_values)


def _join(parts: list[Block]) -> Block:
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    return Block(
        pa.concat_arrays([part.ids for part in parts]),
        np.concatenate([[0], *offsets]),
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.values for part in parts]),
    )
