"""The torch backend: vocabulary-tiled PyTorch. A CPU's fast path, and the path of every device without Triton.

On a CPU the real tokens are packed (:mod:`.packed`). Other devices cannot pack without a host sync; :mod:`.unpacked`
reduces their tiles over segments instead. The backward of the maximum is shared (:mod:`.backward`). Accumulation is
float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..pooling import Gradients, Pooling, PoolingCall
from . import packed, unpacked
from .backward import max_pool_backward

__all__ = ["POOLINGS", "flops_sums"]


def _max_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if dispatch.on_host(hidden):
        return packed.max_pool_forward(call, hidden, weight, bias)
    if call.screening == "on":
        raise RuntimeError(
            f"screening: the torch backend screens on a CPU only, and hidden_states is on {hidden.device}"
        )
    return unpacked.max_pool_forward(call, hidden, weight, bias)


def _sum_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    forward = packed.sum_pool_forward if dispatch.on_host(hidden) else unpacked.sum_pool_forward
    return forward(call, hidden, weight, bias)


def _sum_pool_backward(
    call: PoolingCall, grad: Tensor, output: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Gradients:
    backward = packed.sum_pool_backward if dispatch.on_host(hidden) else unpacked.sum_pool_backward
    return backward(call, grad, output, argmax, hidden, weight, bias)


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
