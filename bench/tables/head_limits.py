"""What fits into 24 GiB: memory of the head's forward and backward from a formula, held against what was measured.

Both heads hold h, dh, W, dW, y and dy. Beyond that the dense head holds ``STOCK_LOGITS`` copies of the logits
``[B, S, V]``, the fused head an index and the gradient of each ``[b, v]`` and slices of fixed size. Nothing of the
encoder is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.harness.roofline import logits_bytes
from bench.inputs.cases import PRECISIONS, Case, Precision

BUDGET_BYTES = 24 << 30
# Copies of the logits, in the dtype of the product, at the peak of the dense head's step, which lies in the backward:
# the saved masked logits and the gradients of max and of log1p. Autocast runs log1p in float32: a copy of its input and
# both gradients are then twice as wide.
STOCK_LOGITS = {"float32": 3, "tf32": 3, "bf16": 3, "bf16-autocast": 7}
FUSED_ENTRY_BYTES = 8
FUSED_SLICES_BYTES = 128 << 20
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
LENGTHS = (64, 128, 256, 512, 2048, 8192)


def extra_bytes(case: Case, precision: Precision, variant: str) -> int:
    """Beyond inputs, outputs and gradients: of ``stock`` an estimate, of ``ours`` a bound."""
    cast = 2 * case.vocab_size * case.hidden_size if precision.autocast else 0
    if variant == "stock":
        return STOCK_LOGITS[precision.name] * logits_bytes(case, precision) + cast
    return FUSED_ENTRY_BYTES * case.batch_size * case.vocab_size + FUSED_SLICES_BYTES + cast


def held_bytes(case: Case, precision: Precision) -> int:
    """h and W with their gradients, y and dy."""
    matrices = (case.batch_size * case.length + case.vocab_size) * case.hidden_size * precision.dtype.itemsize
    return 2 * matrices + 2 * case.batch_size * case.vocab_size * precision.out_dtype.itemsize


def largest_batch(length: int, vocab_size: int, precision: Precision, variant: str) -> int:
    """Largest batch whose head fits into ``BUDGET_BYTES``: the formula is linear in the batch."""

    def needed(batch_size: int) -> int:
        case = Case("", batch_size, length, vocab_size=vocab_size)
        return held_bytes(case, precision) + extra_bytes(case, precision, variant)

    fixed = needed(0)
    return max(0, (BUDGET_BYTES - fixed) // (needed(1) - fixed))


def section(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and how far the formula is from every measured row."""
    from bench.report import table

    precision = PRECISIONS["bf16-autocast"]
    cells = [["tokens", *(f"V {size:,}, {name}" for size in (30522, 250002) for name in ("stock", "fused"))]]
    for length in LENGTHS:
        batches = [
            largest_batch(length, size, precision, name) for size in (30522, 250002) for name in ("stock", "ours")
        ]
        cells.append([str(length), *(f"{batch:,}" for batch in batches)])
    formula = f"Forward and backward, {precision.name}, hidden size 768, by the formula of `bench/head_limits.py`."
    title = "## Largest batch of the head alone in 24 GiB: computed"
    return "\n\n".join([title, f"{formula} {_check(rows)}", table(cells)])


def _check(rows: Sequence[dict[str, Any]]) -> str:
    found: dict[str, list[float]] = {"stock": [], "ours": []}
    precisions = set()
    for row in rows:
        if row["job"] != "forward_backward" or row.get("extra_bytes") is None or row["variant"] not in found:
            continue
        sizes = {part[0]: int(part[1:]) for part in row["shape"].split()}
        case = Case(row["case"], sizes["B"], sizes["S"], sizes["D"], sizes["V"])
        formula = extra_bytes(case, PRECISIONS[row["precision"]], row["variant"])
        precisions.add(row["precision"])
        found[row["variant"]].append(row["extra_bytes"] / formula)
    if not found["stock"] or not found["ours"]:
        return "It has not been held against a measurement yet."
    stock, ours = found["stock"], found["ours"]
    return (
        f"Measured extra memory over the formula's ({', '.join(sorted(precisions))}): stock {min(stock):.2f} to "
        f"{max(stock):.2f} in {len(stock)} cases, fused (a bound) at most {max(ours):.2f} in {len(ours)}."
    )
