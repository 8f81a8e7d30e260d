"""What PyTorch can run on a device, and what the host may ask of it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def has_kernel(operation: str, device_type: str) -> bool:
    """Whether this PyTorch has a kernel of ``aten::operation`` for the device type itself.

    Only the device's own registrations count. On MPS every call resolves to something, if only to the fallback, which
    raises ``NotImplementedError`` or, with ``PYTORCH_ENABLE_MPS_FALLBACK=1``, copies to the CPU and back. Composite
    operations have no registration of their own: ask for the operation that they call.
    """
    key = torch._C._dispatch_key_for_device(device_type)
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operation}", key))


def on_host(tensor: Tensor) -> bool:
    """Whether the host can read the data of ``tensor`` without a sync."""
    return tensor.device.type == "cpu"


def may_wait(tensor: Tensor) -> bool:
    """Whether the host may wait for a count on the device of ``tensor``.

    It may not on CUDA, where launches run ahead of the GPU and may be captured into a graph.
    """
    return tensor.device.type != "cuda"
