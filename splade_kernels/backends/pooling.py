"""What every backend is told about one pooling call, and the elementwise mathematics they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch

# The number of log1p that follow relu. A legal activation is 0 for x <= 0 and increasing: taking it out of the maximum,
# the sparse backward and screening all rest on that.
ACTIVATION_FUNCTIONS = {"relu": 1, "log1p_relu": 2}
POOLING_STRATEGIES = ("max", "sum")

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
T = TypeVar("T")


class Pooling(NamedTuple):
    """One pooling strategy of one backend."""

    forward: Callable[..., tuple[Tensor, Tensor]]  # (call, hidden, weight, bias) -> (y, argmax)
    backward: Callable[..., Gradients]  # (call, grad, output, argmax, hidden, weight, bias) -> (dh, dW, dc)


def check_choice(name: str, choices: Collection[str], value: Any) -> None:
    """Raise a ValueError that names the argument if its value is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def choose(name: str, table: Mapping[str, T], value: str) -> T:
    """``table[value]``; ``name`` is the argument that a ValueError for an unknown value names."""
    check_choice(name, table, value)
    return table[value]


@dataclass(frozen=True, kw_only=True)
class PoolingCall:
    """One ``splade_pool`` call with the hidden states flattened to ``[N, D]``.

    ``N`` is ``B · S`` for padded input (``cu_seqlens`` is None), ``T`` for packed input (``attention_mask`` is None).
    ``max_seqlen`` bounds every length and is known to the host; for padded input it is ``S``.
    """

    batch_size: int
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    pooling_strategy: str
    activation_function: str
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    screening: str = "off"  # "auto", "on" or "off"
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # 0: none
    need_argmax: bool = False
    need_hidden: bool = False
    need_weight: bool = False
    need_bias: bool = False

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return torch.promote_types(self.compute_dtype, torch.float32)

    @property
    def logs(self) -> int:
        """How many log1p follow relu."""
        return choose("activation_function", ACTIVATION_FUNCTIONS, self.activation_function)

    def new_argmax(self, like: Tensor, vocab_size: int) -> Tensor:
        """Uninitialised ``[B, V]`` positions: 2 bytes each while every one fits, else 4; empty when not needed."""
        shape = (self.batch_size, vocab_size) if self.need_argmax else (0,)
        return like.new_empty(shape, dtype=argmax_dtype(self.max_seqlen))

    def edges(self, hidden: Tensor) -> Tensor:
        """``[B + 1]`` int32: sequence b has the rows ``edges[b] .. edges[b + 1] - 1`` of the flat hidden states.

        Checking ``cu_seqlens`` on a device would cost a sync. Whatever it holds there, edges begin at 0, are
        non-decreasing, and name no row outside ``hidden``.
        """
        if self.cu_seqlens is None:
            return torch.arange(self.batch_size + 1, device=hidden.device, dtype=torch.int32) * self.max_seqlen
        edges = self.cu_seqlens.clamp(0, hidden.shape[0]).to(torch.int32)[1:]
        if dispatch.has_kernel("_cummax_helper", edges.device.type):
            edges = edges.cummax(0).values
        else:  # sorting leaves valid edges as they are
            edges = edges.sort().values
        return F.pad(edges, (1, 0))

    def real_rows(self) -> tuple[Tensor, Tensor]:
        """Flat rows of the real tokens in order, and ``[B]`` real tokens per sequence; reads data, so for a CPU."""
        if self.cu_seqlens is not None:
            return torch.arange(int(self.cu_seqlens[-1])), self.cu_seqlens.diff().to(torch.int64)
        if self.attention_mask is None:
            rows = torch.arange(self.batch_size * self.max_seqlen)
            return rows, torch.full((self.batch_size,), self.max_seqlen)
        real = self.attention_mask != 0
        return real.reshape(-1).nonzero().squeeze(1), real.sum(dim=1)


def argmax_dtype(max_seqlen: int) -> torch.dtype:
    return torch.int16 if max_seqlen <= torch.iinfo(torch.int16).max else torch.int32


def activate(logits: Tensor, call: PoolingCall) -> Tensor:
    """``act(x)``: relu, and :func:`after_relu` of that; may overwrite its input."""
    return after_relu(logits.relu_(), call)


def after_relu(values: Tensor, call: PoolingCall) -> Tensor:
    """What follows relu, in place: scale and soft cap of the logits, then one or two ``log1p``.

    Scale and soft cap are increasing and 0 at 0, so that relu may come before them as well as after them.
    """
    if call.logit_scale != 1:
        values = values.mul_(call.logit_scale)
    if call.logit_softcap:
        values = values.div_(call.logit_softcap).tanh_().mul_(call.logit_softcap)
    for _ in range(call.logs):
        values = values.log1p_()
    return values


def activation_gradient(grad: Tensor, output: Tensor, call: PoolingCall) -> Tensor:
    """``g = where(y <= 0, 0, dy · dact)``, so that NaN stays NaN; ``dact`` from the activated output ``y`` alone.

    ``y = log1p(x)`` has the slope ``1 / (1 + x) = exp(-y)`` and ``x = expm1(y)``, once for each ``log1p``: relu:
    ``exp(-y)``; log1p_relu: ``exp(-y) · exp(-expm1(y))``. Before them, ``z = softcap · tanh(scale · x / softcap)`` has
    the slope ``scale · (1 - t) · (1 + t)`` with ``t = z / softcap``.

    The rounding of y limits how well t is known: the slope of the soft cap, at most 1, has an absolute error of up to
    ``2 κ δ``, where ``δ`` is the relative error of y, a few units of 2^-24, and ``κ = (1 + z) log1p(z) / z`` for each
    ``log1p`` (for z = 30: 3.6; log1p_relu: 3.6 · 1.9). So it is known to about 1e-6, which is the slope itself where
    ``scale · x`` is 7 times the soft cap. A y that rounding cannot tell from the largest one has the slope 0, as in
    PyTorch. :func:`recomputed_gradient` does not have this limit.
    """
    output = output.to(call.accumulation_dtype)
    slope, y = _slope_of_logs(output, call)
    if call.logit_softcap:
        t = torch.expm1(y).div_(call.logit_softcap)
        t = t.masked_fill_(output >= saturation(call), 1).clamp_max_(1)
        slope *= (1 - t) * (1 + t)
    return _gradient(grad, output, slope, call)


def recomputed_gradient(grad: Tensor, positive: Tensor, call: PoolingCall) -> Tensor:
    """The same from ``relu(x)``, which it may overwrite.

    The slope of the soft cap is ``scale · 4 e / (1 + e)²`` with ``e = exp(-2 scale · x / softcap)``, whose relative
    error is small for every x.
    """
    if not call.logit_softcap:
        return activation_gradient(grad, after_relu(positive, call), call)
    e = (positive * call.logit_scale).div_(call.logit_softcap).mul_(-2).exp_()
    output = after_relu(positive, call)
    slope, _ = _slope_of_logs(output, call)
    slope *= 4 * e / (1 + e).square_()
    return _gradient(grad, output, slope, call)


def saturation(call: PoolingCall) -> float:
    """From where on an output counts as that of the logit +inf: 4 roundings below, which is more than log1p makes."""
    largest = call.logit_softcap
    for _ in range(call.logs):
        largest = math.log1p(largest)
    return largest * (1 - 2 * torch.finfo(call.accumulation_dtype).eps)


def _slope_of_logs(output: Tensor, call: PoolingCall) -> tuple[Tensor, Tensor]:
    """The slope of all ``log1p`` together, and the result of the first one."""
    slope, y = torch.exp(-output), output
    for _ in range(call.logs - 1):
        y = torch.expm1(y)
        slope *= torch.exp(-y)
    return slope, y


def _gradient(grad: Tensor, output: Tensor, slope: Tensor, call: PoolingCall) -> Tensor:
    if call.logit_scale != 1:
        slope *= call.logit_scale
    return torch.where(output <= 0, 0, grad.to(call.accumulation_dtype) * slope)


def not_at_most(x: Tensor, t: Tensor | float) -> Tensor:
    """``x > t``, and True where either is NaN: NaN counts as above every threshold."""
    return (x <= t).logical_not_()
