"""Calls that screening is tested with."""

from __future__ import annotations

import torch
from torch import Tensor

import splade_kernels as sk
from tests.oracle import Case, make_case

COMPILED = sk.available_backends()["csrc"] == "available" and torch.cpu._is_avx2_supported()
NOT_COMPILED = "the compiled operators were not built, or this CPU has no AVX2"


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
