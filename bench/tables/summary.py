"""What a command of :mod:`bench.gpu` found, in 60 lines, and everything it left in one archive."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness.environment import describe
from bench.harness.result_file import left_out_text, load
from bench.tables import markdown
from bench.tables.numerics import numerics_table
from bench.tables.training import limits_table, training_table

MAX_LINES = 60
MAX_ARCHIVE_BYTES = 16 << 20
NOTE = "In brackets: how many times as fast as the first variant of the job; after +: memory beyond inputs and results."
# Names of failed tests that are shown.
SHOWN = 5

Result = dict[str, Any]


def machine() -> str:
    """Device, driver, versions and commit in one line."""
    found = describe()
    return f"{markdown.machine(found)}; commit {found['commit']}"


def write(name: str, folder: Path) -> None:
    """``folder/SUMMARY.md`` from what is in ``folder``."""
    lines = [f"# gpu-{name}: {machine()}", "", *stages(folder), NOTE, ""]
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        if path.name != "status.json":
            lines += [line for line in _result(path) if line]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES - 1 :] = [f"- {len(lines) - MAX_LINES + 1} lines more: the result files have them."]
    (folder / "SUMMARY.md").write_text("\n".join(lines) + "\n")


def archive(folder: Path, path: Path) -> None:
    """``path``, a tar.gz of everything in ``folder`` of at most ``MAX_ARCHIVE_BYTES``: the largest files are left out
    as long as it would be larger, and named in its ``LEFT_OUT.txt``."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    draft, left_out = path.with_suffix(".part"), list[str]()
    while True:
        with tarfile.open(draft, "w:gz") as tar:
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # a draft that has got its name meanwhile
                    tar.add(file, arcname=str(file.relative_to(folder.parent)))
            if left_out:
                names = "\n".join(left_out).encode() + b"\n"
                entry = tarfile.TarInfo(f"{folder.name}/LEFT_OUT.txt")
                entry.size = len(names)
                tar.addfile(entry, io.BytesIO(names))
        if draft.stat().st_size <= MAX_ARCHIVE_BYTES:
            break
        left_out.append(str(files.pop().relative_to(folder)))
    draft.replace(path)


def stages(folder: Path) -> Iterator[str]:
    """One line with the outcome of each stage; of tests and of the sanitizer what their logs say."""
    for outcome in json.loads((folder / "status.json").read_text()):
        log = folder / "logs" / f"{outcome['name']}.log"
        more = _of_log(log.read_text(errors="replace")) if log.exists() else ""
        yield f"- {outcome['name']}: **{outcome['status']}** in {outcome['seconds']:.0f} s{more}"
    yield ""


def _of_log(text: str) -> str:
    """What pytest said, with or without xdist, or the sanitizer."""
    found = re.findall(
        r"\b(PASSED|FAILED|ERROR|SKIPPED)\b(?: +\[ *\d+%\])?(?: +(tests/\S+))?|(tests/\S+) (FAILED|ERROR)", text
    )
    tests = [(first or last, after or before) for first, after, before, last in found]
    verdicts = [verdict for verdict, _ in tests]
    failed = [name for verdict, name in tests if verdict in ("FAILED", "ERROR") and name]
    counts = ", ".join(f"{verdicts.count(one)} {one.lower()}" for one in dict.fromkeys(verdicts))
    errors = re.findall(r"=+ ERROR SUMMARY: (\d+ errors?)", text)
    shown = f" ({', '.join(dict.fromkeys(failed[:SHOWN]))})" if failed else ""
    return f": {counts}{shown}" if counts else f": {errors[-1]}" if errors else ""


def _result(path: Path) -> Iterator[str]:
    try:
        (result,) = load([path])
        yield from SECTIONS.get(result["kind"], _plain)(result)
    except Exception as error:  # the summary of nine files, and the stages to come, must not fail on the tenth
        yield f"- {path.name}: cannot be summarised: {type(error).__name__}: {error}"
        return
    left_out = result.get("left_out") or []
    if left_out:
        yield f"- {path.name}: left out {len(left_out)}: {'; '.join(map(left_out_text, left_out[:3]))}"


def _smoke(result: Result) -> Iterator[str]:
    rows = result["rows"]
    passed = [row for row in rows if row["status"] == "passed"]
    yield f"- kernels against float64: {len(passed)} of {len(rows)} passed"
    yield from (f"  - {row['smoke']}: {row['status'][:160]}" for row in rows if row not in passed)


def _measured(result: Result) -> Iterator[str]:
    """A line for every case and precision: job by job, each variant's time and extra memory."""
    groups: dict[tuple[str, ...], dict[str, list[Result]]] = {}
    for row in result["rows"]:
        jobs = groups.setdefault((result["kind"], row["case"], row["precision"]), {})
        jobs.setdefault(row["job"].removeprefix("backward-"), []).append(row)
    for key, jobs in groups.items():
        yield f"- {' '.join(key)}: " + " | ".join(f"{job}: {_job(rows)}" for job, rows in jobs.items())


def _job(rows: list[Result]) -> str:
    first = next((row["median"] for row in rows if row["median"]), None)
    said = []
    for row in rows:
        text = row["status"][:80]
        if row["median"]:
            ratio = f" ({first / row['median']:.2f}x)" if first != row["median"] else ""
            extra = "" if row["extra_bytes"] is None else f" +{row['extra_bytes'] / 2**20:.0f} MiB"
            bits = " two runs differ" if row["repeatable"] is False else ""
            text = f"{1e3 * row['median']:.3f} ms{ratio}{extra}{bits}"
        said.append(f"{row['variant']} {text}")
    return ", ".join(said)


def _tuning(result: Result) -> Iterator[str]:
    def about(row: Result) -> list[Any]:
        return [row[key] for key in ("kind", "dtype", "hidden_size", "vocab_size")]

    for row in result["rows"]:
        if row.get("chosen"):
            mine = [one for one in result["rows"] if about(one) == about(row)]
            ratios = [one.get("time_over_shipped") for one in mine if one["config"] == row["config"]]
            ratio = next((value for value in reversed(ratios) if value is not None), 1)
            dropped = sum("dropped" in one for one in mine)
            times = ", ".join(f"{name}: {value:.3f} ms" for name, value in row["shipped_milliseconds"].items())
            compared = f"{ratio:.3f} of the shipped time ({times}); {dropped} candidates dropped"
            question = "{} {} D{} V{}".format(*about(row))
            yield f"- {question}: {compared}; {row['configuration']}"


def _table(make: Callable[[Result], str], result: Result) -> Iterator[str]:
    yield from (f"  {line}" for line in make(result).splitlines() if line)


def _compaction(result: Result) -> Iterator[str]:
    runs = [run for run in result["runs"] if "bucket_bytes_per_second" in run]
    shares = [run["bucket_bytes_per_second"] / run["copy_bytes_per_second"] for run in runs]
    share = "".join(f", {share:.0%} of the copy bandwidth" for share in shares[-1:])
    times = ", ".join(dict.fromkeys(f"{row['operation']} {row['milliseconds']:.2f} ms" for row in result["rows"]))
    yield f"- compaction: {times}{share}"


def _plain(result: Result) -> Iterator[str]:
    for row in result["rows"]:
        shown = (f"{key} {value}" for key, value in row.items() if not isinstance(value, (list, dict)))
        yield f"- {result['kind']}: " + " ".join(word for word in shown if not word.startswith("provenance "))


SECTIONS: dict[str, Callable[[Result], Iterator[str]]] = {
    "smoke": _smoke,
    **dict.fromkeys(("head", "backward", "flops", "screening", "short-sequences"), _measured),
    "numerics": partial(_table, numerics_table),
    "tuning": _tuning,
    "training": partial(_table, training_table),
    "limits": partial(_table, limits_table),
    "compaction": _compaction,
}
