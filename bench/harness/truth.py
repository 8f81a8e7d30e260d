"""What a head must return, in a wider dtype, and how far from it a result is.

The gradient of a maximum goes to one of the tokens whose dots nearly tie, and rounding decides to which. So gradients
are compared by sums that change by no more than the difference of the two dots when the other token wins:
``dc``, ``Σ_s dh[b, s]``, ``Σ_d dW[v, d] W[v, d]`` and ``Σ_sd dh[b, s, d] h[b, s, d]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.inputs.cases import PRECISIONS, Inputs, Precision

# Largest ‖found - truth‖ / ‖truth‖. float32: reorderings of sums. Half precision and TF32: 2^-8 (float16: 2^-11) a
# rounding, and entries near zero that are active on one side only.
BOUNDS = {"float32": 1e-3, "tf32": 2e-2, "bf16-autocast": 5e-2, "bf16": 5e-2, "fp16": 1e-2}
# Elements of one tile of logits.
TILE_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Truth:
    output: Tensor  # [B, V]
    grad_bias: Tensor  # [V]
    grad_hidden_sum: Tensor  # [B, D]
    grad_weight_dot: Tensor  # [V]
    grad_hidden_dot: Tensor  # [B]


def compute(inputs: Inputs, precision: Precision) -> Truth:
    """In float64 for float32 products, in IEEE float32 for coarser ones (float64 is very slow on consumer GPUs)."""
    wide = torch.float64 if precision.name == "float32" else torch.float32
    # The operands are rounded as the head rounds them; everything after that is wide.
    weight = inputs.weight.detach().to(precision.compute_dtype)
    batch, length, _ = inputs.hidden.shape
    dots = torch.empty_like(inputs.grad, dtype=wide)
    step = max(1, TILE_ELEMENTS // length)
    with PRECISIONS["float32"].settings(), torch.no_grad():
        for sequence in range(batch):
            rows = inputs.hidden[sequence, inputs.mask[sequence] != 0].to(weight.dtype).to(wide)
            for first in range(0, len(weight), step):
                columns = slice(first, first + step)
                dots[sequence, columns] = (rows @ weight[columns].to(wide).t()).amax(dim=0)
        output = (dots + inputs.bias.to(wide)).relu_().log1p_()
        slope = torch.where(output > 0, inputs.grad.to(wide) * torch.exp(-output), 0)
        moment = slope * dots
        return Truth(output, slope.sum(0), slope @ weight.to(wide), moment.sum(0), moment.sum(1))


def differences(truth: Truth, output: Tensor, gradients: tuple[Tensor, ...], inputs: Inputs) -> dict[str, float]:
    """Relative distance of everything a step returned, by name; without gradients of the output alone."""
    found = {"output": (output, truth.output)}
    if gradients:
        hidden, weight, bias = gradients
        wide = truth.output.dtype
        found |= {
            "grad_bias": (bias, truth.grad_bias),
            "grad_hidden_sum": (hidden.sum(dim=1, dtype=wide), truth.grad_hidden_sum),
            "grad_hidden_dot": (_dot(hidden, inputs.hidden, wide), truth.grad_hidden_dot),
            "grad_weight_dot": (_dot(weight, inputs.weight, wide), truth.grad_weight_dot),
        }
    return {name: relative_distance(value, exact) for name, (value, exact) in found.items()}


def relative_distance(found: Tensor, exact: Tensor) -> float:
    """``‖found - exact‖ / ‖exact‖``; not finite when anything found is not."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def band(inputs: Inputs, precision: Precision) -> Tensor:
    """``[B, V]`` how far two summation orders of the same products may put an output: :func:`band_of` the longest real
    token of each sequence. The activation shrinks distances."""
    norms = inputs.hidden.detach().to(precision.compute_dtype).double().norm(dim=2)
    longest = norms.masked_fill_(inputs.mask == 0, 0).amax(dim=1, keepdim=True)
    return band_of(longest, inputs.weight.detach(), precision)


def band_of(longest: Tensor, weight: Tensor, precision: Precision) -> Tensor:
    """``4 · 2^-24 · √D ‖h‖ ‖w‖`` ``[..., V]`` for tokens of at most the norm ``longest [..., 1]``; in TF32 plus the
    rounding of the products."""
    unit = 4 * 2**-24 * weight.shape[1] ** 0.5 + (2**-9 if precision.tf32 else 0)
    allowed: Tensor = unit * longest * weight.to(precision.compute_dtype).double().norm(dim=1)
    return allowed


def in_bands(found: Tensor, other: Tensor, allowed: Tensor, precision: Precision) -> float:
    """The largest ``|found - other|`` in multiples of what :func:`band` and the rounding of an output allow. One active
    pair that is lost shows here; a norm over all entries would hide it."""
    coarsest = max(torch.finfo(precision.compute_dtype).eps, torch.finfo(precision.out_dtype).eps)
    found, other = found.double(), other.double()
    # A weight row of zeros (the padding entry of a tied decoder) allows no difference and has none.
    limit = (allowed + 2 * coarsest * torch.maximum(found, other)).clamp_min_(torch.finfo(torch.float64).tiny)
    return float(((found - other).abs() / limit).amax())


def backward(output: Tensor, argmax: Tensor, grad: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dW, dc for a given argmax, in float32 products and float64 sums, a sequence at a time."""
    wide = torch.float64
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    slope = torch.where(output > 0, grad.to(wide) * torch.exp(-output.to(wide)), 0)
    grad_hidden = torch.zeros_like(hidden, dtype=wide)
    grad_weight = torch.zeros_like(weight, dtype=wide)
    for sequence, values in enumerate(slope):
        entries = values.nonzero().squeeze(1)
        rows, share = argmax[sequence, entries].long(), values[entries, None]
        grad_hidden[sequence].index_add_(0, rows, share * weight[entries])
        grad_weight[entries] += share * hidden[sequence, rows]
    return grad_hidden, grad_weight, slope.sum(0)


def _dot(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """Sum of products over all but the first dimension, in slices of it."""
    step = max(1, TILE_ELEMENTS // max(1, left[0].numel()))
    parts = [
        (a.to(wide) * b.detach().to(wide)).flatten(1).sum(1)
        for a, b in zip(left.split(step), right.split(step), strict=True)
    ]
    return torch.cat(parts)
