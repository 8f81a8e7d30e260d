"""Work in processes side by side. Nothing here imports PyTorch, which takes a new process seconds."""

from __future__ import annotations

import os
import signal
import time

import pytest

from bench.harness.side_by_side import side_by_side


def waits(number: int) -> int:
    time.sleep(600 if number == 1 else 0)
    return number


def half(number: int) -> float:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1 / number


def test_what_hangs_is_given_up():
    # Last, since one process may have to do all before it.
    assert side_by_side(waits, [(0,), (2,), (1,)], 5) == [0, 2, "failed: no answer after 5 s"]
    assert side_by_side(waits, [(3,)]) == [3]


@pytest.mark.parametrize("number", range(3))
def test_every_result_is_there_beside_an_error_and_crashes(number):
    """Several times, since a crash may meet any moment of a submission."""
    crash, error = "failed: it took its process down", "failed: ZeroDivisionError: division by zero"
    tasks = [(1,), (3,), (0,), (2,), (3,), (4,), (3,), (5,)]
    assert side_by_side(half, tasks) == [1.0, crash, error, 0.5, crash, 0.25, crash, 0.2]
