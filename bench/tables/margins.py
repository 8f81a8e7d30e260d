"""What the bounds of a margins result leave over, for docs/screening.md and RESULTS.md."""

from __future__ import annotations

from typing import Any

from bench import screening_model

Row = dict[str, Any]


def section(result: dict[str, Any]) -> str:
    from bench import report

    return "\n\n".join(["## What int8 bounds leave over", report.caption(result), tables(result)])


def block(result: dict[str, Any]) -> str:
    """The tables and where they are from."""
    left_out = f" Left out: {'; '.join(result['left_out'])}." if result["left_out"] else ""
    source = f"`{result['command']}`, commit {result['environment']['commit']}: `bench/results/{result['file']}`."
    return f"{tables(result)}\n\n{source}{left_out}"


def tables(result: dict[str, Any]) -> str:
    """What each criterion leaves with one scale a row, and what both leave with more."""
    from bench import report

    groups: dict[tuple[str, int], dict[int, Row]] = {}
    for row in result["rows"]:
        groups.setdefault((row["case"], row["levels"]), {})[row["blocks"]] = row
    if not groups:
        return "No rows."
    blocks = list(next(iter(groups.values())))
    left = ["groups", "tokens", "tokens an active pair"]
    criteria = [["case", "active pairs", "levels", "bound", "relu: pairs", *left, "both: groups", *left[1:]]]
    scales = [["case", "levels", *(f"{n} scale{'s' if n > 1 else ''}: bound, tokens" for n in blocks)]]
    for (case, levels), found in groups.items():
        row = found[1]
        criteria.append([case, f"{row['active_pairs']:.2%}", str(levels), f"{row['bound']:.2f}"])
        criteria[-1].append(f"{row['relu_pairs']:.2%}")
        for name in ("relu", "best"):
            criteria[-1] += [f"{row[f'{name}_groups']:.2%}", f"{row[f'{name}_tokens']:.3%}", _dots(row, name)]
        cells = (f"{found[n]['bound']:.2f}, {found[n]['best_tokens']:.3%}" for n in blocks)
        scales.append([case, str(levels), *cells])
    shapes = {row["case"]: f"{row['case']} {row['shape']}" for row in result["rows"]}
    note = (
        "Left over with one scale a row, by relu and by both criteria: shares of the (sequence, word), (group of 16 "
        "tokens, word) and (token, word) pairs, and (token, word) pairs for each active (sequence, word) pair. Both "
        "leave the same (sequence, word) pairs as relu. `bound`: its mean in standard deviations of the dots. "
        f"{'; '.join(shapes.values())}; a third of the tokens is padding, which is not counted."
    )
    more = "More scales a row, one for each block of the hidden size; (token, word) pairs that both criteria leave:"
    if "trained_model" in result:
        note += f" {screening_model.describe(result['trained_model'])}"
    return "\n\n".join([note, report.table(criteria), more, report.table(scales)])


def _dots(row: Row, name: str) -> str:
    dots = row[f"{name}_tokens_per_active_pair"]
    return "-" if dots is None else f"{dots:.2f}"
