"""``splade-kernels encode``."""

from __future__ import annotations

from ..encoding.errors import UsageError


def command() -> None:
    raise UsageError("encode: not built yet")
