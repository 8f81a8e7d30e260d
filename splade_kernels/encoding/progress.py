"""What a run says while it runs: a bar on a terminal, a line now and then elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

# Seconds between two lines where there is no terminal.
EVERY = 30.0


class Progress:
    """Counts rows, tokens and terms, and shows them on stderr.

    Args:
        quiet: show nothing; warnings are printed all the same.
        label: what the run is called, in front of the numbers.
    """

    def __init__(self, quiet: bool, label: str = "encode") -> None:
        self.quiet = quiet
        self.label = label
        self.rows = self.tokens = self.terms = self.in_part = 0
        self.fraction: float | None = None
        self.started: float | None = None
        self._began_at = 0.0
        self._shown = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"))
            self._bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task(self.label, total=None, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def warn(self, message: str) -> None:
        line = f"splade-kernels: {message}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def start(self, fraction: float | None) -> None:
        """The first text that is encoded, at this fraction of the corpus."""
        if self.started is None:
            self.started = self._shown = time.monotonic()
            self._began_at = fraction or 0.0

    def batch(self, rows: int, tokens: int) -> None:
        self.in_part += rows
        self.tokens += tokens
        self._show()

    def part(self, rows: int, terms: int, fraction: float | None) -> None:
        """A part has been written; ``fraction`` of the corpus is done."""
        self.rows += rows
        self.in_part = 0
        self.terms += terms
        self.fraction = fraction
        self._show()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started if self.started is not None else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds, from how much of the corpus has been encoded since the start."""
        if self.fraction is None or self.fraction <= self._began_at:
            return None
        return self.seconds * max(1 - self.fraction, 0.0) / (self.fraction - self._began_at)

    def numbers(self) -> str:
        parts = [f"{self.rows + self.in_part:,} rows"]
        if self.seconds:
            parts.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        if self.rows:
            parts.append(f"{self.terms / self.rows:.1f} active terms a row")
        if self.remaining is not None:
            parts.append(f"ETA {timedelta(seconds=round(self.remaining))}")
        return ", ".join(parts)

    def _show(self) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            total = None if self.fraction is None else 1.0
            self._bar.update(self._task, total=total, completed=self.fraction or 0.0, numbers=self.numbers())
        elif time.monotonic() - self._shown >= EVERY:
            self._shown = time.monotonic()
            share = "" if self.fraction is None else f" {self.fraction:.1%}:"
            print(f"{self.label}:{share} {self.numbers()}", file=sys.stderr, flush=True)
