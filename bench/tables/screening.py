"""The section of a screening result: times of inference and training, survivors, memory, whole ``encode`` runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import screening_model
from bench.inputs import variants
from bench.tables.ratios import against, speedup

INFERENCE = (*variants.SCREENING, "matmul-real")
# As the tables call them.
LABELS = {"ours": "auto", "screened-first": "screened, first call", "matmul-real": "matmul of the real tokens"}
MODES = ("stock", *variants.MODES)
NOTE = (
    "`active`: share of the (sequence, word) pairs; `computed`: share of the (real token, word) pairs whose dot is "
    "computed exactly when screened. Auto decides from the inputs of the call whether to screen; on a GPU it does not "
    "screen where no checked-in result of the architecture says that it pays. In inference "
    "the quantised weight is at hand from earlier calls; a first call quantises it, and the memory is a first call's. "
    "In training every step quantises it anew, within the time shown."
)


def section(result: dict[str, Any]) -> str:
    from bench import report

    environment = result.get("environment", {})
    flags = environment.get("cpu_flags")
    parts = [f"## Exact screening: {report.device(result)}", report.caption(result), NOTE]
    if flags and not environment.get("gpu"):
        parts.append(f"Vector instructions of this CPU: {' '.join(flags)}.")
    if "trained_model" in result:
        parts.append(screening_model.describe(result["trained_model"]))
    for precision in result["machine"]:
        of_precision = [row for row in result["rows"] if row["precision"] == precision]
        forwards, steps, encodes = (
            report.grouped([row for row in of_precision if row["job"] == job])
            for job in ("forward", "forward_backward", "encode")
        )
        if forwards:
            parts += [
                f"### Head alone, inference, {precision}, milliseconds",
                report.table(_times(forwards, INFERENCE)),
            ]
        if steps:
            parts += [f"### Head alone, training, {precision}, milliseconds", report.table(_times(steps, MODES))]
        memory = _memory(forwards)
        if memory[1:]:
            parts += [f"### Peak memory beyond inputs and outputs, {precision}, MiB", report.table(memory)]
        if encodes:
            parts += [f"### Whole `encode`, {precision}, texts a second", report.table(_texts(encodes))]
    parts.append(_checks(result))
    return "\n\n".join(part for part in parts if part)


def _times(groups: list[Any], names: Sequence[str]) -> list[list[str]]:
    from bench import report

    compared = ["screened against unscreened", "auto against unscreened", "screened against stock"]
    compared += ["first call against unscreened", "against matmul"] if names == INFERENCE else []
    rows = [["case", "active", "computed", *(LABELS.get(name, name) for name in names), *compared]]
    for case, _, _, found in groups:
        any_row = next(iter(found.values()))
        screened, unscreened = found.get("screened"), found.get("unscreened")
        computed = screened.get("survivors") if screened else None
        cells = [
            f"{case} ({any_row['shape']})",
            f"{any_row['active_share']:.2%}",
            "-" if computed is None else f"{computed:.3%}",
            *(report.cell(found.get(name)) for name in names),
            speedup(unscreened, screened),
            against(found.get("ours"), unscreened, "x the time"),
            speedup(found.get("stock"), screened),
        ]
        if names == INFERENCE:
            first, floor = found.get("screened-first"), found.get("matmul-real")
            cells += [speedup(unscreened, first), against(screened, floor, "x the time")]
        rows.append(cells)
    return rows


def _memory(groups: list[Any]) -> list[list[str]]:
    from bench import report

    rows = [["case", *(LABELS.get(name, name) for name in MODES)]]
    for case, _, _, found in groups:
        cells = [report.mebibytes(found.get(name)) for name in MODES]
        if any(cell != "-" for cell in cells):
            rows.append([case, *cells])
    return rows


def _texts(groups: list[Any]) -> list[list[str]]:
    from bench import report

    names = [LABELS.get(name, name) for name in MODES]
    rows = [["case", "active", *names, "auto against unscreened", "auto against stock"]]
    for case, _, _, found in groups:
        any_row = next(iter(found.values()))
        rates = [
            f"{row['texts'] / row['median']:,.1f}" if row and row["median"] else report.cell(row)
            for row in map(found.get, MODES)
        ]
        ours = found.get("ours")
        compared = [speedup(found.get(name), ours) for name in ("unscreened", "stock")]
        rows.append([f"{case} ({any_row['shape']})", f"{any_row['active_share']:.2%}", *rates, *compared])
    return rows


def _checks(result: dict[str, Any]) -> str:
    """How ours was checked before it was timed."""
    ours = [row for row in result["rows"] if row["variant"] in variants.OURS]
    red = [row for row in ours if row["status"].startswith(("red", "failed"))]
    repeated = sum(bool(row["repeatable"]) for row in ours)
    distances = [row["errors"]["bands_from_unscreened"] for row in ours if "bands_from_unscreened" in row["errors"]]
    text = f"Of {len(ours)} results of ours, two runs were identical to the bit in {repeated}; {len(red)} were wrong."
    if distances:
        text += (
            f" Largest distance of an entry from the unscreened one: {max(distances):.2g} of what two orders of "
            "summation may differ by."
        )
    lines = [f"- {row['case']} {row['precision']} {row['job']} {row['variant']}: {row['status']}" for row in red]
    return "\n".join([text, *([""] if lines else []), *lines])
