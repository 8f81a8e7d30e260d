"""What a call of ours adds, in microseconds (:mod:`bench.overhead`)."""

from __future__ import annotations

from bench.tables.markdown import Result, Row, section, table

LABELS = {
    "by-hand": "body and `splade_pool` by hand",
    "handed-over": "the model's own forward, then `splade_pool`",
    "encoder": "`SpladeEncoder`",
    "stock": "`SparseEncoder`, stock",
    "fused": "`SparseEncoder`, fused",
}


def overhead_section(result: Result) -> str:
    return section("Overhead of a call", result, overhead_table(result))


def overhead_table(result: Result) -> str:
    lines = [["model", "", "µs a call", "added, processor time", "added, wall clock", "rounds"]]
    for row in result["rows"]:
        lines.append([row["case"], LABELS[row["variant"]], *_cells(row)])
    return table(lines)


def _cells(row: Row) -> list[str]:
    if row["status"] != "measured":
        return [row["status"], "", "", ""]
    added = [f"{row[name] * 1e6:+.0f} µs" if row[name] is not None else "" for name in ("added_cpu", "added_wall")]
    return [f"{row['median'] * 1e6:,.0f}", *added, str(row["rounds"])]
