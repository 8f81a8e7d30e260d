"""The section of a head result, and its rows in the README."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from bench.harness import roofline
from bench.harness.roofline import Machine, Work
from bench.inputs import cases
from bench.inputs.cases import CASES, PRECISIONS
from bench.tables import ratios
from bench.tables.markdown import Result, Row, caption, cell, checks, grouped, mebibytes, precisions, section, table
from bench.tables.ratios import against, speedup

COLUMNS = ("stock", "compile", "tiled", "sparton", "rival", "ours", "matmul-padded", "matmul-real")
# Weights, hidden states and the gradient that arrives are inputs.
EXTRA_MEMORY = "peak memory beyond inputs, outputs and gradients"
ROOFLINE = (
    "`roofline / ours`: the least time for all dots of the real tokens at the rates measured here, over that of ours. "
    "Where ours screens it computes few of these dots, so that this is no floor and the share may exceed 100 %."
)


def head_section(result: Result) -> str:
    parts = []
    for precision in precisions(result):
        for job in roofline.PASSES:
            found = measured(result, precision, job)
            if found:
                parts += [f"### {job.replace('_', ' and ')}, {precision}, milliseconds", table(_times(found)), ROOFLINE]
        parts += _memory(result, precision)
    only_curves = all(row["case"].startswith("curve") for row in result["rows"])
    return section(f"Head{', curves' if only_curves else ''}", result, *parts, checks(result))


def readme_part(result: Result) -> list[str]:
    """Forward and backward of the cases that are shown in the README, stock against ours, and where they are from."""
    rows = [["forward and backward", "stock", "fused", "", f"{EXTRA_MEMORY}, stock", "fused"]]
    # Of the batches of one step their sum.
    shown = {case.part_of or case.name for case in cases.shown_in("readme")}
    for case, variants in measured(result, precisions(result)[0], "forward_backward"):
        stock, ours = variants.get("stock"), variants.get("ours")
        if case.split(" ")[0] in shown and stock and ours:
            times = [f"{cell(row)} ms" if row.get("median") else cell(row) for row in (stock, ours)]
            rows.append([case, *times, speedup(stock, ours), mebibytes(stock), mebibytes(ours)])
    return [table(rows), f"{ratios.NOTE} {caption(result)}"] if rows[1:] else []


def measured(result: Result, precision: str, job: str) -> list[tuple[str, dict[str, Row]]]:
    """Labelled cases and their variants; the cases of one step come first, as their sum."""
    found = [
        (case, variants)
        for case, mode, passes, variants in grouped(result["rows"])
        if (mode, passes) == (precision, job) and not case.startswith("curve")
    ]
    sums = []
    for whole in dict.fromkeys(case.part_of for case in CASES.values() if case.part_of):
        names = [case.name for case in CASES.values() if case.part_of == whole]
        parts = [variants for case, variants in found if case in names]
        if len(parts) == len(names):
            both = {name: total([part[name] for part in parts]) for name in parts[0] if all(name in p for p in parts)}
            sums.append((f"{whole} (both batches)", both))
    return sums + [(f"{case} ({next(iter(rows.values()))['shape']})", rows) for case, rows in found]


def total(rows: Sequence[Row]) -> Row:
    """The batches of one step as one row: times added round by round, the larger of the memories."""
    found: Row = {"status": next((row["status"] for row in rows if row["status"] != "measured"), "measured")}
    found["samples"] = [sum(pair) for pair in zip(*(row.get("samples") or [] for row in rows), strict=False)]
    for name in ("median", "operations", "bytes"):
        values = [row[name] for row in rows]
        found[name] = None if None in values else sum(values)
    memory = [row["extra_bytes"] for row in rows]
    found["extra_bytes"] = None if None in memory else max(memory)
    busiest = max(rows, key=lambda row: row.get("others") or 0)
    return found | {name: busiest.get(name) for name in ("clock", "others", "run", "precision")}


def floors_section() -> str:
    """Computed, not measured: the RTX 3090's datasheet against the forward of the cases that ask for it."""
    machine = roofline.RTX_3090
    rates = f"{machine.bytes_per_second / 1e9:.0f} GB/s and {machine.operations_per_second / 1e12:.0f} TFLOP/s"
    note = f"Floors of the forward in bfloat16 from the datasheet's {rates} (dense, float32 accumulation)."
    rows = [["case", "shape", "forward, all tokens real, ms", "forward, real tokens, ms", "binds"]]
    for case in cases.shown_in("floors"):
        real = int(case.draw_lengths().sum())
        counts = (case.batch_size * case.length, real)
        works = [roofline.forward(case, PRECISIONS["bf16"], count) for count in counts]
        compute, memory = works[1].operations / machine.operations_per_second, works[1].bytes / machine.bytes_per_second
        times = [f"{machine.seconds(work) * 1e3:.3f}" for work in works]
        rows.append([case.name, case.shape, *times, "operations" if compute > memory else "bytes"])
    return f"## RTX 3090: computed, not measured\n\n{note}\n\n{table(rows)}"


def _times(found: Sequence[tuple[str, dict[str, Row]]]) -> list[list[str]]:
    present = itertools.chain.from_iterable(variants.items() for _, variants in found)
    here = {name for name, row in present if not row["status"].startswith("not here")}
    names = [name for name in COLUMNS if name in here]
    rows = [["case", *names, "ours against stock", "against matmul", "roofline / ours"]]
    for case, variants in found:
        stock, ours, matmul = (variants.get(name, {}) for name in ("stock", "ours", "matmul-padded"))
        compared = [speedup(stock, ours), against(ours, matmul), _roofline(ours)]
        rows.append([case, *(cell(variants.get(name)) for name in names), *compared])
    return rows


def _roofline(row: Row) -> str:
    if not row.get("operations") or not row.get("median"):
        return "-"
    machine = Machine(**row["run"]["machine"][row["precision"]])
    return f"{machine.seconds(Work(row['operations'], row['bytes'])) / row['median']:.0%}"


def _memory(result: Result, precision: str) -> list[str]:
    names = ("stock", "ours")
    rows = [["case", *(f"{job.replace('_', ' and ')}, {name}" for job in roofline.PASSES for name in names)]]
    jobs = [dict(measured(result, precision, job)) for job in roofline.PASSES]
    for case in jobs[0]:
        cells = [mebibytes(job.get(case, {}).get(name)) for job in jobs for name in names]
        if any(cell != "-" for cell in cells):
            rows.append([case, *cells])
    return [f"### {EXTRA_MEMORY.capitalize()}, {precision}, MiB", table(rows)] if rows[1:] else []
