"""PISA's uncompressed collection: https://pisa.readthedocs.io, and pisa-engine/ciff, whose files these are.

A sequence is its length and its numbers, all uint32, little-endian. A lexicon is the number of its texts, 0 and the
offsets of their ends, all uint64, and the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .inverted import invert, sorted_terms
from .weights import Array, Survey, Weights

BASE_NAME = "index"


def write_pisa(weights: Weights, found: Survey, names: Sequence[str], folder: Path) -> None:
    order = sorted_terms(found.frequencies, names)
    base = folder / BASE_NAME
    with base.with_suffix(".docs").open("wb") as rows, base.with_suffix(".freqs").open("wb") as frequencies:
        rows.write(_sequence(np.array([found.rows])))
        for postings in invert(weights, found.frequencies, order):
            rows.write(_sequence(postings.rows))
            frequencies.write(_sequence(postings.weights))
    with base.with_suffix(".sizes").open("wb") as sizes:
        sizes.write(np.array([found.rows], "<u4").tobytes())
        for batch in weights:
            sizes.write(batch.sums.astype("<u4").tobytes())
    terms = [[names[term] for term in order]]
    _write_texts(base, ".terms", ".termlex", len(order), terms, terms)
    ids = [(batch.ids.to_pylist() for batch in weights) for _ in range(3)]
    _write_texts(base, ".documents", ".doclex", found.rows, *ids[:2])


def _write_texts(base: Path, lines: str, lexicon: str, count: int, *passes: Iterable[list[str]]) -> None:
    """Texts as lines and as a lexicon. Two passes over the texts: offsets come before texts."""
    with base.with_suffix(lines).open("wb") as line_file, base.with_suffix(lexicon).open("wb") as file:
        file.write(np.array([count, 0], "<u8").tobytes())
        end = 0
        for texts in passes[0]:
            encoded = [text.encode() for text in texts]
            line_file.write(b"".join(text + b"\n" for text in encoded))
            ends = end + np.cumsum([len(text) for text in encoded], dtype=np.uint64)
            file.write(ends.astype("<u8").tobytes())
            end = int(ends[-1]) if len(ends) else end
        for texts in passes[1]:
            file.write("".join(texts).encode())


def _sequence(numbers: Array) -> bytes:
    return np.concatenate([[len(numbers)], numbers]).astype("<u4").tobytes()
