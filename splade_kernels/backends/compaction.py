"""Active entries in the order of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def bucket_by_token(argmax: Tensor, grad: Tensor, edges: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Active entries by row: ``bounds [rows, 2]``, ``words [n · V]`` int32, ``values [n · V]``.

    Row r has the entries ``bounds[r, 0] <= e < bounds[r, 1]``, vocabulary ids ascending.
    """
    vocab_size = grad.shape[1]
    edges = edges.to(torch.int64)
    position = argmax.to(torch.int64)
    row = position + (edges[:-1] - edges[0])[:, None]
    active = (grad != 0) & (position >= 0) & (position < edges.diff()[:, None]) & (row < rows)
    keys = torch.where(active, row, rows).flatten()
    keys, order = torch.sort(keys, stable=True)
    offsets = torch.searchsorted(keys, torch.arange(rows + 1, device=keys.device))
    bounds = torch.stack([offsets[:-1], offsets[1:]], dim=1).to(torch.int32)
    return bounds, order.remainder(vocab_size).to(torch.int32), grad.flatten()[order]
