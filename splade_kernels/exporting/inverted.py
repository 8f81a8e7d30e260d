"""The inverted index of an output: the rows of every term, made in bounded memory by reading the rows repeatedly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .weights import Array, Weights

# Postings held at a time, 8 bytes each; every so many of the corpus are one more pass over the parts.
POSTINGS_HELD = 1 << 26


class Postings(NamedTuple):
    """``rows`` (ascending) and ``weights`` of a term, int32."""

    term: int
    rows: Array
    weights: Array


def sorted_terms(frequencies: Array, names: Sequence[str]) -> Array:
    """The terms that occur, by the UTF-8 bytes of their names, which is the order that CIFF and PISA ask for."""
    occurring = np.flatnonzero(frequencies).tolist()
    return np.array(sorted(occurring, key=lambda term: names[term].encode()), np.int64)


def invert(weights: Weights, frequencies: Array, order: Array, held: int | None = None) -> Iterator[Postings]:
    """The postings of the terms of ``order``, in that order.

    A counting sort: ``frequencies`` say where the postings of each term begin. No more than ``held`` postings
    (``POSTINGS_HELD``), or those of one term, are in memory.
    """
    place = np.full(len(frequencies), -1, np.int64)
    place[order] = np.arange(len(order))
    for first, last in _groups(frequencies[order], POSTINGS_HELD if held is None else held):
        begins = np.concatenate([[0], np.cumsum(frequencies[order[first:last]])])
        rows, values = (np.empty(begins[-1], np.int32) for _ in range(2))
        free, row = begins[:-1].copy(), 0
        for batch in weights:
            terms = place[batch.indices]
            here = np.flatnonzero((terms >= first) & (terms < last))
            # The sort is stable, so the rows of a term stay ascending.
            by_term = here[np.argsort(terms[here], kind="stable")]
            terms = terms[by_term] - first
            counts = np.bincount(terms, minlength=last - first)
            within = np.arange(len(terms)) - np.repeat(np.cumsum(counts) - counts, counts)
            rows[free[terms] + within] = batch.numbers[by_term] + row
            values[free[terms] + within] = batch.values[by_term]
            free += counts
            row += len(batch)
        for term, begin, end in zip(order[first:last], begins, begins[1:], strict=False):
            yield Postings(int(term), rows[begin:end], values[begin:end])


def _groups(counts: Array, held: int) -> Iterator[tuple[int, int]]:
    """Ranges of terms with up to ``held`` postings each."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + held, side="right")))
        yield first, last
        first = last
