"""Markdown tables of results of :mod:`bench.training` and :mod:`bench.limits`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def table(result: dict[str, Any]) -> str:
    """The tables of one result, by its ``kind``: "training" or "limits"."""
    makers: dict[str, Callable[[dict[str, Any]], str]] = {"training": _training, "limits": _limits}
    if result.get("kind") not in makers:
        raise ValueError(f"kind: expected one of {sorted(makers)}, got {result.get('kind')!r}")
    return makers[result["kind"]](result)


def _training(result: dict[str, Any]) -> str:
    # The ratio is that of the device's own time: the wall clock has the host in it, and on a CPU whatever else runs.
    on_gpu = any(_value(row, "gpu_ms_per_step") for row in result["rows"])
    time = "gpu_ms_per_step" if on_gpu else "cpu_ms_per_step"
    header = [
        "model", "texts", "active terms", "checkpointing", "step, ms: stock", "fused",
        f"{'GPU' if on_gpu else 'CPU'} time, ms: stock", "fused", "stock / fused", "peak, MiB: stock", "fused",
    ]  # fmt: skip
    keys = ("model", "layers", "hidden_size", "vocab_size", "pairs_per_batch", "max_length", "lengths", "active_terms")
    lines = []
    for stock, fused in _pairs(result["rows"], (*keys, "gradient_checkpointing", "precision")):
        lines.append(
            [
                f"{fused['model']}, {fused['layers']} layers, {fused['hidden_size']} wide, V {fused['vocab_size']}",
                f"{fused['pairs_per_batch']} pairs, {fused['precision']}, "
                + ("GooAQ's lengths" if fused["lengths"] == "gooaq" else f"all of {fused['max_length']} tokens"),
                "all" if fused["active_terms"] is None else f"about {fused['active_terms']}",
                "on" if fused["gradient_checkpointing"] else "off",
                _cell(stock, "wall_ms_per_step"),
                _cell(fused, "wall_ms_per_step"),
                _cell(stock, time),
                _cell(fused, time),
                _ratio(_value(stock, time), _value(fused, time)),
                _cell(stock, "peak_memory_mib", 0),
                _cell(fused, "peak_memory_mib", 0),
            ]
        )
    parts = [_markdown(header, lines)]
    seed = result["seed_run"]
    for row in result["predictions"]:
        active = "every word active" if row["active_terms"] is None else f"about {row['active_terms']} active terms"
        stock, fused = row["stock_hours"], row["fused_hours"]
        parts.append(
            f"Predicted for {row['predicted_for']}, not run: {row['steps']:,} steps of the GooAQ run with {active} "
            f"take {stock:.2f} h stock and {fused:.2f} h fused ({stock / fused:.2f}x), evaluation left out. "
            f"The run of the model card took {seed['hours_on_its_rtx_3090']} h on its RTX 3090."
        )
    return "\n\n".join(parts)


def _limits(result: dict[str, Any]) -> str:
    header = ["model", "tokens", "checkpointing", "attention, optimizer", "pairs: stock", "fused", "fused / stock"]
    lines = []
    for stock, fused in _pairs(result["rows"], ("model", "vocab_size", "max_length", "gradient_checkpointing")):
        lines.append(
            [
                f"{fused['model']}, {fused['layers']} layers, V {fused['vocab_size']}",
                str(fused["max_length"]),
                "on" if fused["gradient_checkpointing"] else "off",
                f"{fused['attention']}, {fused['optimizer']}",
                _cell(stock, "largest_pairs", 0),
                _cell(fused, "largest_pairs", 0),
                _ratio(_value(fused, "largest_pairs"), _value(stock, "largest_pairs")),
            ]
        )
    limit = result["limit"]
    note = (
        f"Largest batch, in pairs of texts with every token real, whose training step fits {limit['total_gib']} GiB "
        f"less {limit['allowance_gib']} GiB for the context, {limit['precision']}, found to within "
        f"{limit['resolution']:.0%}; the GPU was {result['environment']['device']}, held to that share of its memory."
    )
    return f"{_markdown(header, lines)}\n\n{note}"


def _pairs(rows: Iterable[Row], keys: Sequence[str]) -> Iterable[tuple[Row | None, Row]]:
    """Stock and fused rows of the same case, in the order of the fused ones; None where stock has not been measured."""
    stock = {tuple(row[key] for key in keys): row for row in rows if row["head"] == "stock"}
    for row in rows:
        if row["head"] == "fused":
            yield stock.get(tuple(row[key] for key in keys)), row


def _value(row: Row | None, key: str) -> float | None:
    return None if row is None else row.get(key)


def _cell(row: Row | None, key: str, digits: int = 1) -> str:
    if row is not None and row.get("out_of_memory"):
        return "out of memory"
    value = _value(row, key)
    return "-" if value is None else f"{value:,.{digits}f}"


def _ratio(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}x" if numerator and denominator else "-"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
