"""Ctrl-C and SIGTERM: the first ends the run after the batch that is computed, the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import CommandError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(CommandError):
    """A signal has ended the run, which the same command continues."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")


class Stop:
    """Which signal has come, if one has."""

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self) -> None:
        if self.number is not None:
            raise Stopped(self.number)

    def _come(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Only in a program's main thread; elsewhere signals keep their meaning."""
    stop = Stop()
    try:
        before = {number: signal.signal(number, stop._come) for number in SIGNALS}
    except ValueError:
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
