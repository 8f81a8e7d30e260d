"""``splade-kernels search``."""

from __future__ import annotations

from ..encoding.errors import UsageError


def command() -> None:
    raise UsageError("search: not built yet")
