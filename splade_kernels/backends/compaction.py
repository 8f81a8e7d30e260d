"""Data-dependent compaction: the compiled operators of ``csrc/``, or PyTorch's with the identical result.

The compiled operators serve the devices that they were built for. Everywhere else PyTorch's own operations return the
same bytes, more slowly. Only :func:`sparsify`, whose result has the exact size, makes the host wait for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import compiled


def bucket_by_token(argmax: Tensor, grad: Tensor, edges: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The active entries of each sequence, ordered by token, and by vocabulary id within a token.

    Entry ``(b, v)`` is active if ``grad[b, v] != 0`` (NaN is) and ``0 <= argmax[b, v] < edges[b + 1] - edges[b]``; it
    belongs to row ``edges[b] - edges[0] + argmax[b, v]``.

    Args:
        argmax: ``[n, V]`` int16 or int32, position of the winning token in its sequence; any strides.
        grad: ``[n, V]`` float32; any strides.
        edges: ``[n + 1]`` int32 or int64, non-decreasing: the row at which each sequence begins, and the end.
        rows: bound on ``edges[n] - edges[0]`` that the host knows. Entries of later rows are left out.

    Returns:
        ``(bounds, words, values)``. The entries of row r are ``bounds[r, 0]`` to ``bounds[r, 1] - 1``; ``[rows, 2]``
        int64 (``n · V`` may exceed 2^31), both 0 for a row without entries. ``words [n · V]`` int32 are their
        vocabulary ids, ``values [n · V]`` float32 their gradients: those of sequence b from ``b · V`` on, without gaps;
        what follows them up to ``(b + 1) · V`` is unspecified.
    """
    # Entries are counted by row, so no two sequences may share one, whatever the edges hold.
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
    # Row r has the key 2 r + 1. The key of an entry that is left out lies behind its sequence and before the next one,
    # so that keys ascend over all sequences.
    key = torch.where(active, 2 * row + 1, 2 * ends)
    key, order = key.sort(dim=1, stable=True)
    wanted = 2 * torch.arange(rows, device=grad.device) + 1
    bounds = torch.stack([torch.searchsorted(key.view(-1), wanted, right=right) for right in (False, True)], dim=1)
    bounds = torch.where(bounds[:, :1] < bounds[:, 1:], bounds, 0)
    return bounds, order.to(torch.int32).view(-1), grad.gather(1, order).view(-1)


def sparsify(embeddings: Tensor, max_active_dims: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """``(crow [B + 1] int64, col [nnz] int64, values [nnz])`` of the non-zeros of each row.

    Args:
        embeddings: ``[B, V]`` floating point; any strides.
        max_active_dims: take only the non-zeros among each row's largest entries, at most this many; NaN is the
            largest, ties go to the lowest id. None: all.
    """
    if not compiled.serves(embeddings.device):
        return sparsify_in_pytorch(embeddings, max_active_dims)
    csrc = torch.ops.splade_kernels_csrc
    count = max(1, embeddings.shape[1] if max_active_dims is None else min(max_active_dims, embeddings.shape[1]))
    if embeddings.device.type == "cpu":
        result: tuple[Tensor, Tensor, Tensor] = csrc.sparsify(embeddings, count)
        return result
    counts, mask = csrc.active_mask(embeddings, count)
    crow = F.pad(counts.cumsum(0), (1, 0))
    return crow, *csrc.gather_active(embeddings, crow, mask, int(crow[-1]))


def sparsify_in_pytorch(embeddings: Tensor, max_active_dims: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sparsify` by PyTorch's operations."""
    kept = embeddings != 0
    if max_active_dims is not None and max_active_dims < embeddings.shape[1]:
        # topk leaves the choice among ties open, and on CUDA sorts a NaN with its sign bit set behind all numbers: the
        # smallest of what it took is found without its order.
        count = max_active_dims
        taken = embeddings.topk(count, dim=1, sorted=False).values
        smallest = taken.masked_fill(taken.isnan(), math.inf).amin(dim=1, keepdim=True)
        smallest.masked_fill_(taken.isnan().all(dim=1, keepdim=True), math.nan)
        above = (embeddings > smallest) | (embeddings.isnan() & ~smallest.isnan())
        tied = (embeddings == smallest) | (embeddings.isnan() & smallest.isnan())
        places = count - above.sum(dim=1, keepdim=True)
        kept &= above | (tied & (tied.cumsum(dim=1) <= places))
    rows, columns = kept.nonzero(as_tuple=True)
    # `columns` is a view of one tensor of all indices, and operators promise tensors of their own.
    return F.pad(kept.sum(dim=1).cumsum(0), (1, 0)), columns.clone(), embeddings[rows, columns]
