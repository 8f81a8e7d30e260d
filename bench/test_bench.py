"""Every case as a benchmark: the head's forward and backward, screening, FLOPS. See :mod:`bench.conftest`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.conftest import parameters, replay, report
from bench.harness.rows import Job
from bench.inputs.variants import HEADS, MATMULS, SCREENING
from bench.jobs.screening import FLOOR

Make = Callable[[], list[Job]]
pytestmark = pytest.mark.benchmark(timer=replay.clock, min_rounds=1)
_NAMES = {
    "head": [*HEADS, *MATMULS],
    "screening": [*SCREENING, FLOOR],
    "backward": ["ours", "training-forward"],
    "flops": ["stock", "ours"],
}


_INFERENCE_ALONE = (*MATMULS, "screened-first")


def _cases(kind: str) -> list[Any]:
    return [
        pytest.param(case, precision, job, make, variant, id=f"{case}-{precision}-{job}-{variant}")
        for case, precision, job, make in parameters(kind)
        for variant in _NAMES[kind]
        if job == "forward" or variant not in _INFERENCE_ALONE
    ]


_ARGUMENTS = ("case", "precision", "job", "make", "variant")


@pytest.mark.parametrize(_ARGUMENTS, _cases("head"))
def test_head(benchmark: Any, case: str, precision: str, job: str, make: Make, variant: str) -> None:
    report(benchmark, case, precision, job, make, variant)


@pytest.mark.parametrize(_ARGUMENTS, _cases("screening"))
def test_screening(benchmark: Any, case: str, precision: str, job: str, make: Make, variant: str) -> None:
    report(benchmark, case, precision, job, make, variant)


@pytest.mark.parametrize(_ARGUMENTS, _cases("backward"))
def test_backward(benchmark: Any, case: str, precision: str, job: str, make: Make, variant: str) -> None:
    report(benchmark, case, precision, job, make, variant)


@pytest.mark.parametrize(_ARGUMENTS, _cases("flops"))
def test_flops(benchmark: Any, case: str, precision: str, job: str, make: Make, variant: str) -> None:
    report(benchmark, case, precision, job, make, variant)
