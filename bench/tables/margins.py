"""What the bounds of a margins result leave over, for docs/screening.md and RESULTS.md."""

from __future__ import annotations

from bench.inputs import text_model
from bench.tables.markdown import Result, Row, caption, joined, table


def margins_section(result: Result) -> str:
    return joined("## What int8 bounds leave over", caption(result), tables(result))


def margins_block(result: Result) -> str:
    """The table and where it is from."""
    return joined(tables(result), caption(result))


def tables(result: Result) -> str:
    """What each criterion leaves."""
    if not result["rows"]:
        return "No rows."
    left = ["groups", "tokens", "tokens an active pair"]
    rows = [["case", "active pairs", "levels", "bound", "relu: pairs", *left, "both: groups", *left[1:]]]
    for row in result["rows"]:
        rows.append([row["case"], f"{row['active_pairs']:.2%}", str(row["levels"]), f"{row['bound']:.2f}"])
        rows[-1].append(f"{row['relu_pairs']:.2%}")
        for name in ("relu", "best"):
            rows[-1] += [f"{row[f'{name}_groups']:.2%}", f"{row[f'{name}_tokens']:.3%}", _dots(row, name)]
    shapes = dict.fromkeys(f"{row['case']} {row['shape']}" for row in result["rows"])
    note = (
        "What relu alone and both criteria leave, in shares of the (sequence, vocabulary entry), (group of 16 tokens, "
        "vocabulary entry) and (token, vocabulary entry) pairs, and (token, vocabulary entry) pairs for each active "
        "(sequence, vocabulary entry) pair. Both leave the same (sequence, vocabulary entry) pairs as relu. `bound`: "
        f"its mean in standard deviations of the dots. {'; '.join(shapes)}; a third of the tokens is padding, which is "
        "not counted."
    )
    records = [run["trained_model"] for run in result["runs"] if "trained_model" in run]
    return joined(" ".join([note, *dict.fromkeys(map(text_model.describe, records))]), table(rows))


def _dots(row: Row, name: str) -> str:
    dots = row[f"{name}_tokens_per_active_pair"]
    return "-" if dots is None else f"{dots:.2f}"
