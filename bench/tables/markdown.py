"""Pieces that all tables are made of: Markdown, cells, captions, and the badge of what no GPU has measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.harness.environment import device_name
from bench.harness.result_file import is_wrong, left_out_text

Result = dict[str, Any]
Row = dict[str, Any]

NOT_ON_A_GPU = "**Not measured on a GPU yet.**"
# With more work of other programs than this, in processors, times on a CPU are marked.
BUSY_PROCESSORS = 0.2


def badge(results: Iterable[Result]) -> str:
    """``NOT_ON_A_GPU``, or nothing once a GPU has timed something; the tuner's results compare our own kernels only."""
    runs = (run for result in results if result["kind"] != "tuning" for run in result["runs"])
    return "" if any(run["environment"].get("gpu") for run in runs) else NOT_ON_A_GPU


def device(result: Result) -> str:
    """The device of a result, as titles have it."""
    return device_name(result["runs"][0]["environment"]) if result["runs"] else result["file"]


def section(title: str, result: Result, *parts: str) -> str:
    """A titled section with the caption of its result; empty parts are left out."""
    return joined(f"## {title}: {device(result)}", caption(result), *parts)


def joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def caption(result: Result) -> str:
    """Machine, versions, commit and command of the rows, by run; and whether the machine was quiet."""
    said: dict[str, list[str]] = {}
    for number, run in enumerate(result["runs"]):
        command = f"`{run['command']}`" if run.get("command") else "the command was not recorded"
        text = f"commit {run['environment']['commit']}, {command}"
        if "load_average" in run:
            text += f", load average at the start {run['load_average']:.1f}"
        if number:
            cases = dict.fromkeys(row.get("case", "") for row in result["rows"] if row["run"] is run)
            text = f"{', '.join(filter(None, cases))}: {text}"
        said.setdefault(machine(run["environment"]), []).append(text)
    if not said:
        return ""
    text = " ".join(f"{machine}; {'; '.join(texts)}." for machine, texts in said.items())
    text += f" File: `bench/results/{result['file']}`."
    if any(beside_others(row) for row in result["rows"]):
        text += f" \\* other programs kept more than {BUSY_PROCESSORS} processors busy meanwhile."
    if result.get("left_out"):
        text += f" Left out: {'; '.join(map(left_out_text, result['left_out']))}."
    return text


def machine(environment: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    driver = f", driver {environment['driver']}, CUDA {environment['cuda']}" if environment.get("driver") else ""
    return f"{device_name(environment)}{driver}; python {environment['python']}, {packages}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def replace_block(text: str, block: str) -> str:
    """The text with what lies between the markers, first and last line of the block, replaced by the block."""
    begin, *_, end = block.split("\n")
    if begin not in text or end not in text:
        raise ValueError(f"expected the markers {begin!r} and {end!r}")
    return text[: text.index(begin)] + block + text[text.index(end) + len(end) :]


def grouped(rows: Sequence[Row]) -> list[tuple[str, str, str, dict[str, Row]]]:
    """``(case, precision, job, variants by name)`` in the order of the rows."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["case"], row["shape"], row["precision"], row["job"]), {})[row["variant"]] = row
    return [(case, precision, job, variants) for (case, _, precision, job), variants in found.items()]


def precisions(result: Result) -> list[str]:
    return list(dict.fromkeys(row["precision"] for row in result["rows"]))


def cell(row: Row | None) -> str:
    """Milliseconds, or why there are none."""
    if row is None:
        return "-"
    if row["median"] is not None:
        mark = "\\*" if beside_others(row) else ""
        return (f"{row['median'] * 1e3:.3g}" if row["median"] < 1 else f"{row['median'] * 1e3:,.0f}") + mark
    return str(row["status"]).split(":")[0]


def beside_others(row: Row) -> bool:
    """Whether other programs were busy while a CPU was timed."""
    return bool(row.get("clock") == "perf_counter" and (row.get("others") or 0) > BUSY_PROCESSORS)


def mebibytes(row: Row | None) -> str:
    return "-" if not row or row.get("extra_bytes") is None else f"{row['extra_bytes'] / 2**20:,.0f} MiB"


def checks(result: Result, ours: Sequence[str] = ("ours",)) -> str:
    """How the rows of ours were checked before they were timed, and what is not here."""
    mine = [row for row in result["rows"] if row["variant"] in ours]
    wrong = [row for row in mine if is_wrong(row["status"])]
    repeated = sum(bool(row["repeatable"]) for row in mine)
    distances = [row["errors"]["bands_from_unscreened"] for row in mine if "bands_from_unscreened" in row["errors"]]
    text = f"Of {len(mine)} results of ours, two runs were identical to the bit in {repeated}; {len(wrong)} were wrong."
    if distances:
        text += (
            f" Largest distance of an entry from the unscreened one: {max(distances):.2g} of what two orders of "
            "summation may differ by."
        )
    names = ("case", "precision", "job") if len(ours) == 1 else ("case", "precision", "job", "variant")
    lines = [f"- {' '.join(row[name] for name in names)}: {row['status']}" for row in wrong]
    absent = [f"- {row['variant']} {row['status']}" for row in result["rows"] if row["status"].startswith("not here")]
    lines += dict.fromkeys(absent)
    return "\n".join([text, *([""] if lines else []), *lines])
