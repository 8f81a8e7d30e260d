"""Work in processes side by side. Nothing here imports PyTorch, which takes a new process seconds."""

from __future__ import annotations

import os
import signal
import time

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
    assert side_by_side(waits, [(0,), (2,), (1,)], 8) == [0, 2, "failed: no answer after 8 s"]
    assert side_by_side(waits, [(3,)]) == [3]


def test_every_result_is_there_beside_an_error_and_a_crash():
    found = side_by_side(half, [(1,), (0,), (2,), (3,), (4,)])
    assert found == [1.0, "failed: ZeroDivisionError: division by zero", 0.5, "failed: it took its process down", 0.25]
