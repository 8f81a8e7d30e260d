"""What a search found, and TREC's format of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

TAG = "splade-kernels"


class Hits(NamedTuple):
    """The documents found for one query, best first: their ids, and their scores ``[n]`` float32."""

    ids: Sequence[str]
    scores: Any


def write_run(file: TextIO, queries: Sequence[str], hits: Sequence[Hits], tag: str = TAG) -> int:
    """Write ``qid Q0 docid rank score tag`` lines, ranks from 1; returns how many.

    A score has the fewest digits that read back as the same float32.
    """
    lines = 0
    for query, (ids, scores) in zip(queries, hits, strict=True):
        for rank, (identifier, score) in enumerate(zip(ids, scores.astype(str), strict=True), 1):
            file.write(f"{query} Q0 {identifier} {rank} {score} {tag}\n")
        lines += len(ids)
    return lines
