"""The Common Index File Format, version 1: https://github.com/osirrc/ciff.

A file is a sequence of protocol-buffer messages, each after its length: the header, the postings lists by term, the
documents. They are encoded here, by array: a message object a posting, as the library for protocol buffers has it,
takes five times as long, and ciff-toolkit needs a protobuf older than 5. The tests compare the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from .inverted import Postings, invert, sorted_terms
from .weights import Array, Survey, Weights

# Postings encoded at a time, or those of one term.
CHUNK = 1 << 18


def write_ciff(weights: Weights, found: Survey, names: Sequence[str], file: BinaryIO) -> None:
    order = sorted_terms(found.frequencies, names)
    file.write(_delimited(_header(weights, found, len(order))))
    for some in _chunks(invert(weights, found.frequencies, order)):
        _write_postings(some, names, file)
    number = 0
    for rows in weights:
        for row, length in zip(rows.ids.to_pylist(), rows.sums.tolist(), strict=True):
            file.write(_delimited(_integer(1, number) + _text(2, row) + _integer(3, length)))
            number += 1


def _header(weights: Weights, found: Survey, terms: int) -> bytes:
    rows = found.rows
    average = struct.pack("<d", found.total / rows) if found.total else b""
    described = f"{weights.output.manifest['model']['name']}, weights times {weights.scale:g}, by splade-kernels"
    counts = (1, terms, rows, terms, rows, found.total)
    message = b"".join(_integer(field, count) for field, count in enumerate(counts, 1))
    return message + (b"\x39" + average if average else b"") + _text(8, described)


def _chunks(postings: Iterable[Postings]) -> Iterator[list[Postings]]:
    """Terms together, since an array operation costs as much for ten postings as for a thousand."""
    some: list[Postings] = []
    held = 0
    for one in postings:
        if some and held + len(one.rows) > CHUNK:
            yield some
            some, held = [], 0
        some.append(one)
        held += len(one.rows)
    if some:
        yield some


def _write_postings(some: list[Postings], names: Sequence[str], file: BinaryIO) -> None:
    gaps = np.concatenate([np.diff(one.rows, prepend=0) for one in some])
    encoded, ends = _encoded(gaps, np.concatenate([one.weights for one in some]))
    last = np.cumsum([len(one.rows) for one in some]) - 1
    begin = 0
    for one, end in zip(some, ends[last].tolist(), strict=True):
        total = int(one.weights.sum(dtype=np.int64))
        head = _text(1, names[one.term]) + _integer(2, len(one.rows)) + _integer(3, total)
        file.write(_varint(len(head) + end - begin) + head + encoded[begin:end].tobytes())
        begin = end


def _encoded(gaps: Array, weights: Array) -> tuple[Array, Array]:
    """Field 4 of a postings list, once a posting: its gap (field 1, left out where 0) and its weight (field 2).

    Returns the bytes, and the end of each posting in them.
    """
    gap_sizes, weight_sizes = np.where(gaps > 0, 1 + _varint_sizes(gaps), 0), 1 + _varint_sizes(weights)
    ends = np.cumsum(2 + gap_sizes + weight_sizes)
    begins = ends - (2 + gap_sizes + weight_sizes)
    out = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    out[begins] = 0x22
    out[begins + 1] = gap_sizes + weight_sizes
    written = gaps > 0
    out[begins[written] + 2] = 0x08
    _put_varints(out, begins[written] + 3, gaps[written])
    out[begins + 2 + gap_sizes] = 0x10
    _put_varints(out, begins + 3 + gap_sizes, weights)
    return out, ends


def _varint_sizes(numbers: Array) -> Array:
    sizes = np.ones(len(numbers), np.int64)
    for limit in (1 << 7, 1 << 14, 1 << 21, 1 << 28):
        sizes += numbers >= limit
    return sizes


def _put_varints(out: Array, at: Array, numbers: Array) -> None:
    """Seven bits a byte, the lowest first; the high bit says that another byte follows."""
    while len(numbers):
        more = numbers > 0x7F
        out[at] = (numbers & 0x7F) | (more << 7)
        at, numbers = at[more] + 1, numbers[more] >> 7


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _integer(field: int, number: int) -> bytes:
    return bytes([field << 3]) + _varint(number) if number else b""


def _text(field: int, text: str) -> bytes:
    encoded = text.encode()
    return bytes([field << 3 | 2]) + _varint(len(encoded)) + encoded if encoded else b""


def _delimited(message: bytes) -> bytes:
    return _varint(len(message)) + message
