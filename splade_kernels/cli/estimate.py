"""``splade-kernels estimate``."""

from __future__ import annotations

from ..encoding.errors import UsageError


def command() -> None:
    raise UsageError("estimate: not built yet")
