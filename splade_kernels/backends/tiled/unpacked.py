"""Vocabulary tiles on a device whose data the host does not look at: nothing is packed.

Used by the torch backend for all devices but CPUs: float64 on CUDA, GPUs that Triton does not serve, MPS, XPU and
others. Each sequence is reduced by plain ``amax``, ``amin`` and ``sum`` (:mod:`.segments`), which keeps maxima and sums
bitwise repeatable without atomics and needs no operation that a device may lack. One route serves them all, rather than
``torch.segment_reduce`` where there is one and this where there is none: on CPU tensors it took about as long (padded
maxima less, packed short sequences more), and its memory does not grow with the length of the longest sequence. Since
nothing is packed, a matmul sees the padding too, and may round a row differently when there is more of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..pooling import PoolingCall, activation_gradient, log1p
from . import segments

# Elements of one [N, tile] tile of dots: 256 MiB of float32.
TILE_ELEMENTS = 64 << 20


def max_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y`` and the position of each maximum; see :class:`.Pooling`."""
    vocab_size = weight.shape[0]
    output = hidden.new_zeros(call.batch_size, vocab_size, dtype=call.out_dtype)
    argmax = call.new_argmax(hidden, vocab_size).zero_()
    if hidden.shape[0] == 0 or call.batch_size == 0:
        return output, argmax
    sequences = segments.of_call(call, hidden)
    for columns, dots in _tiles(call, hidden, weight, sequences.rows):
        largest, position = sequences.maximum(dots, call.need_argmax)
        values = torch.where(sequences.occupied[:, None], _activate(_with_bias(largest, bias, columns), call), 0)
        if position is not None:
            argmax[:, columns] = torch.where(values <= 0, 0, position).to(argmax.dtype)
        output[:, columns] = values.to(call.out_dtype)
    return output, argmax


def sum_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y``, and no positions; see :class:`.Pooling`."""
    output = hidden.new_zeros(call.batch_size, weight.shape[0], dtype=call.out_dtype)
    argmax = call.new_argmax(hidden, weight.shape[0]).zero_()
    if hidden.shape[0] == 0 or call.batch_size == 0:
        return output, argmax
    sequences = segments.of_call(call, hidden)
    for columns, dots in _tiles(call, hidden, weight, sequences.rows):
        output[:, columns] = sequences.sum(_activate(_with_bias(dots, bias, columns), call)).to(call.out_dtype)
    return output, argmax


def sum_pool_backward(
    call: PoolingCall, grad: Tensor, output: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Recomputes the logits tile by tile and multiplies them out; see :class:`.Pooling`."""
    dtype = call.accumulation_dtype
    sequence, real = _rows(call, hidden)
    exact = torch.where(real[:, None], hidden, 0).to(dtype)
    grad_hidden = torch.zeros_like(exact)
    grad_weight = torch.empty_like(weight, dtype=dtype)
    grad_bias = weight.new_empty(weight.shape[0], dtype=dtype)
    for columns, dots in _tiles(call, hidden, weight, hidden.shape[0]):
        logits = _with_bias(dots, bias, columns)
        grad_tokens = grad[:, columns].index_select(0, sequence)
        grad_logits = activation_gradient(grad_tokens, _activate(logits, call), call)
        grad_logits = torch.where(real[:, None], grad_logits, 0)
        grad_bias[columns] = grad_logits.sum(dim=0)
        grad_weight[columns] = grad_logits.t() @ exact
        grad_hidden.addmm_(grad_logits, weight[columns].to(dtype))
    return (
        grad_hidden.to(hidden.dtype) if call.need_hidden else None,
        grad_weight.to(weight.dtype) if call.need_weight else None,
        grad_bias.to(bias.dtype) if call.need_bias and bias is not None else None,
    )


def _rows(call: PoolingCall, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Per row its sequence, and whether it is real."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    edges = call.edges(hidden).to(torch.int64)
    real = rows < edges[-1] if call.attention_mask is None else call.attention_mask.reshape(-1) != 0
    return torch.searchsorted(edges[1:], rows, right=True).clamp_max(max(call.batch_size - 1, 0)), real


def _with_bias(dots: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    return dots if bias is None else dots + bias[columns].to(dots.dtype)


def _activate(logits: Tensor, call: PoolingCall) -> Tensor:
    """As :func:`.pooling.activate`, without ``relu``: on MPS it made zeros of NaN until 2026 (pytorch#183571)."""
    return log1p(torch.where(logits <= 0, 0, logits), call.activation_function)


def _tiles(call: PoolingCall, hidden: Tensor, weight: Tensor, most_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(columns, dots [N, columns])`` in the accumulation dtype; a reduction expands N to ``most_rows`` at most.

    Tiles are as wide as memory for that many rows allows.
    """
    rows = hidden.to(call.compute_dtype)
    # Products of half precision with a wider result: PyTorch's CUDA kernels, not those of all its builds for HIP.
    wide_output = rows.is_cuda and torch.version.hip is None and call.compute_dtype != call.accumulation_dtype
    if not wide_output:
        rows = rows.to(call.accumulation_dtype)
    vocab_size = weight.shape[0]
    width = max(1, min(vocab_size, TILE_ELEMENTS // max(len(rows), most_rows, 1)))
    for first in range(0, vocab_size, width):
        columns = slice(first, min(first + width, vocab_size))
        tile = weight[columns].to(call.compute_dtype).t()
        if wide_output:
            yield columns, torch.mm(rows, tile, out_dtype=call.accumulation_dtype)
        else:
            yield columns, rows @ tile.to(call.accumulation_dtype)
