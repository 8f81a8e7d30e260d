"""Sum pooling: ``y[b, v] = Σ_s act(h[b, s] · W[v] + c[v])``, and its backward, which recomputes the logits.

The activation stands between the product and the sum, so that it cannot be hoisted: a program owns a sequence and a
tile of the vocabulary, walks the packed rows of the sequence in order and stores y once.

The backward cuts the packed rows of the whole batch, and the vocabulary, into chunks of fixed size, writes the logit
gradient of one chunk of both and multiplies it by the rows and by W. Whether the tokens came padded, packed or with
more padding changes neither the chunks nor the shapes of the products, and so not a bit of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pooling import Gradients, PoolingCall
from . import launch
from .common import (
    GROUP,
    GROUP_ROWS,
    INTERPRETED,
    activate,
    dots,
    log1p,
    narrow,
    tile_of,
    transform_slope,
    transformed,
    widen,
)
from .pack import find_tokens, group_capacity, pack_groups, pack_sequences, slices
from .tuning import MatmulConfig, matmul_config

# The last block of a sequence holds no other sequence: shorter blocks waste less of it.
MAX_BLOCK_T, MAX_BLOCK_V = 64, 128
# Logits of one tile of the backward, whose derivative keeps several values of each in registers.
MAX_TILE = 8192
WARP_LOGITS = 1024
# Packed rows and vocabulary entries of one chunk: whole blocks of every configuration, 16 MiB of gradients in half
# precision. In the interpreter every program, even one without a token, costs milliseconds.
CHUNK_ROWS = 128 if INTERPRETED else 2048
CHUNK_VOCAB = 4096


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of the packed batch."""

    rows: Tensor  # [CHUNK_ROWS, D] in the compute dtype
    sequence: Tensor  # [CHUNK_ROWS] int32 sequence of each real token; -1 for repeats and past the end
    source: Tensor  # [CHUNK_ROWS] int64 row of each real token in the flat hidden states


def sum_pool_forward(
    call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None, config: MatmulConfig | None = None
) -> tuple[Tensor, Tensor]:
    """``(y [B, V], argmax [B, V])`` of ``pooling_strategy="sum"``; see :class:`.Pooling`."""
    vocab_size = weight.shape[0]
    output = hidden.new_empty(call.batch_size, vocab_size, dtype=call.out_dtype)
    argmax = call.new_argmax(hidden, vocab_size)
    if hidden.shape[0] == 0 or vocab_size == 0:
        return output.zero_(), argmax
    config, options = _configure(call, weight, config, sum_config)
    weight = weight.to(call.compute_dtype)
    bias = None if bias is None else bias.contiguous()
    tokens = find_tokens(call, hidden)
    for part in slices(call, vocab_size, hidden, 0):
        packed = pack_sequences(call, tokens, hidden, part)
        sequences = part.stop - part.start
        owners = packed.group_offsets, packed.lengths, output[part], sequences
        _sum_kernel[(sequences * triton.cdiv(vocab_size, config.block_v),)](
            weight, packed.rows, bias, *owners, *weight.shape, *weight.stride(), **options
        )
    return output, argmax


def sum_pool_backward(
    call: PoolingCall,
    grad: Tensor,
    output: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: MatmulConfig | None = None,
) -> Gradients:
    """As :func:`splade_kernels.backends.tiled.packed.sum_pool_backward`."""
    vocab_size, hidden_size = weight.shape
    total_rows = hidden.shape[0]
    # One more row than there are tokens: padding rows are written there.
    grad_hidden = hidden.new_zeros(total_rows + 1, hidden_size) if call.need_hidden else None
    grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if call.need_weight else None
    grad_bias = bias.new_zeros(bias.shape, dtype=torch.float32) if call.need_bias and bias is not None else None
    config, options = _configure(call, weight, config, logit_grad_config)
    parameter, weight = weight, weight.to(call.compute_dtype)
    bias = None if bias is None else bias.contiguous()

    width = min(CHUNK_VOCAB, vocab_size)
    logit_grad = weight.new_empty(width, CHUNK_ROWS) if call.need_hidden or call.need_weight else None
    partial = weight.new_empty(width, CHUNK_ROWS // config.block_t, dtype=torch.float32) if call.need_bias else None
    for chunk in _chunks(call, hidden) if vocab_size > 0 else ():
        grad_rows = torch.zeros_like(chunk.rows, dtype=torch.float32) if call.need_hidden else None
        for first in range(0, vocab_size, CHUNK_VOCAB):
            columns = slice(first, min(first + CHUNK_VOCAB, vocab_size))
            count = columns.stop - columns.start
            part = (
                weight[columns],
                chunk.rows,
                None if bias is None else bias[columns],
                chunk.sequence,
                grad[:, columns],
            )
            sizes = count, hidden_size, *weight.stride(), *grad.stride()
            _logit_grad_kernel[(triton.cdiv(count, config.block_v) * (CHUNK_ROWS // config.block_t),)](
                *part, logit_grad, partial, *sizes, ROWS=CHUNK_ROWS, **options
            )
            if grad_weight is not None and logit_grad is not None:
                _add_product(grad_weight[columns], logit_grad[:count], chunk.rows)
            if grad_rows is not None and logit_grad is not None:
                _add_product(grad_rows, logit_grad[:count].t(), weight[columns])
            if grad_bias is not None and partial is not None:
                grad_bias[columns] += partial[:count].sum(dim=1)
        if grad_hidden is not None and grad_rows is not None:
            destination = torch.where(chunk.sequence >= 0, chunk.source, total_rows)
            grad_hidden.index_copy_(0, destination, grad_rows.to(grad_hidden.dtype))
    return (
        None if grad_hidden is None else grad_hidden[:total_rows],
        None if grad_weight is None else grad_weight.to(parameter.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def sum_config(config: MatmulConfig) -> MatmulConfig:
    """What the forward makes of the configuration of the maximum."""
    return _with_short_blocks(config, MAX_BLOCK_T)


def logit_grad_config(config: MatmulConfig) -> MatmulConfig:
    """What the backward makes of the same configuration."""
    return _with_short_blocks(config, MAX_TILE // min(config.block_v, MAX_BLOCK_V))


def _with_short_blocks(config: MatmulConfig, longest: int) -> MatmulConfig:
    """At most ``longest`` tokens and ``MAX_BLOCK_V`` vocabulary entries, with enough warps that no logit spills."""
    block_v, block_t = min(config.block_v, MAX_BLOCK_V), min(config.block_t, longest)
    num_warps = max(config.num_warps, block_v * block_t // WARP_LOGITS)
    return replace(config, block_v=block_v, block_t=block_t, num_warps=num_warps)


def _configure(
    call: PoolingCall, weight: Tensor, config: MatmulConfig | None, adapt: Callable[[MatmulConfig], MatmulConfig]
) -> tuple[MatmulConfig, dict[str, Any]]:
    """The configuration, and what it and the call make of a kernel's constants and launch options."""
    problem = launch.problem(call, weight)
    config = adapt(config or matmul_config(*problem, kind="sum"))
    options = {"PRECISION": problem[-1], **launch.activation_options(call), **launch.tile_options(config)}
    return config, options


def _chunks(call: PoolingCall, hidden: Tensor) -> Iterator[Chunk]:
    """The packed rows of the whole batch, ``CHUNK_ROWS`` at a time; past the end they are zeros.

    Slices by sequence, as in the forward, would depend on the bound of the lengths, and with them the order of the sum
    over tokens in dW.
    """
    capacity = group_capacity(call, call.batch_size, hidden.shape[0])
    if hidden.shape[0] == 0 or capacity == 0:
        return
    tokens = find_tokens(call, hidden)
    step = CHUNK_ROWS // GROUP
    row = torch.arange(CHUNK_ROWS, device=hidden.device, dtype=torch.int32)
    for first in range(0, capacity, step):
        packed = pack_groups(call, tokens, hidden, first, step)
        sequence = packed.group_sequence.repeat_interleave(GROUP)
        owner = sequence.clamp_min(0)
        real = (sequence >= 0) & (row - GROUP * packed.group_offsets[owner] < packed.lengths[owner])
        source = (tokens.starts[owner] + packed.positions).to(torch.int64)
        yield Chunk(packed.rows, torch.where(real, sequence, -1), source)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with a float32 result; PyTorch's settings decide about TF32."""
    if left.is_cuda and left.dtype != torch.float32:
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.to(torch.float32), right.to(torch.float32))


@triton.jit(do_not_specialize=["sequences"], do_not_specialize_on_alignment=["length_ptr", "output_ptr"])
def _sum_kernel(
    weight_ptr,
    row_ptr,
    bias_ptr,
    offset_ptr,
    length_ptr,
    output_ptr,
    sequences,
    vocab_size,
    hidden_size,
    stride_wv,
    stride_wd,
    logit_scale,
    logit_softcap,
    LOGS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y[b, v] = Σ_t act(W[v] · h[t] + c[v])`` over the real tokens of one sequence, in order."""
    tile_v, b = tile_of(tl.program_id(0), tl.cdiv(vocab_size, BLOCK_V), sequences, GROUP_V)
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < vocab_size
    first_row = tl.load(offset_ptr + b) * GROUP_ROWS
    length = tl.load(length_ptr + b)
    weight = weight_ptr, stride_wv, stride_wd
    y = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, length, BLOCK_T):
        rank = first + tl.arange(0, BLOCK_T)
        m_t = rank < length
        # [BLOCK_V, BLOCK_T]
        logit = dots(weight, row_ptr, o_v, first_row + rank, m_v, m_t, hidden_size, hidden_size, BLOCK_K, PRECISION)
        if bias_ptr is not None:
            logit += widen(tl.load(bias_ptr + o_v, mask=m_v, other=0.0))[:, None]
        value = activate(logit, logit_scale, logit_softcap, LOGS)
        y += tl.sum(tl.where(m_t[None, :], value, 0.0), axis=1)
    p_y = output_ptr + b.to(tl.int64) * vocab_size + o_v
    tl.store(p_y, narrow(y, output_ptr.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["vocab_size", "stride_gb"])
def _logit_grad_kernel(
    weight_ptr,
    row_ptr,
    bias_ptr,
    sequence_ptr,
    grad_ptr,
    logit_grad_ptr,
    partial_ptr,
    vocab_size,
    hidden_size,
    stride_wv,
    stride_wd,
    stride_gb,
    stride_gv,
    logit_scale,
    logit_softcap,
    LOGS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``G[v, t] = where(x <= 0, 0, dy[b, v] · act'(x))``, ``x = W[v] · h[t] + c[v]``; its sums over a tile's tokens.

    ``act' = 1 / (1 + x)``, for two logarithms ``1 / ((1 + x) (1 + log1p(x)))``; with a scale or a soft cap of that
    value z, times dz/dx. Either result may be None.
    """
    GROUPS: tl.constexpr = BLOCK_T // GROUP_ROWS
    tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    tile_v, tile_t = tile_of(tl.program_id(0), tiles_v, tl.num_programs(0) // tiles_v, GROUP_V)
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_g = tile_t * BLOCK_T + tl.arange(0, GROUPS) * GROUP_ROWS
    m_v = o_v < vocab_size
    # The first row of a group is real unless the group, and every later one, is past the end.
    depth = tl.where(tl.load(sequence_ptr + tile_t * BLOCK_T) >= 0, hidden_size, 0)
    weight = weight_ptr, stride_wv, stride_wd
    # [BLOCK_V, BLOCK_T]
    logit = dots(weight, row_ptr, o_v, o_t, m_v, o_t < ROWS, depth, hidden_size, BLOCK_K, PRECISION)
    if bias_ptr is not None:
        logit += widen(tl.load(bias_ptr + o_v, mask=m_v, other=0.0))[:, None]
    sequence = tl.load(sequence_ptr + o_t)
    b = tl.load(sequence_ptr + o_g)
    p_grad = grad_ptr + b.to(tl.int64)[None, :] * stride_gb + o_v.to(tl.int64)[:, None] * stride_gv
    # [BLOCK_V, GROUPS]
    grad = widen(tl.load(p_grad, mask=m_v[:, None] & (b >= 0)[None, :], other=0.0))
    grad = tl.broadcast_to(grad[:, :, None], (BLOCK_V, GROUPS, GROUP_ROWS))
    # False for NaN, which passes. With ``is_active`` the bfloat16 kernel for sm_90 takes 159 registers, not 124.
    inactive = logit <= 0
    y = tl.where(inactive, 0.0, logit)
    grad = tl.reshape(grad, (BLOCK_V, BLOCK_T))
    if (logit_scale is not None) or (logit_softcap is not None):
        grad *= transform_slope(y, logit_scale, logit_softcap)
        y = transformed(y, logit_scale, logit_softcap)
    divisor = 1.0
    for _ in tl.static_range(LOGS):
        divisor *= 1.0 + y
        y = log1p(y)
    g = tl.where(inactive | (sequence < 0)[None, :], 0.0, grad / divisor)
    if logit_grad_ptr is not None:
        p_g = logit_grad_ptr + o_v.to(tl.int64)[:, None] * ROWS + o_t[None, :]
        tl.store(p_g, narrow(g, logit_grad_ptr.dtype.element_ty), mask=m_v[:, None])
    if partial_ptr is not None:
        tl.store(partial_ptr + o_v * (ROWS // BLOCK_T) + tile_t, tl.sum(g, axis=1), mask=m_v)
