"""int8 rows with a certified bound on their error: the arithmetic of exact screening in every backend.

``docs/screening.md`` derives the bound and the limits. ``csrc/cpu/screening.h`` mirrors the constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Products of unsigned and signed int8 rows of this size, 127 · 255 · 65536, still fit int32.
MAX_HIDDEN_SIZE = 1 << 16
# Rows whose largest element is outside this range have no bound: products of their norms would leave float32.
TINY, HUGE = 2.0**-40, 2.0**40
LEVELS = 127
# Relative rounding errors for rows of D elements, in units of 2^-23: D + NORM_SLACK of a computed norm; D + DOT_SLACK
# of a dot and its bound, relative to the product of the norms.
UNIT = 2.0**-23
NORM_SLACK, DOT_SLACK = 64, 128


def quantise(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int8 rows ``[n, D]`` and, each ``[n]`` float32, their scale, radius and norm (docs/screening.md)."""
    # The maximum is taken in float64 where the rows are: a row that is zero only in float32 has dots above zero.
    largest = rows.to(torch.promote_types(rows.dtype, torch.float32)).abs().amax(dim=1)
    bounded = (largest >= TINY) & (largest <= HUGE)
    hostile = ~bounded & (largest != 0)
    largest = largest.to(torch.float32)
    exact = torch.where(bounded[:, None], rows.to(torch.float32), 0)
    scale = torch.where(bounded, largest / LEVELS, 0)
    near = (exact * torch.where(bounded, LEVELS / largest, 0)[:, None]).round_()
    radius, norm = radius_and_norm(exact, near * scale[:, None])
    # A scale of NaN makes the bounds of all dots of such a row NaN.
    return near.to(torch.int8), scale.masked_fill_(hostile, torch.nan), radius, norm


def radius_and_norm(exact: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of float32 rows from their approximation, with the rounding of their dots, and their norms."""
    size = exact.shape[1]
    norm = exact.square().sum(dim=1).sqrt_() * (1 + (size + NORM_SLACK) * UNIT)
    error = (exact - near).square_().sum(dim=1).sqrt_()
    return (error + norm * ((size + DOT_SLACK) * UNIT)) * (1 + (size + NORM_SLACK) * UNIT), norm
