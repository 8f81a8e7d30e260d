"""What PyTorch and the host can do on a device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def has_kernel(operation: str, device_type: str) -> bool:
    """Whether this PyTorch has a kernel of ``aten::operation`` made for a type of device.

    The device's own registrations are asked, not what a call would resolve to: on MPS that is always something, the
    fallback for all operations, which raises ``NotImplementedError`` or, with ``PYTORCH_ENABLE_MPS_FALLBACK=1``, copies
    to the CPU and back. Composite operations have no registration of their own: ask for what they call.
    """
    key = torch._C._dispatch_key_for_device(device_type)
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operation}", key))


def on_host(tensor: Tensor) -> bool:
    """Whether reading the data of ``tensor`` costs the host no sync."""
    return tensor.device.type == "cpu"


def may_wait(tensor: Tensor) -> bool:
    """Whether the host may wait for a count on the device of ``tensor``: everywhere but on CUDA, whose work is queued
    far ahead of the GPU and may be captured into a graph."""
    return tensor.device.type != "cuda"
