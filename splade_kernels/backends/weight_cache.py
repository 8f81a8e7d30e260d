"""What backends derive from a weight alone, kept between inference calls.

An entry belongs to one storage (by weak reference: a dead weight's entry is never used), one view of it and one version
of its contents. Versions do not count every write: not those of fused optimizers, nor any through ``weight.data``,
NumPy, a raw pointer or another process that shares the memory. So every step of an optimizer empties the cache, callers
:func:`forget` a weight that they see trained, and a :func:`sample` of its rows is compared at every use, which sees
whatever writes all of it. An uncounted write to a few rows between two inference calls, with none of these in between,
may not be seen.
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

# A model has one decoder; a few more are for models side by side.
MAX_ENTRIES = 8
# Rows that are compared, at least: of uncounted writes to a share p of all rows, (1 - p)^64 go unseen.
SAMPLE_ROWS = 64

T = TypeVar("T")
# Where the weight is -> its storage, the version and a sample of its contents, and what was made of them.
_entries: OrderedDict[tuple[Any, ...], tuple[StorageWeakRef, int, tuple[Tensor, ...], Any]] = OrderedDict()
_lock = threading.Lock()


def cached(weight: Tensor, kind: str, make: Callable[[], T]) -> T:
    """``make()``, or what it returned for the same contents of ``weight``, which must be all that it depends on.

    ``kind`` names what is made, and everything else that it depends on. Never kept: what is made from an inference
    tensor, which has no version, or for a CUDA graph, whose memory and contents are the graph's own.

    The samples of accelerators' tensors are left to the caller: comparing them here would wait for the device.
    """
    if weight.is_inference() or (weight.is_cuda and _is_for_a_graph(weight.device)):
        return make()
    storage = StorageWeakRef(weight.untyped_storage())
    # What one stream made is not ready for another.
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
        # Memory for the new one.
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
    """Whether memory allocated now belongs to a CUDA graph: one is captured, or ``torch.compile`` runs up to it."""
    if torch.cuda.is_current_stream_capturing():
        return True
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
        return manager is not None and bool(manager.in_warmup or manager.in_recording)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError):
        # Private to PyTorch, so another version may have it otherwise. To quantise once more is all that it costs.
        return True


def sample(weight: Tensor) -> Tensor:
    """A view of 64 rows of it or a few more, evenly spread."""
    return weight.detach()[:: max(1, weight.shape[0] // SAMPLE_ROWS)]


def forget(weight: Tensor) -> None:
    """Drop what is kept for any view of this weight's storage."""
    if _entries:
        storage = StorageWeakRef(weight.untyped_storage())
        with _lock:
            _drop(lambda reference: reference.expired() or reference == storage)


def _drop(unwanted: Callable[[StorageWeakRef], bool]) -> None:
    for key in [key for key, (reference, *_) in _entries.items() if unwanted(reference)]:
        del _entries[key]


@functools.cache
def _watch_optimizers() -> None:
    """From the first entry on."""

    def empty(*step: Any) -> None:
        with _lock:
            _entries.clear()

    register_optimizer_step_post_hook(empty)
