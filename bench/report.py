"""Result files to ``bench/RESULTS.md`` and the blocks of README.md and docs/screening.md; every number in them comes
from a file named there.

    python -m bench.report bench/results/*.json [--output bench/RESULTS.md] [--readme README.md]
                           [--screening docs/screening.md] [--figures docs/bench]

A file's ``kind`` chooses its section; a kind without one is shown as a plain table of its rows.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import roofline
from bench.harness.result_file import left_out_text
from bench.harness.roofline import Machine, Work
from bench.inputs.cases import GOOAQ
from bench.tables import head_limits, ratios
from bench.tables import margins as margins_tables
from bench.tables import screening as screening_tables
from bench.tables import short_sequences as short_sequences_tables
from bench.tables import training as training_tables
from bench.tables.ratios import against, speedup

Result = dict[str, Any]
Row = dict[str, Any]

NOT_ON_A_GPU = "**Not measured on a GPU yet.**"
# Beside more work of others than this, in processors, times on a CPU are marked.
BUSY_PROCESSORS = 0.2
COLUMNS = ("stock", "compile", "tiled", "sparton", "rival", "ours", "matmul-padded", "matmul-real")
README_CASES = ("gooaq", "dev-ragged", "splade-v3-ragged", "xlmr-16-ragged", "query", "dev", "splade-v3")
# Weights and hidden states are inputs, as is the gradient that arrives.
EXTRA_MEMORY = "peak memory beyond inputs, outputs and gradients"
ROOFLINE = (
    "`roofline / ours`: the least time for all dots of the real tokens at the rates measured here, over that of ours. "
    "Where ours screens it computes few of these dots, so that this is no floor and the share may exceed 100 %."
)
BEGIN, END = "<!-- bench: python -m bench.report bench/results/*.json -->", "<!-- bench end -->"


def load(paths: Iterable[Path]) -> list[Result]:
    """Results with the name of their file; ``bench.resources --json`` writes a bare list of rows, of kind resources."""
    results = []
    for path in sorted(paths):
        content = json.loads(path.read_text())
        result = {"kind": "resources", "rows": content} if isinstance(content, list) else content
        results.append(result | {"file": path.name})
    return results


def render(results: Sequence[Result], figures: Sequence[str] = ()) -> str:
    """The whole of RESULTS.md."""
    order = list(SECTIONS)
    ranked = sorted(results, key=lambda result: order.index(result["kind"]) if result["kind"] in order else 99)
    parts = [
        "# Results",
        "Written by `python -m bench.report bench/results/*.json`; how it is measured: "
        "[docs/benchmarks.md](../docs/benchmarks.md).",
        ratios.NOTE,
    ]
    if not _on_gpu(results):
        parts += [
            NOT_ON_A_GPU + " What a GPU would need at least is computed below, from its datasheet.",
            roofline.floors_section(),
        ]
    parts += [_picture(figure) for figure in figures]
    parts += [SECTIONS.get(result["kind"], plain_section)(result) for result in ranked]
    parts.append(head_limits.section([row for result in results if result["kind"] == "head" for row in result["rows"]]))
    return "\n\n".join(parts) + "\n"


def readme_block(results: Sequence[Result], figures: Sequence[str] = ()) -> str:
    """Forward and backward of the named cases and whole encodes, stock against ours, one table a device."""
    parts = [BEGIN]
    if not _on_gpu(results):
        parts.append(NOT_ON_A_GPU)
    for result in results:
        if result["kind"] != "head":
            continue
        rows = [
            row
            for case, variants in _table(result, _first(result), "forward_backward")
            for row in _short(case, variants)
        ]
        header = ["forward and backward", "stock", "fused", "", f"{EXTRA_MEMORY}, stock", "fused"]
        parts += [table([header, *rows]), f"{ratios.NOTE} {caption(result)}"] if rows else []
    parts += [part for result in results if result["kind"] == "encode" for part in (_encodes(result), caption(result))]
    parts += [_picture(figure) for figure in figures]
    return "\n\n".join([*parts, "All cases, precisions and floors: [bench/RESULTS.md](bench/RESULTS.md).", END])


def screening_block(results: Sequence[Result]) -> str:
    """What int8 bounds leave over."""
    margins = [margins_tables.block(result) for result in results if result["kind"] == "margins"]
    return "\n\n".join([BEGIN, *(margins or ["Not measured."]), END])


def head_section(result: Result) -> str:
    only_curves = all(row["case"].startswith("curve") for row in result["rows"])
    parts = [f"## Head{', curves' if only_curves else ''}: {device(result)}", caption(result)]
    for precision in result["machine"]:
        machine = _machine(result, precision)
        for job in roofline.PASSES:
            measured = _table(result, precision, job)
            present = [row for _, variants in measured for row in variants.items()]
            here = {name for name, row in present if not row["status"].startswith("not here")}
            names = [name for name in COLUMNS if name in here]
            rows = [["case", *names, "ours against stock", "against matmul", "roofline / ours"]]
            for case, variants in measured:
                ours, floor = variants.get("ours", {}), variants.get("matmul-padded", {})
                work = _work(ours)
                rows.append(
                    [
                        case,
                        *(cell(variants.get(name)) for name in names),
                        speedup(variants.get("stock"), ours),
                        against(ours, floor),
                        f"{machine.seconds(work) / ours['median']:.0%}" if work and ours.get("median") else "-",
                    ]
                )
            if measured:
                parts += [f"### {job.replace('_', ' and ')}, {precision}, milliseconds", table(rows), ROOFLINE]
        parts += _memory(result, precision)
    parts.append(_checks(result))
    return "\n\n".join(part for part in parts if part)


def backward_section(result: Result) -> str:
    rows = [["case", "precision", "distribution", "active", "backward, ms", "training forward, ms", "ratio"]]
    for case, precision, job, variants in grouped(result["rows"]):
        ours, forward = variants["ours"], variants.get("training-forward")
        share = f"{ours['active_share']:.1%}"
        cells = [cell(ours), cell(forward), against(ours, forward)]
        rows.append([case, precision, job.removeprefix("backward-"), share, *cells])
    return "\n\n".join([f"## Backward alone: {device(result)}", caption(result), table(rows), _checks(result)])


def flops_section(result: Result) -> str:
    rows = [["rows and columns", "precision", "job", "stock, ms", "ours, ms", "ours, GB/s", "of copy bandwidth"]]
    for _, precision, job, variants in grouped(result["rows"], "shape"):
        ours = variants["ours"]
        rate = ours["bytes"] / ours["median"] if ours["median"] else 0.0
        share = rate / result["machine"][precision]["bytes_per_second"]
        shown = [f"{rate / 1e9:.1f}", f"{share:.0%}"] if job == "forward" and rate else ["-", "-"]
        rows.append([ours["shape"], precision, job, cell(variants["stock"]), cell(ours), *shown])
    return "\n\n".join([f"## FLOPS regulariser: {device(result)}", caption(result), table(rows), _checks(result)])


def encode_section(result: Result) -> str:
    return "\n\n".join([f"## Whole `encode`: {device(result)}", caption(result), _encodes(result), _checks(result)])


def _encodes(result: Result) -> str:
    """Stock and fused encodes: seconds, and what the process grew by."""
    memory = "peak memory beyond the loaded model"
    rows = [["sentence-transformers' `encode`", "stock", "fused", "", f"{memory}, stock", "fused"]]
    for case, precision, _, variants in grouped(result["rows"]):
        stock, ours = variants["stock"], variants["ours"]
        cells = [f"{row['median']:.3g} s" if row["median"] else cell(row) for row in (stock, ours)]
        memories = [mebibytes(row) for row in (stock, ours)]
        rows.append([f"{case}: {ours['shape']}, {precision}", *cells, speedup(stock, ours), *memories])
    return table(rows)


def resources_section(result: Result) -> str:
    """What the compiler made of the kernels for the RTX 3090's architecture."""
    rows = [["kernel", "dtype", "registers", "spilled bytes", "shared bytes", "tensor cores"]]
    for row in result["rows"]:
        if row["arch"] == 86:
            tensor = ", ".join(name for name in row["instructions"] if name.endswith("MMA")) or "-"
            rows.append([row["kernel"], row["dtype"], *map(str, (row["registers"], row["spill_bytes"]))])
            rows[-1] += [str(row["shared_bytes"]), tensor]
    return f"## Compiled for sm_86 (`python -m bench.resources`, {result['file']})\n\n{table(rows)}"


def training_section(result: Result) -> str:
    """Whole training steps, or the largest batches."""
    title = f"## {result['kind'].capitalize()}: {device(result)}"
    return "\n\n".join([title, caption(result), training_tables.table(result)])


def plain_section(result: Result) -> str:
    """A kind that has no section of its own: the scalars of its rows."""
    names = list(dict.fromkeys(k for row in result["rows"] for k, v in row.items() if not isinstance(v, (dict, list))))
    rows = [names, *([_scalar(row.get(name)) for name in names] for row in result["rows"])]
    parts = [f"## {result['kind']}: {device(result)}", caption(result), table(rows) if names else "No rows."]
    return "\n\n".join(part for part in parts if part)


SECTIONS: dict[str, Callable[[Result], str]] = {
    "head": head_section,
    "encode": encode_section,
    "screening": screening_tables.section,
    "margins": margins_tables.section,
    "backward": backward_section,
    "short-sequences": short_sequences_tables.section,
    "flops": flops_section,
    "training": training_section,
    "limits": training_section,
    "compaction": plain_section,
    "resources": resources_section,
}


def caption(result: Result) -> str:
    """Machine, versions, commit, command; and whether the machine was quiet."""
    environment = result.get("environment")
    if not environment:
        return ""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    driver = f", driver {environment['driver']}, CUDA {environment['cuda']}" if environment.get("driver") else ""
    text = (
        f"{device(result)}{driver}; python {environment['python']}, {packages}; commit {environment['commit']}. "
        f"Command: `{result.get('command', '')}`; file `bench/results/{result['file']}`."
    )
    if "load_average" in result:
        text += f" Load average of the machine at the start: {result['load_average']:.1f}."
    if any(_beside_others(row) for row in result["rows"]):
        text += f" \\* other programs kept more than {BUSY_PROCESSORS} processors busy meanwhile."
    if result.get("left_out"):
        text += f" Left out: {'; '.join(map(left_out_text, result['left_out']))}."
    return text


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def replace_block(text: str, block: str) -> str:
    """The text with what lies between the markers, first and last line of the block, replaced by the block.

    Raises:
        ValueError: a marker is missing.
    """
    begin, *_, end = block.split("\n")
    if begin not in text or end not in text:
        raise ValueError(f"expected the markers {begin!r} and {end!r}")
    return text[: text.index(begin)] + block + text[text.index(end) + len(end) :]


def _picture(figure: str) -> str:
    shows = "Screening against the share of active pairs" if figure.endswith("-shares.png") else "Cost against one size"
    return f"![{shows}]({figure})"


def grouped(rows: Sequence[Row], key: str = "case") -> list[tuple[str, str, str, dict[str, Row]]]:
    """``(case, precision, job, variants by name)`` in the order of the rows."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row[key], row["precision"], row["job"]), {})[row["variant"]] = row
    return [(*names, variants) for names, variants in found.items()]


def _table(result: Result, precision: str, job: str) -> list[tuple[str, dict[str, Row]]]:
    """Named cases and their variants; a GooAQ step is its two batches together."""
    found = {
        case: variants
        for case, mode, passes, variants in grouped(result["rows"])
        if (mode, passes) == (precision, job) and not case.startswith("curve")
    }
    if all(name in found for name in GOOAQ):
        both = [found[name] for name in GOOAQ]
        found = {"gooaq": {name: _sum([part[name] for part in both]) for name in both[0]}} | found
    labels = {case: f"{case} ({next(iter(rows.values()))['shape']})" for case, rows in found.items() if case != "gooaq"}
    return [(labels.get(case, "gooaq (both batches)"), variants) for case, variants in found.items()]


def _sum(rows: Sequence[Row]) -> Row:
    total: Row = {"status": next((row["status"] for row in rows if row["status"] != "measured"), "measured")}
    # As many rounds as both have.
    total["samples"] = [sum(pair) for pair in zip(*(row.get("samples") or [] for row in rows), strict=False)]
    for name in ("median", "operations", "bytes"):
        values = [row[name] for row in rows]
        total[name] = None if None in values else sum(values)
    memory = [row["extra_bytes"] for row in rows]
    busiest = max(rows, key=lambda row: row.get("others") or 0)
    shared = {"clock": busiest.get("clock"), "others": busiest.get("others")}
    return total | shared | {"extra_bytes": None if None in memory else max(memory)}


def _short(case: str, variants: dict[str, Row]) -> list[list[str]]:
    if case.split(" ")[0] not in README_CASES or "stock" not in variants:
        return []
    stock, ours = variants["stock"], variants["ours"]
    cells = [f"{cell(row)} ms" if row.get("median") else cell(row) for row in (stock, ours)]
    return [[case, *cells, speedup(stock, ours), *(mebibytes(row) for row in (stock, ours))]]


def _memory(result: Result, precision: str) -> list[str]:
    rows = [
        ["case", *(f"{job.replace('_', ' and ')}, {name}" for job in roofline.PASSES for name in ("stock", "ours"))]
    ]
    jobs = [dict(_table(result, precision, job)) for job in roofline.PASSES]
    for case in jobs[0]:
        cells = [mebibytes(job.get(case, {}).get(name)) for job in jobs for name in ("stock", "ours")]
        if any(cell != "-" for cell in cells):
            rows.append([case, *cells])
    return [f"### {EXTRA_MEMORY.capitalize()}, {precision}, MiB", table(rows)] if rows[1:] else []


def _checks(result: Result) -> str:
    ours = [row for row in result["rows"] if row["variant"] == "ours"]
    repeated = sum(bool(row["repeatable"]) for row in ours)
    red = [row for row in ours if row["status"].startswith(("red", "failed"))]
    wrong = [f"{row['case']} {row['precision']} {row['job']}: {row['status']}" for row in red]
    text = f"Of {len(ours)} results of ours, two runs were identical to the bit in {repeated}; {len(wrong)} were wrong."
    absent = {row["variant"]: row["status"] for row in result["rows"] if row["status"].startswith("not here")}
    lines = [f"- {line}" for line in wrong] + [f"- {name} {status}" for name, status in absent.items()]
    return "\n".join([text, *([""] if lines else []), *lines])


def cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["median"] is not None:
        mark = "\\*" if _beside_others(row) else ""
        return (f"{row['median'] * 1e3:.3g}" if row["median"] < 1 else f"{row['median'] * 1e3:,.0f}") + mark
    return str(row["status"]).split(":")[0]


def _beside_others(row: Row) -> bool:
    return bool(row.get("clock") == "perf_counter" and (row.get("others") or 0) > BUSY_PROCESSORS)


def mebibytes(row: Row | None) -> str:
    return "-" if not row or row.get("extra_bytes") is None else f"{row['extra_bytes'] / 2**20:,.0f} MiB"


def _scalar(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _work(row: Row) -> Work | None:
    return Work(row["operations"], row["bytes"]) if row.get("operations") else None


def _machine(result: Result, precision: str) -> Machine:
    rates = result["machine"][precision]
    return Machine(device(result), rates["bytes_per_second"], rates["operations_per_second"])


def _first(result: Result) -> str:
    return str(next(iter(result["machine"])))


def device(result: Result) -> str:
    environment = result.get("environment", {})
    if environment.get("gpu") or "threads" not in environment:
        return str(environment.get("device", result["file"]))
    return f"{environment['device']} ({environment['cpu_capability']}), {environment['threads']} threads"


def _on_gpu(results: Sequence[Result]) -> bool:
    return any(result.get("environment", {}).get("gpu") for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("bench/RESULTS.md"))
    parser.add_argument("--readme", type=Path, help="replace the block between its markers")
    parser.add_argument("--screening", type=Path, help="docs/screening.md: replace the block between its markers")
    parser.add_argument("--figures", type=Path, help="folder for the plots; needs matplotlib")
    args = parser.parse_args()
    results = load(args.results)
    figures: list[Path] = []
    if args.figures:
        from bench.tables.figures import plot_curves, plot_shares

        figures = sorted([*plot_curves(results, args.figures), *plot_shares(results, args.figures)])

    def links(document: Path) -> list[str]:
        return [os.path.relpath(path, document.parent) for path in figures]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(render(results, links(args.output)))
    if args.readme:
        args.readme.write_text(replace_block(args.readme.read_text(), readme_block(results, links(args.readme))))
    if args.screening:
        args.screening.write_text(replace_block(args.screening.read_text(), screening_block(results)))


if __name__ == "__main__":
    main()
