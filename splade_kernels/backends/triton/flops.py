"""FLOPS statistics: the column sums of ``[B, V]`` embeddings over the rows that a threshold keeps.

Every program sums a fixed number of rows of a few columns; the same kernel then adds the partial sums in order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import widen

BLOCK_V = 256
# Rows that are loaded together, and rows of one partial sum.
BLOCK_B = 8
PARTIAL_ROWS = 64


def flops_sums(embeddings: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """``[V]`` float32 sums over the kept rows, and ``[B]`` bool which rows were kept (empty without a threshold).

    A row is kept if it has more than ``threshold`` non-zeros; NaN is one. Rows that are not kept are not read again.
    """
    rows, vocab_size = embeddings.shape
    kept = None if threshold is None else _count_rows(embeddings, threshold)
    chunks = triton.cdiv(rows, PARTIAL_ROWS)
    sums = torch.empty(max(chunks, 1), vocab_size, device=embeddings.device, dtype=torch.float32)
    _launch_sums(embeddings, kept, sums, PARTIAL_ROWS)
    if chunks > 1:
        partial, sums = sums, sums.new_empty(1, vocab_size)
        _launch_sums(partial, None, sums, chunks)
    return sums[0], embeddings.new_empty(0, dtype=torch.bool) if kept is None else kept.view(torch.bool)


def _count_rows(embeddings: Tensor, threshold: float) -> Tensor:
    rows, vocab_size = embeddings.shape
    kept = torch.empty(rows, device=embeddings.device, dtype=torch.uint8)
    # An integer, so that rounding to float32 decides nothing. No count exceeds a NaN threshold.
    dropped = math.floor(max(threshold, -1.0)) if threshold < vocab_size else vocab_size
    if rows > 0:
        _count_kernel[(rows,)](embeddings, kept, vocab_size, dropped, *embeddings.stride(), BLOCK_V=2048, num_warps=4)
    return kept


def _launch_sums(values: Tensor, kept: Tensor | None, sums: Tensor, rows_each: int) -> None:
    rows, vocab_size = values.shape
    if vocab_size > 0:
        sizes = rows, rows_each, vocab_size, *values.stride()
        _sums_kernel[(triton.cdiv(vocab_size, BLOCK_V), len(sums))](
            values, kept, sums, *sizes, BLOCK_B=BLOCK_B, BLOCK_V=BLOCK_V, num_warps=4
        )


@triton.jit(do_not_specialize=["dropped"])
def _count_kernel(embedding_ptr, kept_ptr, vocab_size, dropped, stride_eb, stride_ev, BLOCK_V: tl.constexpr):
    """``kept[b]`` is whether more than ``dropped`` of ``e[b, :]`` are not zero."""
    b = tl.program_id(0).to(tl.int64)
    counts = tl.zeros((BLOCK_V,), dtype=tl.int32)
    for first in range(0, vocab_size, BLOCK_V):
        o_v = first + tl.arange(0, BLOCK_V)
        values = tl.load(embedding_ptr + b * stride_eb + o_v.to(tl.int64) * stride_ev, mask=o_v < vocab_size, other=0.0)
        counts += (widen(values) != 0).to(tl.int32)
    tl.store(kept_ptr + b, (tl.sum(counts, axis=0) > dropped).to(tl.uint8))


@triton.jit(do_not_specialize=["rows", "rows_each"])
def _sums_kernel(
    value_ptr,
    kept_ptr,
    sum_ptr,
    rows,
    rows_each,
    vocab_size,
    stride_eb,
    stride_ev,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``sum[i, v] = Σ_b e[b, v]`` over the kept rows b of the i-th ``rows_each`` rows."""
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    i = tl.program_id(1)
    m_v = (o_v < vocab_size)[None, :]
    p_v = value_ptr + o_v.to(tl.int64)[None, :] * stride_ev
    last = tl.minimum((i + 1) * rows_each, rows)
    # [BLOCK_B, BLOCK_V]
    acc = tl.zeros((BLOCK_B, BLOCK_V), dtype=tl.float32)
    for first in range(i * rows_each, last, BLOCK_B):
        o_b = first + tl.arange(0, BLOCK_B)
        m_b = o_b < last
        if kept_ptr is not None:
            m_b = m_b & (tl.load(kept_ptr + o_b, mask=m_b, other=0) != 0)
        values = tl.load(p_v + o_b.to(tl.int64)[:, None] * stride_eb, mask=m_b[:, None] & m_v, other=0.0)
        acc += widen(values)
    tl.store(sum_ptr + i.to(tl.int64) * vocab_size + o_v, tl.sum(acc, axis=0), mask=o_v < vocab_size)
