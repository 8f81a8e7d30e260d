"""Pack: the real tokens of a slice of the batch, densely, in groups of 16 rows.

Every sequence is filled up to whole groups with its own first token, which changes neither a maximum nor its lowest
position; groups past the last one are zeros and belong to sequence -1. All on the device: grids cover the bound that
the host knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..pooling import PoolingCall
from .common import GROUP

# Bytes of the packed rows, and of the [sequences, V] keys, of one slice.
SLICE_BYTES = 64 << 20


@dataclass(frozen=True)
class Tokens:
    """Where the real tokens of every sequence are."""

    starts: Tensor  # [B] int64 row of each sequence's position 0 in the flat hidden states
    lengths: Tensor  # [B] int32 real tokens
    listed: Tensor | None  # [B, S] int32 positions of the real tokens, in order; None: positions 0 .. length - 1


@dataclass(frozen=True)
class Packed:
    rows: Tensor  # [G · 16, D] in the compute dtype
    positions: Tensor  # [G · 16] int32 position in its sequence
    group_sequence: Tensor  # [G] int32 sequence within the slice, -1 past the end
    group_offsets: Tensor  # [n + 1] int32 first group of each sequence
    lengths: Tensor  # [n] int32 real tokens of each sequence


def find_tokens(call: PoolingCall, hidden: Tensor) -> Tokens:
    """Lengths and positions; values of ``cu_seqlens`` are clamped, so that no row outside ``hidden`` is ever named."""
    if call.cu_seqlens is not None:
        bounds = call.cu_seqlens.to(torch.int64).clamp(0, hidden.shape[0])
        lengths = bounds.diff().clamp(0, call.max_seqlen)
        return Tokens(bounds[:-1], lengths.to(torch.int32), None)
    starts = torch.arange(call.batch_size, device=hidden.device) * call.max_seqlen
    lengths = torch.full((call.batch_size,), call.max_seqlen, device=hidden.device, dtype=torch.int32)
    mask = call.attention_mask
    if mask is None:
        return Tokens(starts, lengths, None)
    listed = torch.empty(mask.shape, device=hidden.device, dtype=torch.int32)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if mask.numel() > 0:
        _list_kernel[(call.batch_size,)](
            mask, listed, lengths, mask.shape[1], mask.stride(0), mask.stride(1), BLOCK_S=1024, num_warps=4
        )
    return Tokens(starts, lengths, listed)


def slices(call: PoolingCall, vocab_size: int, hidden_size: int, key_bytes: int, rows: int) -> Iterator[slice]:
    """The batch in pieces whose keys and packed rows stay below ``SLICE_BYTES`` each, as far as the host can tell."""
    longest = GROUP * triton.cdiv(call.max_seqlen, GROUP)
    by_keys = SLICE_BYTES // max(1, vocab_size * key_bytes)
    by_rows = SLICE_BYTES // max(1, longest * hidden_size * call.compute_dtype.itemsize)
    # A bound on the lengths that is larger than a slice says nothing: all packed tokens together are the bound then.
    step = max(1, min(by_keys, by_rows)) if by_rows > 0 or call.cu_seqlens is None else max(1, by_keys)
    for first in range(0, call.batch_size, step):
        yield slice(first, min(first + step, call.batch_size))


def pack(call: PoolingCall, tokens: Tokens, hidden: Tensor, part: slice) -> Packed:
    """Gather the real tokens of the sequences ``part`` into packed groups, in the compute dtype."""
    count = part.stop - part.start
    total_rows, hidden_size = hidden.shape
    capacity = count * triton.cdiv(call.max_seqlen, GROUP)
    if call.cu_seqlens is not None:
        capacity = min(capacity, count + total_rows // GROUP)
    lengths = tokens.lengths[part]
    groups = (lengths + (GROUP - 1)) // GROUP
    offsets = F.pad(groups.cumsum(0), (1, 0)).to(torch.int32)
    rows = hidden.new_empty(capacity * GROUP, hidden_size, dtype=call.compute_dtype)
    positions = torch.empty(capacity * GROUP, device=hidden.device, dtype=torch.int32)
    group_sequence = torch.empty(capacity, device=hidden.device, dtype=torch.int32)
    listed = tokens.listed
    _pack_kernel[(capacity,)](
        hidden,
        tokens.starts[part],
        lengths,
        listed if listed is None else listed[part],
        offsets,
        rows,
        positions,
        group_sequence,
        count,
        hidden_size,
        call.max_seqlen,
        hidden.stride(0),
        hidden.stride(1),
        HAS_LIST=listed is not None,
        GROUP=GROUP,
        BLOCK_D=min(256, triton.next_power_of_2(max(hidden_size, 1))),
        num_warps=4,
    )
    return Packed(rows, positions, group_sequence, offsets, lengths)


@triton.jit(do_not_specialize=["length", "stride_mb"], do_not_specialize_on_alignment=["mask_ptr"])
def _list_kernel(mask_ptr, listed_ptr, length_ptr, length, stride_mb, stride_ms, BLOCK_S: tl.constexpr):
    """``listed[b, rank] = s`` for the rank-th position s with ``mask[b, s] != 0``; ``length[b]`` counts them."""
    b = tl.program_id(0).to(tl.int64)
    found = 0
    for first in range(0, length, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < length
        real = (tl.load(mask_ptr + b * stride_mb + o_s.to(tl.int64) * stride_ms, mask=m_s, other=0) != 0) & m_s
        rank = found + tl.cumsum(real.to(tl.int32), 0) - 1
        tl.store(listed_ptr + b * length + rank, o_s, mask=real)
        found += tl.sum(real.to(tl.int32), 0)
    tl.store(length_ptr + b, found)


@triton.jit(
    do_not_specialize=["sequences", "list_stride"],
    do_not_specialize_on_alignment=["start_ptr", "length_ptr", "listed_ptr", "offset_ptr"],
)
def _pack_kernel(
    hidden_ptr,
    start_ptr,
    length_ptr,
    listed_ptr,
    offset_ptr,
    row_ptr,
    position_ptr,
    group_sequence_ptr,
    sequences,
    hidden_size,
    list_stride,
    stride_hn,
    stride_hd,
    HAS_LIST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One group of 16 packed rows: ``row[16 g + i] = h[start + position(rank)]``, rank 0 again past the end."""
    g = tl.program_id(0)
    o_i = tl.arange(0, GROUP)
    packed_row = g.to(tl.int64) * GROUP + o_i
    inside = g < tl.load(offset_ptr + sequences)

    # The last sequence whose first group is not past g; empty sequences share their offset with the next one.
    low = tl.full((), 0, tl.int32)
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offset_ptr + middle) <= g:
            low = middle
        else:
            high = middle
    rank = (g - tl.load(offset_ptr + low)) * GROUP + o_i
    rank = tl.where(inside & (rank < tl.load(length_ptr + low)), rank, 0)
    if HAS_LIST:
        position = tl.load(listed_ptr + low.to(tl.int64) * list_stride + rank, mask=inside, other=0)
    else:
        position = rank
    tl.store(group_sequence_ptr + g, tl.where(inside, low, -1))
    tl.store(position_ptr + packed_row, position)

    source = (tl.load(start_ptr + low) + position) * stride_hn
    for first in range(0, hidden_size, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_d = (o_d < hidden_size)[None, :]
        # [GROUP, BLOCK_D]
        values = tl.load(hidden_ptr + source[:, None] + o_d[None, :] * stride_hd, mask=m_d & inside, other=0.0)
        p_row = row_ptr + packed_row[:, None] * hidden_size + o_d[None, :]
        tl.store(p_row, values.to(row_ptr.dtype.element_ty), mask=m_d)
