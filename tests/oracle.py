"""The definition in float64, written out over sequences, to hold every backend against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import splade_kernels as sk
from splade_kernels import ops
from splade_kernels.backends.pooling import ACTIVATION_FUNCTIONS, PoolingCall

# Whatever is tested for each activation function is tested for these.
ACTIVATIONS = list(ACTIVATION_FUNCTIONS)


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    grad: Tensor

    def parameters(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    def packed(self) -> tuple[Tensor, Tensor]:
        lengths = self.mask.sum(dim=1)
        return self.hidden.detach()[self.mask != 0], torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def make_case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    pattern: str = "ragged",
    bias: bool = True,
    integers: bool = False,
    seed: int = 0,
) -> Case:
    """``shape`` is (B, S, D, V). Integer cases have small whole numbers, whose dots are exact in every dtype.

    Drawn on the CPU, so that the numbers do not depend on the device, and moved to the default one.
    """
    batch, length, hidden_size, vocab_size = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        if integers:
            values = torch.randint(-2, 3, size, generator=generator, device="cpu")
        else:
            values = torch.randn(*size, generator=generator, device="cpu")
        return values.to(torch.get_default_device(), dtype)

    scale = 1 if integers or hidden_size == 0 else hidden_size**-0.5
    case = Case(
        draw(batch, length, hidden_size).requires_grad_(),
        (draw(vocab_size, hidden_size) * scale).requires_grad_(),
        draw(vocab_size).requires_grad_() if bias else None,
        make_mask(batch, length, pattern, generator),
        draw(batch, vocab_size),
    )
    return case


def make_mask(batch: int, length: int, pattern: str, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(0, length + 1, (batch,), generator=generator, device="cpu")
    lengths[-1:] = length
    return _mask(lengths, torch.arange(length, device="cpu"), pattern, generator).to(torch.get_default_device())


def _mask(lengths: Tensor, positions: Tensor, pattern: str, generator: torch.Generator) -> Tensor:
    shape = len(lengths), len(positions)
    if pattern == "full":
        return positions < lengths.new_full(shape, shape[1])
    if pattern == "ragged":
        return positions < lengths[:, None]
    if pattern == "left":
        return positions >= shape[1] - lengths[:, None]
    if pattern == "holes":
        return torch.rand(shape, generator=generator, device="cpu") < 0.6
    if pattern == "one":
        return positions == (lengths[:, None] - 1).clamp_min(0)
    if pattern == "empty":
        mask = positions < lengths[:, None]
        mask[::2] = False
        return mask
    raise ValueError(pattern)


def attained_maximum(case: Case, argmax: Tensor) -> Tensor:
    """Dots in float64 at the given positions, ``[B, V]``; 0 for sequences without a real token."""
    dots = case.hidden.detach().double() @ case.weight.detach().double().t()
    if dots.shape[1] == 0:
        return dots.new_zeros(argmax.shape)
    return dots.gather(1, argmax.long()[:, None])[:, 0]


def expected_gradients(
    case: Case, output: Tensor, argmax: Tensor, activation_function: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dW, dc in float64 of the maximum, given the argmax: one contribution for each active entry, no others."""
    hidden, weight = case.hidden.detach().double(), case.weight.detach().double()
    y = output.double()
    slope, inner = torch.ones_like(y), y
    for _ in range(ACTIVATION_FUNCTIONS[activation_function]):
        slope, inner = slope * torch.exp(-inner), torch.exp(inner) - 1
    g = torch.where(y <= 0, 0, case.grad.double() * slope)
    sequence, entry = torch.nonzero(g != 0, as_tuple=True)
    token = argmax.long()[sequence, entry]
    active = g[sequence, entry]
    grad_hidden = torch.zeros_like(hidden).index_put(
        (sequence, token), active[:, None] * weight[entry], accumulate=True
    )
    rows = active[:, None] * hidden[sequence, token]
    grad_weight = torch.zeros_like(weight).index_put((entry,), rows, accumulate=True)
    return grad_hidden, grad_weight, g.sum(dim=0)


def gradient_magnitudes(case: Case, output: Tensor, argmax: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`expected_gradients` sums, without signs: what rounding in those sums is relative to."""
    absolute = {name: getattr(case, name).detach().abs() for name in ("hidden", "weight", "grad")}
    return expected_gradients(replace(case, **absolute), output, argmax, activation)


def sum_gradient_magnitudes(case: Case, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the gradients of sum pooling."""
    hidden, weight = case.hidden.detach().double(), case.weight.detach().double()
    logits = hidden @ weight.t() + (0 if case.bias is None else case.bias.detach().double())
    slope, inner = torch.ones_like(logits), logits.relu()
    for _ in range(ACTIVATION_FUNCTIONS[activation]):
        slope, inner = slope / (1 + inner), inner.log1p()
    active = (logits > 0) & (case.mask != 0)[..., None]
    g = torch.where(active, case.grad.double().abs()[:, None] * slope, 0)
    return g @ weight.abs(), torch.einsum("bsv,bsd->vd", g, hidden.abs()), g.sum(dim=(0, 1))


def reference_in_double(case: Case, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of the dense definition at the case's exact values."""
    parameters = [tensor.detach().double().requires_grad_() for tensor in case.parameters()]
    hidden, weight, *bias = parameters
    output = sk.reference.splade_pool(hidden, weight, bias[0] if bias else None, case.mask, **options)
    return output.detach(), list(torch.autograd.grad(output, parameters, case.grad.double()))


def stock(case: Case, pooling_strategy: str, activation_function: str) -> Tensor:
    """What the dense head computes in the case's own dtype: its error is what ours is held against."""
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    values = (logits * case.mask[..., None].to(logits.dtype)).relu()
    for _ in range(ACTIVATION_FUNCTIONS[activation_function]):
        values = values.log1p()
    if pooling_strategy == "sum":
        return (values * case.mask[..., None]).sum(dim=1)
    return values.amax(dim=1) if values.shape[1] else values.new_zeros(case.grad.shape)


def pool_options(**options: Any) -> ops.PoolOptions:
    """What the operators are given beside tensors; unless said otherwise, for one float32 token and its maximum."""
    defaults = ops.PoolOptions(1, "max", "relu", torch.float32, torch.float32, "auto", "auto")
    return defaults._replace(**options)


def new_call(**options: Any) -> PoolingCall:
    """What a backend is told; unless said otherwise, of one float32 token and its maximum."""
    defaults = PoolingCall(
        batch_size=1,
        attention_mask=None,
        cu_seqlens=None,
        max_seqlen=1,
        pooling_strategy="max",
        activation_function="relu",
        compute_dtype=torch.float32,
        out_dtype=torch.float32,
    )
    return replace(defaults, **options)


def call_of(case: Case, **options: Any) -> PoolingCall:
    """What a backend is told of a padded case; unless said otherwise, of its maximum."""
    batch_size, length, _ = case.hidden.shape
    sizes = {"batch_size": batch_size, "attention_mask": case.mask, "max_seqlen": length}
    dtypes = dict.fromkeys(("compute_dtype", "out_dtype"), case.hidden.dtype)
    return new_call(**(sizes | dtypes | options))


def forward_with_argmax(case: Case, backend: str, activation_function: str = "relu") -> tuple[Tensor, Tensor]:
    """What the forward keeps for the backward: the output in at least float32, and the argmax."""
    dtype = case.hidden.dtype
    bias = None if case.bias is None else case.bias.detach()
    options = pool_options(
        max_seqlen=case.hidden.shape[1],
        activation_function=activation_function,
        compute_dtype=dtype,
        out_dtype=torch.promote_types(dtype, torch.float32),
        backend=backend,
    )
    output, argmax = ops.pool_forward(
        case.hidden.detach(), case.weight.detach(), bias, case.mask, None, *options, need_argmax=True
    )
    return output, argmax


def largest_error(ours: Tensor, exact: Tensor) -> float:
    return (ours.double() - exact).abs().max().item() if exact.numel() else 0.0


def close(ours: Tensor, exact: Tensor) -> bool:
    """Within 100 roundings of our dtype, on the scale of the largest value."""
    scale = max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    return largest_error(ours, exact) <= 100 * torch.finfo(ours.dtype).eps * scale


# Half a unit in the last place of float32, relative.
EPSILON = 2.0**-24


def gradient_allowance(magnitude: Tensor, terms: int) -> Tensor:
    """How far a float32 sum of so many terms of a gradient may be off; exponentials are worth some more of them."""
    return (terms + 32) * EPSILON * magnitude


def float32_allowance(case: Case, exact: Tensor, pooling_strategy: str = "max") -> Tensor:
    """How far float32 arithmetic may be from ``exact``, a ``[B, V]`` output, before that is rounded to its dtype.

    Dots: 2 D ``EPSILON`` of the norms, for tensor cores truncate. The bias; two logarithms; a sum over the tokens.
    """
    hidden, weight = case.hidden.detach().double(), case.weight.detach().double()
    norms = torch.where(case.mask != 0, hidden.norm(dim=-1), 0)
    tokens = case.hidden.shape[1] if pooling_strategy == "sum" else 1
    norm = norms.sum(dim=1) if pooling_strategy == "sum" else norms.amax(dim=1)
    bias = 0 if case.bias is None else tokens * case.bias.detach().double().abs()
    dots = (2 * hidden.shape[2] + 1) * norm[:, None] * weight.norm(dim=1)
    return EPSILON * (dots + bias + (16 + tokens) * exact)


def rounded_once(ours: Tensor, exact: Tensor, allowance: Tensor) -> bool:
    """Within half a unit in the last place of our 16-bit dtype, and the allowance for the float32 that was rounded.

    A float32 result is not rounded again.
    """
    info = torch.finfo(ours.dtype)
    _, exponent = torch.frexp((exact.abs() + allowance).clamp_min(info.tiny))
    half = torch.exp2(exponent.double() - 1) * info.eps / 2 if info.bits == 16 else 0.0
    return bool(((ours.double() - exact).abs() <= half + allowance).all())
