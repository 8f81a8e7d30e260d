"""Ratios of interleaved rounds: what is called a gain, and what is not."""

from __future__ import annotations

import pytest

from bench import report
from bench.tables import ratios

STEADY = {"median": 1.0, "spread": (1.0, 4.0), "samples": [1.0, 4.0, 1.0, 2.0, 1.0]}


def scaled(*factors: float) -> dict[str, object]:
    """Times beside those of :data:`STEADY`, so that their ratios are the factors."""
    samples = [factor * base for factor, base in zip(factors, STEADY["samples"], strict=True)]
    return {"median": sorted(samples)[2], "spread": (min(samples), max(samples)), "samples": samples}


def test_a_ratio_is_the_median_of_the_rounds_own_and_not_that_of_the_medians():
    """Every second round meets a slow machine: the spreads overlap, the rounds agree."""
    slower = scaled(2.0, 2.2, 2.4, 2.1, 2.3)
    assert ratios.ratio(slower, STEADY) == pytest.approx((2.2, 2.1, 2.3))
    assert ratios.against(slower, STEADY, "x the time") == "2.20x the time (2.10 to 2.30)"
    assert ratios.speedup(slower, STEADY) == "2.2x faster (2.1 to 2.3)"
    assert ratios.speedup(STEADY, slower) == "2.2x slower (2.1 to 2.3)"


def test_quartiles_on_both_sides_of_one_are_no_gain():
    noisy = scaled(0.8, 1.3, 0.9, 1.4, 1.2)
    assert noisy["median"] / STEADY["median"] == pytest.approx(1.2)
    assert ratios.speedup(noisy, STEADY) == ratios.against(noisy, STEADY) == "≈ 1 (0.90 to 1.30)"
    assert ratios.speedup(STEADY, noisy).startswith("≈ 1 (0.77 to 1.11")


def test_what_has_no_time_has_no_ratio():
    for one in (None, STEADY | {"median": None, "samples": []}):
        assert ratios.speedup(one, STEADY) == ratios.against(STEADY, one) == "-"


def test_both_batches_of_a_step_are_added_round_by_round():
    rows = [STEADY | {"status": "measured", "operations": 1, "bytes": 1, "extra_bytes": 5}] * 2
    rows[1] = rows[1] | {"samples": [1.0, 1.0, 3.0]}
    assert report._sum(rows)["samples"] == [2.0, 5.0, 4.0]
