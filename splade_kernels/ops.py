"""The operators: schema, fake and per-backend implementation. They are opaque to ``torch.compile``.

Every body runs with autocast off: it would still be on inside an operator and turn float32 products into bfloat16 ones.
The caller has chosen the compute dtype. No output aliases an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import backends
from .backends import compaction, compiled
from .backends.pooling import ACTIVATION_FUNCTIONS, Pooling, PoolingCall, argmax_dtype, check_choice, choose


class PoolOptions(NamedTuple):
    """The arguments of a pooling operator that are not tensors; the schema is made from these fields."""

    max_seqlen: int
    pooling_strategy: str
    activation_function: str
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    screening: str  # "auto", "on" or "off"
    backend: str
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # 0: none


_TYPES = {int: "SymInt", float: "float", str: "str", torch.dtype: "ScalarType"}
_OPTIONS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(PoolOptions).items())
_POOL = f"Tensor hidden_states, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? cu_seqlens, {_OPTIONS}"
_library = torch.library.Library("splade_kernels", "DEF")


def _define(name: str, signature: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(f"{name}{signature}")
    # One implementation for every device: it selects the backend itself.
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"splade_kernels::{name}", fake, lib=_library)


@contextmanager
def _isolated(tensor: Tensor) -> Iterator[None]:
    """Autocast and autograd off, and the device of ``tensor`` as the current one, on which Triton launches."""
    device = tensor.device.type
    with torch.autocast(device, enabled=False), torch.no_grad(), torch.cuda.device_of(tensor):
        yield


class _Inputs(NamedTuple):
    """The arguments that both pooling operators take."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    options: PoolOptions

    @property
    def batch_size(self) -> int:
        return self.hidden_states.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def flat(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``[N, D]`` hidden states, the weight and the bias."""
        return self.hidden_states.flatten(0, -2), self.weight, self.bias

    def describe(self) -> tuple[PoolingCall, Pooling]:
        """The call as backends are told it, and the backend's implementation of its pooling strategy."""
        options = self.options
        backend = backends.select(options.backend, self.hidden_states.device, options.compute_dtype)
        pooling = choose("pooling_strategy", backend.POOLINGS, options.pooling_strategy)
        check_choice("activation_function", ACTIVATION_FUNCTIONS, options.activation_function)
        call = PoolingCall(
            batch_size=self.batch_size,
            attention_mask=self.attention_mask,
            cu_seqlens=self.cu_seqlens,
            max_seqlen=options.max_seqlen,
            pooling_strategy=options.pooling_strategy,
            activation_function=options.activation_function,
            compute_dtype=options.compute_dtype,
            out_dtype=options.out_dtype,
            screening=options.screening,
            logit_scale=options.logit_scale,
            logit_softcap=options.logit_softcap,
        )
        return call, pooling


def _parse(arguments: tuple[Any, ...]) -> tuple[_Inputs, tuple[bool, ...]]:
    """Inputs, and the trailing ``need_...`` of an operator."""
    hidden_states, weight, bias, attention_mask, cu_seqlens, *others = arguments
    options, needs = PoolOptions(*others[: len(PoolOptions._fields)]), others[len(PoolOptions._fields) :]
    return _Inputs(hidden_states, weight, bias, attention_mask, cu_seqlens, options), tuple(needs)


def _pool_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, (need_argmax,) = _parse(arguments)
    _check_cu_seqlens(inputs)
    call, pooling = inputs.describe()
    with _isolated(inputs.hidden_states):
        output, argmax = pooling.forward(replace(call, need_argmax=need_argmax), *inputs.flat())
    return output, argmax


def _pool_forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, (need_argmax,) = _parse(arguments)
    shape = (inputs.batch_size, inputs.weight.shape[0])
    new, options = inputs.hidden_states.new_empty, inputs.options
    argmax = new(shape if need_argmax else (0,), dtype=argmax_dtype(options.max_seqlen))
    return new(shape, dtype=options.out_dtype), argmax


def _pool_backward(grad: Tensor, output: Tensor, argmax: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (need_hidden, need_weight, need_bias) = _parse(arguments)
    call, pooling = inputs.describe()
    call = replace(call, need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias)
    with _isolated(inputs.hidden_states):
        grad_hidden, *others = pooling.backward(call, grad, output, argmax, *inputs.flat())
    if grad_hidden is not None:
        grad_hidden = grad_hidden.view(inputs.hidden_states.shape)
    return _present([grad_hidden, *others], (need_hidden, need_weight, need_bias), inputs)


def _pool_backward_fake(grad: Tensor, output: Tensor, argmax: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, needs = _parse(arguments)
    likes = inputs.hidden_states, inputs.weight, inputs.bias
    return _present([None if like is None else like.new_empty(like.shape) for like in likes], needs, inputs)


def _present(
    gradients: Sequence[Tensor | None], needs: tuple[bool, ...], inputs: _Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that are needed; an operator returns tensors, so the others are empty ones."""
    likes = inputs.hidden_states, inputs.weight, inputs.weight
    hidden, weight, bias = (
        gradient if need and gradient is not None else like.new_empty(0)
        for gradient, need, like in zip(gradients, needs, likes, strict=True)
    )
    return hidden, weight, bias


def _flops_sums(embeddings: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """``[V]`` sums over the kept rows in at least float32, and ``[B]`` which rows were kept (empty: all)."""
    module = backends.select("auto", embeddings.device, embeddings.dtype)
    with _isolated(embeddings):
        sums, kept = module.flops_sums(embeddings, threshold)
    return sums, kept


def _flops_sums_fake(embeddings: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    sums = embeddings.new_empty(embeddings.shape[1], dtype=torch.promote_types(embeddings.dtype, torch.float32))
    return sums, embeddings.new_empty(0 if threshold is None else embeddings.shape[0], dtype=torch.bool)


def _flops_value(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """From ``[V]`` column sums and the number of rows: ``Σ mean²``, and its gradient in each row, ``2 mean / rows``."""
    with _isolated(statistics):
        rows = statistics[-1]
        mean = statistics[:-1] / rows
        return mean.square().sum(), mean * (2 / rows)


def _flops_value_fake(statistics: Tensor) -> tuple[Tensor, Tensor]:
    return statistics.new_empty(()), statistics.new_empty(statistics.shape[0] - 1)


def _sparsify(embeddings: Tensor, max_active_dims: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """``crow [B + 1]``, ``col [nnz]`` int64 and ``values [nnz]``; on a device the host waits for the count."""
    with _isolated(embeddings):
        return compaction.sparsify(embeddings, max_active_dims)


def _check_cu_seqlens(inputs: _Inputs) -> None:
    """Checks the values on a CPU, where reading them costs no sync; on a device the kernels clamp them instead."""
    cu_seqlens, max_seqlen = inputs.cu_seqlens, inputs.options.max_seqlen
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    tokens = inputs.hidden_states.shape[0]
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {first}")
    lengths = cu_seqlens.diff()
    if len(lengths) and int(lengths.min()) < 0:
        where = int(lengths.argmin())
        raise ValueError(
            f"cu_seqlens: expected non-decreasing values, got {int(cu_seqlens[where])} followed by "
            f"{int(cu_seqlens[where + 1])} at index {where + 1}"
        )
    if last != tokens:
        raise ValueError(f"cu_seqlens: expected to end at the number of tokens T={tokens}, got {last}")
    if len(lengths) and int(lengths.max()) > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least the longest sequence ({int(lengths.max())}), got {max_seqlen}")


_define("pool_forward", f"({_POOL}, bool need_argmax) -> (Tensor, Tensor)", _pool_forward, _pool_forward_fake)
_define(
    "pool_backward",
    f"(Tensor grad, Tensor output, Tensor argmax, {_POOL}, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    _pool_backward,
    _pool_backward_fake,
)
_define("flops_sums", "(Tensor embeddings, float? threshold) -> (Tensor, Tensor)", _flops_sums, _flops_sums_fake)
_define("flops_value", "(Tensor statistics) -> (Tensor, Tensor)", _flops_value, _flops_value_fake)
_define(
    "sparsify",
    "(Tensor embeddings, SymInt? max_active_dims) -> (Tensor crow, Tensor col, Tensor values)",
    _sparsify,
    compiled.sparsify_fake,
)

pool_forward = torch.ops.splade_kernels.pool_forward.default
pool_backward = torch.ops.splade_kernels.pool_backward.default
flops_sums = torch.ops.splade_kernels.flops_sums.default
flops_value = torch.ops.splade_kernels.flops_value.default
sparsify = torch.ops.splade_kernels.sparsify.default
