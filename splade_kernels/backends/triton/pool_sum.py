"""Sum pooling: ``y[b, v] = Σ_s act(h[b, s] · W[v] + c[v])``, and its backward, which recomputes the logits.

The activation stands between the product and the sum, so groups cannot be combined before it: a program owns a sequence
and a tile of the vocabulary, walks the sequence's packed rows in order and stores y once.

The backward cuts the packed rows of the whole batch, and the vocabulary, into chunks of fixed size, writes the gradient
of the logits of one chunk of both and multiplies it out. How the tokens came (padded, packed, more padding) changes
neither the chunks nor the shapes of the products, and so not a bit of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..pooling import PoolingCall
from .common import GROUP, activate, activation_is_double_log, dot_precision, interpreted, log1p
from .pack import _pack_kernel, find_tokens, pack, slices
from .pool_forward import _tile
from .tuning import MatmulConfig, architecture, matmul_config

_GROUP = tl.constexpr(GROUP)
# Every sequence has its last block of tokens to itself: shorter blocks waste less of it.
MAX_BLOCK_T = 64
# Logits of one tile of the backward: the derivative keeps several values of each in registers.
MAX_TILE = 8192
# Packed rows and words of one chunk: whole blocks of every configuration, 16 MiB of gradients in half precision.
CHUNK_ROWS = 2048
CHUNK_WORDS = 4096


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of the packed batch. ``groups`` of them can be tokens, as far as the host knows; all others are
    zero."""

    rows: Tensor  # [CHUNK_ROWS, D] in the compute dtype
    sequence: Tensor  # [CHUNK_ROWS] int32 sequence of each real token; -1 for repeats and past the end
    source: Tensor  # [CHUNK_ROWS] int64 row of each real token in the flat hidden states
    groups: int


def sum_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`splade_kernels.backends.torch.pool_forward`, for ``pooling_strategy="sum"``."""
    vocab_size, hidden_size = weight.shape
    output = hidden.new_empty(call.batch_size, vocab_size, dtype=call.out_dtype)
    argmax = call.new_argmax(hidden, vocab_size)
    if hidden.shape[0] == 0 or vocab_size == 0:
        return output.zero_(), argmax
    precision = dot_precision(call.compute_dtype)
    config = sum_config(_configure(call, weight, precision))
    weight = _with_dense_rows(weight.to(call.compute_dtype))
    offset = weight.new_zeros(vocab_size) if bias is None else bias.contiguous()
    tokens = find_tokens(call, hidden)
    for part in slices(call, vocab_size, hidden_size, 0, hidden.shape[0]):
        packed = pack(call, tokens, hidden, part)
        sequences = part.stop - part.start
        _sum_kernel[(sequences * triton.cdiv(vocab_size, config.block_v),)](
            weight,
            packed.rows,
            offset,
            packed.group_offsets,
            packed.lengths,
            output[part],
            sequences,
            vocab_size,
            hidden_size,
            weight.stride(0),
            DOUBLE_LOG=activation_is_double_log(call),
            BLOCK_V=config.block_v,
            BLOCK_T=config.block_t,
            BLOCK_K=config.block_k,
            GROUP_V=config.group_v,
            PRECISION=precision,
            UPCAST=interpreted() and call.compute_dtype == torch.bfloat16,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return output, argmax


def sum_pool_backward(
    call: PoolingCall, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`splade_kernels.backends.torch.sum_pool_backward`."""
    vocab_size, hidden_size = weight.shape
    grad_hidden = hidden.new_zeros(hidden.shape) if call.need_hidden else None
    grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if call.need_weight else None
    grad_bias = bias.new_zeros(bias.shape, dtype=torch.float32) if call.need_bias and bias is not None else None
    precision = dot_precision(call.compute_dtype)
    config = logit_grad_config(_configure(call, weight, precision))
    words = _with_dense_rows(weight.to(call.compute_dtype))
    offset = weight.new_zeros(vocab_size) if bias is None else bias.contiguous()
    grad = _with_dense_rows(grad)

    # Zeroed once: the kernel writes the rows that can be tokens, the products read all of them.
    width = min(CHUNK_WORDS, vocab_size)
    logit_grad = words.new_zeros(width, CHUNK_ROWS) if call.need_hidden or call.need_weight else None
    partial = words.new_zeros(width, CHUNK_ROWS // config.block_t, dtype=torch.float32) if call.need_bias else None
    for chunk in _chunks(call, hidden) if vocab_size > 0 else ():
        grad_rows = torch.zeros_like(chunk.rows, dtype=torch.float32) if call.need_hidden else None
        for first in range(0, vocab_size, CHUNK_WORDS):
            columns = slice(first, min(first + CHUNK_WORDS, vocab_size))
            _launch_logit_grad(call, config, precision, chunk, columns, words, offset, grad, logit_grad, partial)
            count = columns.stop - columns.start
            if grad_weight is not None and logit_grad is not None:
                _add_product(grad_weight[columns], logit_grad[:count], chunk.rows)
            if grad_rows is not None and logit_grad is not None:
                _add_product(grad_rows, logit_grad[:count].t(), words[columns])
            if grad_bias is not None and partial is not None:
                grad_bias[columns] += partial[:count].sum(dim=1)
        if grad_hidden is not None:
            _scatter_kernel[(chunk.groups,)](
                grad_rows,
                chunk.sequence,
                chunk.source,
                grad_hidden,
                hidden_size,
                BLOCK_D=min(256, triton.next_power_of_2(max(hidden_size, 1))),
                num_warps=4,
            )
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def sum_config(config: MatmulConfig) -> MatmulConfig:
    """What the forward makes of the configuration of the maximum."""
    return replace(config, block_t=min(config.block_t, MAX_BLOCK_T))


def logit_grad_config(config: MatmulConfig) -> MatmulConfig:
    """What the backward makes of it."""
    return replace(config, block_t=min(config.block_t, MAX_TILE // config.block_v))


def _configure(call: PoolingCall, weight: Tensor, precision: str) -> MatmulConfig:
    vocab_size, hidden_size = weight.shape
    return matmul_config(architecture(weight.device), hidden_size, vocab_size, call.compute_dtype, precision)


def _with_dense_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _chunks(call: PoolingCall, hidden: Tensor) -> Iterator[Chunk]:
    """The packed rows of the whole batch, ``CHUNK_ROWS`` at a time, all in the same memory.

    Slices by sequence, as the forward takes, would depend on the bound of the lengths, and with them the order in which
    the gradient of the weight is summed.
    """
    total_rows, hidden_size = hidden.shape
    capacity = call.batch_size * triton.cdiv(call.max_seqlen, GROUP)
    if call.cu_seqlens is not None:
        capacity = min(capacity, call.batch_size + total_rows // GROUP)
    if total_rows == 0 or capacity == 0:
        return
    step = CHUNK_ROWS // GROUP
    groups = min(step, capacity)
    tokens = find_tokens(call, hidden)
    offsets = F.pad(((tokens.lengths + (GROUP - 1)) // GROUP).cumsum(0), (1, 0)).to(torch.int32)
    rows = hidden.new_zeros(CHUNK_ROWS, hidden_size, dtype=call.compute_dtype)
    positions = torch.zeros(CHUNK_ROWS, device=hidden.device, dtype=torch.int32)
    group_sequence = torch.full((step,), -1, device=hidden.device, dtype=torch.int32)
    packed_row = torch.arange(CHUNK_ROWS, device=hidden.device, dtype=torch.int32)
    for first in range(0, capacity, step):
        # Offsets from the chunk's own first group: those of sequences that began earlier are negative.
        from_here = offsets - first
        _pack_kernel[(groups,)](
            hidden,
            tokens.starts,
            tokens.lengths,
            tokens.listed,
            from_here,
            rows,
            positions,
            group_sequence,
            call.batch_size,
            hidden_size,
            call.max_seqlen,
            hidden.stride(0),
            hidden.stride(1),
            HAS_LIST=tokens.listed is not None,
            GROUP=GROUP,
            BLOCK_D=min(256, triton.next_power_of_2(max(hidden_size, 1))),
            num_warps=4,
        )
        sequence = group_sequence.repeat_interleave(GROUP)
        owner = sequence.clamp_min(0)
        real = (sequence >= 0) & (packed_row - GROUP * from_here[owner] < tokens.lengths[owner])
        yield Chunk(rows, torch.where(real, sequence, -1), tokens.starts[owner] + positions, groups)


def _launch_logit_grad(
    call: PoolingCall,
    config: MatmulConfig,
    precision: str,
    chunk: Chunk,
    columns: slice,
    weight: Tensor,
    bias: Tensor,
    grad: Tensor,
    logit_grad: Tensor | None,
    partial: Tensor | None,
) -> None:
    weight = weight[columns]
    vocab_size, hidden_size = weight.shape
    tiles = triton.cdiv(vocab_size, config.block_v) * triton.cdiv(chunk.groups * GROUP, config.block_t)
    _logit_grad_kernel[(tiles,)](
        weight,
        chunk.rows,
        bias[columns],
        chunk.sequence,
        grad[:, columns],
        logit_grad,
        partial,
        vocab_size,
        hidden_size,
        weight.stride(0),
        grad.stride(0),
        DOUBLE_LOG=activation_is_double_log(call),
        ROWS=CHUNK_ROWS,
        BLOCK_V=config.block_v,
        BLOCK_T=config.block_t,
        BLOCK_K=config.block_k,
        GROUP_V=config.group_v,
        PRECISION=precision,
        UPCAST=interpreted() and call.compute_dtype == torch.bfloat16,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with a float32 result; PyTorch's settings decide about TF32."""
    if left.is_cuda and left.dtype != torch.float32:
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.to(torch.float32), right.to(torch.float32))


@triton.jit
def _dots(
    weight_ptr,
    row_ptr,
    o_v,
    o_t,
    m_v,
    m_t,
    depth,
    hidden_size,
    stride_wv,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``W[v] · h[t]`` over the first ``depth`` hidden dimensions, ``[BLOCK_V, BLOCK_T]`` in float32."""
    p_w = weight_ptr + o_v.to(tl.int64)[:, None] * stride_wv
    p_h = row_ptr + o_t.to(tl.int64)[None, :] * hidden_size
    acc = tl.zeros((o_v.shape[0], o_t.shape[0]), dtype=tl.float32)
    for first in range(0, depth, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        m_k = o_k < hidden_size
        b_w = tl.load(p_w + o_k[None, :], mask=m_v[:, None] & m_k[None, :], other=0.0)
        b_h = tl.load(p_h + o_k[:, None], mask=m_t[None, :] & m_k[:, None], other=0.0)
        if UPCAST:
            b_w = b_w.to(tl.float32)
            b_h = b_h.to(tl.float32)
        acc = tl.dot(b_w, b_h, acc, input_precision=PRECISION)
    return acc


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
    DOUBLE_LOG: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``y[b, v] = Σ_t act(W[v] · h[t] + c[v])`` over the real tokens of one sequence, in order."""
    tile_v, b = _tile(tl.program_id(0), tl.cdiv(vocab_size, BLOCK_V), sequences, GROUP_V)
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < vocab_size
    first_row = tl.load(offset_ptr + b) * _GROUP
    length = tl.load(length_ptr + b)
    y = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, length, BLOCK_T):
        rank = first + tl.arange(0, BLOCK_T)
        m_t = rank < length
        # [BLOCK_V, BLOCK_T]
        logit = _dots(
            weight_ptr, row_ptr, o_v, first_row + rank, m_v, m_t, hidden_size, hidden_size, stride_wv,
            BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        logit += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)[:, None]
        y += tl.sum(tl.where(m_t[None, :], activate(logit, DOUBLE_LOG), 0.0), axis=1)
    p_y = output_ptr + b.to(tl.int64) * vocab_size + o_v
    tl.store(p_y, y.to(output_ptr.dtype.element_ty), mask=m_v)


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
    stride_gb,
    DOUBLE_LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``G[v, t] = where(x <= 0, 0, dy[b, v] · act'(x))``, ``x = W[v] · h[t] + c[v]``; its sums over a tile's tokens.

    ``act' = 1 / (1 + x)``, for DOUBLE_LOG ``1 / ((1 + x) (1 + log1p(x)))``. Either result may be None.
    """
    GROUPS: tl.constexpr = BLOCK_T // _GROUP
    tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    tile_v, tile_t = _tile(tl.program_id(0), tiles_v, tl.num_programs(0) // tiles_v, GROUP_V)
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_g = tile_t * BLOCK_T + tl.arange(0, GROUPS) * _GROUP
    m_v = o_v < vocab_size
    # The first row of a group is real unless the group is past the end, and then so are all after it.
    depth = tl.where(tl.load(sequence_ptr + tile_t * BLOCK_T) >= 0, hidden_size, 0)
    # [BLOCK_V, BLOCK_T]
    logit = _dots(
        weight_ptr, row_ptr, o_v, o_t, m_v, o_t < ROWS, depth, hidden_size, stride_wv, BLOCK_K, PRECISION,
        UPCAST,
    )  # fmt: skip
    logit += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)[:, None]
    sequence = tl.load(sequence_ptr + o_t)
    b = tl.load(sequence_ptr + o_g)
    p_grad = grad_ptr + b.to(tl.int64)[None, :] * stride_gb + o_v[:, None]
    # [BLOCK_V, GROUPS]
    grad = tl.load(p_grad, mask=m_v[:, None] & (b >= 0)[None, :], other=0.0).to(tl.float32)
    grad = tl.broadcast_to(grad[:, :, None], (BLOCK_V, GROUPS, _GROUP))
    # Written so that NaN passes.
    inactive = logit <= 0
    x = tl.where(inactive, 0.0, logit)
    divisor = 1.0 + x
    if DOUBLE_LOG:
        divisor *= 1.0 + log1p(x)
    g = tl.where(inactive | (sequence < 0)[None, :], 0.0, tl.reshape(grad, (BLOCK_V, BLOCK_T)) / divisor)
    if logit_grad_ptr is not None:
        p_g = logit_grad_ptr + o_v.to(tl.int64)[:, None] * ROWS + o_t[None, :]
        tl.store(p_g, g.to(logit_grad_ptr.dtype.element_ty), mask=m_v[:, None])
    if partial_ptr is not None:
        tl.store(partial_ptr + o_v * (ROWS // BLOCK_T) + tile_t, tl.sum(g, axis=1), mask=m_v)


@triton.jit
def _scatter_kernel(row_ptr, sequence_ptr, source_ptr, output_ptr, hidden_size, BLOCK_D: tl.constexpr):
    """``output[source[t]] = row[t]`` for the real tokens t of a group of 16."""
    o_t = tl.program_id(0) * _GROUP + tl.arange(0, _GROUP)
    real = (tl.load(sequence_ptr + o_t) >= 0)[:, None]
    p_row = row_ptr + o_t.to(tl.int64)[:, None] * hidden_size
    p_output = output_ptr + tl.load(source_ptr + o_t)[:, None] * hidden_size
    for first in range(0, hidden_size, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)[None, :]
        m = real & (o_d < hidden_size)
        # [GROUP, BLOCK_D]
        values = tl.load(p_row + o_d, mask=m, other=0.0)
        tl.store(p_output + o_d, values.to(output_ptr.dtype.element_ty), mask=m)
