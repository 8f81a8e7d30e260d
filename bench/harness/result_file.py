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

from bench.harness.environment import command, describe, device_name

Row = dict[str, Any]
# Of two rows with these in common, measured on the same device by different runs, the later one replaces the other.
KEY = ("case", "shape", "precision", "job", "variant")


def write(path: Path, content: Any) -> None:
    """Write JSON in one move, so that an end at any time leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
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
        append: whether to keep what the file holds already.
        key: what makes two rows of different runs the same measurement.
        run: what the provenance of this run's rows holds besides command, environment and load average.
        more: what the file holds besides.

    Raises:
        SystemExit: ``append`` to a result of another kind.
    """

    def __init__(
        self, kind: str, module: str, path: Path | None, *, append: bool = False, key: Sequence[str] = KEY,
        run: dict[str, Any] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        self.path, self._key = path, key
        earlier = json.loads(path.read_text()) if append and path and path.exists() else {"kind": kind}
        if earlier["kind"] != kind:
            raise SystemExit(f"--append: expected a result of kind {kind!r} in {path}, got {earlier['kind']!r}")
        environment = describe()
        self.run: dict[str, Any] = {
            "command": command(module),
            "environment": environment,
            "load_average": os.getloadavg()[0],
        }
        self.run |= run or {}
        self.content: dict[str, Any] = {
            "kind": kind,
            **more,
            "provenance": [*earlier.get("provenance", []), self.run],
            "rows": earlier.get("rows", []),
            "left_out": earlier.get("left_out", []),
        }

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.content["rows"]
        return rows

    def add(self, *rows: Row) -> None:
        """Add rows of this run in place of what earlier runs have of the same measurements."""
        mine = len(self.content["provenance"]) - 1
        keys = {self._identity(row | {"provenance": mine}) for row in rows}
        self.rows[:] = [row for row in self.rows if row["provenance"] == mine or self._identity(row) not in keys]
        self.rows.extend(row | {"provenance": mine} for row in rows)
        left = self.content["left_out"]
        left[:] = [entry for entry in left if not any(_settles(row, entry) for row in rows)]
        self.write()

    def leave_out(self, reason: str, what: Row) -> None:
        """Name what is not measured, by the fields of the rows that it would have given."""
        entry = {**what, "reason": reason}
        if entry not in self.content["left_out"]:
            self.content["left_out"].append(entry)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write(self.path, self.content)

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


def left_out_text(entry: str | dict[str, Any]) -> str:
    """What was left out, in words."""
    if isinstance(entry, str):
        return entry
    words = [str(value) if name in KEY else f"{name} {value}" for name, value in entry.items() if name != "reason"]
    return " ".join(words) + (f": {entry['reason']}" if "reason" in entry else "")


def _settles(row: Row, entry: str | dict[str, Any]) -> bool:
    """Whether a row is what had been left out."""
    return isinstance(entry, dict) and all(row.get(key) == value for key, value in entry.items() if key != "reason")
