"""Triton kernels: the fast path of a GPU, run by every test through Triton's interpreter.

What is not here serves from the torch backend: float64 (see :func:`splade_kernels.backends.select`).
"""

from __future__ import annotations

from torch import Tensor

from ..pooling import PoolingCall
from .flops import flops_sums
from .max_backward import max_pool_backward
from .max_forward import max_pool_forward
from .sum_pool import sum_pool_backward, sum_pool_forward

__all__ = ["flops_sums", "max_pool_backward", "pool_forward", "sum_pool_backward"]


def pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(y [B, V], argmax [B, V])``; the argmax is a position in the sequence, and empty unless the call needs it."""
    forward = max_pool_forward if call.pooling_strategy == "max" else sum_pool_forward
    return forward(call, hidden, weight, bias)
