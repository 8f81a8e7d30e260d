"""Drop-ins for other libraries. Each is imported only when it is asked for: they pull in the library they serve."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("sentence_transformers", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
