"""Vocabulary tiles over all rows, on a device whose data the host does not read: nothing is packed.

The torch backend's route for every device but CPUs: float64 on CUDA, GPUs that Triton does not serve, MPS, XPU and
others. Each sequence is reduced by ``amax``, ``amin`` and ``sum`` (:mod:`.segments`), which are bitwise repeatable
without atomics and exist on every device. Since nothing is packed, a matmul also sees the padding, and may round a row
differently when there is more of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..pooling import Gradients, PoolingCall, after_relu, recomputed_gradient
from . import segments

# Elements of one [N, tile] tile of dots: 256 MiB of float32.
TILE_ELEMENTS = 64 << 20


def max_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y`` and the position of each maximum; see :class:`.Pooling`."""
    if call.screening == "on":
        raise RuntimeError(
            f"screening: the torch backend screens on a CPU only, and hidden_states is on {hidden.device}"
        )
    output, argmax = _new_results(call, hidden, weight)
    if output.shape[0] == 0 or hidden.shape[0] == 0:
        return output, argmax
    sequences = segments.of_call(call, hidden)
    for columns, dots in _tiles(call, hidden, weight, sequences.rows):
        largest, position = sequences.maximum(dots, call.need_argmax)
        values = torch.where(sequences.occupied[:, None], _activated(largest, bias, columns, call), 0)
        if position is not None:
            argmax[:, columns] = torch.where(values <= 0, 0, position).to(argmax.dtype)
        output[:, columns] = values.to(call.out_dtype)
    return output, argmax


def sum_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y``, and no positions; see :class:`.Pooling`."""
    output, argmax = _new_results(call, hidden, weight)
    if output.shape[0] == 0 or hidden.shape[0] == 0:
        return output, argmax
    sequences = segments.of_call(call, hidden)
    for columns, dots in _tiles(call, hidden, weight, sequences.rows):
        output[:, columns] = sequences.sum(_activated(dots, bias, columns, call)).to(call.out_dtype)
    return output, argmax


def sum_pool_backward(
    call: PoolingCall, grad: Tensor, output: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Gradients:
    """Recomputes the logits tile by tile and multiplies their gradients out; see :class:`.Pooling`."""
    dtype = call.accumulation_dtype
    sequence, real = _rows(call, hidden)
    exact = torch.where(real[:, None], hidden, 0).to(dtype)
    grad_hidden = torch.zeros_like(exact)
    grad_weight = torch.empty_like(weight, dtype=dtype)
    grad_bias = weight.new_empty(weight.shape[0], dtype=dtype)
    for columns, dots in _tiles(call, hidden, weight, hidden.shape[0]):
        grad_tokens = grad[:, columns].index_select(0, sequence)
        grad_logits = recomputed_gradient(grad_tokens, _positive(dots, bias, columns), call)
        grad_logits = torch.where(real[:, None], grad_logits, 0)
        grad_bias[columns] = grad_logits.sum(dim=0)
        grad_weight[columns] = grad_logits.t() @ exact
        grad_hidden.addmm_(grad_logits, weight[columns].to(dtype))
    return (
        grad_hidden.to(hidden.dtype) if call.need_hidden else None,
        grad_weight.to(weight.dtype) if call.need_weight else None,
        grad_bias.to(bias.dtype) if call.need_bias and bias is not None else None,
    )


def _new_results(call: PoolingCall, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    output = hidden.new_zeros(call.batch_size, weight.shape[0], dtype=call.out_dtype)
    return output, call.new_argmax(hidden, weight.shape[0]).zero_()


def _rows(call: PoolingCall, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each row, and whether the row is a real token."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    edges = call.edges(hidden).to(torch.int64)
    real = rows < edges[-1] if call.attention_mask is None else call.attention_mask.reshape(-1) != 0
    return torch.searchsorted(edges[1:], rows, right=True).clamp_max(max(call.batch_size - 1, 0)), real


def _activated(dots: Tensor, bias: Tensor | None, columns: slice, call: PoolingCall) -> Tensor:
    """As :func:`.pooling.activate` of dots + bias."""
    return after_relu(_positive(dots, bias, columns), call)


def _positive(dots: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    """``relu`` of dots + bias, but for ``relu``: on MPS it returned 0 for NaN (pytorch#183571)."""
    logits = dots if bias is None else dots + bias[columns].to(dots.dtype)
    return torch.where(logits <= 0, 0, logits)


def _tiles(call: PoolingCall, hidden: Tensor, weight: Tensor, most_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(columns, dots [N, columns])`` in the accumulation dtype.

    A tile is as wide as memory allows for N rows, or for the ``most_rows`` that a reduction expands them to.
    """
    rows = hidden.to(call.compute_dtype)
    # Half-precision operands with a float32 result: PyTorch's CUDA matmul has that, not every build for HIP does.
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
