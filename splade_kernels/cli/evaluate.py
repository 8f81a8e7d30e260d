"""``splade-kernels evaluate``."""

from __future__ import annotations

from ..encoding.errors import UsageError


def command() -> None:
    raise UsageError("evaluate: not built yet")
