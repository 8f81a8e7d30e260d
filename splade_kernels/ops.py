"""The operators: schema, fake and per-backend implementation. Opaque to ``torch.compile``; autograd lives above them.

Every body runs with autocast off (it would still be on inside an operator and turn float32 products into bfloat16
ones); the compute dtype was chosen once by the caller. No output aliases an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import compaction
from .backends.pooling import PoolingCall, argmax_dtype, choose

_library = torch.library.Library("splade_kernels", "DEF")

_POOL = (
    "Tensor hidden_states, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? cu_seqlens, SymInt max_seqlen, "
    "str pooling_strategy, str activation_function, ScalarType compute_dtype, ScalarType out_dtype, "
    "str screening, str backend"
)


def _define(name: str, signature: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(f"{name}{signature}")
    # One body serves every device, and selects its backend itself.
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"splade_kernels::{name}", fake, lib=_library)


@contextmanager
def _isolated(tensor: Tensor) -> Iterator[None]:
    """No autocast, no graph, and the device of ``tensor`` as the current one: Triton launches on that."""
    device = tensor.device.type
    with torch.autocast(device, enabled=False), torch.no_grad(), torch.cuda.device_of(tensor):
        yield


def _batch_size(hidden_states: Tensor, cu_seqlens: Tensor | None) -> int:
    return hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _describe(
    hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, options: Any
) -> tuple[PoolingCall, ModuleType]:
    """The call as backends are told it, and the backend."""
    pooling_strategy, activation_function, compute_dtype, out_dtype, screening, backend = options
    call = PoolingCall(
        _batch_size(hidden_states, cu_seqlens),
        attention_mask,
        cu_seqlens,
        max_seqlen,
        pooling_strategy,
        activation_function,
        compute_dtype,
        out_dtype,
        screening,
    )
    return call, backends.select(backend, hidden_states.device, compute_dtype)


def _pool_forward(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    *more: Any,
) -> tuple[Tensor, Tensor]:
    *options, need_argmax = more
    _check_cu_seqlens(cu_seqlens, hidden_states, max_seqlen)
    call, backend = _describe(hidden_states, attention_mask, cu_seqlens, max_seqlen, options)
    call = replace(call, need_argmax=need_argmax)
    with _isolated(hidden_states):
        pooling = choose("pooling_strategy", backend.POOLINGS, call.pooling_strategy)
        output, argmax = pooling.forward(call, hidden_states.flatten(0, -2), weight, bias)
    return output, argmax


def _pool_forward_fake(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *_, out_dtype, _, _, need_argmax = options
    shape = (_batch_size(hidden_states, cu_seqlens), weight.shape[0])
    argmax = hidden_states.new_empty(shape if need_argmax else (0,), dtype=argmax_dtype(max_seqlen))
    return hidden_states.new_empty(shape, dtype=out_dtype), argmax


def _pool_backward(
    grad: Tensor,
    output: Tensor,
    argmax: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *options, need_hidden, need_weight, need_bias = more
    call, backend = _describe(hidden_states, attention_mask, cu_seqlens, max_seqlen, options)
    call = replace(call, need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias)
    flat = hidden_states.flatten(0, -2)
    with _isolated(hidden_states):
        pooling = choose("pooling_strategy", backend.POOLINGS, call.pooling_strategy)
        grad_hidden, grad_weight, grad_bias = pooling.backward(call, grad, output, argmax, flat, weight, bias)
    return (
        grad_hidden.view(hidden_states.shape) if need_hidden else hidden_states.new_empty(0),
        grad_weight if need_weight else weight.new_empty(0),
        grad_bias if need_bias else weight.new_empty(0),
    )


def _pool_backward_fake(
    grad: Tensor,
    output: Tensor,
    argmax: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_hidden, need_weight, need_bias = options
    return (
        hidden_states.new_empty(hidden_states.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


def _flops_sums(embeddings: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """``[V]`` sums over the kept rows in at least float32, and ``[B]`` which rows were kept (empty: all)."""
    module = backends.select("auto", embeddings.device, embeddings.dtype)
    with _isolated(embeddings):
        sums, kept = module.flops_sums(embeddings, threshold)
    return sums, kept


def _flops_sums_fake(embeddings: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    rows, columns = embeddings.shape
    kept = embeddings.new_empty(0 if threshold is None else rows, dtype=torch.bool)
    return embeddings.new_empty(columns, dtype=_statistics_dtype(embeddings)), kept


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


def _sparsify_fake(embeddings: Tensor, max_active_dims: int | None) -> tuple[Tensor, Tensor, Tensor]:
    nonzeros = torch.library.get_ctx().new_dynamic_size()
    rows = embeddings.shape[0]
    crow = embeddings.new_empty(rows + 1, dtype=torch.int64)
    return crow, embeddings.new_empty(nonzeros, dtype=torch.int64), embeddings.new_empty(nonzeros)


def _statistics_dtype(embeddings: Tensor) -> torch.dtype:
    return torch.promote_types(embeddings.dtype, torch.float32)


def _check_cu_seqlens(cu_seqlens: Tensor | None, hidden_states: Tensor, max_seqlen: int) -> None:
    """Values, where reading them costs no sync; on a device the kernels clamp them instead."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    tokens = hidden_states.shape[0]
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
    _sparsify_fake,
)

pool_forward = torch.ops.splade_kernels.pool_forward.default
pool_backward = torch.ops.splade_kernels.pool_backward.default
flops_sums = torch.ops.splade_kernels.flops_sums.default
flops_value = torch.ops.splade_kernels.flops_value.default
sparsify = torch.ops.splade_kernels.sparsify.default
