"""Markdown tables of results of :mod:`bench.training` and :mod:`bench.limits`, and hours predicted from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bench.inputs import encoders
from bench.tables.markdown import Result, Row, joined, table

# The run of the model card tomaarsen/splade-distilbert-base-uncased-gooaq on one RTX 3090.
SEED_RUN = {"steps": 94_110, "pairs_per_batch": 32, "max_length": 256, "hours_on_its_rtx_3090": 3.894}
# Below this share of a step in which the GPU computes, the wall clock is the host's.
LEAST_BUSY = 1 / 3


def training_table(result: Result) -> str:
    # The ratio is that of the device's own time: the wall clock includes the host and, on a CPU, all other programs.
    on_gpu = any(row.get("gpu_ms_per_step") for row in result["rows"])
    time = "gpu_ms_per_step" if on_gpu else "cpu_ms_per_step"
    rows = [[
        "model", "texts", "active terms", "checkpointing", "step, ms: stock", "fused",
        f"{'GPU' if on_gpu else 'CPU'} time, ms: stock", "fused", "stock / fused", "peak, MiB: stock", "fused",
    ]]  # fmt: skip
    keys = ("model", "layers", "hidden_size", "vocab_size", "pairs_per_batch", "max_length", "lengths", "active_terms")
    for stock, fused in _pairs(result["rows"], (*keys, "gradient_checkpointing", "precision")):
        texts = "GooAQ's lengths" if fused["lengths"] == "gooaq" else f"all of {fused['max_length']} tokens"
        rows.append(
            [
                f"{fused['model']}, {fused['layers']} layers, {fused['hidden_size']} wide, V {fused['vocab_size']}",
                f"{fused['pairs_per_batch']} pairs, {fused['precision']}, {texts}",
                "all" if fused["active_terms"] is None else f"about {fused['active_terms']}",
                "on" if fused["gradient_checkpointing"] else "off",
                *(_cell(row, "wall_ms_per_step") for row in (stock, fused)),
                *(_cell(row, time) for row in (stock, fused)),
                _ratio(stock, fused, time),
                *(_cell(row, "peak_memory_mib", 0) for row in (stock, fused)),
            ]
        )
    return joined(table(rows), *predictions(result["rows"]))


def predictions(rows: Sequence[Row]) -> Iterator[str]:
    """Hours of the seed's run on this GPU: its number of steps times the wall clock of a measured one.

    Only steps like its own count: DistilBERT in full size, batches of 32 pairs with GooAQ's lengths, bf16. Evaluation,
    which the hours of the model card may contain, is left out.
    """
    size = encoders.SIZES["distilbert"]
    like_seed = {
        "model": "distilbert", "layers": size.layers, "hidden_size": size.hidden_size, "lengths": "gooaq",
        "precision": "bf16", "gradient_checkpointing": False, "pairs_per_batch": SEED_RUN["pairs_per_batch"],
        "max_length": SEED_RUN["max_length"], "device": "cuda", "out_of_memory": False,
    }  # fmt: skip
    alike = [row for row in rows if all(row.get(key) == value for key, value in like_seed.items())]
    for stock, fused in _pairs(alike, ("active_terms",)):
        if stock:
            terms = fused["active_terms"]
            active = "every term active" if terms is None else f"about {terms} active terms"
            measured = [row for row in (stock, fused) if row["gpu_ms_per_step"]]
            busy = [row["gpu_ms_per_step"] / row["wall_ms_per_step"] for row in measured]
            if busy and min(busy) < LEAST_BUSY:
                yield (
                    f"The GooAQ run with {active} is not predicted for {fused['run']['environment']['device']}: the "
                    f"GPU computes for {', '.join(f'{share:.0%}' for share in busy)} of a step (stock, fused), and the "
                    "wall clock is that of the host, on which other work of the trainer weighs more than the head."
                )
                continue
            hours = [SEED_RUN["steps"] * row["wall_ms_per_step"] / 3.6e6 for row in (stock, fused)]
            yield (
                f"Predicted for {fused['run']['environment']['device']}, not run: {SEED_RUN['steps']:,} steps of the "
                f"GooAQ run with {active} take {hours[0]:.2f} h stock and {hours[1]:.2f} h fused "
                f"({hours[0] / hours[1]:.2f}x), evaluation left out. The run of the model card took "
                f"{SEED_RUN['hours_on_its_rtx_3090']} h on its RTX 3090."
            )


def limits_table(result: Result) -> str:
    rows = [["model", "tokens", "checkpointing", "attention, optimizer", "pairs: stock", "fused", "fused / stock"]]
    for stock, fused in _pairs(result["rows"], ("model", "vocab_size", "max_length", "gradient_checkpointing")):
        rows.append(
            [
                f"{fused['model']}, {fused['layers']} layers, V {fused['vocab_size']}",
                str(fused["max_length"]),
                "on" if fused["gradient_checkpointing"] else "off",
                f"{fused['attention']}, {fused['optimizer']}",
                *(_cell(row, "largest_pairs", 0) for row in (stock, fused)),
                _ratio(fused, stock, "largest_pairs"),
            ]
        )
    run = result["runs"][-1]
    limit = run["limit"]
    note = (
        f"Largest batch, in pairs of texts with every token real, whose training step fits {limit['total_gib']} GiB "
        f"less {limit['allowance_gib']} GiB for the context, {limit['precision']}, found to within "
        f"{limit['resolution']:.0%}; the GPU was {run['environment']['device']}, held to that share of its memory."
    )
    return joined(table(rows), note)


def _pairs(rows: Iterable[Row], keys: Sequence[str]) -> Iterable[tuple[Row | None, Row]]:
    """Stock and fused rows of the same case, in the order of the fused ones; None where stock has not been measured."""
    stock = {tuple(row[key] for key in keys): row for row in rows if row["head"] == "stock"}
    for row in rows:
        if row["head"] == "fused":
            yield stock.get(tuple(row[key] for key in keys)), row


def _cell(row: Row | None, key: str, digits: int = 1) -> str:
    if row is not None and row.get("out_of_memory"):
        return "out of memory"
    value = row.get(key) if row else None
    return "-" if value is None else f"{value:,.{digits}f}"


def _ratio(top: Row | None, bottom: Row | None, key: str) -> str:
    above, below = (row.get(key) if row else None for row in (top, bottom))
    return f"{above / below:.2f}x" if above and below else "-"
