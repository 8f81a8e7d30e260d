"""Tables of :mod:`bench.numerics`, for docs/numerics.md."""

from __future__ import annotations

from bench.jobs.numerics import ERRORS
from bench.tables.markdown import Result, Row, caption, joined, section, table

LABELS = {
    "stock": "stock",
    "compile": "`torch.compile` of stock",
    "unscreened": "ours, `screening=False`",
    "ours": "ours",
    "screened": "ours, `screening=True`",
}
HEADER = ["precision", "head", "values", "wrong tokens", "hidden states' gradient", "weight's", "bias's"]


def numerics_block(result: Result) -> str:
    """What a device's result says, and where it is from."""
    return joined(numerics_table(result), caption(result))


def numerics_section(result: Result) -> str:
    return section("Distance from float64", result, "Tables: [docs/numerics.md](../docs/numerics.md).")


def numerics_table(result: Result) -> str:
    """A table for each shape."""
    shapes: dict[str, list[Row]] = {}
    for row in result["rows"]:
        shapes.setdefault(row["shape"], []).append(row)
    parts = []
    for shape, rows in shapes.items():
        lines = [HEADER]
        for row in rows:
            found = [_cell(name, row["errors"][name]) for name in ERRORS if row["errors"]]
            lines.append([row["precision"], LABELS[row["variant"]], *(found or [row["status"], "", "", "", ""])])
        parts.append(joined(f"{shape}:", table(lines)))
    return joined(*parts)


def _cell(name: str, error: float) -> str:
    return f"{error:.3%}" if name == "wrong_tokens" else f"{error:.1e}"
