"""Every case as a benchmark: the head's forward and backward, screening, FLOPS.

    pytest bench --benchmark-json=RESULT.json

pytest-benchmark times one callable after another, so that a drift of the machine would look like a difference between
variants. Here all variants of a case are measured together, in interleaved rounds, by :mod:`.harness.rows`; each test
then plays its own samples back to pytest-benchmark through its clock, ``replay.clock``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench import measure
from bench.harness import rows
from bench.harness.environment import describe
from bench.harness.result_file import is_wrong
from bench.harness.rows import Job, Row
from bench.inputs import text_model
from bench.inputs.cases import PRECISIONS
from bench.inputs.variants import HEADS, MATMULS, SCREENING
from bench.jobs.screening import FLOOR

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 2.0
VARIANTS = {
    "head": [*HEADS, *MATMULS],
    "screening": [*SCREENING, FLOOR],
    "backward": ["ours", "training-forward"],
    "flops": ["stock", "ours"],
}
INFERENCE_ALONE = (*MATMULS, "screened-first")


class Replay:
    """A clock that is moved by measured samples."""

    now = 0.0

    def clock(self) -> float:
        return self.now

    def __call__(self, samples: Any) -> None:
        self.now += next(samples)


replay = Replay()
environment = functools.cache(describe)


def cases() -> Iterator[Any]:
    """Every variant of everything that is measured on this device."""
    for kind, names in VARIANTS.items():
        for precision in measure.default_precisions(kind, DEVICE):
            for case, subject in measure.plan(kind, measure.default_cases(kind, DEVICE), DEVICE):
                if text_model.why_absent(subject):
                    continue
                measured = kind, subject, PRECISIONS[precision], DEVICE, measure.default_variants(kind)
                for job, make in measure.groups(*measured).items():
                    for name in names:
                        if job == "forward" or name not in INFERENCE_ALONE:
                            yield pytest.param(make, precision, name, id=f"{kind}-{case}-{precision}-{job}-{name}")


@functools.lru_cache(maxsize=1)  # tests of a group follow each other
def measured(make: Callable[[], list[Job]], precision: str) -> dict[str, Row]:
    with PRECISIONS[precision].settings():
        return {row.variant: row for row in rows.run(make(), DEVICE, SECONDS)}


@pytest.mark.benchmark(timer=replay.clock, min_rounds=1)
@pytest.mark.parametrize(("make", "precision", "variant"), [*cases()])
def test_case(benchmark: Any, make: Callable[[], list[Job]], precision: str, variant: str) -> None:
    row = measured(make, precision)[variant]
    benchmark.group = f"{row.case} {row.shape} {precision} {row.job}"
    benchmark.extra_info.update(asdict(row), environment=environment())
    if row.status != "measured":
        (pytest.fail if is_wrong(row.status) else pytest.skip)(row.status)
    benchmark.pedantic(replay, args=(iter(row.samples),), rounds=row.rounds, iterations=1)
