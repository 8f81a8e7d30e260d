"""Approximate search by Seismic (Bruch, Nardini, Rulli, Venturini, SIGIR 2024): the extra ``seismic``."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from ..encoding.errors import DataError
from ..encoding.output import Output
from . import documents
from .run import Hits

# Of the index: postings a term at most on average, share of them that are centroids of blocks, share of a block's mass
# that its summary keeps. pyseismic-lsr's own defaults.
INDEX = {"n_postings": 3500, "centroid_fraction": 0.1, "summary_energy": 0.4}
# Of a query: terms that choose posting lists, and the share of the k-th score that a block's summary has to promise.
SEARCH = {"query_cut": 20, "heap_factor": 0.7}
# Terms that the narrow index can number.
NARROW = 1 << 16


def search(output: Output, queries: Tensor, k: int, threads: int = 0) -> list[Hits]:
    """For each query about the ``k`` documents of the largest dot product, among those whose score is above 0.

    The index is built in memory, of the whole corpus, for this one search, with the parameters ``INDEX`` and
    ``SEARCH``. Scores are Seismic's, from values rounded to float16. Equal ones are in ascending order of their ids as
    UTF-8 bytes.

    Args:
        output: the encoded corpus.
        queries: ``[Q, V]`` sparse CSR, float32.
        k: documents per query, at least 1.
        threads: of Seismic; 0: one a core.

    Raises:
        DataError: pyseismic-lsr is not installed; a part is broken, see :func:`.documents.blocks`.
    """
    seismic = library()
    wide = output.vocabulary_size > NARROW
    dataset = (seismic.SeismicDatasetLV if wide else seismic.SeismicDataset)(dim=output.vocabulary_size)
    for block in documents.blocks(output):
        dataset.add_documents_by_id(
            block.ids.to_pylist(), block.indices.astype(np.int64), block.values, block.offsets.astype(np.int64)
        )
    texts = queries.shape[0]
    if not dataset.len:  # which leaves empty documents out
        return [Hits([], np.zeros(0, np.float32))] * texts
    kind = seismic.SeismicIndexLV if wide else seismic.SeismicIndex
    with _output_as_error():
        index = kind.build_from_dataset(dataset, num_threads=threads, **INDEX)
    string = seismic.get_seismic_string()
    crow, col, values = (
        part.cpu().numpy() for part in (queries.crow_indices(), queries.col_indices(), queries.values())
    )
    rows = [slice(first, last) for first, last in itertools.pairwise(crow)]
    found = index.batch_search(
        np.array([str(number) for number in range(texts)], dtype=string),
        [col[row].astype(string) for row in rows],
        [values[row] for row in rows],
        k=min(k, output.rows),
        num_threads=threads,
        **SEARCH,
    )
    hits: dict[int, Hits] = {}
    for results in found:
        if results:
            kept = sorted((-score, identifier) for _, score, identifier in results if score > 0)
            scores = np.array([-score for score, _ in kept], dtype=np.float32)
            hits[int(results[0][0])] = Hits([identifier for _, identifier in kept], scores)
    return [hits.get(number, Hits([], np.zeros(0, np.float32))) for number in range(texts)]


def library() -> Any:
    """pyseismic-lsr; raises DataError where it is not installed."""
    try:
        import seismic
    except ImportError as error:
        raise DataError("--engine seismic needs pyseismic-lsr: pip install 'splade-kernels[seismic]'") from error
    return seismic


@contextlib.contextmanager
def _output_as_error() -> Iterator[None]:
    """What the library itself prints on the standard output goes to the standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
