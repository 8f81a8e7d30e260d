"""``splade-kernels export``."""

from __future__ import annotations

from ..encoding.errors import UsageError


def command() -> None:
    raise UsageError("export: not built yet")
