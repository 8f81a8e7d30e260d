"""Result files that are written as measuring goes on, and the time it may take."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.environment import command, describe


def write(path: Path, content: Any) -> None:
    """As JSON, in one move: an end at any time leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(draft, path)


def left_out_text(entry: str | dict[str, Any]) -> str:
    """What was left out, in words."""
    return entry if isinstance(entry, str) else " ".join(f"{name} {value}" for name, value in entry.items())


@dataclass
class Budget:
    """Room for one more piece of work is judged by the longest piece so far."""

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
    """A result file that is whole at any time, and complete after every :meth:`write`.

    ``load_average`` tells a busy machine's times apart.
    """

    def __init__(self, kind: str, module: str, path: Path | None, **more: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "kind": kind,
            "command": command(module),
            "environment": describe(),
            "load_average": os.getloadavg()[0],
            **more,
            "rows": [],
            "left_out": [],
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write(self.path, self.content)
