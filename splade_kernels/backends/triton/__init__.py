"""Triton kernels: the fast path of a GPU, run by every test through Triton's interpreter.

What is not here serves from the torch backend: float64 (see :func:`splade_kernels.backends.select`).
"""

from __future__ import annotations

from ..pooling import Pooling
from .flops import flops_sums
from .max_backward import max_pool_backward
from .max_forward import max_pool_forward
from .sum_pool import sum_pool_backward, sum_pool_forward

__all__ = ["POOLINGS", "flops_sums"]

POOLINGS = {"max": Pooling(max_pool_forward, max_pool_backward), "sum": Pooling(sum_pool_forward, sum_pool_backward)}
