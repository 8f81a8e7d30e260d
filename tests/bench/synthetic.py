"""Made-up results as :func:`bench.harness.result_file.load` gives them, and the cells of their tables."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from bench.harness import rows as bench_rows
from bench.harness.rows import Job

Row = dict[str, Any]
PRECISION = "bf16"
GPU = {"device": "Test GPU", "gpu": True, "arch": 90, "driver": "570", "cuda": "12.8"}
CPU = {"device": "Test CPU", "gpu": False, "threads": 2, "cpu_capability": "AVX2", "cpu_flags": ["avx", "avx2"]}


def row(case: str, variant: str, median: float | None, job: str = "forward", **more: object) -> Row:
    base = {"case": case, "shape": "B32 S128 D768 V30522", "precision": PRECISION, "job": job, "variant": variant}
    state = {"status": "measured", "median": median, "repeatable": True, "extra_bytes": None, "others": None}
    state |= {"samples": [] if median is None else [median] * 3, "errors": {}, "operations": 10**9, "bytes": 10**6}
    return base | state | more


def run(gpu: bool = True, **more: object) -> Row:
    """The provenance of rows."""
    environment = (GPU if gpu else CPU) | {"python": "3.11", "packages": {"torch": "2.11"}, "commit": "abc"}
    machine = {PRECISION: {"bytes_per_second": 1e12, "operations_per_second": 1e14}}
    return {"command": "python -m bench", "environment": environment, "machine": machine} | more


def result(kind: str, rows: list[Row], gpu: bool = True, **more: object) -> dict[str, Any]:
    """One device's result; ``more`` is in the provenance of its rows."""
    made = run(gpu, **more)
    rows = [{"run": made} | row for row in rows]
    return {"kind": kind, "file": f"{kind}.json", "rows": rows, "runs": [made], "left_out": []}


def changed(job: Job, change: Callable[..., Any]) -> bench_rows.Row:
    """The row of a job with one step, whose results are changed."""
    (step,) = job.steps()
    job.steps = lambda: [lambda: change(*step())]
    (found,) = bench_rows.run([job], torch.device("cpu"), 0.01)
    return found


def kernels(kind: type) -> set[str]:
    """The names of the package's Triton kernels, which are of this kind."""
    import splade_kernels.backends.triton as package

    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    members = itertools.chain.from_iterable(vars(module).items() for module in modules)
    return {name for name, value in members if isinstance(value, kind) and name.endswith("_kernel")}


def cells(text: str, start: str) -> list[list[str]]:
    """The cells of the table rows that begin so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def without_quartiles(row: list[str]) -> list[str]:
    return [cell.split(" (")[0] for cell in row]
