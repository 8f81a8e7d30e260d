"""What screening costs (times of inference and training, survivors, memory, whole ``encode`` runs), and what the bounds
of a margins result leave over, for docs/screening.md and RESULTS.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.inputs import text_model, variants
from bench.tables.markdown import (
    Result,
    caption,
    cell,
    checks,
    grouped,
    joined,
    mebibytes,
    precisions,
    section,
    table,
)  # fmt: skip
from bench.tables.ratios import against, speedup

INFERENCE = (*variants.SCREENING, "matmul-real")
MODES = ("stock", *variants.MODES)
# As the tables call them.
LABELS = {"ours": "auto", "screened-first": "screened, first call", "matmul-real": "matmul of the real tokens"}
NOTE = (
    "`active`: share of the (sequence, vocabulary entry) pairs; `computed`: share of the (real token, vocabulary "
    "entry) pairs whose dot is computed exactly when screened. Auto decides from the inputs of the call whether to "
    "screen; on a GPU it does not screen where no checked-in result of the architecture says that it pays. In "
    "inference the quantised weight is cached by earlier calls; a first call quantises it, and the memory is a first "
    "call's. In training every step quantises it anew, within the time shown."
)


def screening_section(result: Result) -> str:
    parts = [NOTE]
    environment = result["runs"][0]["environment"] if result["runs"] else {}
    if environment.get("cpu_flags") and not environment.get("gpu"):
        parts.append(f"Vector instructions of this CPU: {' '.join(environment['cpu_flags'])}.")
    parts += text_model.describe(result["runs"])
    for precision in precisions(result):
        groups: dict[str, list[Any]] = {}
        for one in grouped([row for row in result["rows"] if row["precision"] == precision]):
            groups.setdefault(one[2], []).append(one)
        forwards = groups.get("forward", [])
        for title, rows in (
            ("Head alone, inference, {}, milliseconds", _times(forwards, INFERENCE)),
            ("Head alone, training, {}, milliseconds", _times(groups.get("forward_backward", []), MODES)),
            ("Peak memory beyond inputs and outputs, {}, MiB", _memory(forwards)),
            ("Whole `encode`, {}, texts a second", _texts(groups.get("encode", []))),
        ):
            parts += [f"### {title.format(precision)}", table(rows)] if rows[1:] else []
    return section("Exact screening", result, *parts, checks(result, variants.OURS))


def _times(groups: list[Any], names: Sequence[str]) -> list[list[str]]:
    compared = ["screened against unscreened", "auto against unscreened", "screened against stock"]
    compared += ["first call against unscreened", "against matmul"] if names == INFERENCE else []
    rows = [["case", "active", "computed", *(LABELS.get(name, name) for name in names), *compared]]
    for case, _, _, found in groups:
        any_row = next(iter(found.values()))
        screened, unscreened = found.get("screened"), found.get("unscreened")
        computed = screened.get("survivors") if screened else None
        cells = [
            f"{case} ({any_row['shape']})",
            f"{any_row['active_share']:.2%}",
            "-" if computed is None else f"{computed:.3%}",
            *(cell(found.get(name)) for name in names),
            speedup(unscreened, screened),
            against(found.get("ours"), unscreened, "x the time"),
            speedup(found.get("stock"), screened),
        ]
        if names == INFERENCE:
            first, floor = found.get("screened-first"), found.get("matmul-real")
            cells += [speedup(unscreened, first), against(screened, floor, "x the time")]
        rows.append(cells)
    return rows


def _memory(groups: list[Any]) -> list[list[str]]:
    rows = [["case", *(LABELS.get(name, name) for name in MODES)]]
    for case, _, _, found in groups:
        cells = [mebibytes(found.get(name)) for name in MODES]
        if any(cell != "-" for cell in cells):
            rows.append([case, *cells])
    return rows


def _texts(groups: list[Any]) -> list[list[str]]:
    names = [LABELS.get(name, name) for name in MODES]
    rows = [["case", "active", *names, "auto against unscreened", "auto against stock"]]
    for case, _, _, found in groups:
        any_row = next(iter(found.values()))
        rates = [
            f"{row['texts'] / row['median']:,.1f}" if row and row["median"] else cell(row)
            for row in map(found.get, MODES)
        ]
        compared = [speedup(found.get(name), found.get("ours")) for name in ("unscreened", "stock")]
        rows.append([f"{case} ({any_row['shape']})", f"{any_row['active_share']:.2%}", *rates, *compared])
    return rows


def margins_section(result: Result) -> str:
    return joined("## What int8 bounds leave over", caption(result), margins_table(result))


def margins_block(result: Result) -> str:
    """The table and where it is from."""
    return joined(margins_table(result), caption(result))


def margins_table(result: Result) -> str:
    """What each criterion leaves."""
    if not result["rows"]:
        return "No rows."
    left = ["groups", "tokens", "tokens an active pair"]
    rows = [["case", "active pairs", "levels", "bound", "relu: pairs", *left, "both: groups", *left[1:]]]
    for row in result["rows"]:
        rows.append([row["case"], f"{row['active_pairs']:.2%}", str(row["levels"]), f"{row['bound']:.2f}"])
        rows[-1].append(f"{row['relu_pairs']:.2%}")
        for name in ("relu", "best"):
            dots = row[f"{name}_tokens_per_active_pair"]
            rows[-1] += [f"{row[f'{name}_groups']:.2%}", f"{row[f'{name}_tokens']:.3%}"]
            rows[-1].append("-" if dots is None else f"{dots:.2f}")
    shapes = dict.fromkeys(f"{row['case']} {row['shape']}" for row in result["rows"])
    note = (
        "What relu alone and both criteria leave, in shares of the (sequence, vocabulary entry), (group of 16 tokens, "
        "vocabulary entry) and (token, vocabulary entry) pairs, and (token, vocabulary entry) pairs for each active "
        "(sequence, vocabulary entry) pair. Both leave the same (sequence, vocabulary entry) pairs as relu. `bound`: "
        f"its mean in standard deviations of the dots. {'; '.join(shapes)}; a third of the tokens is padding, which is "
        "not counted."
    )
    return joined(" ".join([note, *text_model.describe(result["runs"])]), table(rows))
