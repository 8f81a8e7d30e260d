"""The compiled operators of ``csrc/``: the one place that loads them and knows which devices they serve.

They are optional, and nothing is loaded before the first question.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# What csrc/schema.cpp returns: a library built with another number has other operators or arguments.
SCHEMA_VERSION = 3
_PACKAGE = Path(__file__).parents[1]
_BUILD = "build it in a clone with `python setup.py build_ext --inplace`, or `pip install --no-build-isolation .`"


def why_not() -> str | None:
    """Why the compiled operators cannot serve every device of this machine; None if they can."""
    reason = _load("_csrc")
    if reason is None and torch.cuda.is_available():
        cuda_reason = _why_not_cuda(torch.cuda.current_device())
        return cuda_reason and f"CPU tensors only: {cuda_reason}"
    return reason


def serves(device: torch.device) -> bool:
    """Whether tensors on ``device`` are served by the compiled operators."""
    if device.type not in ("cpu", "cuda") or _load("_csrc") is not None:
        return False
    if device.type == "cpu":
        return True
    return _why_not_cuda(torch.cuda.current_device() if device.index is None else device.index) is None


@functools.cache
def _why_not_cuda(index: int) -> str | None:
    """Why the CUDA library cannot serve a GPU: not built, or not for its architecture, which only a launch shows."""
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    reason = _load(f"_csrc_cuda{torch.version.cuda.split('.')[0]}")
    if reason is None:
        try:
            torch.ops.splade_kernels_csrc.active_mask(torch.zeros(1, 1, device=f"cuda:{index}"), 1)
        except RuntimeError as error:
            return f"the compiled CUDA operators do not run on {torch.cuda.get_device_name(index)}: {error}"
    return reason


@functools.cache
def _load(name: str) -> str | None:
    """Load one of the shared libraries, once; why it cannot be."""
    path = _PACKAGE / f"{name}.so"
    if not path.exists():
        return f"{path.name} was not built; {_BUILD}"
    try:
        torch.ops.load_library(path)
        if name == "_csrc":
            csrc = torch.ops.splade_kernels_csrc
            if not hasattr(csrc, "schema_version") or csrc.schema_version() != SCHEMA_VERSION:
                return f"{path.name} is of another version; {_BUILD}"
            _register_fakes()
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load: {error}"
    return None


def _register_fakes() -> None:
    def bucket_by_token(argmax: Tensor, grad: Tensor, edges: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        entries = grad.shape[0] * grad.shape[1]
        words = grad.new_empty(entries, dtype=torch.int32)
        return grad.new_empty((rows, 2), dtype=torch.int64), words, grad.new_empty(entries)

    def max_pool_gradients(
        gradient: Tensor, argmax: Tensor, edges: Tensor, hidden: Tensor, weight: Tensor, *need: bool
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = need
        grad_hidden = hidden.new_empty((hidden.shape[0] if need_hidden else 0, hidden.shape[1]))
        return grad_hidden, weight.new_empty((weight.shape[0] if need_weight else 0, weight.shape[1]))

    def active_mask(embeddings: Tensor, count: int) -> tuple[Tensor, Tensor]:
        rows, columns = embeddings.shape
        mask = embeddings.new_empty((rows, (columns + 31) // 32), dtype=torch.int32)
        return embeddings.new_empty(rows, dtype=torch.int64), mask

    def gather_active(embeddings: Tensor, crow: Tensor, mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        return embeddings.new_empty(capacity, dtype=torch.int64), embeddings.new_empty(capacity)

    for fake in (bucket_by_token, max_pool_gradients, sparsify_fake, active_mask, gather_active):
        torch.library.register_fake(f"splade_kernels_csrc::{fake.__name__.removesuffix('_fake')}", fake)


def sparsify_fake(embeddings: Tensor, count: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the compiled ``sparsify``, and of the operator that calls it: the number of non-zeros is in the data."""
    nonzeros = torch.library.get_ctx().new_dynamic_size()
    crow = embeddings.new_empty(embeddings.shape[0] + 1, dtype=torch.int64)
    return crow, embeddings.new_empty(nonzeros, dtype=torch.int64), embeddings.new_empty(nonzeros)
