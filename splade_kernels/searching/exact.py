"""Exact search of an encoded corpus: every document is scored, and nothing but a block of them is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from .. import csr
from ..encoding.output import Output
from . import documents
from .run import Hits

# Queries whose best documents are merged at a time.
MERGED = 1024


def search(output: Output, queries: Tensor, k: int) -> list[Hits]:
    """For each query the ``k`` documents of the largest ``Σ_v queries[q, v] documents[n, v]`` that is above 0.

    Products and sums are float32. Equal scores are in ascending order of their ids as UTF-8 bytes, also where ``k``
    cuts through them. The corpus is read once, :data:`.documents.ROWS` documents or :data:`.documents.VALUES` values at
    a time, so memory does not grow with it; what is kept are ``k`` scores and ids a query.

    Args:
        output: the encoded corpus.
        queries: ``[Q, V]`` sparse CSR, float32, on the device that is to multiply.
        k: documents per query, at least 1.

    Returns:
        The documents found for each query, best first; fewer than ``k`` where fewer have a score above 0.

    Raises:
        DataError: a part is broken, see :func:`.documents.blocks`.
    """
    k = max(1, min(k, output.rows))
    best = _Best(queries.shape[0], k)
    for block in documents.blocks(output):
        # In a block in ascending order of ids, the first of equal scores, which csr.search takes, has the lowest id.
        order = pc.sort_indices(block.ids)
        rows = torch.from_numpy(order.to_numpy().astype(np.int64))
        arrays = (block.offsets, block.indices.astype(np.int64), block.values)
        crow, col, values = (torch.from_numpy(np.require(array, requirements="W")) for array in arrays)
        size = (len(block), output.vocabulary_size)
        embeddings = torch.sparse_csr_tensor(crow, col, values, size=size, check_invariants=False)
        scores, places = csr.search(queries, csr.take(embeddings, rows).to(queries.device), k)
        best.add(scores.cpu().numpy(), places.cpu().numpy(), block.ids.take(order))
    return list(best.hits())


class _Best:
    """The best documents of each query so far: scores, 0 where there is none, and ranks of their ids among ``ids``."""

    def __init__(self, queries: int, k: int) -> None:
        self.scores = np.zeros((queries, k), dtype=np.float32)
        self.ranks = np.zeros((queries, k), dtype=np.int64)
        self.ids = pa.array([], pa.string())  # ascending

    def add(self, scores: Any, places: Any, ids: pa.Array) -> None:
        """Merge a block: ``scores`` and ``places`` ``[Q, n]``, the latter in ``ids``, which ascend."""
        possible = (scores > 0) & (scores >= self.scores[:, -1:])
        if not possible.any():
            return
        # Ids that are in use, of both; their common order gives every one its new rank.
        old, new = np.unique(self.ranks[self.scores > 0]), np.unique(places[possible])
        both = pa.concat_arrays([self.ids.take(pa.array(old)), ids.take(pa.array(new))])
        order = pc.sort_indices(both).to_numpy()
        rank = np.empty(len(both), dtype=np.int64)
        rank[order] = np.arange(len(both))
        self.ids = both.take(pa.array(order))
        if len(old):
            at = np.minimum(np.searchsorted(old, self.ranks), len(old) - 1)  # where there is none, any rank will do
            self.ranks = rank[at]
        touched = possible.any(axis=1).nonzero()[0]
        for first in range(0, len(touched), MERGED):
            rows = touched[first : first + MERGED]
            entering = np.where(possible[rows], scores[rows], np.float32(0))
            at = len(old) + np.minimum(np.searchsorted(new, places[rows]), len(new) - 1)
            merged = np.concatenate([self.scores[rows], entering], axis=1)
            ranks = np.concatenate([self.ranks[rows], rank[at]], axis=1)
            chosen = np.lexsort((ranks, -merged), axis=1)[:, : self.scores.shape[1]]
            self.scores[rows] = np.take_along_axis(merged, chosen, axis=1)
            self.ranks[rows] = np.take_along_axis(ranks, chosen, axis=1)

    def hits(self) -> Iterator[Hits]:
        for scores, ranks in zip(self.scores, self.ranks, strict=True):
            count = int((scores > 0).sum())
            yield Hits(self.ids.take(pa.array(ranks[:count])).to_pylist(), scores[:count])


def to_csr(encoded: Any, vocabulary_size: int, device: str) -> Tensor:
    """Encoded texts as ``[n, V]`` sparse CSR on a device."""
    arrays: Sequence[Any] = (encoded.offsets, encoded.indices.astype(np.int64), encoded.values)
    crow, col, values = (torch.from_numpy(array) for array in arrays)
    size = (len(crow) - 1, vocabulary_size)
    return torch.sparse_csr_tensor(crow, col, values, size=size, check_invariants=False).to(device)
