"""The definition of every operation of this package in plain dense PyTorch, which the tests compare with.

Everything is materialised, on any device and in any dtype. float16 and bfloat16 inputs are computed in float32 and
rounded once, at the end.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["flops_loss", "sparsify", "splade_pool"]


def splade_pool(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    pooling_strategy: str = "max",
    activation_function: str = "relu",
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Dense SPLADE head (Formal et al. 2021, arXiv:2109.10086): logits, activation, masked pooling over tokens.

    ``y[b, v] = max_s act(h[b, s] · W[v] + c[v])`` over the real tokens ``s`` (``"sum"``: the sum), with
    ``act = log1p ∘ relu`` or ``log1p ∘ log1p ∘ relu``. The maximum's gradient goes to the lowest position that attains
    it. A sequence without a real token is a row of zeros. ``logit_scale`` and ``logit_softcap`` change a logit x before
    ``act``: ``z = logit_scale · x``, then ``z = logit_softcap · tanh(z / logit_softcap)``.

    Args:
        hidden_states, weight, bias, attention_mask, cu_seqlens, pooling_strategy, activation_function, logit_scale,
            logit_softcap: as in :func:`splade_kernels.splade_pool`.
        max_seqlen: accepted for symmetry with it; not needed here.

    Returns:
        ``[B, V]`` in the dtype of ``hidden_states``.
    """
    _check_positive("logit_scale", logit_scale, "a number")
    if logit_softcap is not None:
        _check_positive("logit_softcap", logit_softcap, "a number or None")
    if cu_seqlens is not None:
        hidden_states, attention_mask = _pad(hidden_states.reshape(-1, hidden_states.shape[-1]), cu_seqlens)
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    # One more padding token, so that there is something to reduce over when S = 0.
    hidden_states = F.pad(hidden_states, (0, 0, 0, 1))
    real = F.pad(attention_mask != 0, (0, 1))

    options = activation_function, logit_scale, logit_softcap
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    dots = torch.where(real.unsqueeze(-1), hidden_states, 0).to(dtype) @ weight.to(dtype).mT
    if pooling_strategy == "max":
        values = _activate(_first_maximum(dots, real.unsqueeze(-1)), bias, *options)
        values = torch.where(real.any(dim=1, keepdim=True), values, 0)
    elif pooling_strategy == "sum":
        values = torch.where(real.unsqueeze(-1), _activate(dots, bias, *options), 0).sum(dim=1)
    else:
        raise ValueError(f"pooling_strategy: expected 'max' or 'sum', got {pooling_strategy!r}")
    return values.to(hidden_states.dtype)


def flops_loss(embeddings: Tensor, *, threshold: float | None = None) -> Tensor:
    """FLOPS regulariser (Paria et al. 2020, arXiv:2004.05665): ``Σ_v (mean_b y[b, v])²``, in at least float32.

    With ``threshold``, rows with at most that many non-zeros are zeroed first (arXiv:2504.14839); the mean is still
    over all rows.
    """
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    if threshold is not None:
        kept = (embeddings != 0).sum(dim=1, keepdim=True) > threshold
        embeddings = torch.where(kept, embeddings, 0)
    return embeddings.mean(dim=0).square().sum()


def sparsify(embeddings: Tensor, *, max_active_dims: int | None = None) -> Tensor:
    """Dense ``[B, V]`` to sparse CSR of exact size; optionally only the ``max_active_dims`` largest of each row.

    Ties go to the lowest vocabulary id; ids ascend within a row; NaN counts as the largest value.
    """
    if max_active_dims is not None and max_active_dims < embeddings.shape[1]:
        order = torch.sort(embeddings, dim=1, descending=True, stable=True).indices
        keep = torch.zeros_like(embeddings, dtype=torch.bool).scatter_(1, order[:, :max_active_dims], True)
        embeddings = torch.where(keep, embeddings, 0)
    return embeddings.to_sparse_csr()


def _check_positive(name: str, value: Any, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def _pad(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed ``[T, D]`` to padded ``[B, S, D]`` and its mask."""
    sequences = packed.split(cu_seqlens.diff().tolist())
    if not sequences:
        return packed.reshape(0, 0, packed.shape[-1]), packed.new_zeros(0, 0, dtype=torch.bool)
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=packed.device) < cu_seqlens.diff()[:, None]


def _first_maximum(dots: Tensor, real: Tensor) -> Tensor:
    """Maximum of ``[B, S, V]`` over real tokens; NaN is the largest; the gradient goes to its first occurrence."""
    dots = torch.where(real, dots, -torch.inf)
    largest = dots.detach().amax(dim=1, keepdim=True)
    attains = real & ((dots == largest) | (dots.isnan() & largest.isnan()))
    length = dots.shape[1]
    positions = torch.arange(length, device=dots.device).view(1, length, 1)
    first = torch.where(attains, positions, length - 1).amin(dim=1, keepdim=True)
    return dots.gather(1, first).squeeze(1)


def _activate(
    dots: Tensor,
    bias: Tensor | None,
    activation_function: str,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    logits = dots if bias is None else dots + bias.to(dots.dtype)
    if logit_scale != 1:
        logits = logit_scale * logits
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    if activation_function == "relu":
        return logits.relu().log1p()
    if activation_function == "log1p_relu":
        return logits.relu().log1p().log1p()
    raise ValueError(f"activation_function: expected 'relu' or 'log1p_relu', got {activation_function!r}")
