"""Rows of a result, and how a group of jobs becomes rows: checked first, then timed in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench.harness import memory, timing
from bench.harness.result_file import reason
from bench.harness.steps import Step, Tensors, Weigh, unweighed


@dataclass
class Row:
    """One variant of one case in one precision. Times in seconds, memory in bytes."""

    case: str
    shape: str
    precision: str
    job: str
    variant: str
    # "measured", "out of memory", "red: …" (wrong, so not timed), "failed: …" or "not here: …".
    status: str = "measured"
    scaled_from: str | None = None
    median: float | None = None
    rounds: int = 0
    # Seconds a step, one for each round; ratios are made of them.
    samples: list[float] = field(default_factory=list)
    clock: str | None = None
    # Processors that other programs kept busy meanwhile.
    others: float | None = None
    extra_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    repeatable: bool | None = None
    operations: int | None = None
    bytes: int | None = None
    real_tokens: int | None = None
    active_share: float | None = None
    # Share of the (real token, vocabulary entry) pairs whose dot was computed exactly.
    survivors: float | None = None
    # Texts that one step encodes.
    texts: int | None = None
    # What the model of short sequences says that the job takes (:mod:`bench.jobs.short_sequences`).
    predicted_forwards: float | None = None


@dataclass
class Job:
    """One variant to check and time: a step for each set of inputs."""

    row: Row
    steps: Callable[[], Sequence[Step]]
    # Relative distances, by name, of what a step returned; None for floors, which return nothing to check.
    check: Callable[[Tensors], dict[str, float]] | None = None
    bound: float = 0.0
    # Whether two runs have to agree bit for bit.
    strict: bool = False
    weigh: Weigh = unweighed
    # Bounds of single names where ``bound`` is not theirs.
    bounds: dict[str, float] = field(default_factory=dict)
    # Whether a short step may be timed as a CUDA graph.
    captured: bool = True


def run(jobs: Sequence[Job], device: torch.device, seconds: float) -> list[Row]:
    """Check all, time those that passed, and return every row."""
    samplers: dict[tuple[str, str], timing.Sampler] = {}
    for job in jobs:
        if job.row.status != "measured":
            continue
        try:
            steps = job.steps()
            job.row.status = _verdict(job, steps[0])
            if job.row.status == "measured":
                job.row.extra_bytes = job.weigh(steps[0])
                samplers[job.row.precision, job.row.variant] = timing.Sampler(steps, device, job.captured)
        except Exception as error:  # a rival that fails must not take the others with it
            job.row.status = reason(error)
        if job.row.status != "measured":
            memory.release()  # not in the handler, where the traceback still holds the tensors
    timed = timing.interleave(samplers, seconds)
    for job in jobs:
        result = timed.get((job.row.precision, job.row.variant))
        if result is not None:
            job.row.median, job.row.rounds, job.row.samples = result.median, len(result.samples), result.samples
            job.row.clock, job.row.others = result.clock, result.others
    return [job.row for job in jobs]


def _verdict(job: Job, step: Step) -> str:
    if job.check is None:
        step()
        return "measured"
    first = step()
    job.row.errors = job.check(first)
    second = step()
    job.row.repeatable = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    wrong = {name: error for name, error in job.row.errors.items() if not error <= job.bounds.get(name, job.bound)}
    if wrong:
        allowed = {name: job.bounds[name] for name in wrong if name in job.bounds}
        return f"red: beyond {allowed or job.bound}: {wrong}"
    if job.strict and not job.row.repeatable:
        return "red: two runs differ"
    return "measured"
