"""Measure one kind of job on the device at hand and write a result file.

    python -m bench.measure head|backward|flops --output RESULT.json [--case dev ...] [--precision bf16 ...] [--budget 300]

Every variant is first checked against the truth and against a second run of itself: a red one is not timed. Then all
variants of a case are timed in interleaved rounds (:mod:`bench.timing`). Extra memory is the peak above inputs, outputs
and gradients. Running out of memory is a result. The file is rewritten after every case, so that what was measured
survives an end by timeout.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import splade_kernels as sk
from bench import cases as shapes
from bench import distributions, roofline, timing, truth, variants
from bench.cases import Case, Inputs, Precision
from bench.environment import describe
from bench.steps import Step, Tensors, cuda_extra_bytes, train_or_infer, unweighed, weigher

SCHEMA = 1
KINDS = ("head", "backward", "flops")
CURVES = "curves"


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
    spread: tuple[float, float] | None = None
    rounds: int = 0
    clock: str | None = None
    extra_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    repeatable: bool | None = None
    operations: int | None = None
    bytes: int | None = None
    real_tokens: int | None = None
    active_share: float | None = None


@dataclass
class Job:
    """One variant to check and time: a step for each set of inputs."""

    row: Row
    steps: Callable[[], Sequence[Step]]
    # Relative distances by name of what a step returned; None for floors, which return nothing to check.
    check: Callable[[Tensors], dict[str, float]] | None = None
    bound: float = 0.0
    # Whether two runs have to agree to the bit.
    strict: bool = False
    weigh: Callable[[Step], int | None] = unweighed


def run(jobs: Sequence[Job], device: torch.device, seconds: float) -> list[Row]:
    """Check all, time those that passed, and return every row."""
    samplers: dict[str, timing.Sampler] = {}
    for job in jobs:
        if job.row.status != "measured":
            continue
        try:
            steps = job.steps()
            job.row.status = _verdict(job, steps[0])
            if job.row.status == "measured":
                job.row.extra_bytes = job.weigh(steps[0])
                samplers[job.row.variant] = timing.Sampler(steps, device)
        except Exception as error:  # a rival that fails must not take the others with it
            job.row.status = _reason(error)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    timed = timing.interleave(samplers, seconds)
    for job in jobs:
        if job.row.variant in timed:
            result = timed[job.row.variant]
            job.row.median, job.row.spread = result.median, result.spread
            job.row.rounds, job.row.clock = len(result.samples), result.clock
    return [job.row for job in jobs]


def _verdict(job: Job, step: Step) -> str:
    if job.check is None:
        step()
        return "measured"
    first = step()
    job.row.errors = job.check(first)
    second = step()
    job.row.repeatable = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    wrong = {name: error for name, error in job.row.errors.items() if not error <= job.bound}
    if wrong:
        return f"red: beyond {job.bound}: {wrong}"
    if job.strict and not job.row.repeatable:
        return "red: two runs differ"
    return "measured"


def _reason(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def head(case: Case, precision: Precision, job: str, device: torch.device, names: Sequence[str]) -> list[Job]:
    """The variants of ``forward`` or ``forward_backward``."""
    training = job == "forward_backward"
    sets = _input_sets(case, precision, device)
    exact = truth.compute(sets[0], precision)
    real = variants.tokens(case, padded=False)
    active = int((exact.output > 0).sum())
    work = (
        roofline.forward_backward(case, precision, active, real)
        if training
        else roofline.forward(case, precision, real)
    )
    row = Row(case.name, case.shape, precision.name, job, "", scaled_from=case.scaled_from, real_tokens=real)
    row = replace(row, operations=work.operations, bytes=work.bytes, active_share=active / exact.output.numel())

    def check(found: Tensors) -> dict[str, float]:
        return truth.differences(exact, found[0], found[1:], sets[0])

    def steps(make: Callable[[bool], variants.Head]) -> list[Step]:
        function = make(training)
        return [train_or_infer(function, inputs, precision, training) for inputs in sets]

    jobs = []
    for name in names:
        reason = variants.why_not(name, device)
        # A floor's rows and their own dictionaries: replace() would share the dictionary.
        mine = replace(row, variant=name, errors={}, status=f"not here: {reason}" if reason else "measured")
        make = variants.VARIANTS[name].make
        weigh = weigher(case, precision, name, training, device)
        jobs.append(
            Job(mine, lambda make=make: steps(make), check, truth.BOUNDS[precision.name], name == "ours", weigh)
        )  # type: ignore[misc]
    for name in () if training else variants.MATMULS:

        def floor(name: str = name) -> list[Step]:
            products = [variants.matmul(name, inputs, precision) for inputs in sets]
            return [lambda product=product: (product(),) for product in products]  # type: ignore[misc]

        rows = variants.tokens(case, padded=name == "matmul-padded")
        jobs.append(Job(replace(row, variant=name, errors={}, real_tokens=rows), floor))
    return jobs


def backward(case: Case, precision: Precision, distribution: str, device: torch.device) -> list[Job]:
    """The backward operator alone on one distribution, beside the training forward of the same shape."""
    sets = _input_sets(case, precision, device)
    drawn = [distributions.draw(distribution, case, precision, device, seed) for seed in range(len(sets))]
    exact = truth.backward(*drawn[0], sets[0])
    real, active = variants.tokens(case, padded=False), int((drawn[0][0] > 0).sum())
    row = Row(case.name, case.shape, precision.name, f"backward-{distribution}", "ours", scaled_from=case.scaled_from)
    row = replace(row, real_tokens=real, active_share=active / drawn[0][0].numel())
    work, base = roofline.backward(case, precision, active, real), roofline.forward(case, precision, real)

    def operator(inputs: Inputs, output: Tensor, argmax: Tensor, grad: Tensor) -> Step:
        def gradients() -> Tensors:
            hidden, weight, bias = (leaf.detach() for leaf in inputs.leaves)
            found: Tensors = torch.ops.splade_kernels.pool_backward(
                grad=grad,
                output=output,
                argmax=argmax,
                hidden_states=hidden,
                weight=weight,
                bias=bias,
                attention_mask=inputs.mask,
                cu_seqlens=None,
                max_seqlen=case.length,
                pooling_strategy="max",
                activation_function="relu",
                compute_dtype=precision.compute_dtype,
                out_dtype=precision.out_dtype,
                backend="auto",
                need_hidden=True,
                need_weight=True,
                need_bias=True,
            )
            return found

        return gradients

    def forward(inputs: Inputs) -> Step:
        def training_forward() -> Tensors:
            with precision.forward(device):
                return (sk.splade_pool(*inputs.leaves, inputs.mask).detach(),)

        return training_forward

    def check(found: Tensors) -> dict[str, float]:
        names = ("grad_hidden", "grad_weight", "grad_bias")
        return {name: truth.relative_distance(*pair) for name, *pair in zip(names, found, exact, strict=True)}

    weigh = cuda_extra_bytes if device.type == "cuda" else unweighed
    mine = replace(row, operations=work.operations, bytes=work.bytes)
    beside = replace(row, variant="training-forward", errors={}, operations=base.operations, bytes=base.bytes)
    steps = [operator(inputs, *tensors) for inputs, tensors in zip(sets, drawn, strict=True)]
    bound = 1e-4 if precision.compute_dtype == torch.float32 else 1e-2
    return [
        Job(mine, lambda: steps, check, bound, True, weigh),
        Job(beside, lambda: [forward(inputs) for inputs in sets]),
    ]


def flops(rows: int, columns: int, precision: Precision, job: str, device: torch.device) -> list[Job]:
    """The regulariser, as sentence-transformers computes it and ours."""
    training = job == "forward_backward"
    dtype = precision.out_dtype
    count = timing.rotation(rows * columns * dtype.itemsize, device)
    tensors = [torch.rand(rows, columns, device=device).sub_(0.9).relu_().to(dtype) for _ in range(count)]
    mean = torch.cat([part.sum(0, dtype=torch.float64)[None] for part in tensors[0].split(64)]).sum(0) / rows
    exact = (mean.square().sum(), (2 / rows * mean).expand(rows, -1))
    work = roofline.flops(rows, columns, dtype.itemsize)
    row = Row("flops", f"B{rows} V{columns}", precision.name, job, "", operations=work.operations, bytes=work.bytes)

    def stock(embeddings: Tensor) -> Tensor:
        return torch.sum(torch.mean(embeddings, dim=0) ** 2)

    def make(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Step:
        leaf = tensor.requires_grad_(training)

        def one() -> Tensors:
            value = function(leaf)
            return (value.detach(), *torch.autograd.grad(value, leaf)) if training else (value,)

        return one

    def check(found: Tensors) -> dict[str, float]:
        errors = {"value": truth.relative_distance(found[0], exact[0])}
        return errors | ({"grad": truth.relative_distance(found[1][0], exact[1][0])} if training else {})

    weigh = cuda_extra_bytes if device.type == "cuda" else unweighed
    return [
        Job(
            replace(row, variant=name, errors={}),
            lambda function=function: [make(function, tensor) for tensor in tensors],  # type: ignore[misc]
            check,
            1e-5 if dtype == torch.float32 else 2e-2,
            name == "ours",
            weigh,
        )
        for name, function in (("stock", stock), ("ours", sk.flops_loss))
    ]


def _input_sets(case: Case, precision: Precision, device: torch.device) -> list[Inputs]:
    size = case.hidden_size * (case.batch_size * case.length + case.vocab_size) * precision.dtype.itemsize
    return [shapes.make_inputs(case, precision, device, seed) for seed in range(timing.rotation(size, device))]


def plan(kind: str, names: Sequence[str], device: torch.device) -> Iterator[tuple[str, Any]]:
    """``(name, case or arguments)`` of a kind on this device; scaled shapes that coincide are measured once."""
    if kind == "flops":
        limit = shapes.CPU_FLOPS_ELEMENTS if device.type == "cpu" else None
        for rows, columns in shapes.FLOPS_SHAPES:
            if limit is None or rows * columns <= limit:
                yield f"B{rows}-V{columns}", (rows, columns)
        return
    curves = [case for axis in shapes.CURVES for case in shapes.curve_points(axis, device)] if CURVES in names else []
    chosen = [shapes.CASES[name] for name in names if name != CURVES]
    seen: set[tuple[str, str]] = set()
    for case in [*chosen, *curves]:
        scaled = shapes.for_device(case, device)
        key = (scaled.shape, scaled.lengths)
        if scaled.scaled_from is None or key not in seen:
            seen.add(key)
            yield case.name, scaled


def default_cases(kind: str, device: torch.device) -> list[str]:
    if kind == "backward":
        return ["dev", "splade-v3"] if device.type == "cuda" else ["dev"]
    if device.type == "cpu":
        return [name for name in shapes.CASES if name not in ("xlmr-64-ragged", "xlmr-420-ragged")]
    return [*shapes.CASES, CURVES]


def default_precisions(device: torch.device) -> list[str]:
    return ["bf16", "bf16-autocast", "tf32", "float32"] if device.type == "cuda" else ["float32"]


def groups(kind: str, subject: Any, precision: Precision, device: torch.device, names: Sequence[str]) -> Iterator[Any]:
    """Functions that make the jobs to be interleaved with each other."""
    if kind == "head":
        for job in roofline.PASSES:
            yield lambda job=job: head(subject, precision, job, device, names)
    elif kind == "backward":
        for distribution in distributions.DISTRIBUTIONS:
            yield lambda distribution=distribution: backward(subject, precision, distribution, device)
    else:
        for job in roofline.PASSES:
            yield lambda job=job: flops(*subject, precision, job, device)


def measure(make: Callable[[], list[Job]], precision: Precision, device: torch.device, seconds: float) -> list[Row]:
    """Rows of one group. When not even its inputs fit, there is nothing to name but that."""
    with precision.settings():
        jobs = make()
        rows = run(jobs, device, seconds)
    del jobs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def document(kind: str, device: torch.device, precisions: Sequence[str], command: str) -> dict[str, Any]:
    """What a result file holds besides its rows: where it was measured, and how fast that machine copies and multiplies."""
    machine = {}
    for name in precisions:
        precision = shapes.PRECISIONS[name]
        with precision.settings():
            rate = timing.matmul_rate(device, precision.compute_dtype)
        machine[name] = {"bytes_per_second": timing.copy_rate(device), "operations_per_second": rate}
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": command,
        "environment": describe(),
        "machine": machine,
        "rows": [],
        "left_out": [],
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """In one move, so that an end by timeout leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--case", nargs="+", choices=[*shapes.CASES, CURVES], help="default: all; 'curves': S, V and B")
    parser.add_argument("--precision", nargs="+", choices=list(shapes.PRECISIONS))
    parser.add_argument("--variant", nargs="+", choices=list(variants.VARIANTS), default=list(variants.VARIANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on the rounds of one group")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    args = parser.parse_args()
    device = torch.device(args.device)
    names = args.case or default_cases(args.kind, device)
    precisions = args.precision or default_precisions(device)
    begin = time.monotonic()
    command = f"python -m bench.measure {args.kind}"
    result = document(args.kind, device, precisions, command)
    for precision in (shapes.PRECISIONS[name] for name in precisions):
        for name, subject in plan(args.kind, names, device):
            if time.monotonic() - begin > args.budget:
                result["left_out"].append(f"{name} {precision.name}")
                continue
            for make in groups(args.kind, subject, precision, device, args.variant):
                try:
                    rows = measure(make, precision, device, args.seconds)
                except Exception as error:  # the inputs themselves may not fit
                    result["left_out"].append(f"{name} {precision.name}: {_reason(error)}")
                    continue
                result["rows"] += [asdict(row) for row in rows]
                for row in rows:
                    print(_line(row), flush=True)
            write(args.output, result)
    result["environment"]["load_average"] = os.getloadavg()[0]
    write(args.output, result)
    red = [row for row in result["rows"] if row["variant"] == "ours" and row["status"].startswith(("red", "failed"))]
    if red:
        raise SystemExit("\n".join(f"{row['case']} {row['precision']} {row['job']}: {row['status']}" for row in red))


def _line(row: Row) -> str:
    time_text = row.status if row.median is None else f"{row.median * 1e3:10.3f} ms {row.clock}"
    extra = "" if row.extra_bytes is None else f" extra {row.extra_bytes / 2**20:.0f} MiB"
    return f"{row.case:20} {row.shape:28} {row.precision:14} {row.job:18} {row.variant:16} {time_text}{extra}"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
