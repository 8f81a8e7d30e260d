"""The Common Index File Format, version 1: https://github.com/osirrc/ciff.

A file is a sequence of protocol-buffer messages, each after its length: the header, the postings lists by term, the
documents. They are encoded here, by array: a message object a posting, as the library for protocol buffers has it,
takes some fifty times as long, and ciff-toolkit needs a protobuf older than 5. The tests compare the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from .inverted import Postings, invert, sorted_terms
from .weights import Array, Survey, Weights

# Postings encoded at a time.
CHUNK = 1 << 20


def write_ciff(weights: Weights, found: Survey, names: Sequence[str], file: BinaryIO) -> None:
    order = sorted_terms(found.frequencies, names)
    file.write(_delimited(_header(weights, found, len(order))))
    for postings in invert(weights, found.frequencies, order):
        _write_postings(postings, names[postings.term], file)
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


def _write_postings(postings: Postings, name: str, file: BinaryIO) -> None:
    gaps = np.diff(postings.rows, prepend=0)
    head = _text(1, name) + _integer(2, len(gaps)) + _integer(3, int(postings.weights.sum(dtype=np.int64)))
    length = len(head) + int(np.sum(2 + _gap_sizes(gaps) + 1 + _varint_sizes(postings.weights)))
    file.write(_varint(length) + head)
    for begin in range(0, len(gaps), CHUNK):
        file.write(_encoded(gaps[begin : begin + CHUNK], postings.weights[begin : begin + CHUNK]).tobytes())


def _encoded(gaps: Array, weights: Array) -> Array:
    """Field 4 of a postings list, once a posting: its gap (field 1, left out where 0) and its weight (field 2)."""
    gap_sizes, weight_sizes = _gap_sizes(gaps), 1 + _varint_sizes(weights)
    sizes = 2 + gap_sizes + weight_sizes
    begins = np.cumsum(sizes) - sizes
    out = np.empty(int(sizes.sum()), np.uint8)
    out[begins] = 0x22
    out[begins + 1] = gap_sizes + weight_sizes
    written = gaps > 0
    out[begins[written] + 2] = 0x08
    _put_varints(out, begins[written] + 3, gaps[written])
    out[begins + 2 + gap_sizes] = 0x10
    _put_varints(out, begins + 3 + gap_sizes, weights)
    return out


def _gap_sizes(gaps: Array) -> Array:
    return np.where(gaps > 0, 1 + _varint_sizes(gaps), 0)


def _varint_sizes(numbers: Array) -> Array:
    return np.asarray(1 + sum((numbers >> bits > 0).astype(np.int64) for bits in (7, 14, 21, 28)))


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
