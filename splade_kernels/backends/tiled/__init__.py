"""The torch backend: vocabulary-tiled PyTorch, for CPUs and for every device without Triton.

On a CPU the real tokens are packed (:mod:`.packed`). Other devices cannot pack without a host sync, so their tiles
cover all rows and are reduced over segments (:mod:`.unpacked`). Both share the backward of the maximum
(:mod:`.backward`).
Accumulation is float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..pooling import Gradients, Pooling, PoolingCall
from . import packed, unpacked
from .backward import max_pool_backward

__all__ = ["POOLINGS", "flops_sums"]


def _max_pool_forward(call: PoolingCall, hidden: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    forward = packed.max_pool_forward if dispatch.on_host(hidden) else unpacked.max_pool_forward
    return forward(call, hidden, *parameters)


def _sum_pool_forward(call: PoolingCall, hidden: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    forward = packed.sum_pool_forward if dispatch.on_host(hidden) else unpacked.sum_pool_forward
    return forward(call, hidden, *parameters)


def _sum_pool_backward(call: PoolingCall, grad: Tensor, *inputs: Any) -> Gradients:
    backward = packed.sum_pool_backward if dispatch.on_host(grad) else unpacked.sum_pool_backward
    return backward(call, grad, *inputs)


POOLINGS = {
    "max": Pooling(_max_pool_forward, max_pool_backward),
    "sum": Pooling(_sum_pool_forward, _sum_pool_backward),
}


def flops_sums(embeddings: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """``[V]`` sums over the kept rows in at least float32, and ``[B]`` which rows were kept (empty: all)."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    if threshold is None:
        return embeddings.sum(dim=0, dtype=dtype), embeddings.new_empty(0, dtype=torch.bool)
    kept = (embeddings != 0).sum(dim=1) > threshold
    return torch.where(kept[:, None], embeddings, 0).sum(dim=0, dtype=dtype), kept
