"""The torch backend: vocabulary-tiled PyTorch. A CPU's fast path, and the path of every device without Triton.

On a CPU the real tokens are packed (:mod:`.packed`). Other devices cannot pack without a host sync; :mod:`.unpacked`
reduces their tiles over segments instead. The backward of the maximum is shared (:mod:`.backward`). Accumulation is
float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..pooling import PoolingCall
from . import packed, unpacked
from .backward import max_pool_backward

__all__ = ["flops_sums", "max_pool_backward", "pool_forward", "sum_pool_backward"]


def pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(y [B, V], argmax [B, V])``; the argmax is a position in the sequence, and empty unless the call needs it."""
    if not dispatch.on_host(hidden):
        if call.screening == "on":
            raise RuntimeError(
                f"screening: the torch backend screens on a CPU only, and hidden_states is on {hidden.device}"
            )
        return unpacked.pool_forward(call, hidden, weight, bias)
    forward = packed.max_pool_forward if call.pooling_strategy == "max" else packed.sum_pool_forward
    return forward(call, hidden, weight, bias)


def sum_pool_backward(
    call: PoolingCall, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward of the sum: recomputes the logits tile by tile and multiplies them out."""
    backward = packed.sum_pool_backward if dispatch.on_host(hidden) else unpacked.sum_pool_backward
    return backward(call, grad, hidden, weight, bias)


def flops_sums(embeddings: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """``[V]`` sums over the kept rows in at least float32, and ``[B]`` which rows were kept (empty: all)."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    if threshold is None:
        return embeddings.sum(dim=0, dtype=dtype), embeddings.new_empty(0, dtype=torch.bool)
    kept = (embeddings != 0).sum(dim=1) > threshold
    return torch.where(kept[:, None], embeddings, 0).sum(dim=0, dtype=dtype), kept
