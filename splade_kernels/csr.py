"""Sparse CSR embeddings joined, searched and handed to SciPy (docs/search.md).

PyTorch neither concatenates nor slices CSR tensors, so these functions work on their three arrays: ``crow_indices``,
``col_indices`` and ``values``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import check_count

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["join", "search", "to_scipy"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Dense at a time are a block of queries over the whole vocabulary and its scores for a block of documents. 64 float32
# columns are four cache lines for each vocabulary entry; with more columns a CPU's cache holds too few entries.
QUERIES = 64
DOCUMENTS = 2**15


def join(batches: Iterable[Tensor]) -> Tensor:
    """The rows of sparse CSR tensors, one batch after the other, as one sparse CSR tensor, detached.

    The peak memory is that of all batches and the result together.

    Args:
        batches: ``[n_i, V]`` sparse CSR tensors of one ``V``, dtype and device, as ``encode_sparse`` yields them.

    Returns:
        ``[Σ n_i, V]`` sparse CSR with int64 indices, in the dtype and on the device of the batches.

    Raises:
        TypeError, ValueError: a batch is none of these, or differs from the first, or there is none.
    """
    parts = list(_checked("batches", batches))
    if not parts:
        raise ValueError("batches: expected at least one batch, which says how wide the result is, got none")
    return _join(parts)


def search(queries: Tensor, documents: Tensor | Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Exact search: for each query the ``k`` documents of the largest ``Σ_v queries[q, v] documents[n, v]``.

    Every document is scored; no index is built. Products and sums are float32 (float64 if queries or documents are),
    and the same bits from run to run. Dense at a time are 64 queries over the vocabulary, ``[V, 64]``, and their scores
    for 32,768 documents. Not differentiable. CUDA tensors are searched on their device.

    Args:
        queries: ``[Q, V]`` sparse CSR or dense, floating point.
        documents: ``[N, V]`` sparse CSR, floating point; or an iterable of such batches of one dtype, whose rows are
            numbered on. It is read once, so the corpus need not be in memory.
        k: documents per query, at least 1; all of them where there are fewer.

    Returns:
        ``scores``, float32 or float64, and ``ids``, int64 row numbers in ``documents``: both ``[Q, min(k, N)]``, scores
        descending. Equal scores are in ascending order of their ids, also where ``k`` cuts through them. NaN counts
        as the largest score. As in a dense product, a document's NaN or infinity makes NaN with a query that lacks the
        term; a query's does not with a document that lacks it.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """
    k = check_count("k", k, 1)
    _check("queries", queries, (torch.sparse_csr, torch.strided), _DTYPES)
    queries = queries.detach()
    count = queries.shape[0]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    scores = torch.empty(count, 0, dtype=dtype, device=queries.device)
    ids = torch.empty(count, 0, dtype=torch.int64, device=queries.device)
    searched = 0
    for block in _blocks(documents, queries):
        dtype = torch.promote_types(dtype, block.dtype)
        values = block.values().to(dtype)
        found = []
        for first in range(0, count, QUERIES):
            rows = slice(first, min(first + QUERIES, count))
            products = F.embedding_bag(  # a document is a weighted bag of the queries' columns
                block.col_indices(),
                _columns(queries, rows, dtype),
                block.crow_indices(),
                mode="sum",
                per_sample_weights=values,
                include_last_offset=True,
            )
            products = products.t().contiguous()
            places = _largest(products, k)
            # In both halves, and across them, equal scores are in ascending order of their ids: a stable sort keeps it.
            both = torch.cat([scores[rows].to(dtype), products.gather(1, places)], dim=1)
            best, order = both.sort(dim=1, descending=True, stable=True)
            found.append((best[:, :k], torch.cat([ids[rows], places + searched], dim=1).gather(1, order[:, :k])))
        if found:
            scores, ids = torch.cat([best for best, _ in found]), torch.cat([places for _, places in found])
        searched += block.shape[0]
    shape = (count, min(k, searched))  # which they have already, unless there is no query
    return scores.to(dtype).reshape(shape), ids.reshape(shape)


def to_scipy(embeddings: Tensor) -> csr_array:
    """The embeddings as a SciPy array that shares their memory: writing to one changes the other.

    Args:
        embeddings: ``[B, V]`` sparse CSR on the CPU, float32 or float64, SciPy's own dtypes.

    Returns:
        ``scipy.sparse.csr_array`` with the tensor's own values and indices.

    Raises:
        TypeError, ValueError: ``embeddings`` is none of these.
        ImportError: SciPy is not installed.
    """
    _check("embeddings", embeddings, (torch.sparse_csr,), (torch.float32, torch.float64))
    if embeddings.device.type != "cpu":
        raise ValueError(f"embeddings: expected on the CPU, got {embeddings.device}: pass embeddings.cpu()")
    try:
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError("to_scipy needs SciPy: pip install scipy") from error
    embeddings = embeddings.detach()
    array = csr_array(tuple(embeddings.shape), dtype=embeddings.values().numpy().dtype)
    # Set one by one, since the constructor copies int64 indices to int32 where they fit.
    array.indptr, array.indices = embeddings.crow_indices().numpy(), embeddings.col_indices().numpy()
    array.data = embeddings.values().numpy()
    return array


def _check(name: str, value: Any, layouts: tuple[torch.layout, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout not in layouts:
        expected = " or ".join({torch.sparse_csr: "sparse CSR", torch.strided: "dense"}[layout] for layout in layouts)
        raise TypeError(f"{name}: expected {expected}, got layout {value.layout}: .to_sparse_csr() converts it")
    if value.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got {value.ndim}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, dtypes))}, got {value.dtype}")


def _checked(name: str, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches, detached. A wrong one is refused before the next is asked for."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"{name}: expected an iterable of sparse CSR tensors, got {type(batches).__name__}")
    expected = None
    for number, batch in enumerate(batches):
        _check(f"{name}[{number}]", batch, (torch.sparse_csr,), _DTYPES)
        came = {"width": batch.shape[1], "dtype": batch.dtype, "device": batch.device}
        expected = expected or came
        for what, value in expected.items():
            if came[what] != value:
                error = TypeError if what == "dtype" else ValueError
                raise error(f"{name}[{number}]: expected {what} {value} like {name}[0], got {came[what]}")
        yield batch.detach()


def _blocks(documents: Tensor | Iterable[Tensor], queries: Tensor) -> Iterator[Tensor]:
    """The documents in their order, at most ``DOCUMENTS`` at a time; small batches are joined, large ones cut."""
    if isinstance(documents, Tensor):
        _check("documents", documents, (torch.sparse_csr,), _DTYPES)
        documents = [documents]
    held: list[Tensor] = []
    rows = 0
    for batch in _checked("documents", documents):
        if batch.shape[1] != queries.shape[1]:
            raise ValueError(f"documents: expected width {queries.shape[1]} like queries, got {batch.shape[1]}")
        if batch.device != queries.device:
            raise ValueError(f"documents: expected on {queries.device} like queries, got {batch.device}")
        for first in range(0, batch.shape[0], DOCUMENTS):
            part = _rows(batch, slice(first, min(first + DOCUMENTS, batch.shape[0])))
            if rows + part.shape[0] > DOCUMENTS:
                yield held[0] if len(held) == 1 else _join(held)
                held, rows = [], 0
            held.append(part)
            rows += part.shape[0]
    if held:
        yield held[0] if len(held) == 1 else _join(held)


def _join(parts: list[Tensor]) -> Tensor:
    crow = _join_crow([part.crow_indices() for part in parts], [part.values().shape[0] for part in parts])
    col = torch.cat([part.col_indices() for part in parts]).to(torch.int64)
    return _csr(crow, col, torch.cat([part.values() for part in parts]), parts[0].shape[1])


def _join_crow(crows: list[Tensor], counts: list[int]) -> Tensor:
    """``crow_indices`` of the whole. ``counts`` are the non-zeros of the parts: their sum may exceed int32."""
    before = itertools.accumulate([0, *counts[:-1]])
    ends = [crow[1:].to(torch.int64) + start for crow, start in zip(crows, before, strict=True)]
    return torch.cat([crows[0].new_zeros(1, dtype=torch.int64), *ends])


def _rows(embeddings: Tensor, rows: slice) -> Tensor:
    """Some rows of a CSR tensor. The values and column indices are views."""
    crow = embeddings.crow_indices()[rows.start : rows.stop + 1]
    first, last = crow[[0, -1]].tolist()
    col, values = embeddings.col_indices()[first:last], embeddings.values()[first:last]
    return _csr(crow - first, col, values, embeddings.shape[1])


def take(embeddings: Tensor, rows: Tensor) -> Tensor:
    """The rows of a CSR tensor that ``rows [n]``, int64 on its device, names in any order."""
    crow = embeddings.crow_indices()
    taken = F.pad(crow.diff()[rows].cumsum(0), (1, 0))
    # Where each stored value lies in ``embeddings``: its place in the result, moved by as much as its row is.
    source = (crow[rows] - taken[:-1]).repeat_interleave(taken.diff())
    source += torch.arange(len(source), device=source.device)
    return _csr(taken, embeddings.col_indices()[source], embeddings.values()[source], embeddings.shape[1])


def _csr(crow: Tensor, col: Tensor, values: Tensor, width: int) -> Tensor:
    size = (crow.shape[0] - 1, width)
    return torch.sparse_csr_tensor(crow, col, values, size=size, device=values.device, check_invariants=False)


def _columns(queries: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some queries as the columns of a dense matrix, ``[V, at most QUERIES]``."""
    if queries.layout == torch.strided:
        return queries[rows].to(dtype).t().contiguous()
    part = _rows(queries, rows)
    col, crow = part.col_indices().to(torch.int64), part.crow_indices()
    column = torch.arange(len(part), device=col.device).repeat_interleave(crow.diff(), output_size=col.shape[0])
    dense = torch.zeros(part.shape[1], len(part), dtype=dtype, device=col.device)
    dense[col, column] = part.values().to(dtype)
    return dense


def _largest(scores: Tensor, k: int) -> Tensor:
    """The places of each row's ``k`` largest scores, ascending. Of equal ones the first; NaN counts as the largest."""
    if k >= scores.shape[1]:
        return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    values, places = scores.topk(k + 1, dim=1)
    places = places[:, :k]
    # Where k cuts through equal scores (NaN is greater than none), topk may have chosen any of them.
    tied = (~(values[:, k - 1] > values[:, k])).nonzero()[:, 0]
    if len(tied):
        places[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return places.sort(dim=1).values
