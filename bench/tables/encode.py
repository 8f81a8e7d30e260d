"""Whole encodes: stock against fused, and every other way to encode beside the fused one."""

from __future__ import annotations

from bench.jobs.encode import INT8
from bench.tables.markdown import Result, Row, caption, cell, checks, grouped, mebibytes, section, table
from bench.tables.ratios import speedup

# The ways to encode, in the order of the table.
WAYS = {
    "stock": "`encode`, stock",
    "ours": "`encode`, fused",
    "encode_sparse": "`encode_sparse`, fused",
    "command": "`splade-kernels encode`, a part",
    "onnx": "ONNX Runtime",
    "onnx-int8": "ONNX Runtime, int8",
    "onnx-encoder": "int8 encoder in ONNX Runtime, exact head",
}


def encode_section(result: Result) -> str:
    return section("Whole `encode`", result, encodes(result), ways(result), checks(result))


def encode_part(result: Result) -> list[str]:
    """What the README shows of an encode result."""
    return [encodes(result), ways(result), caption(result)]


def encodes(result: Result) -> str:
    """Stock and fused encodes: seconds, and what the process grew by."""
    memory = "peak memory beyond the loaded model"
    rows = [["sentence-transformers' `encode`", "stock", "fused", "", f"{memory}, stock", "fused"]]
    for case, precision, _, variants in grouped(result["rows"]):
        stock, ours = variants.get("stock"), variants.get("ours")
        if stock is None or ours is None:
            continue
        memories = [mebibytes(row) for row in (stock, ours)]
        first = f"{case}: {ours['shape']}, {precision}"
        rows.append([first, *map(_seconds, (stock, ours)), speedup(stock, ours), *memories])
    return table(rows)


def ways(result: Result) -> str:
    """Every way to encode, of all precisions; nothing where there are only stock and fused ones in one of them."""
    rows = [["case", "", "precision", "time", "against stock float32", "against fused bf16", "relative error"]]
    cases: dict[str, list[Row]] = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], []).append(row)
    for case, found in cases.items():
        if all(row["variant"] in ("stock", "ours") for row in found):
            continue
        by_name = {(row["variant"], row["precision"]): row for row in found}
        yardsticks = [by_name.get(name) for name in (("stock", "float32"), ("ours", "bf16"))]
        for row in sorted(found, key=lambda row: list(WAYS).index(row["variant"])):
            precision = "int8" if row["variant"] in INT8 else row["precision"]
            ratios = ["-" if row is other else speedup(other, row) for other in yardsticks]
            error = f"{row['errors']['output']:.1e}" if "output" in row["errors"] else "-"
            rows.append([case, WAYS[row["variant"]], precision, _seconds(row), *ratios, error])
    return table(rows) if len(rows) > 1 else ""


def _seconds(row: Row) -> str:
    return f"{row['median']:.3g} s" if row["median"] else cell(row)
