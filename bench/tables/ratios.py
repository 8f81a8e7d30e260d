"""How many times as long one variant took as another, and whether the rounds agree on which of them was faster.

Variants are timed in interleaved rounds, so what slows down a round slows down both: every round has its own ratio.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

Row = dict[str, Any]
NOTE = (
    "Ratios are medians of the rounds' own ratios, their quartiles in brackets; ≈ 1 where those are on both sides of 1."
)


class Ratio(NamedTuple):
    middle: float
    low: float
    high: float

    @property
    def is_about_one(self) -> bool:
        return self.low <= 1 <= self.high


def ratio(top: Row | None, bottom: Row | None) -> Ratio | None:
    """Times of ``top`` over times of ``bottom``; None where one of them was not timed."""
    if not top or not bottom or not top.get("samples") or not bottom.get("samples"):
        return None
    rounds = [a / b for a, b in zip(top["samples"], bottom["samples"], strict=True)]
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Ratio(middle, low, high)


def against(top: Row | None, bottom: Row | None, unit: str = "x") -> str:
    """``top`` over ``bottom`` as a cell."""
    found = ratio(top, bottom)
    if found is None:
        return "-"
    return ("≈ 1" if found.is_about_one else f"{found.middle:.2f}{unit}") + f" ({found.low:.2f} to {found.high:.2f})"


def speedup(slow: Row | None, fast: Row | None) -> str:
    """How many times as fast ``fast`` is, as a cell."""
    found = ratio(slow, fast)
    if found is None:
        return "-"
    if found.is_about_one:
        return f"≈ 1 ({found.low:.2f} to {found.high:.2f})"
    if found.middle < 1:
        middle, high, low = (1 / value for value in found)
        return f"{middle:.1f}x slower ({low:.1f} to {high:.1f})"
    return f"{found.middle:.1f}x faster ({found.low:.1f} to {found.high:.1f})"
