"""Measure one kind of job on the device at hand and write a result file.

    python -m bench.measure head|backward|flops|screening|encode --output RESULT.json [--append] [--case NAME ...]

Every variant is first checked against the truth and against a second run of itself; one that fails is red and is not
timed. Then all variants of a case are timed in interleaved rounds (:mod:`.harness.timing`). Extra memory is the peak
above inputs, outputs and gradients. Running out of memory is a result. The file is rewritten after every job of a case,
so that what was measured survives a killed run; ``--append`` continues it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from bench.harness import memory, options, roofline, rows, timing
from bench.harness.result_file import Budget, Result, Row
from bench.harness.rows import Job
from bench.inputs import cases as shapes
from bench.inputs import distributions, text_model, variants
from bench.inputs.cases import Precision
from bench.jobs import encode, operators, screening

KINDS = ("head", "backward", "flops", "screening", "encode")
CURVES = "curves"
FLOPS_CASES = {f"B{rows}-V{columns}": (rows, columns) for rows, columns in shapes.FLOPS_SHAPES}
CORPORA = {encode.SQUAD.name: encode.SQUAD, **encode.CORPORA}


def plan(kind: str, names: Sequence[str], device: torch.device) -> Iterator[tuple[str, Any]]:
    """``(name, case or arguments)`` of a kind on this device; scaled shapes that coincide are measured once."""
    if kind == "flops":
        for name, (rows, columns) in FLOPS_CASES.items():
            if name in names and (device.type != "cpu" or rows * columns <= shapes.CPU_FLOPS_ELEMENTS):
                yield name, (rows, columns)
        return
    # A CPU leaves out the points that it would have to scale.
    points = [case for axis in shapes.CURVES.values() for case in axis if shapes.for_device(case, device) == case]
    known = shapes.CASES | shapes.SCREENING
    chosen = [known[name] for name in names if name in known]
    seen: set[shapes.Case] = set()
    for case in [*chosen, *(points if CURVES in names else [])]:
        scaled = shapes.for_device(case, device)
        key = replace(scaled, name="", scaled_from=None, shown_in=())
        if scaled.scaled_from is None or key not in seen:
            seen.add(key)
            yield case.name, scaled
    yield from ((name, corpus) for name, corpus in CORPORA.items() if name in names)


def default_cases(kind: str, device: torch.device) -> list[str]:
    if kind == "screening":
        return [*shapes.SCREENING, encode.SQUAD.name]
    if kind == "encode":
        return list(encode.CORPORA)
    if kind == "flops":
        return list(FLOPS_CASES)
    gpu = device.type == "cuda"
    if kind == "backward":
        return [case.name for case in shapes.shown_in("backward-gpu" if gpu else "backward-cpu")]
    return [*shapes.CASES, CURVES] if gpu else [case.name for case in shapes.shown_in("cpu")]


def default_variants(kind: str) -> Sequence[str]:
    return {
        "encode": ("stock", "ours", encode.SPARSE, encode.COMMAND, *encode.ONNX),
        "screening": variants.SCREENING,
    }.get(kind, variants.HEADS)


def default_precisions(kind: str, device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["bf16", "bf16-autocast", "tf32", "float32"]
    return ["float32", "bf16"] if kind == "encode" else ["float32"]


def groups(
    kind: str, subject: Any, precision: Precision, device: torch.device, names: Sequence[str],
    beside: Sequence[Precision] = (),
) -> dict[str, Callable[[], list[Job]]]:  # fmt: skip
    """By name, functions that make the jobs to be interleaved with each other, of a corpus those of the precisions
    ``beside`` too."""
    if isinstance(subject, encode.Corpus):
        return {"encode": partial(encode.together, subject, (precision, *beside), device, names)}
    makers: dict[str, tuple[Callable[..., list[Job]], Iterable[str]]] = {
        "head": (partial(operators.head, names=names), roofline.PASSES),
        "backward": (operators.backward, distributions.DISTRIBUTIONS),
        "flops": (operators.flops, roofline.PASSES),
        "screening": (partial(screening.head, names=names), roofline.PASSES),
    }
    make, found = makers[kind]
    if kind == "screening" and subject.name.startswith("share-"):
        found = roofline.PASSES[:1]  # points of the curve over the active share are inference alone
    return {job: partial(make, subject, precision, job, device) for job in found}


def measure(make: Callable[[], list[Job]], precision: Precision, device: torch.device, seconds: float) -> list[Row]:
    """Rows of one group."""
    with precision.settings():
        measured = [asdict(row) for row in rows.run(make(), device, seconds)]
    memory.release()
    return measured


def measure_jobs(
    result: Result, budget: Budget, case: str, precision: Precision, jobs: Mapping[str, Callable[[], list[Job]]],
    device: torch.device, seconds: float,
) -> None:  # fmt: skip
    """Add the rows of one case in one precision; the file is rewritten after each job."""
    for job, make in jobs.items():
        what = {"case": case, "precision": precision.name, "job": job}
        for row in result.attempt(budget, what, measure, make, precision, device, seconds, room=False):
            time = row["status"] if row["median"] is None else f"{row['median'] * 1e3:10.3f} ms {row['clock']}"
            extra = "" if row["extra_bytes"] is None else f" extra {row['extra_bytes'] / 2**20:.0f} MiB"
            names = f"{case:20} {row['shape']:28} {row['precision']:14} {job:18} {row['variant']:16}"
            print(f"{names} {time}{extra}", flush=True)


def main() -> None:
    parser = options.parser(__doc__, required=True, seconds=2.0)
    parser.add_argument("kind", choices=KINDS)
    known = [*shapes.CASES, CURVES, *shapes.SCREENING, *FLOPS_CASES, *CORPORA]
    parser.add_argument("--case", nargs="+", choices=known, help="default: all of the kind; 'curves': S, V and B")
    parser.add_argument("--precision", nargs="+", choices=list(shapes.PRECISIONS))
    parser.add_argument("--variant", nargs="+", choices=list(dict.fromkeys((*variants.VARIANTS, *encode.VARIANTS))))
    args = parser.parse_args()
    device = torch.device(args.device)
    precisions = [shapes.PRECISIONS[name] for name in args.precision or default_precisions(args.kind, device)]
    machine = timing.machine(device, precisions)
    result = Result(args.kind, "bench.measure", args.output, append=args.append, run={"machine": machine})
    names = args.case or default_cases(args.kind, device)
    chosen = args.variant or default_variants(args.kind)
    budget = Budget(args.budget)
    # Whole encodes of all precisions are timed together: whether bfloat16 pays is asked against float32 and int8.
    for precision, *beside in [precisions] if args.kind == "encode" else [[precision] for precision in precisions]:
        for name, subject in plan(args.kind, names, device):
            if absent := text_model.why_absent(subject) if budget.has_time() else "no time":
                result.leave_out(absent, {"case": name, "precision": precision.name})
                continue
            text_model.note(subject, result.run)
            jobs = groups(args.kind, subject, precision, device, chosen, beside)
            measure_jobs(result, budget, name, precision, jobs, device, args.seconds)
    result.finish(*variants.OURS)


if __name__ == "__main__":
    main()
