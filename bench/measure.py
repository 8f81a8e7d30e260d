"""Measure one kind of job on the device at hand and write a result file.

    python -m bench.measure head|backward|flops|screening|encode --output RESULT.json [--case NAME ...]

Every variant is first checked against the truth and against a second run of itself: a red one is not timed. Then all
variants of a case are timed in interleaved rounds (:mod:`.harness.timing`). Extra memory is the peak above inputs,
outputs and gradients. Running out of memory is a result. The file is rewritten after every job of a case, so that what
was measured survives an end by timeout.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import screening_model
from bench.harness import roofline, rows, timing
from bench.harness.environment import command, describe
from bench.harness.result_file import write
from bench.harness.rows import Job, Row
from bench.inputs import cases as shapes
from bench.inputs import distributions, variants
from bench.inputs.cases import Precision
from bench.jobs import encode, screening
from bench.jobs import operators as jobs

SCHEMA = 1
KINDS = ("head", "backward", "flops", "screening", "encode")
CURVES = "curves"
FLOPS_CASES = [f"B{rows}-V{columns}" for rows, columns in shapes.FLOPS_SHAPES]
# Other cases would be scaled to one of these shapes.
CPU_CASES = (
    "dev-ragged",
    "gooaq-question",
    "gooaq-answer",
    "query",
    "splade-v3-ragged",
    "xlmr-16-ragged",
    "qwen-ragged",
    "long-ragged",
    "dev",
)


def plan(kind: str, names: Sequence[str], device: torch.device) -> Iterator[tuple[str, Any]]:
    """``(name, case or arguments)`` of a kind on this device; scaled shapes that coincide are measured once."""
    if kind == "flops":
        limit = shapes.CPU_FLOPS_ELEMENTS if device.type == "cpu" else None
        for rows, columns in shapes.FLOPS_SHAPES:
            name = f"B{rows}-V{columns}"
            if name in names and (limit is None or rows * columns <= limit):
                yield name, (rows, columns)
        return
    curves = [case for axis in shapes.CURVES for case in shapes.curve_points(axis, device)] if CURVES in names else []
    known = shapes.CASES | shapes.SCREENING
    chosen = [known[name] for name in names if name in known]
    seen: set[shapes.Case] = set()
    for case in [*chosen, *curves]:
        scaled = shapes.for_device(case, device)
        key = replace(scaled, name="", scaled_from=None)
        if scaled.scaled_from is None or key not in seen:
            seen.add(key)
            yield case.name, scaled
    for corpus in (encode.SQUAD, *encode.CORPORA.values()):
        if corpus.name in names:
            yield corpus.name, corpus


def default_cases(kind: str, device: torch.device) -> list[str]:
    if kind == "screening":
        return [*shapes.SCREENING, encode.SQUAD.name]
    if kind == "encode":
        return list(encode.CORPORA)
    if kind == "flops":
        return FLOPS_CASES
    if kind == "backward":
        return ["dev", "splade-v3"] if device.type == "cuda" else ["dev"]
    if device.type == "cpu":
        return list(CPU_CASES)
    return [*shapes.CASES, CURVES]


def default_variants(kind: str) -> list[str]:
    if kind == "encode":
        return ["stock", "ours"]
    return list(variants.SCREENING if kind == "screening" else variants.HEADS)


def default_precisions(device: torch.device) -> list[str]:
    return ["bf16", "bf16-autocast", "tf32", "float32"] if device.type == "cuda" else ["float32"]


def groups(
    kind: str, subject: Any, precision: Precision, device: torch.device, names: Sequence[str]
) -> dict[str, Callable[[], list[Job]]]:
    """By name, functions that make the jobs to be interleaved with each other."""
    if kind == "head":
        return {job: partial(jobs.head, subject, precision, job, device, names) for job in roofline.PASSES}
    if isinstance(subject, encode.Corpus):
        return {"encode": partial(encode.jobs, subject, precision, device, names)}
    if kind == "screening":
        passes = screening.passes(subject)
        return {job: partial(screening.head, subject, precision, job, device, names) for job in passes}
    if kind == "flops":
        shape: tuple[int, int] = subject
        return {job: partial(jobs.flops, shape, precision, job, device) for job in roofline.PASSES}
    return {name: partial(jobs.backward, subject, precision, name, device) for name in distributions.DISTRIBUTIONS}


def takes_model(subject: Any) -> bool:
    """Whether a subject is measured on the model on text."""
    if isinstance(subject, encode.Corpus):
        return subject.size is None
    return isinstance(subject, shapes.Case) and subject.from_text


def why_absent(subject: Any) -> str | None:
    """Why there is nothing to measure a subject on here, or None."""
    return screening_model.why_not() if takes_model(subject) else None


def measure(make: Callable[[], list[Job]], precision: Precision, device: torch.device, seconds: float) -> list[Row]:
    """Rows of one group."""
    with precision.settings():
        measured = rows.run(make(), device, seconds)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measured


def document(kind: str, device: torch.device, precisions: Sequence[str], command: str) -> dict[str, Any]:
    """A result without rows: where it is measured, and how fast that machine copies and multiplies."""
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


def measure_all(result: dict[str, Any], args: argparse.Namespace, device: torch.device) -> None:
    """Add the rows of every case in every precision, and what was left out; the file is rewritten after each job."""
    names = args.case or default_cases(args.kind, device)
    chosen = args.variant or default_variants(args.kind)
    begin = time.monotonic()
    for precision in (shapes.PRECISIONS[name] for name in result["machine"]):
        for name, subject in plan(args.kind, names, device):
            if time.monotonic() - begin > args.budget:
                result["left_out"].append(f"{name} {precision.name}")
                continue
            absent = why_absent(subject)
            if absent:
                result["left_out"].append(f"{name} {precision.name}: {absent}")
                continue
            if takes_model(subject):
                result["trained_model"] = screening_model.training_record()
            for job, make in groups(args.kind, subject, precision, device, chosen).items():
                if time.monotonic() - begin > args.budget:
                    result["left_out"].append(f"{name} {precision.name} {job}")
                    continue
                try:
                    measured = measure(make, precision, device, args.seconds)
                except Exception as error:  # the inputs themselves may not fit
                    result["left_out"].append(f"{name} {precision.name} {job}: {rows.reason(error)}")
                    continue
                result["rows"] += [asdict(row) for row in measured]
                write(args.output, result)
                for row in measured:
                    print(_line(row), flush=True)
    write(args.output, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--output", type=Path, required=True)
    known = [*shapes.CASES, CURVES, *shapes.SCREENING, *FLOPS_CASES, encode.SQUAD.name, *encode.CORPORA]
    parser.add_argument("--case", nargs="+", choices=known, help="default: all of the kind; 'curves': S, V and B")
    parser.add_argument("--precision", nargs="+", choices=list(shapes.PRECISIONS))
    parser.add_argument("--variant", nargs="+", choices=list(variants.VARIANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on the rounds of one group")
    until = "seconds after which no job is begun"
    parser.add_argument("--budget-seconds", "--budget", dest="budget", type=float, default=float("inf"), help=until)
    args = parser.parse_args()
    device = torch.device(args.device)
    precisions = args.precision or default_precisions(device)
    result = document(args.kind, device, precisions, command("bench.measure"))
    measure_all(result, args, device)
    ours = [row for row in result["rows"] if row["variant"] in variants.OURS]
    red = [row for row in ours if row["status"].startswith(("red", "failed"))]
    if red:
        named = (" ".join(row[key] for key in ("case", "precision", "job", "variant", "status")) for row in red)
        raise SystemExit("\n".join(named))


def _line(row: Row) -> str:
    time_text = row.status if row.median is None else f"{row.median * 1e3:10.3f} ms {row.clock}"
    extra = "" if row.extra_bytes is None else f" extra {row.extra_bytes / 2**20:.0f} MiB"
    return f"{row.case:20} {row.shape:28} {row.precision:14} {row.job:18} {row.variant:16} {time_text}{extra}"


if __name__ == "__main__":
    main()
