"""What backends derive from a weight alone, kept between inference calls.

An entry belongs to one storage (by weak reference, so that a dead weight's entry is never used), one view of it and one
version of its contents. PyTorch's version counter misses the writes of fused optimizers and those through
``weight.data``, NumPy, a raw pointer or another process that shares the memory. Therefore every optimizer step empties
the cache, callers :func:`forget` a weight that is being trained, and a :func:`sample` of its rows is compared at every
use, which detects a write to the whole weight. What remains is an uncounted write to a few rows between two inference
calls: it may not be detected.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

# A model has one decoder; the others are for several models in one process.
MAX_ENTRIES = 8
# Rows compared, at least: an uncounted write to a share p of all rows goes undetected with probability (1 - p)^64.
SAMPLE_ROWS = 64

T = TypeVar("T")
# Location of the weight -> its storage, the version and a sample of its contents, and what was made from them.
_entries: OrderedDict[tuple[Any, ...], tuple[StorageWeakRef, int, tuple[Tensor, ...], Any]] = OrderedDict()
_lock = threading.Lock()


def cached(weight: Tensor, kind: str, make: Callable[[], T]) -> T:
    """``make()``, or what it returned before for the same contents of ``weight``.

    ``kind`` names everything else that the result depends on. What is made from an inference tensor, which has no
    version, or inside a CUDA graph, which owns its memory and contents, is not kept. The caller compares samples of
    weights on accelerators: comparing them here would wait for the device.
    """
    if weight.is_inference() or (weight.is_cuda and _is_for_a_graph(weight.device)):
        return make()
    storage = StorageWeakRef(weight.untyped_storage())
    # Another stream would not wait for what this one makes.
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None
    layout = (weight.dtype, weight.device, tuple(weight.shape), weight.stride())
    key = (storage.cdata, weight.data_ptr(), layout, stream, kind)
    version = weight._version
    rows = (sample(weight),) if weight.device.type == "cpu" else ()
    with _lock:
        _drop(lambda reference: reference.expired())
        if key in _entries:
            _, kept_version, kept_rows, made = _entries[key]
            if kept_version == version and all(map(torch.equal, rows, kept_rows)):
                _entries.move_to_end(key)
                found: T = made
                return found
        # Free the stale entry before make().
        _entries.pop(key, None)
    _watch_optimizers()
    made = make()
    with _lock:
        _entries[key] = (storage, version, tuple(row.clone() for row in rows), made)
        _entries.move_to_end(key)
        while len(_entries) > MAX_ENTRIES:
            _entries.popitem(last=False)
    return made


def _is_for_a_graph(device: torch.device) -> bool:
    """Whether memory allocated now belongs to a CUDA graph: during capture, or ``torch.compile``'s warm-up for it."""
    if torch.cuda.is_current_stream_capturing():
        return True
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
        return manager is not None and bool(manager.in_warmup or manager.in_recording)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError):
        # These are private to PyTorch and may change. A wrong True costs quantising the weight again.
        return True


def sample(weight: Tensor) -> Tensor:
    """A view of at least 64 rows, evenly spread, if the weight has as many."""
    return weight.detach()[:: max(1, weight.shape[0] // SAMPLE_ROWS)]


def forget(weight: Tensor) -> None:
    """Drop the entries of every view of this weight's storage."""
    if _entries:
        storage = StorageWeakRef(weight.untyped_storage())
        with _lock:
            _drop(lambda reference: reference.expired() or reference == storage)


def _drop(unwanted: Callable[[StorageWeakRef], bool]) -> None:
    for key in [key for key, (reference, *_) in _entries.items() if unwanted(reference)]:
        del _entries[key]


@functools.cache
def _watch_optimizers() -> None:
    """Called for every entry, cached: it registers its hook once."""

    def empty(*step: Any) -> None:
        with _lock:
            _entries.clear()

    register_optimizer_step_post_hook(empty)
