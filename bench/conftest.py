"""pytest-benchmark as a front end: ``pytest bench --benchmark-json=RESULT.json``.

pytest-benchmark times one callable after another, so that a drift of the machine would look like a difference between
variants. Here all variants of a case are measured together, in interleaved rounds, by :mod:`.harness.rows`; each test
then plays its own samples back to pytest-benchmark through its clock, ``replay.clock``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench import measure
from bench.harness import rows
from bench.harness.environment import describe
from bench.harness.rows import Job
from bench.inputs.cases import PRECISIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 2.0


class Replay:
    """A clock that is moved by measured samples."""

    now = 0.0

    def clock(self) -> float:
        return self.now

    def __call__(self, samples: Any) -> None:
        self.now += next(samples)


replay = Replay()
_measured: dict[tuple[str, ...], dict[str, Job]] = {}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["splade_kernels"] = describe()


def parameters(kind: str) -> list[tuple[str, str, str, Callable[[], list[Job]]]]:
    """``(case, precision, job, function)`` of everything a kind measures on this device."""
    found = []
    for precision in measure.default_precisions(DEVICE):
        names = measure.default_variants(kind)
        for name, subject in measure.plan(kind, measure.default_cases(kind, DEVICE), DEVICE):
            if measure.why_absent(subject):
                continue
            for job, make in measure.groups(kind, subject, PRECISIONS[precision], DEVICE, names).items():
                found.append((name, precision, job, make))
    return found


def report(benchmark: Any, case: str, precision: str, job: str, make: Callable[[], list[Job]], variant: str) -> None:
    """Measure the group once, then play back one variant's samples."""
    key = (case, precision, job)
    if key not in _measured:
        _measured.clear()  # tests of a group follow each other, so the inputs of the last one may go
        with PRECISIONS[precision].settings():
            made = make()
            rows.run(made, DEVICE, SECONDS)
        for one in made:
            one.steps, one.check = list, None
        _measured[key] = {one.row.variant: one for one in made}
    found = _measured[key][variant]
    benchmark.group = f"{case} {precision} {job}"
    benchmark.extra_info.update(asdict(found.row))
    if found.row.status != "measured":
        (pytest.fail if rows.is_wrong(found.row.status) else pytest.skip)(found.row.status)
    samples = iter(found.row.samples)
    benchmark.pedantic(replay, args=(samples,), rounds=found.row.rounds, iterations=1)
