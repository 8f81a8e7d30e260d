"""The implementations behind the operators, and the choice between them."""

from __future__ import annotations

import os
from types import ModuleType

ENVIRONMENT_VARIABLE = "SPLADE_KERNELS_BACKEND"
BACKENDS = ("torch", "triton")


def available_backends() -> dict[str, str]:
    """Name of each backend and ``"available"``, or the reason why it cannot run."""
    return {name: _unavailable(name) or "available" for name in BACKENDS}


def select(name: str) -> ModuleType:
    """The backend module for ``name``; ``"auto"`` follows ``SPLADE_KERNELS_BACKEND`` where it is set.

    Raises:
        ValueError: ``SPLADE_KERNELS_BACKEND`` names no backend.
        RuntimeError: the backend was asked for by name and cannot run here.
    """
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
        if name not in ("auto", *BACKENDS):
            expected = ", ".join(repr(choice) for choice in ("auto", *BACKENDS))
            raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected one of {expected}, got {name!r}")
    reason = None if name == "auto" else _unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}")
    from . import torch as torch_backend

    return torch_backend


def _unavailable(name: str) -> str | None:
    if name == "triton":
        return "the Triton kernels are not part of this version"
    return None
