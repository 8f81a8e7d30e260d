"""Sections that are one table: backward, FLOPS, compiled kernels, and all others."""

from __future__ import annotations

from typing import Any

from bench.tables.markdown import Result, cell, checks, grouped, section, table
from bench.tables.ratios import against


def backward_section(result: Result) -> str:
    rows = [["case", "precision", "distribution", "active", "backward, ms", "training forward, ms", "ratio"]]
    for case, precision, job, variants in grouped(result["rows"]):
        ours, forward = variants["ours"], variants.get("training-forward")
        times = [cell(ours), cell(forward), against(ours, forward)]
        rows.append([case, precision, job.removeprefix("backward-"), f"{ours['active_share']:.1%}", *times])
    return section("Backward alone", result, table(rows), checks(result))


def flops_section(result: Result) -> str:
    rows = [["rows and columns", "precision", "job", "stock, ms", "ours, ms", "ours, GB/s", "of copy bandwidth"]]
    for _, precision, job, variants in grouped(result["rows"]):
        ours = variants["ours"]
        rate = ours["bytes"] / ours["median"] if ours["median"] else 0.0
        share = rate / ours["run"]["machine"][precision]["bytes_per_second"]
        shown = [f"{rate / 1e9:.1f}", f"{share:.0%}"] if job == "forward" and rate else ["-", "-"]
        rows.append([ours["shape"], precision, job, cell(variants["stock"]), cell(ours), *shown])
    return section("FLOPS regulariser", result, table(rows), checks(result))


def resources_section(result: Result) -> str:
    """What the compiler made of the kernels for the RTX 3090's architecture."""
    rows = [["kernel", "dtype", "registers", "spilled bytes", "shared bytes", "tensor cores"]]
    for row in result["rows"]:
        if row["arch"] == 86:
            tensor = ", ".join(name for name in row["instructions"] if name.endswith("MMA")) or "-"
            numbers = [str(row[name]) for name in ("registers", "spill_bytes", "shared_bytes")]
            rows.append([row["kernel"], row["dtype"], *numbers, tensor])
    return f"## Compiled for sm_86 (`python -m bench.resources`, {result['file']})\n\n{table(rows)}"


def plain_section(result: Result) -> str:
    """A kind that has no section of its own: the scalars of its rows."""
    skipped = ("run", "provenance")
    names = list(dict.fromkeys(k for row in result["rows"] for k, v in row.items() if not isinstance(v, (dict, list))))
    names = [name for name in names if name not in skipped]

    def scalar(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    rows = [names, *([scalar(row.get(name)) for name in names] for row in result["rows"])]
    return section(result["kind"], result, table(rows) if names else "No rows.")
