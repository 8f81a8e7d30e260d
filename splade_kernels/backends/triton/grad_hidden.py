"""``dh[n, :] = Σ g[b, v] · W[v, :]`` over the active entries (b, v) whose maximum was attained in row n of h.

The entries of a slice of the batch are sorted by row (:func:`..compaction.bucket_by_token`), then one program sums the
rows of W for a row of h. Early in training up to half of the vocabulary lands on one token, so the run of entries of a
row is cut into chunks of ``CHUNK`` entries, counted from its own beginning: the program of the row sums the first
chunk, other programs the rest, and the program of the row adds their partial sums in order. Neither where a run lies
nor how the batch was sliced or padded changes a bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..compaction import bucket_by_token
from ..pooling import PoolingCall
from .common import logit_gradient, narrow, widen
from .launch import activation_options
from .tuning import HiddenConfig

# Entries of a chunk. It decides how sums are rounded, so it is the same for every shape.
CHUNK = 256
# Entries [sequences, V] of one slice.
SLICE_ENTRIES = 1 << 21
GRADIENT_BLOCK = 1024


def sum_hidden(
    call: PoolingCall,
    config: HiddenConfig,
    grad: Tensor,
    output: Tensor,
    argmax: Tensor,
    edges: Tensor,
    weight: Tensor,
    grad_hidden: Tensor,
) -> None:
    """Write all of ``grad_hidden [N, D]``; sequence b has the rows ``edges[b] .. edges[b + 1] - 1``."""
    total_rows, hidden_size = grad_hidden.shape
    vocab_size = weight.shape[0]
    # In the dtype of the forward's products: under autocast half the bytes of the parameter.
    weight = weight.to(call.compute_dtype)
    blocks_d = triton.cdiv(hidden_size, config.block_d)
    tiles = {"CHUNK": CHUNK, "ENTRIES": config.entries, "BLOCK_D": config.block_d, "num_warps": config.num_warps}
    step = max(1, SLICE_ENTRIES // vocab_size)
    for first in range(0, call.batch_size, step):
        count = min(step, call.batch_size - first)
        # At least one: with a bound of 0 on packed lengths, the rows of dh still have to be written.
        rows = max(1, min(total_rows, count * call.max_seqlen))
        part = slice(first, first + count)
        values = torch.empty(count, vocab_size, device=output.device, dtype=torch.float32)
        tensors = grad[part], output[part], values
        _gradient_kernel[(count, triton.cdiv(vocab_size, GRADIENT_BLOCK))](
            *tensors, vocab_size, *grad.stride(), **activation_options(call), BLOCK_V=GRADIENT_BLOCK, num_warps=4
        )
        entries = bucket_by_token(argmax[part], values, edges[first : first + count + 1], rows)
        chunk_offsets, chunk_rows = _chunk_long_runs(entries[0], count * vocab_size)
        capacity = len(chunk_rows)
        partial = weight.new_empty(capacity, hidden_size, dtype=torch.float32)
        sums = (*entries, chunk_offsets, weight, *weight.stride(), partial, hidden_size, rows)
        if capacity > 0:
            _chunk_kernel[(capacity, blocks_d)](*sums, chunk_rows, **tiles)
        # Programs take rows in turn, so where the bound on a length is loose, twice the slice's share is enough.
        programs = triton.cdiv(min(rows, triton.cdiv(2 * total_rows * count, call.batch_size)), config.rows)
        limits = (first, count, call.batch_size, total_rows)
        _hidden_kernel[(programs, blocks_d)](*sums, edges, grad_hidden, *limits, ROWS=config.rows, **tiles)
        del values, entries, partial, sums  # before the next slice allocates its own


def _chunk_long_runs(bounds: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """``offsets [R + 1]`` of each row's chunks after its first, and ``[capacity]`` the row of each chunk (R: unused).

    A row of n entries has ``(n - 1) // CHUNK`` such chunks, hence the capacity: the host does not know their number.
    """
    counts = bounds.diff(dim=1).squeeze(1).sub_(1).clamp_(min=0).div_(CHUNK, rounding_mode="floor")
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    chunks = torch.arange((entries - 1) // CHUNK, device=offsets.device, dtype=torch.int32)
    return offsets, torch.searchsorted(offsets[1:], chunks, right=True, out_int32=True)


@triton.jit(do_not_specialize=["stride_gb"], do_not_specialize_on_alignment=["grad_ptr", "output_ptr"])
def _gradient_kernel(
    grad_ptr,
    output_ptr,
    value_ptr,
    vocab_size,
    stride_gb,
    stride_gv,
    logit_scale,
    logit_softcap,
    LOGS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``value[b, v] = g[b, v]``."""
    b = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < vocab_size
    p_grad = grad_ptr + b * stride_gb + o_v.to(tl.int64) * stride_gv
    p_output = output_ptr + b * vocab_size + o_v
    g = logit_gradient(p_grad, p_output, m_v, logit_scale, logit_softcap, LOGS)
    tl.store(value_ptr + b * vocab_size + o_v, g, mask=m_v)


@triton.jit
def _sum_rows(word_ptr, value_ptr, weight_ptr, stride_wv, stride_wd, begin, end, o_d, m_d, ENTRIES: tl.constexpr):
    """``Σ value[e] · W[v[e], :]`` over ``begin <= e < end``, ENTRIES at a time."""
    p_weight = weight_ptr + o_d.to(tl.int64)[None, :] * stride_wd
    total = tl.zeros((o_d.shape[0],), dtype=tl.float32)
    for first in range(begin, end, ENTRIES):
        o_e = first + tl.arange(0, ENTRIES)
        m_e = o_e < end
        v = tl.load(word_ptr + o_e, mask=m_e, other=0).to(tl.int64)
        g = tl.load(value_ptr + o_e, mask=m_e, other=0.0)
        # [ENTRIES, BLOCK_D]
        w = tl.load(p_weight + v[:, None] * stride_wv, mask=m_e[:, None] & m_d[None, :], other=0.0)
        total += tl.sum(g[:, None] * widen(w), axis=0)
    return total


@triton.jit(do_not_specialize=["rows"])
def _chunk_kernel(
    bound_ptr,
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
        begin = tl.load(bound_ptr + 2 * row) + (k - tl.load(chunk_offset_ptr + row) + 1) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(bound_ptr + 2 * row + 1))
        total = _sum_rows(word_ptr, value_ptr, weight_ptr, stride_wv, stride_wd, begin, end, o_d, m_d, ENTRIES)
        tl.store(partial_ptr + k.to(tl.int64) * hidden_size + o_d, total, mask=m_d)


@triton.jit(do_not_specialize=["rows", "first", "count", "batch_size", "total_rows"])
def _hidden_kernel(
    bound_ptr,
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

    The slices together write all rows of dh, also those of no sequence. Rows from ``rows`` on, which exist only where a
    sequence is longer than its bound, have no entries.
    """
    begin_row = tl.load(edge_ptr + first)
    end_row = tl.where(first + count == batch_size, total_rows, tl.load(edge_ptr + first + count))
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < hidden_size
    p_hidden = grad_hidden_ptr + begin_row.to(tl.int64) * hidden_size + o_d
    for block in range(tl.program_id(0), tl.cdiv(end_row - begin_row, ROWS), tl.num_programs(0)):
        first_r = block * ROWS
        last_r = tl.minimum(first_r + ROWS, rows)
        o_r = first_r + tl.arange(0, ROWS)
        m_r = o_r < rows
        p_bound = bound_ptr + 2 * o_r
        length = tl.load(p_bound + 1, mask=m_r, other=0) - tl.load(p_bound, mask=m_r, other=0)
        m_empty = (length == 0) & (o_r < end_row - begin_row)
        # [ROWS, BLOCK_D]
        zeros = tl.zeros((ROWS, BLOCK_D), dtype=grad_hidden_ptr.dtype.element_ty)
        p_rows = p_hidden[None, :] + o_r.to(tl.int64)[:, None] * hidden_size
        tl.store(p_rows, zeros, mask=m_empty[:, None] & m_d[None, :])
        if tl.sum(length, axis=0) > 0:
            for r in range(first_r, last_r):
                begin = tl.load(bound_ptr + 2 * r)
                end = tl.load(bound_ptr + 2 * r + 1)
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
                    tl.store(p_row, narrow(total, grad_hidden_ptr.dtype.element_ty), mask=m_d)
