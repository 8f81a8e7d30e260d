"""Memory that a step takes at its peak: of a CUDA device as PyTorch's allocator counts it, of a CPU's process (Linux).

``VmHWM`` is read rather than ``ru_maxrss``, which a child process inherits from its parent and which cannot be reset.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Imported once for all the processes of :func:`in_a_process`, with the module of its function.
PRELOAD = ["sentence_transformers.sparse_encoder.modules"]


def peak(cuda: bool = False) -> int:
    """The peak since the start or the last :func:`reset_peak`, in bytes: resident, or allocated on CUDA."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    if match is None:
        raise RuntimeError(f"{_STATUS}: expected a VmHWM line, got none")
    return int(match.group(1)) * 1024


def reset_peak(cuda: bool = False) -> int:
    """Set the peak to the present size, and return it."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    _CLEAR_REFS.write_text("5")
    return peak()


def release() -> None:
    """Return what a finished or failed step left to Python's collector and to PyTorch's CUDA allocator."""
    gc.collect()
    torch.cuda.empty_cache()


def return_free_memory() -> None:
    """To the system: freed memory that glibc keeps would count as part of a baseline, and hide as much of a peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def unpooled() -> Iterator[None]:
    """Have glibc give freed blocks above 128 KiB back at once; elsewhere nothing.

    By itself it keeps up to tens of MiB of them, in an amount that depends on the order of all calls so far, and so a
    peak of the process is more than the peak of what is allocated. On the way out it is as it becomes by itself in a
    process that has freed a large block, which is faster: pages are not faulted in again and again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 128 << 10)
        mallopt(_M_TRIM_THRESHOLD, 128 << 10)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 32 << 20)
            mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def cuda_extra_bytes(step: Callable[[], tuple[Tensor, ...]]) -> int:
    """Peak allocated bytes of one step, without what was there before it and what it returned."""
    step()  # allocates the workspaces of libraries
    torch.cuda.synchronize()
    before = reset_peak(cuda=True)
    kept = size_of(step())
    torch.cuda.synchronize()
    return peak(cuda=True) - before - kept


def host_extra_bytes(work: Callable[[], int]) -> int:
    """Peak resident bytes of ``work``, without what was there before it and the bytes that it says it keeps, or 0."""
    return_free_memory()
    before = reset_peak()
    kept = work()
    # The step may have used pages that were freed after the baseline was read.
    return max(0, peak() - before - kept)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a process forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, *PRELOAD])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def size_of(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
