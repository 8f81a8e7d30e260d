"""A device that is neither CPU nor CUDA, acted by the CPU: what PyTorch lacks there is not there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from splade_kernels.backends import dispatch

# Without a kernel on some device: the first on MPS, the others on devices whose kernels come from elsewhere.
MISSING = ("segment_reduce", "_embedding_bag", "_embedding_bag_forward_only", "_cummax_helper")


@contextmanager
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors are computed as those of another device, by a PyTorch with less than a CPU has.

    The kernels for CPUs raise, whoever calls them, as a missing kernel does; ``relu_`` loses NaN and booleans are not
    sorted, since PyTorch's kernels for MPS got these wrong (pytorch#183571, pytorch#184620).
    """

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("not implemented for the device")

    def relu_(tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.where(tensor > 0, tensor, 0))

    def argsort(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert tensor.dtype != torch.bool, "booleans are sorted"
        return tensor.argsort(*args, **kwargs)

    monkeypatch.setattr(dispatch, "on_host", lambda tensor: False)
    monkeypatch.setattr(dispatch, "has_kernel", lambda operation, device_type: operation not in MISSING)
    monkeypatch.setattr(torch, "argsort", argsort)
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for operation in MISSING:
                library.impl(operation, missing, "CPU", allow_override=True)
            library.impl("relu_", relu_, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
