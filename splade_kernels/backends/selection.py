"""The choice between the backends."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

from . import compiled
from .pooling import check_choice

ENVIRONMENT_VARIABLE = "SPLADE_KERNELS_BACKEND"
BACKENDS = ("torch", "triton")


def available_backends() -> dict[str, str]:
    """Name of each backend and ``"available"``, or the reason why it cannot run.

    ``"csrc"``, the compiled operators that both use where they were built, cannot be chosen as a backend. Nor can
    ``"screening"``: which kernels screen CPU tensors, and why these.
    """
    from .tiled import screening

    reasons = {"torch": None, "triton": _why_not_triton(), "csrc": compiled.why_not()}
    return {name: reason or "available" for name, reason in reasons.items()} | {"screening": screening.in_use()}


def select(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend for a call: ``"auto"`` is Triton for what it can do on CUDA, torch elsewhere.

    ``SPLADE_KERNELS_BACKEND`` names another one in place of ``"auto"``.

    Raises:
        ValueError: ``SPLADE_KERNELS_BACKEND`` names no backend.
        RuntimeError: the backend was asked for by name and cannot run this call here.
    """
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
        check_choice(ENVIRONMENT_VARIABLE, ("auto", *BACKENDS), name)
    if name == "auto":
        name = "triton" if device.type == "cuda" and _why_not_triton(device, dtype) is None else "torch"
    if name == "torch":
        from . import tiled

        return tiled
    reason = _why_not_triton(device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend 'triton' cannot run: {reason}")
    from . import triton as triton_backend

    return triton_backend


def _why_not_triton(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why Triton cannot run, here or for tensors of this device and dtype."""
    if dtype == torch.float64:
        return "its kernels do not compute in float64; backend='torch' does"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA's GPUs, and this PyTorch is built for AMD's"
    if not torch.cuda.is_available():
        return "no CUDA device is available, and TRITON_INTERPRET=1 was not set before triton was imported"
    if device is not None and device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None
