"""The SPLADE head as one fused, differentiable operator, with its FLOPS regulariser and drop-ins."""

from __future__ import annotations

from . import csr, integrations, reference
from .backends import available_backends
from .functional import flops_loss, sparsify, splade_pool
from .memory import estimate
from .modules import FlopsLoss, SpladeHead

__version__ = "0.1.0"

__all__ = [
    "FlopsLoss",
    "SpladeHead",
    "available_backends",
    "csr",
    "estimate",
    "flops_loss",
    "integrations",
    "reference",
    "sparsify",
    "splade_pool",
]
