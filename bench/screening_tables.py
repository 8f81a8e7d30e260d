"""The section of a screening result: times, survivors, memory, whole ``encode`` runs."""

from __future__ import annotations

from typing import Any

from bench.ratios import against, speedup
from bench.variants import OURS

VARIANTS = ("stock", "unscreened", "ours", "screened", "matmul-real")
# As the tables call them.
LABELS = {"ours": "auto", "matmul-real": "matmul of the real tokens"}
WEIGHED = ("stock", *OURS)
NOTE = (
    "`active`: share of the (sequence, word) pairs; `computed`: share of the (real token, word) pairs whose dot is "
    "computed exactly when screened. Auto decides from the inputs of the call whether to screen. Inference: the "
    "quantised weight is at hand from earlier calls; the memory is that of a first call, quantised weight included."
)


def section(result: dict[str, Any]) -> str:
    from bench import report

    environment = result.get("environment", {})
    flags = environment.get("cpu_flags")
    parts = [f"## Exact screening: {report.device(result)}", report.caption(result), NOTE]
    if flags and not environment.get("gpu"):
        parts.append(f"Vector instructions of this CPU: {' '.join(flags)}.")
    for precision in result["machine"]:
        of_precision = [row for row in result["rows"] if row["precision"] == precision]
        heads = report.grouped([row for row in of_precision if row["job"] == "forward"])
        encodes = report.grouped([row for row in of_precision if row["job"] == "encode"])
        if heads:
            parts += [f"### Head alone, {precision}, milliseconds", report.table(_times(heads))]
        memory = _memory(heads)
        if memory[1:]:
            parts += [f"### Peak memory beyond inputs and outputs, {precision}, MiB", report.table(memory)]
        if encodes:
            parts += [f"### Whole `encode`, {precision}, texts a second", report.table(_texts(encodes))]
    parts.append(_checks(result))
    return "\n\n".join(part for part in parts if part)


def _times(groups: list[Any]) -> list[list[str]]:
    from bench import report

    compared = ["screened against unscreened", "auto against unscreened", "screened against stock", "against matmul"]
    rows = [["case", "active", "computed", *(LABELS.get(name, name) for name in VARIANTS), *compared]]
    for case, _, _, found in groups:
        any_row = next(iter(found.values()))
        screened, unscreened = found.get("screened"), found.get("unscreened")
        computed = screened.get("survivors") if screened else None
        rows.append(
            [
                f"{case} ({any_row['shape']})",
                f"{any_row['active_share']:.2%}",
                "-" if computed is None else f"{computed:.3%}",
                *(report.cell(found.get(name)) for name in VARIANTS),
                speedup(unscreened, screened),
                against(found.get("ours"), unscreened, "x the time"),
                speedup(found.get("stock"), screened),
                against(screened, found.get("matmul-real"), "x the time"),
            ]
        )
    return rows


def _memory(groups: list[Any]) -> list[list[str]]:
    from bench import report

    rows = [["case", *(LABELS.get(name, name) for name in WEIGHED)]]
    for case, _, _, found in groups:
        cells = [report.mebibytes(found.get(name)) for name in WEIGHED]
        if any(cell != "-" for cell in cells):
            rows.append([case, *cells])
    return rows


def _texts(groups: list[Any]) -> list[list[str]]:
    from bench import report

    names = [LABELS.get(name, name) for name in WEIGHED]
    rows = [["case", "active", *names, "auto against unscreened", "auto against stock"]]
    for case, _, _, found in groups:
        any_row = next(iter(found.values()))
        rates = [
            f"{row['texts'] / row['median']:,.1f}" if row and row["median"] else report.cell(row)
            for row in map(found.get, WEIGHED)
        ]
        ours = found.get("ours")
        compared = [speedup(found.get(name), ours) for name in ("unscreened", "stock")]
        rows.append([f"{case} ({any_row['shape']})", f"{any_row['active_share']:.2%}", *rates, *compared])
    return rows


def _checks(result: dict[str, Any]) -> str:
    """How ours was checked before it was timed."""
    ours = [row for row in result["rows"] if row["variant"] in OURS]
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
