"""Device helpers and host facts that the kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pooling import PoolingCall

# Rows of a packed group: what one reduction combines, and what sequences are filled up to.
GROUP = 16


def interpreted() -> bool:
    """Whether kernels run on the CPU through Triton's interpreter (``TRITON_INTERPRET=1`` before the import)."""
    return bool(triton.knobs.runtime.interpret)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a float32 product: TF32 only where PyTorch's own matmuls may use it.

    The newer setting is read first: once it was set, reading the older one raises.
    """
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", "none")
    allowed = setting == "tf32" if setting not in ("none", "") else bool(matmul.allow_tf32)
    return "tf32" if allowed else "ieee"


def activation_is_double_log(call: PoolingCall) -> bool:
    return call.activation_function == "log1p_relu"


@triton.jit
def ordered(x):
    """float32 to int32 of the same order: NaN is the largest, both zeros are equal.

    ``tl.max`` drops NaN in floats, and its NaN-propagating form is slow in the interpreter; on these integers a maximum
    is a maximum everywhere.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0, 0, bits)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def unordered(o):
    """Inverse of :func:`ordered`; NaN comes back as a NaN."""
    return (o ^ ((o >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for ``x >= 0`` without losing small x: Goldberg's correction of the rounding of ``1 + x``."""
    u = 1.0 + x
    corrected = tl.log(u) * (x / (u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == x, tl.log(u), corrected))


@triton.jit
def activate(x, DOUBLE_LOG: tl.constexpr):
    """``log1p(relu(x))``, once more ``log1p`` of it for DOUBLE_LOG; NaN stays NaN."""
    y = log1p(tl.where(x <= 0, 0.0, x))
    if DOUBLE_LOG:
        y = log1p(y)
    return y
