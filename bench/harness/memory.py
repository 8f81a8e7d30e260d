"""Peak resident memory of this process (Linux).

``VmHWM`` is read rather than ``ru_maxrss``, which a child process inherits from its parent and which cannot be reset.
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak() -> int:
    """Largest resident size in bytes since the start of the process or the last :func:`reset_peak`."""
    match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    if match is None:
        raise RuntimeError(f"{_STATUS}: expected a VmHWM line, found none")
    return int(match.group(1)) * 1024


def return_free_memory() -> None:
    """To the system: freed memory that glibc keeps would sit in a baseline and hide as much of a peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak() -> int:
    """Set the peak to the present resident size, and return it."""
    _CLEAR_REFS.write_text("5")
    return peak()
