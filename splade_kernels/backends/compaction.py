"""Data-dependent compaction: the compiled operators of ``csrc/``, or PyTorch's with the identical result.

Nothing is loaded before the first call. The compiled operators serve the devices they were built for; everything else
takes PyTorch's own operations, which are slower and return the same bytes. No function here makes the host wait for a
device, except :func:`sparsify`, whose result has the exact size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import compiled


def bucket_by_token(argmax: Tensor, grad: Tensor, edges: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The active entries of each sequence, ordered by token and by vocabulary id inside a token.

    Entry ``(b, v)`` is active if ``grad[b, v] != 0`` (NaN is) and ``0 <= argmax[b, v] < edges[b + 1] - edges[b]``; it
    belongs to row ``edges[b] - edges[0] + argmax[b, v]``.

    Args:
        argmax: ``[n, V]`` int16 or int32, position of the winning token in its sequence; any strides.
        grad: ``[n, V]`` float32; any strides.
        edges: ``[n + 1]`` int32 or int64, non-decreasing: the row at which each sequence begins, and the end.
        rows: bound on ``edges[n] - edges[0]`` that the host knows. Entries of later rows are left out.

    Returns:
        ``(bounds, words, values)``: row r has the entries ``bounds[r, 0]`` to ``bounds[r, 1] - 1``; ``[rows, 2]`` int64
        (``n · V`` may exceed 2^31), both 0 for a row without entries. ``words`` ``[n · V]`` int32 vocabulary ids and
        ``values`` ``[n · V]`` float32: sequence b's from ``b · V`` on, without gaps; what follows them up to
        ``(b + 1) · V`` is unspecified.
    """
    # Whatever they hold, no two sequences share a row then: rows are what entries are counted by.
    edges = edges.to(torch.int64).cummax(0).values
    if compiled.serves(grad.device):
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.splade_kernels_csrc.bucket_by_token(argmax, grad, edges, rows)
        return result
    return bucket_in_pytorch(argmax, grad, edges, rows)


def bucket_in_pytorch(argmax: Tensor, grad: Tensor, edges: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`bucket_by_token` by PyTorch's sort; ``edges`` int64 and non-decreasing."""
    starts = (edges[:-1] - edges[0])[:, None]
    ends = edges[1:, None] - edges[0]
    row = starts + argmax
    active = (grad != 0) & (argmax >= 0) & (row < ends) & (row < rows)
    # Row r is key 2 r + 1. What is left out goes behind its sequence and before the next one, so that keys ascend
    # over all segments.
    key = torch.where(active, 2 * row + 1, 2 * ends)
    key, order = key.sort(dim=1, stable=True)
    wanted = 2 * torch.arange(rows, device=grad.device) + 1
    bounds = torch.stack([torch.searchsorted(key.view(-1), wanted, right=right) for right in (False, True)], dim=1)
    bounds = torch.where(bounds[:, :1] < bounds[:, 1:], bounds, 0)
    return bounds, order.to(torch.int32).view(-1), grad.gather(1, order).view(-1)


def sparsify(embeddings: Tensor, max_active_dims: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """``(crow [B + 1] int64, col [nnz] int64, values [nnz])`` of the non-zeros, or of those among each row's largest.

    Args:
        embeddings: ``[B, V]`` floating point; any strides.
        max_active_dims: non-zeros among each row's largest entries, at most so many; NaN is the largest, ties go to the
            lowest id. None: all.
    """
    count = _limit(embeddings, max_active_dims)
    if compiled.serves(embeddings.device):
        if embeddings.device.type == "cpu":
            result: tuple[Tensor, Tensor, Tensor] = torch.ops.splade_kernels_csrc.sparsify(embeddings, max(count, 1))
            return result
        counts, mask = torch.ops.splade_kernels_csrc.active_mask(embeddings, max(count, 1))
        crow = _row_pointers(counts)
        return crow, *torch.ops.splade_kernels_csrc.gather_active(embeddings, crow, mask, int(crow[-1]))
    return sparsify_in_pytorch(embeddings, max_active_dims)


def sparsify_in_pytorch(embeddings: Tensor, max_active_dims: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sparsify` by PyTorch's operations."""
    kept = _kept(embeddings, _limit(embeddings, max_active_dims))
    rows, columns = kept.nonzero(as_tuple=True)
    # A view into all the indices: operators promise tensors of their own.
    return _row_pointers(kept.sum(dim=1)), columns.clone(), embeddings[rows, columns]


def sparsify_bounded(embeddings: Tensor, max_active_dims: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sparsify` without a host sync: ``col`` and ``values`` have room for the most there can be.

    That is ``B · min(max_active_dims, V)`` entries, of which the first ``crow[-1]`` are specified.
    """
    count = _limit(embeddings, max_active_dims)
    capacity = embeddings.shape[0] * count
    if compiled.serves(embeddings.device):
        counts, mask = torch.ops.splade_kernels_csrc.active_mask(embeddings, max(count, 1))
        crow = _row_pointers(counts)
        return crow, *torch.ops.splade_kernels_csrc.gather_active(embeddings, crow, mask, capacity)
    kept = _kept(embeddings, count)
    crow = _row_pointers(kept.sum(dim=1))
    # Kept entries go to their rank, all others behind the last place.
    place = torch.where(kept, kept.view(-1).cumsum(0).view(kept.shape) - 1, capacity).view(-1)
    ids = torch.arange(embeddings.shape[1], device=embeddings.device).expand(embeddings.shape).reshape(-1)
    col = ids.new_zeros(capacity + 1).scatter_(0, place, ids)
    values = embeddings.new_zeros(capacity + 1).scatter_(0, place, embeddings.reshape(-1))
    return crow, col[:capacity].clone(), values[:capacity].clone()


def _limit(embeddings: Tensor, max_active_dims: int | None) -> int:
    size = embeddings.shape[1]
    return size if max_active_dims is None else min(max_active_dims, size)


def _row_pointers(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


def _kept(embeddings: Tensor, count: int) -> Tensor:
    """Mask of the non-zeros among each row's ``count`` largest; ``topk`` alone leaves the choice among ties open."""
    kept = embeddings != 0
    if count == embeddings.shape[1]:
        return kept
    smallest = embeddings.topk(count, dim=1).values[:, -1:]
    above = (embeddings > smallest) | (embeddings.isnan() & ~smallest.isnan())
    tied = (embeddings == smallest) | (embeddings.isnan() & smallest.isnan())
    places = count - above.sum(dim=1, keepdim=True)
    return kept & (above | (tied & (tied.cumsum(dim=1) <= places)))
