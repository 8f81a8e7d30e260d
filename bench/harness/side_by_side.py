"""One function on many arguments, in processes side by side, of which an argument may take one down."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Result = TypeVar("Result")
# A process has a context of CUDA of its own, about half a GiB of the GPU's memory.
PROCESSES = 16
SECONDS = 60.0


_pool: ProcessPoolExecutor | None = None


def side_by_side(
    work: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], seconds: float = SECONDS
) -> list[Result | str]:
    """``work(*task)`` of every task, in their order; in place of a result why there is none.

    What has no result after so many seconds, since a kernel hangs or waits behind one that does, is given up.

    An error of CUDA stays with its process, and what crashes a process takes its pool down. So a task that met neither
    its own error nor a result is tried again in new processes, and alone once a whole round brought no result. The
    processes, which take seconds to start, are kept for the next call.
    """
    found: dict[int, Result | str] = {}
    alone = False
    while left := [number for number in range(len(tasks)) if number not in found]:
        before = len(found)
        _round(work, tasks, left[:1] if alone else left, found, seconds)
        if alone:
            found.setdefault(left[0], "failed: it took its process down")
        alone = len(found) == before
    return [found[number] for number in range(len(tasks))]


def _round(
    work: Callable[..., Result],
    tasks: Sequence[Any],
    numbers: list[int],
    found: dict[int, Result | str],
    seconds: float,
) -> None:
    """Put what is decided into ``found``; a pool that was not equal to all of it is given up."""
    global _pool
    if _pool is None:
        processes = min(PROCESSES, len(os.sched_getaffinity(0)))
        _pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    pool = _pool
    futures: dict[int, Future[Result | str | None]] = {}
    # A pool that breaks during a submission has closed the pipes that a further process would be given.
    with contextlib.suppress(BrokenProcessPool, OSError):
        for number in numbers:
            futures[number] = pool.submit(_try, work, tasks[number])
    _, late = wait(futures.values(), seconds)
    for number, future in futures.items():
        with contextlib.suppress(BrokenProcessPool):
            result = f"failed: no answer after {seconds:.0f} s" if future in late else future.result()
            if result is not None:
                found[number] = result
    if late or any(number not in found for number in numbers):
        # One that hangs, and one that started while the pool broke, would not end by itself.
        for process in list(pool._processes.values()):
            process.kill()
        pool.shutdown()
        _pool = None


_usable = True


def _try(work: Callable[..., Result], task: tuple[Any, ...]) -> Result | str | None:
    """None where an earlier task left this process without a working device."""
    global _usable
    if not _usable:
        return None
    try:
        return work(*task)
    except Exception as error:
        _usable = _device_works()
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _device_works() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.ones(1, device="cuda").sum().item()
    except RuntimeError:
        return False
    return True
