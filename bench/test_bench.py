"""Every case as a benchmark: the head's forward and backward, screening, FLOPS. See :mod:`bench.conftest`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.conftest import parameters, replay, report
from bench.harness.rows import Job
from bench.inputs.variants import HEADS, MATMULS, SCREENING
from bench.jobs.screening import FLOOR

pytestmark = pytest.mark.benchmark(timer=replay.clock, min_rounds=1)
_NAMES = {
    "head": [*HEADS, *MATMULS],
    "screening": [*SCREENING, FLOOR],
    "backward": ["ours", "training-forward"],
    "flops": ["stock", "ours"],
}
_INFERENCE_ALONE = (*MATMULS, "screened-first")
_CASES = [
    pytest.param(case, precision, job, make, variant, id=f"{kind}-{case}-{precision}-{job}-{variant}")
    for kind, names in _NAMES.items()
    for case, precision, job, make in parameters(kind)
    for variant in names
    if job == "forward" or variant not in _INFERENCE_ALONE
]


@pytest.mark.parametrize(("case", "precision", "job", "make", "variant"), _CASES)
def test_case(benchmark: Any, case: str, precision: str, job: str, make: Callable[[], list[Job]], variant: str) -> None:
    report(benchmark, case, precision, job, make, variant)
