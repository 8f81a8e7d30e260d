"""Result files, whole at any time, in which every row knows the run that measured it; and the time a run may take.

A file is ``{"kind", "provenance": [run, …], "rows": [row, …], "left_out": […]}`` and what a kind adds.
``row["provenance"]`` is the index of its run: command, environment (with device and commit), load average, and what the
command adds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness.environment import command, describe, device_name

Row = dict[str, Any]
# Of two rows with these in common, measured on the same device by different runs, the later one replaces the other.
KEY = ("case", "shape", "precision", "job", "variant")


def write(path: Path, content: Any) -> None:
    """Write JSON in one move; see :func:`write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one move, so that an end at any time leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(text)
    os.replace(draft, path)


@dataclass
class Budget:
    """Seconds for a run. Whether one more piece of work fits is judged by the longest piece so far."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def has_time(self) -> bool:
        return time.monotonic() - self.began < self.seconds

    def has_room(self) -> bool:
        return time.monotonic() - self.began + self.longest < self.seconds

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.monotonic()
        try:
            return work(*arguments)
        finally:
            self.longest = max(self.longest, time.monotonic() - start)


class Result:
    """A result file being written: complete after every :meth:`add` and :meth:`write`.

    Args:
        module: the command, as ``python -m`` takes it.
        path: None to keep the result in memory.
        append: whether to keep what the file holds already, which has to be a result of the same kind.
        key: what makes two rows of different runs the same measurement.
        run: what the provenance of this run's rows holds besides command, environment and load average.
        more: what the file holds besides.
    """

    def __init__(
        self, kind: str, module: str, path: Path | None, *, append: bool = False, key: Sequence[str] = KEY,
        run: dict[str, Any] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        self.path, self._key = path, key
        self._failed: list[str] = []
        earlier = json.loads(path.read_text()) if append and path and path.exists() else {"kind": kind}
        if earlier["kind"] != kind:
            raise SystemExit(f"--append: expected a result of kind {kind!r} in {path}, got {earlier['kind']!r}")
        described = {"command": command(module), "environment": describe(), "load_average": os.getloadavg()[0]}
        self.run: dict[str, Any] = described | (run or {})
        self.content: dict[str, Any] = {
            "kind": kind,
            **more,
            "provenance": [*earlier.get("provenance", []), self.run],
            "rows": earlier.get("rows", []),
            "left_out": earlier.get("left_out", []),
        }
        self._number = len(self.content["provenance"]) - 1

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.content["rows"]
        return rows

    def add(self, *rows: Row) -> None:
        """Add rows of this run in place of what earlier runs have of the same measurements."""
        mine = [row | {"provenance": self._number} for row in rows]
        keys = {self._identity(row) for row in mine}
        kept = [row for row in self.rows if row["provenance"] == self._number or self._identity(row) not in keys]
        self.rows[:] = [*kept, *mine]
        for entry in list(self.content["left_out"]):
            measured = {key: value for key, value in entry.items() if key != "reason"}
            if any(measured.items() <= row.items() for row in rows):
                self.content["left_out"].remove(entry)
        self.write()

    def leave_out(self, why: str, what: Row) -> None:
        """Name what is not measured, by the fields of the rows that it would have given."""
        left = self.content["left_out"]
        left[:] = [entry for entry in left if entry | {"reason": ""} != what | {"reason": ""}]
        left.append(what | {"reason": why})
        self.write()

    def attempt(
        self, budget: Budget, what: Row, work: Callable[..., Sequence[Row] | Row], *arguments: Any, room: bool = True
    ) -> Sequence[Row]:
        """Add the rows of one piece of work and return them, or name it as left out: no time for it, or it failed.

        Args:
            what: fields of the rows that it would give.
            work: returns rows, or what one row holds besides ``what``.
            room: whether the budget has to have room for a piece as long as the longest so far, or only some time.
        """
        if not (budget.has_room() if room else budget.has_time()):
            self.leave_out("no time", what)
            return []
        try:
            found = budget.run(work, *arguments)
        except Exception as error:  # inputs may not fit; what else there is to measure may
            self.leave_out(reason(error), what)
            if is_wrong(reason(error)):
                self._failed.append(left_out_text(self.content["left_out"][-1]))
            return []
        rows: Sequence[Row] = [what | found] if isinstance(found, dict) else found
        self.add(*rows)
        return rows

    def write(self) -> None:
        """Write the file; rows that were put in without :meth:`add` are this run's."""
        for row in self.rows:
            row.setdefault("provenance", self._number)
        if self.path is not None:
            write(self.path, self.content)

    def finish(self, *held: str) -> None:
        """Write the file; ``SystemExit`` with what failed and the wrong rows of the variants ``held``."""
        self.write()
        for row in self.rows:
            if row["provenance"] == self._number and row.get("variant") in held and is_wrong(row["status"]):
                names = " ".join(row[name] for name in ("case", "precision", "job", "variant"))
                self._failed.append(f"{names}: {row['status']}")
        if self._failed:
            raise SystemExit("\n".join(self._failed))

    def by_device(self) -> list[dict[str, Any]]:
        """What :func:`load` would give."""
        return by_device(self.content, self.path.name if self.path else "")

    def _identity(self, row: Row) -> tuple[Any, ...]:
        environment = self.content["provenance"][row["provenance"]]["environment"]
        return device_name(environment), *(row.get(name) for name in self._key)


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The results of files, apart by device; ``bench.resources`` writes a bare list of rows, of kind resources."""
    found = []
    for path in sorted(paths):
        content = json.loads(path.read_text())
        if isinstance(content, list):
            content = {"kind": "resources", "rows": content}
        found += by_device(content, path.name)
    return found


def by_device(content: dict[str, Any], file: str) -> list[dict[str, Any]]:
    """A result for each device in it: ``runs`` are those of its rows, ``row["run"]`` is a row's own."""
    runs = content.get("provenance", [])
    devices: dict[str, list[Row]] = {}
    for row in content["rows"]:
        run = runs[row["provenance"]] if runs else {"environment": {}}
        devices.setdefault(device_name(run["environment"]), []).append(row | {"run": run})
    if not devices:
        return [content | {"file": file, "runs": runs}]
    return [
        content | {"file": file, "rows": rows, "runs": [run for run in runs if any(row["run"] is run for row in rows)]}
        for rows in devices.values()
    ]


def left_out_text(entry: Row) -> str:
    """What was left out, as text."""
    words = [str(value) if name in KEY else f"{name} {value}" for name, value in entry.items() if name != "reason"]
    return f"{' '.join(words)}: {entry['reason']}"


def reason(error: Exception) -> str:
    """The status of what an error ended."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def is_wrong(status: str) -> bool:
    """Whether a variant failed its check, or failed."""
    return status.startswith(("red", "failed"))
