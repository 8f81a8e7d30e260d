"""Ids that occur twice, found by 64-bit hashes: 8 bytes a row in memory, and a file of them beside each part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from .corpus import Corpus, Row
from .errors import DataError

Hashes = npt.NDArray[np.uint64]


def id_hash(name: str) -> int:
    """The first 64 bits of BLAKE2b, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def id_hashes(names: Iterable[str]) -> Hashes:
    return np.frombuffer(b"".join(id_hash(name).to_bytes(8, "little") for name in names), "<u8").astype(np.uint64)


class Seen:
    """The hashes of all rows so far, in sorted runs of which each is more than twice as long as the next.

    The runs are merged as they grow, so that a row is sorted a logarithmic number of times and looked up in few runs.
    """

    def __init__(self) -> None:
        self._runs: list[Hashes] = []

    def add(self, hashes: Hashes) -> Hashes:
        """Take the hashes of further rows; returns those that now occur more than once."""
        hashes = np.sort(hashes)
        found = [hashes[1:][hashes[1:] == hashes[:-1]]]
        for run in self._runs:
            places = run.searchsorted(hashes)
            found.append(hashes[run[np.minimum(places, len(run) - 1)] == hashes])
        if len(hashes):
            self._runs.append(hashes)
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            last = self._runs.pop()
            merged = np.concatenate([self._runs.pop(), last])
            merged.sort()
            self._runs.append(merged)
        return np.unique(np.concatenate(found))


def check_duplicates(found: Hashes, rows: Sequence[Row], corpus: Corpus) -> None:
    """Tell ids that are there twice from different ids with the same hash.

    Args:
        found: hashes that occur more than once, the last time among ``rows``.
        rows: the rows of which some have these hashes.
        corpus: the corpus from its beginning, which is read up to the second place of the id.

    Raises:
        DataError: an id is there twice; the message names both places.
    """
    wanted = set(found.tolist())
    if not any(id_hash(row.id) in wanted for row in rows):
        return
    first_place: dict[str, str] = {}
    for row in corpus:
        if id_hash(row.id) in wanted:
            if row.id in first_place:
                raise DataError(
                    f"{row.place}: {corpus.fields.id}: expected an id that no other row has, got {row.id!r}, "
                    f"which {first_place[row.id]} has"
                )
            first_place[row.id] = row.place
        if row.place == rows[-1].place:
            return
