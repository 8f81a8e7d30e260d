"""Backward of the maximum: in one pass over the vocabulary by a compiled operator where there is one for a CPU, else by
two weighted gathers over the active entries in PyTorch's operations, on every device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import compiled, dispatch
from ..pooling import Gradients, PoolingCall, activation_gradient
from . import segments

# (sequence, vocabulary) entries per block of the bags: bounds the memory of their index, about 60 bytes an entry.
BACKWARD_ENTRIES = 1 << 20
# The same where only g is computed: 1 MiB for each of its terms, which stay in cache.
GRADIENT_ENTRIES = 1 << 18
# Inactive entries per spare bag (see _bag_sum).
SPARE_BAG = 64


def max_pool_backward(
    call: PoolingCall, grad: Tensor, output: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Gradients:
    """``dW[v] = Σ_b g[b, v] · h[a[b, v]]`` and ``dh[t] = Σ g[b, v] · W[v]`` over the ``(b, v)`` that token t won.

    Entries with ``g = 0`` are left out, not multiplied.
    """
    if hidden.shape[0] == 0:
        return torch.zeros_like(hidden), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    one_pass = dispatch.on_host(hidden) and call.accumulation_dtype == torch.float32 and compiled.serves(hidden.device)
    gradients = _in_one_pass if one_pass else _by_bags
    return gradients(call, grad, output, argmax, hidden, weight, bias)


def _in_one_pass(
    call: PoolingCall, grad: Tensor, output: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Gradients:
    """By the compiled operator. Only g is computed here, block by block, so that its terms stay in cache."""
    gradient = grad.new_empty(grad.shape, dtype=call.accumulation_dtype)
    for columns in _blocks(call, weight.shape[0], GRADIENT_ENTRIES):
        gradient[:, columns] = activation_gradient(grad[:, columns], output[:, columns], call)
    grad_hidden = grad_weight = None
    if call.need_hidden or call.need_weight:
        grad_hidden, grad_weight = torch.ops.splade_kernels_csrc.max_pool_gradients(
            gradient, argmax, call.edges(hidden), hidden, weight, call.need_hidden, call.need_weight
        )
    return (
        grad_hidden if call.need_hidden else None,
        grad_weight if call.need_weight else None,
        gradient.sum(dim=0).to(bias.dtype) if call.need_bias and bias is not None else None,
    )


def _by_bags(
    call: PoolingCall, grad: Tensor, output: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Gradients:
    """Both are sums over bags of rows, in a fixed order without atomics: one bag per vocabulary entry over the rows of
    ``h``, and, after a stable sort by token, one bag per token over the rows of ``W``.
    """
    vocab_size, rows = weight.shape[0], hidden.shape[0]
    table = hidden.to(call.accumulation_dtype).contiguous() if call.need_weight else hidden
    starts = call.edges(hidden)[:-1]
    grad_hidden: Tensor | None = None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if call.need_weight else None
    grad_bias = torch.empty_like(bias) if call.need_bias and bias is not None else None

    for columns in _blocks(call, vocab_size, BACKWARD_ENTRIES):
        gradient = activation_gradient(grad[:, columns], output[:, columns], call)
        values = gradient.t().contiguous()  # [v, B]
        if grad_bias is not None:
            grad_bias[columns] = values.sum(dim=1)
        if not (call.need_hidden or call.need_weight):
            continue
        active = values != 0
        entries = _active_entries(active)
        weights = values.reshape(-1)[entries]
        token = (argmax[:, columns].to(torch.int32) + starts[:, None]).clamp_(0, rows - 1).t().reshape(-1)[entries]
        if grad_weight is not None:
            block_gradient = _bag_sum(token, table, _exclusive_sum(active.sum(dim=1)), weights)
            if len(values) == vocab_size:
                grad_weight = block_gradient.to(weight.dtype)
            else:
                grad_weight[columns] = block_gradient
        if call.need_hidden:
            ids = entries.div(call.batch_size, rounding_mode="floor").to(torch.int32)
            if not dispatch.may_wait(hidden):
                in_use = torch.arange(len(entries), device=hidden.device) < active.sum()
                token = torch.where(in_use, token, rows)
            token, order = torch.sort(token, stable=True)
            bounds = torch.arange(rows + 1, device=hidden.device, dtype=torch.int32)
            offsets = torch.searchsorted(token, bounds, out_int32=True)
            block = weight[columns].to(call.accumulation_dtype).contiguous()
            part = _bag_sum(ids[order], block, offsets, weights[order])
            grad_hidden = part if grad_hidden is None else grad_hidden.add_(part)
    if call.need_hidden:
        grad_hidden = hidden.new_zeros(hidden.shape) if grad_hidden is None else grad_hidden.to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


def _blocks(call: PoolingCall, vocab_size: int, entries: int) -> Iterator[slice]:
    step = max(1, entries // max(call.batch_size, 1))
    return (slice(first, min(first + step, vocab_size)) for first in range(0, vocab_size, step))


def _active_entries(active: Tensor) -> Tensor:
    """Flat indices of the true entries, ascending; if counting them would sync, those of all others follow."""
    if dispatch.may_wait(active):
        return active.view(-1).nonzero().squeeze(1)
    return torch.argsort(active.view(-1).logical_not(), stable=True)


def _exclusive_sum(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _bag_sum(index: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """``out[i] = Σ weights[j] · table[index[j]]`` over ``offsets[i] <= j < offsets[i + 1]``, in a fixed order."""
    if not dispatch.has_kernel("_embedding_bag_forward_only", table.device.type):
        return segments.bag_sum(index, table, offsets, weights)
    bags = len(offsets) - 1
    if len(index) == 0:
        return table.new_zeros(bags, table.shape[1])
    if not dispatch.may_wait(table):
        # PyTorch's CUDA kernel may ignore the last offset (pytorch#178614), so that the last bag would also sum all
        # inactive entries behind it, one after the other. They go into short spare bags, whose sums are dropped.
        ends = torch.arange(1, len(index) // SPARE_BAG + 2, device=offsets.device, dtype=torch.int32) * SPARE_BAG
        offsets = torch.cat([offsets, (offsets[-1:] + ends).clamp_max(len(index))])
    sums = F.embedding_bag(
        index.to(torch.int32), table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    return sums[:bags]
