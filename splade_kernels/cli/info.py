"""``splade-kernels info``."""

from __future__ import annotations

from ..encoding.errors import UsageError


def command() -> None:
    raise UsageError("info: not built yet")
