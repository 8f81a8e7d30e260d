"""Calls that screening is tested with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import splade_kernels as sk
from splade_kernels.backends import compiled
from splade_kernels.backends.tiled import screening
from tests.oracle import Case, make_case


def need_compiled() -> None:
    """Skips a test of the compiled kernels where there are none."""
    if not compiled.serves(torch.device("cpu")):
        pytest.skip(f"csrc: {compiled.why_not()}")
    capability = torch.backends.cpu.get_cpu_capability()
    known = [screening.INSTRUCTION_SETS[name] for name in screening._names()]
    if not any(capability.startswith(instruction_set.allowed_by) for instruction_set in known):
        pytest.skip(f"no kernels for this CPU, or for what ATEN_CPU_CAPABILITY allows of it ({capability})")


def pool(case: Case, screen: str | bool, **options: str) -> Tensor:
    return sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, screening=screen, backend="torch", **options)


def tail(case: Case) -> tuple[Tensor | None, Tensor, Tensor]:
    return case.bias, case.mask, case.grad


def sparse_case(shape: tuple[int, int, int, int] = (8, 60, 96, 700)) -> Case:
    case = make_case(shape, pattern="full")
    with torch.no_grad():
        case.bias.fill_(-3)
    return case


def hopeless_case() -> Case:
    """Tokens so alike that int8 cannot tell them apart: every dot would be computed."""
    case = make_case((8, 60, 96, 700), pattern="full")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        case.hidden[:] = case.hidden[:, :1] + 1e-4 * torch.randn(case.hidden.shape, generator=generator)
        case.bias.fill_(3)
    return case


def logits_and_band(case: Case) -> tuple[Tensor, Tensor]:
    """``[B, V]`` largest logit in float64, and how far two float32 sums of the same products can be from it."""
    hidden, weight = case.hidden.detach().double(), case.weight.detach().double()
    dots = hidden @ weight.t()
    norms = hidden.norm(dim=2)[:, :, None] * weight.norm(dim=1)
    real = (case.mask != 0)[:, :, None]
    largest = dots.masked_fill(~real, -torch.inf).amax(dim=1)
    band = 2.0**-24 * hidden.shape[2] * norms.masked_fill(~real, 0).amax(dim=1) + 2.0**-126
    return largest + (0 if case.bias is None else case.bias.detach().double()), band


def assert_within_band(output: Tensor, case: Case, name: object = None) -> None:
    """Whichever way the dots were summed: no active pair is lost, none is made up, and the values are exact."""
    output = output.detach().double()
    logit, band = logits_and_band(case)
    logit = torch.where((case.mask != 0).any(dim=1)[:, None], logit, -torch.inf)
    assert ((output > 0) | (logit <= band)).all(), name
    assert ((output == 0) | (logit >= -band)).all(), name
    exact = logit.clamp_min(0).log1p()
    bias = 0 if case.bias is None else case.bias.detach().abs()
    rounding = 2.0**-22 * (exact + bias + 2.0**-20)
    assert ((output - exact).abs() <= band + rounding).all(), name
