"""Calls of the maximum forward on Triton with screening, and what has to hold for their results."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import splade_kernels as sk
from tests import oracle
from tests.oracle import Case, make_case

REASON = sk.available_backends()["triton"]
if REASON == "available":
    from splade_kernels.backends.triton import max_forward as forward


def sparse_case(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """About one in fifty pairs (group, vocabulary entry) is active."""
    case = make_case(shape, dtype, **options)
    with torch.no_grad():
        if case.bias is None:
            case.weight -= 3.0 * case.weight.abs().mean()
            case.hidden += 0.4
        else:
            case.bias.mul_(0.1).sub_(3.0)
    return case


def run(
    case: Case, mode: str, need_argmax: bool = True, tiles: dict[str, Any] | None = None, **changes: Any
) -> tuple[Tensor, Tensor]:
    """``tiles``: configurations of the kernels, by default those of the package."""
    batch, length, _ = case.hidden.shape
    call = oracle.new_call(
        batch_size=batch,
        attention_mask=case.mask,
        max_seqlen=length,
        compute_dtype=case.hidden.dtype,
        out_dtype=case.hidden.dtype,
        screening=mode,
        need_argmax=need_argmax,
    )
    bias = None if case.bias is None else case.bias.detach()
    hidden = changes.pop("hidden", case.hidden.detach().flatten(0, 1))
    return forward.max_pool_forward(replace(call, **changes), hidden, case.weight.detach(), bias, **tiles or {})


def logits(case: Case) -> Tensor:
    """``[B, S, V]`` in float64, -inf where there is no real token."""
    bias = 0 if case.bias is None else case.bias.detach().double()
    dots = case.hidden.detach().double() @ case.weight.detach().double().t()
    return torch.where(case.mask[..., None], dots + bias, -torch.inf)


def check(case: Case, output: Tensor, argmax: Tensor | None = None) -> None:
    """Values, support and argmax within the band of two float32 orders of summation."""
    exact_logits = logits(case)
    norms = case.hidden.detach().double().norm(dim=-1).amax(dim=1)[:, None] * case.weight.detach().double().norm(dim=-1)
    band = 4 * 2.0**-24 * math.sqrt(case.hidden.shape[2]) * norms
    expected = exact_logits.amax(dim=1)
    sure = expected.abs() > band
    assert torch.equal((output > 0)[sure], (expected > 0)[sure])
    values = expected.relu().log1p()
    assert oracle.rounded_once(output, values, oracle.float32_allowance(case, values))
    if argmax is not None:
        attained = exact_logits.gather(1, argmax.long()[:, None])[:, 0]
        active = output > 0
        assert bool(((expected - attained)[active] <= 2 * band[active]).all())
        assert not argmax[~active].any()
