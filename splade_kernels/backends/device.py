"""Vocabulary tiles on a device whose data the host must not read: segments are reduced in place, nothing is packed.

Used by the torch backend for accelerators (float64 on CUDA, or where Triton cannot run). ``torch.segment_reduce`` walks
each segment in order, which keeps maxima and sums bitwise repeatable without atomics. Since nothing is packed, a matmul
sees the padding too, and may round a row differently when there is more of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .pooling import PoolingCall, activate, activation_gradient

# Elements of one [N, tile] tile of dots: 256 MiB of float32.
TILE_ELEMENTS = 64 << 20


def pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`splade_kernels.backends.torch.pool_forward`."""
    vocab_size = weight.shape[0]
    output = hidden.new_zeros(call.batch_size, vocab_size, dtype=call.out_dtype)
    argmax = call.new_argmax(hidden, vocab_size).zero_()
    if hidden.shape[0] == 0:
        return output, argmax
    offsets, sequence, position, real = _segments(call, hidden)
    occupied = torch.segment_reduce(real.to(torch.float32), "sum", offsets=offsets, unsafe=True) > 0
    dtype = call.accumulation_dtype
    for columns, dots in _tiles(call, hidden, weight):
        offset = 0 if bias is None else bias[columns].to(dtype)
        if call.pooling_strategy == "max":
            dots = torch.where(real[:, None], dots, -torch.inf)
            largest = torch.segment_reduce(dots, "max", offsets=offsets, unsafe=True)
            values = torch.where(occupied[:, None], activate(largest + offset, call.activation_function), 0)
            if call.need_argmax:
                attained = largest.index_select(0, sequence)
                attains = real[:, None] & ((dots == attained) | (dots.isnan() & attained.isnan()))
                candidates = torch.where(attains, position[:, None], torch.inf)
                first = torch.segment_reduce(candidates, "min", offsets=offsets, unsafe=True)
                argmax[:, columns] = torch.where(values <= 0, 0, first).nan_to_num(posinf=0).to(argmax.dtype)
        else:
            tokens = torch.where(real[:, None], activate(dots + offset, call.activation_function), 0)
            values = torch.segment_reduce(tokens, "sum", offsets=offsets, unsafe=True)
        output[:, columns] = values.to(call.out_dtype)
    return output, argmax


def sum_pool_backward(
    call: PoolingCall, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`splade_kernels.backends.torch.sum_pool_backward`."""
    dtype = call.accumulation_dtype
    _, sequence, _, real = _segments(call, hidden)
    exact = torch.where(real[:, None], hidden, 0).to(dtype)
    grad_hidden = torch.zeros_like(exact)
    grad_weight = torch.empty_like(weight, dtype=dtype)
    grad_bias = weight.new_empty(weight.shape[0], dtype=dtype)
    for columns, dots in _tiles(call, hidden, weight):
        logits = dots if bias is None else dots + bias[columns].to(dtype)
        grad_tokens = grad[:, columns].index_select(0, sequence)
        grad_logits = activation_gradient(grad_tokens, activate(logits, call.activation_function), call)
        grad_logits = torch.where(real[:, None], grad_logits, 0)
        grad_bias[columns] = grad_logits.sum(dim=0)
        grad_weight[columns] = grad_logits.t() @ exact
        grad_hidden.addmm_(grad_logits, weight[columns].to(dtype))
    return (
        grad_hidden.to(hidden.dtype) if call.need_hidden else None,
        grad_weight.to(weight.dtype) if call.need_weight else None,
        grad_bias.to(bias.dtype) if call.need_bias and bias is not None else None,
    )


def _segments(call: PoolingCall, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``offsets [B + 1]``; per row its sequence, its position there (float32: exact to 2^24), whether it is real."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    offsets = call.edges(hidden).to(torch.int64)
    real = rows < offsets[-1] if call.attention_mask is None else call.attention_mask.reshape(-1) != 0
    sequence = torch.searchsorted(offsets[1:], rows, right=True).clamp_max(max(call.batch_size - 1, 0))
    position = (rows - offsets[sequence]).to(torch.float32)
    return offsets, sequence, position, real


def _tiles(call: PoolingCall, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(columns, dots [N, columns])`` in the accumulation dtype."""
    rows = hidden.to(call.compute_dtype)
    wide_output = rows.is_cuda and call.compute_dtype != call.accumulation_dtype
    if not wide_output:
        rows = rows.to(call.accumulation_dtype)
    vocab_size = weight.shape[0]
    width = max(1, min(vocab_size, TILE_ELEMENTS // max(len(rows), 1)))
    for first in range(0, vocab_size, width):
        columns = slice(first, min(first + width, vocab_size))
        tile = weight[columns].to(call.compute_dtype).t()
        if wide_output:
            yield columns, torch.mm(rows, tile, out_dtype=call.accumulation_dtype)
        else:
            yield columns, rows @ tile.to(call.accumulation_dtype)
