"""int8 rows with a bound on what they leave out: the arithmetic that exact screening rests on in every backend.

``docs/screening.md`` derives the bound and the limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# int8 products of unsigned and signed rows, 127 · 255 · 65536, still fit int32.
MAX_HIDDEN_SIZE = 1 << 16
# Rows whose largest element is outside this range are not bounded: products of norms would leave float32.
TINY, HUGE = 2.0**-40, 2.0**40
UNIT = 2.0**-23
LEVELS = 127
# Units that are allowed beside one for each of the D terms: for the sums of squares, and for dots of such rows.
SUM_SLACK, DOT_SLACK = 64, 128


def quantise(rows: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int8 rows ``[n, D]`` and, each ``[n]`` float32, their scale, radius and norm (docs/screening.md)."""
    # In float64 where the rows are: a row that is zero only in float32 has dots above zero.
    largest = rows.to(torch.promote_types(rows.dtype, torch.float32)).abs().amax(dim=1)
    bounded = (largest >= TINY) & (largest <= HUGE)
    hostile = ~bounded & (largest != 0)
    largest = largest.to(torch.float32)
    exact = torch.where(bounded[:, None], rows.to(torch.float32), 0)
    scale = torch.where(bounded, largest / levels, 0)
    near = (exact * torch.where(bounded, levels / largest, 0)[:, None]).round_()
    radius, norm = radius_and_norm(exact, near * scale[:, None])
    # NaN: so are the bounds of all dots of such a row.
    return near.to(torch.int8), scale.masked_fill_(hostile, torch.nan), radius, norm


def radius_and_norm(exact: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """How far float32 rows are from what stands for them, the rounding of their dots included, and their norms."""
    size = exact.shape[1]
    rounded_up = 1 + (size + SUM_SLACK) * UNIT
    norm = exact.square().sum(dim=1).sqrt_() * rounded_up
    error = (exact - near).square_().sum(dim=1).sqrt_()
    return (error + norm * ((size + DOT_SLACK) * UNIT)) * rounded_up, norm
