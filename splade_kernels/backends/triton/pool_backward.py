"""Backward of maximum pooling: two sparse products over the active entries, without atomics, in a fixed order.

With ``g[b, v] = where(y <= 0, 0, dy · dact)`` and the row ``r[b, v]`` of h at which the maximum was attained:

    dW[v, :] = Σ_b g[b, v] · h[r[b, v], :]      dc[v] = Σ_b g[b, v]
    dh[n, :] = Σ g[b, v] · W[v, :]  over all (b, v) with r[b, v] = n

dW, dc: a program owns a block of dW and walks the batch in order. It looks at 16 sequences at a time and visits those
with an active entry in its block: few late in training, all early.

dh: the entries of a slice of the batch are ordered by row, then a program sums the rows of W of one row of h. Early in
training up to half of the vocabulary lands on one token, so runs are cut into chunks of ``CHUNK`` entries, counted from
the run's own beginning: the row's program sums the first, programs of their own the others, and the row's program adds
those partial sums in order. Where a run lies, and how the batch was sliced or padded, changes no bit.

Entries with ``g = 0`` are left out, never multiplied. ``g`` is computed where it is used: a few instructions, instead
of ``[B, V]`` more in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..pooling import PoolingCall
from .common import activation_is_double_log, interpreted

# Entries of a run that one program sums; part of the result's rounding, so the same for every shape.
CHUNK = 256
# Entries [sequences, V] of one slice. Ordering takes about 40 bytes each (keys, int64 indices, their copies): 80 MiB.
# Afterwards it is 8, and up to 4 · D / CHUNK for partial sums: 40 MiB at D = 768.
SLICE_ENTRIES = 1 << 21
# Sequences whose activity is looked up at once: one bit each in an int32.
BLOCK_B = 16
KEY_BLOCK = 1024


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of the two sums, chosen by the hidden size alone: both gather rows, so their width is what matters."""

    # dW: [weight_block_v, weight_block_d], 32 float32 sums a thread.
    weight_block_v: int
    weight_block_d: int
    weight_warps: int
    # dh: hidden_rows rows a program, each from tiles [hidden_entries, hidden_block_d] so wide that all entries of a
    # column are in one thread: no shuffles.
    hidden_rows: int
    hidden_entries: int
    hidden_block_d: int
    hidden_warps: int


class Winners(NamedTuple):
    """What the kernels read to find an entry's ``g`` and row: the first arguments of each."""

    grad: Tensor  # [B, V] dy, any strides
    output: Tensor  # [B, V] y
    argmax: Tensor  # [B, V] position in the sequence
    edges: Tensor  # [B + 1] int32: sequence b has the rows edges[b] .. edges[b + 1] - 1


class Entries(NamedTuple):
    """Active entries of a slice by row: row r of the slice has entries ``offsets[r] .. offsets[r + 1] - 1``."""

    offsets: Tensor  # [R + 1] int32
    words: Tensor  # [E] int32 vocabulary ids, ascending in each row
    values: Tensor  # [E] float32 g


def backward_config(hidden_size: int) -> BackwardConfig:
    widest = triton.next_power_of_2(max(hidden_size, 16))
    block_d = min(256, widest)
    # Half as wide where that leaves fewer lanes idle: 128 for D = 384.
    while block_d > 64 and -hidden_size % (block_d // 2) < -hidden_size % block_d:
        block_d //= 2
    row = min(1024, widest)
    # A program costs the interpreter milliseconds.
    rows = 64 if interpreted() else 4
    return BackwardConfig(16, block_d, max(1, block_d // 64), rows, 8, row, max(1, row // 256))


def max_pool_backward(
    call: PoolingCall, grad: Tensor, output: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`splade_kernels.backends.torch.max_pool_backward`.

    An argmax outside its sequence, which only wrong ``cu_seqlens`` on a device can bring, is left out of dh and dW.
    """
    nothing = hidden.shape[0] == 0 or grad.numel() == 0
    create = torch.Tensor.new_zeros if nothing else torch.Tensor.new_empty
    grad_hidden = create(hidden, hidden.shape) if call.need_hidden else None
    grad_weight = create(weight, weight.shape) if call.need_weight else None
    grad_bias = create(bias, bias.shape) if call.need_bias and bias is not None else None
    if nothing:
        return grad_hidden, grad_weight, grad_bias
    config = backward_config(hidden.shape[1])
    winners = Winners(grad, output.contiguous(), argmax.contiguous(), _sequence_edges(call, hidden))
    if grad_hidden is not None:
        _sum_hidden(call, config, winners, weight, grad_hidden)
    if grad_weight is not None or grad_bias is not None:
        _sum_weight(call, config, winners, hidden, grad_weight, grad_bias)
    return grad_hidden, grad_weight, grad_bias


def _sequence_edges(call: PoolingCall, hidden: Tensor) -> Tensor:
    """``cu_seqlens``, clamped so that every sequence lies in ``hidden`` whatever came."""
    if call.cu_seqlens is not None:
        return call.cu_seqlens.clamp(0, hidden.shape[0]).to(torch.int32)
    return torch.arange(call.batch_size + 1, device=hidden.device, dtype=torch.int32) * call.max_seqlen


def _sum_weight(
    call: PoolingCall,
    config: BackwardConfig,
    winners: Winners,
    hidden: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    batch_size, vocab_size = winners.output.shape
    hidden_size = hidden.shape[1]
    blocks_d = 1 if grad_weight is None else max(1, triton.cdiv(hidden_size, config.weight_block_d))
    _weight_kernel[(triton.cdiv(vocab_size, config.weight_block_v), blocks_d)](
        *winners,
        hidden,
        grad_weight,
        grad_bias,
        batch_size,
        vocab_size,
        hidden_size,
        *winners.grad.stride(),
        *hidden.stride(),
        DOUBLE_LOG=activation_is_double_log(call),
        BLOCK_B=BLOCK_B,
        BLOCK_V=config.weight_block_v,
        BLOCK_D=config.weight_block_d,
        num_warps=config.weight_warps,
    )


def _sum_hidden(
    call: PoolingCall, config: BackwardConfig, winners: Winners, weight: Tensor, grad_hidden: Tensor
) -> None:
    total_rows, hidden_size = grad_hidden.shape
    blocks_d = triton.cdiv(hidden_size, config.hidden_block_d)
    tiles = {"CHUNK": CHUNK, "ENTRIES": config.hidden_entries, "BLOCK_D": config.hidden_block_d}
    step = max(1, SLICE_ENTRIES // weight.shape[0])
    for first in range(0, call.batch_size, step):
        count = min(step, call.batch_size - first)
        # At least one, since a bound of 0 for packed tokens must not leave rows of dh unwritten.
        rows = max(1, min(total_rows, count * call.max_seqlen))
        entries = _order_by_row(call, winners, first, count, rows)
        chunk_offsets, chunk_rows = _chunk_long_runs(entries)
        capacity = len(chunk_rows)
        partial = weight.new_empty(capacity, hidden_size, dtype=torch.float32)
        sums = (*entries, chunk_offsets, weight, *weight.stride(), partial, hidden_size, rows)
        if capacity > 0:
            _chunk_kernel[(capacity, blocks_d)](*sums, chunk_rows, **tiles, num_warps=config.hidden_warps)
        # Programs take rows in turn: twice the slice's share is enough where the bound on a length says nothing.
        programs = triton.cdiv(min(rows, triton.cdiv(2 * total_rows * count, call.batch_size)), config.hidden_rows)
        limits = (first, count, call.batch_size, total_rows)
        _hidden_kernel[(programs, blocks_d)](
            *sums, winners.edges, grad_hidden, *limits, **tiles, ROWS=config.hidden_rows, num_warps=config.hidden_warps
        )


def _order_by_row(call: PoolingCall, winners: Winners, first: int, count: int, rows: int) -> Entries:
    """The active entries of ``count`` sequences by row, rows counted from the first row of the slice."""
    vocab_size = winners.output.shape[1]
    keys = torch.empty(count * vocab_size, device=winners.output.device, dtype=torch.int32)
    values = torch.empty_like(keys, dtype=torch.float32)
    _key_kernel[(count * triton.cdiv(vocab_size, KEY_BLOCK),)](
        *winners,
        keys,
        values,
        first,
        rows,
        vocab_size,
        *winners.grad.stride(),
        DOUBLE_LOG=activation_is_double_log(call),
        BLOCK_V=KEY_BLOCK,
        num_warps=4,
    )
    keys, order = torch.sort(keys, stable=True)
    bounds = torch.arange(rows + 1, device=keys.device, dtype=torch.int32)
    offsets = torch.searchsorted(keys, bounds, out_int32=True)
    values = values.index_select(0, order)
    return Entries(offsets, order.remainder_(vocab_size).to(torch.int32), values)


def _chunk_long_runs(entries: Entries) -> tuple[Tensor, Tensor]:
    """``offsets [R + 1]`` of each row's chunks after its first, and ``[capacity]`` each chunk's row (R: no chunk).

    A row of n entries has ``(n - 1) // CHUNK`` such chunks, hence the capacity: the host does not know their number.
    """
    counts = entries.offsets.diff().sub_(1).clamp_(min=0).div_(CHUNK, rounding_mode="floor")
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    capacity = (len(entries.words) - 1) // CHUNK
    chunks = torch.arange(capacity, device=offsets.device, dtype=torch.int32)
    return offsets, torch.searchsorted(offsets[1:], chunks, right=True, out_int32=True)


@triton.jit
def _logit_gradient(p_grad, p_output, mask, DOUBLE_LOG: tl.constexpr):
    """``g = where(y <= 0, 0, dy · dact)`` from the activated output; NaN stays NaN."""
    y = tl.load(p_output, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(p_grad, mask=mask, other=0.0).to(tl.float32)
    slope = tl.exp(-y)
    if DOUBLE_LOG:
        slope *= tl.exp(1.0 - tl.exp(y))
    return tl.where(y <= 0, 0.0, dy * slope)


@triton.jit
def _winner(p_grad, p_output, p_argmax, p_edge, mask, DOUBLE_LOG: tl.constexpr):
    """``g``, the row of h it belongs to, and whether it has one: ``g`` is not 0, and the row is in its sequence."""
    g = _logit_gradient(p_grad, p_output, mask, DOUBLE_LOG)
    position = tl.load(p_argmax, mask=mask, other=0).to(tl.int32)
    start = tl.load(p_edge)
    inside = (position >= 0) & (position < tl.load(p_edge + 1) - start)
    return g, start + position, (g != 0) & inside


@triton.jit(do_not_specialize=["batch_size", "stride_gb"], do_not_specialize_on_alignment=["grad_ptr"])
def _weight_kernel(
    grad_ptr,
    output_ptr,
    argmax_ptr,
    edge_ptr,
    hidden_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    batch_size,
    vocab_size,
    hidden_size,
    stride_gb,
    stride_gv,
    stride_hn,
    stride_hd,
    DOUBLE_LOG: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dW[v, :] = Σ_b g[b, v] · h[r[b, v], :]``, ``dc[v] = Σ_b g[b, v]``; either may be None."""
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_v = o_v < vocab_size
    m_d = o_d < hidden_size
    p_hidden = hidden_ptr + o_d.to(tl.int64)[None, :] * stride_hd
    # [BLOCK_V, BLOCK_D]
    weight_sum = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, batch_size, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B).to(tl.int64)
        p_output = output_ptr + b[:, None] * vocab_size + o_v[None, :]
        p_grad = grad_ptr + b[:, None] * stride_gb + o_v.to(tl.int64)[None, :] * stride_gv
        # [BLOCK_B, BLOCK_V]
        g = _logit_gradient(p_grad, p_output, (b < batch_size)[:, None] & m_v[None, :], DOUBLE_LOG)
        bias_sum += tl.sum(g, axis=0)
        if grad_weight_ptr is not None:
            active = tl.max((g != 0).to(tl.int32), axis=1)
            bits = tl.sum(active << tl.arange(0, BLOCK_B), axis=0)
            for i in range(0, BLOCK_B):
                if (bits >> i) & 1 != 0:
                    # The interpreter's loop counters are Python integers, which have no ``to``.
                    b_i = tl.full((), 0, tl.int64) + first + i
                    o_entry = b_i * vocab_size + o_v
                    p_grad_i = grad_ptr + b_i * stride_gb + o_v.to(tl.int64) * stride_gv
                    # [BLOCK_V]
                    g_i, row, chosen = _winner(
                        p_grad_i, output_ptr + o_entry, argmax_ptr + o_entry, edge_ptr + b_i, m_v, DOUBLE_LOG
                    )
                    p_row = p_hidden + row.to(tl.int64)[:, None] * stride_hn
                    # [BLOCK_V, BLOCK_D]
                    h = tl.load(p_row, mask=chosen[:, None] & m_d[None, :], other=0.0).to(tl.float32)
                    weight_sum += g_i[:, None] * h
    if grad_weight_ptr is not None:
        p_weight = grad_weight_ptr + o_v.to(tl.int64)[:, None] * hidden_size + o_d[None, :]
        tl.store(p_weight, weight_sum.to(grad_weight_ptr.dtype.element_ty), mask=m_v[:, None] & m_d[None, :])
    if grad_bias_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(grad_bias_ptr + o_v, bias_sum.to(grad_bias_ptr.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["first", "rows", "stride_gb"], do_not_specialize_on_alignment=["grad_ptr"])
def _key_kernel(
    grad_ptr,
    output_ptr,
    argmax_ptr,
    edge_ptr,
    key_ptr,
    value_ptr,
    first,
    rows,
    vocab_size,
    stride_gb,
    stride_gv,
    DOUBLE_LOG: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``value = g``, and ``key`` its row counted from the first row of the slice; ``rows``, past them all, if none."""
    blocks_v = tl.cdiv(vocab_size, BLOCK_V)
    within = tl.program_id(0) // blocks_v
    o_v = (tl.program_id(0) % blocks_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < vocab_size
    b = (first + within).to(tl.int64)
    o_entry = b * vocab_size + o_v
    p_grad = grad_ptr + b * stride_gb + o_v.to(tl.int64) * stride_gv
    # [BLOCK_V]
    g, row, chosen = _winner(p_grad, output_ptr + o_entry, argmax_ptr + o_entry, edge_ptr + b, m_v, DOUBLE_LOG)
    o_key = within.to(tl.int64) * vocab_size + o_v
    tl.store(key_ptr + o_key, tl.where(chosen, row - _first_row(edge_ptr, first), rows), mask=m_v)
    tl.store(value_ptr + o_key, g, mask=m_v)


@triton.jit
def _first_row(edge_ptr, first):
    """First row of a slice that begins with sequence ``first``; rows before all sequences belong to the first slice."""
    return tl.where(first == 0, 0, tl.load(edge_ptr + first))


@triton.jit
def _sum_rows(word_ptr, value_ptr, weight_ptr, stride_wv, stride_wd, begin, end, o_d, m_d, ENTRIES: tl.constexpr):
    """``Σ value[e] · W[word[e], :]`` over ``begin <= e < end``, ENTRIES at a time."""
    p_weight = weight_ptr + o_d.to(tl.int64)[None, :] * stride_wd
    total = tl.zeros((o_d.shape[0],), dtype=tl.float32)
    for first in range(begin, end, ENTRIES):
        o_e = first + tl.arange(0, ENTRIES)
        m_e = o_e < end
        word = tl.load(word_ptr + o_e, mask=m_e, other=0).to(tl.int64)
        g = tl.load(value_ptr + o_e, mask=m_e, other=0.0)
        # [ENTRIES, BLOCK_D]
        w = tl.load(p_weight + word[:, None] * stride_wv, mask=m_e[:, None] & m_d[None, :], other=0.0)
        total += tl.sum(g[:, None] * w.to(tl.float32), axis=0)
    return total


@triton.jit(do_not_specialize=["rows"])
def _chunk_kernel(
    offset_ptr,
    word_ptr,
    value_ptr,
    chunk_offset_ptr,
    weight_ptr,
    stride_wv,
    stride_wd,
    partial_ptr,
    hidden_size,
    rows,
    chunk_row_ptr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``partial[k, :] = Σ g · W[v, :]`` over one chunk of a long run, any but its first."""
    k = tl.program_id(0)
    row = tl.load(chunk_row_ptr + k)
    if row < rows:
        o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < hidden_size
        begin = tl.load(offset_ptr + row) + (k - tl.load(chunk_offset_ptr + row) + 1) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(offset_ptr + row + 1))
        total = _sum_rows(word_ptr, value_ptr, weight_ptr, stride_wv, stride_wd, begin, end, o_d, m_d, ENTRIES)
        tl.store(partial_ptr + k.to(tl.int64) * hidden_size + o_d, total, mask=m_d)


@triton.jit(do_not_specialize=["rows", "first", "count", "batch_size", "total_rows"])
def _hidden_kernel(
    offset_ptr,
    word_ptr,
    value_ptr,
    chunk_offset_ptr,
    weight_ptr,
    stride_wv,
    stride_wd,
    partial_ptr,
    hidden_size,
    rows,
    edge_ptr,
    grad_hidden_ptr,
    first,
    count,
    batch_size,
    total_rows,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``dh[n, :] = Σ g · W[v, :]`` over the entries of row n: its first chunk, then the partial sums, in order.

    Slices share out all rows of dh, those of no sequence included. Rows from ``rows`` on, which only sequences longer
    than their bound can have, have no entries.
    """
    begin_row = _first_row(edge_ptr, first)
    end_row = tl.where(first + count == batch_size, total_rows, tl.load(edge_ptr + first + count))
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < hidden_size
    p_hidden = grad_hidden_ptr + begin_row.to(tl.int64) * hidden_size + o_d
    for block in range(tl.program_id(0), tl.cdiv(end_row - begin_row, ROWS), tl.num_programs(0)):
        first_r = block * ROWS
        last_r = tl.minimum(first_r + ROWS, rows)
        o_r = first_r + tl.arange(0, ROWS)
        m_r = o_r < rows
        length = tl.load(offset_ptr + o_r + 1, mask=m_r, other=0) - tl.load(offset_ptr + o_r, mask=m_r, other=0)
        m_empty = (length == 0) & (o_r < end_row - begin_row)
        # [ROWS, BLOCK_D]
        zeros = tl.zeros((ROWS, BLOCK_D), dtype=grad_hidden_ptr.dtype.element_ty)
        p_rows = p_hidden[None, :] + o_r.to(tl.int64)[:, None] * hidden_size
        tl.store(p_rows, zeros, mask=m_empty[:, None] & m_d[None, :])
        if tl.sum(length, axis=0) > 0:
            for r in range(first_r, last_r):
                begin = tl.load(offset_ptr + r)
                end = tl.load(offset_ptr + r + 1)
                if begin < end:
                    end = tl.minimum(end, begin + CHUNK)
                    total = _sum_rows(
                        word_ptr, value_ptr, weight_ptr, stride_wv, stride_wd, begin, end, o_d, m_d, ENTRIES
                    )
                    end_chunk = tl.load(chunk_offset_ptr + r + 1)
                    for k in range(tl.load(chunk_offset_ptr + r), end_chunk, ENTRIES):
                        o_k = k + tl.arange(0, ENTRIES)
                        p_partial = partial_ptr + o_k.to(tl.int64)[:, None] * hidden_size + o_d[None, :]
                        # [ENTRIES, BLOCK_D]
                        partial = tl.load(p_partial, mask=(o_k < end_chunk)[:, None] & m_d[None, :], other=0.0)
                        total += tl.sum(partial, axis=0)
                    p_row = p_hidden + (tl.full((), 0, tl.int64) + r) * hidden_size
                    tl.store(p_row, total.to(grad_hidden_ptr.dtype.element_ty), mask=m_d)


def compile_cases(hidden_size: int) -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """``(kernel, types, constants, num_warps)`` as :func:`max_pool_backward` launches them on contiguous tensors.

    ``types`` are Triton's, of the pointers that do not point to the dtype of the parameters.
    """
    config = backward_config(hidden_size)
    indices = ("edge_ptr", "key_ptr", "offset_ptr", "word_ptr", "chunk_offset_ptr", "chunk_row_ptr")
    types = {"argmax_ptr": "*i16", "value_ptr": "*fp32", "partial_ptr": "*fp32", **dict.fromkeys(indices, "*i32")}
    entry = {"DOUBLE_LOG": True, "stride_gv": 1}
    sums = {"CHUNK": CHUNK, "ENTRIES": config.hidden_entries, "BLOCK_D": config.hidden_block_d, "stride_wd": 1}
    tile = {"BLOCK_B": BLOCK_B, "BLOCK_V": config.weight_block_v, "BLOCK_D": config.weight_block_d, "stride_hd": 1}
    return [
        (_weight_kernel, types, {**entry, **tile}, config.weight_warps),
        (_key_kernel, types, {**entry, "BLOCK_V": KEY_BLOCK}, 4),
        (_chunk_kernel, types, sums, config.hidden_warps),
        (_hidden_kernel, types, {**sums, "ROWS": config.hidden_rows}, config.hidden_warps),
    ]
