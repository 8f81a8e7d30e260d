"""Pack: the real tokens of a slice of the batch, densely, in groups of 16 rows.

Every sequence is padded to whole groups with its own first token, which changes neither a maximum nor its lowest
position. Groups past the last one are zeros and belong to sequence -1. Nothing is read back: grids cover the most
groups that the host's bounds allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pooling import PoolingCall
from .common import GROUP, GROUP_ROWS, LARGEST_BLOCK_T, narrow

# Bytes of one slice: of its packed rows, and of its keys [sequences, V] or partial maxima.
SLICE_BYTES = 64 << 20
# Up to so many times the packed tokens there are, the bound on their lengths is taken as tight.
LOOSE_BOUND = 4
# Zero groups past the last one: what the last tile may read.
TAIL_GROUPS = LARGEST_BLOCK_T // GROUP
ALL_GROUPS = 1 << 30


@dataclass(frozen=True)
class Tokens:
    """Where the real tokens of every sequence are, and where they are packed."""

    starts: Tensor  # [B] int32 row of each sequence's position 0 in the flat hidden states
    lengths: Tensor  # [B] int32 real tokens
    listed: Tensor | None  # [B, S] int32 positions of the real tokens, in order; None: positions 0 .. length - 1
    group_offsets: Tensor  # [B + 1] int32 first group of each sequence


@dataclass(frozen=True)
class Packed:
    rows: Tensor  # [G · 16, D] in the compute dtype
    positions: Tensor  # [G · 16] int32 position in its sequence
    group_sequence: Tensor  # [G] int32 sequence within the slice, -1 past the end
    group_offsets: Tensor  # [n + 1] int32 first group of each sequence
    lengths: Tensor  # [n] int32 real tokens of each sequence


def find_tokens(call: PoolingCall, hidden: Tensor) -> Tokens:
    """Lengths and positions of the real tokens, and the groups that they will be packed into."""
    edges = call.edges(hidden)
    lengths, group_offsets = torch.empty_like(edges[1:]), torch.empty_like(edges)
    mask, listed = call.attention_mask, None
    if mask is not None:
        listed = torch.empty(mask.shape, device=hidden.device, dtype=torch.int32)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        _list_kernel[(call.batch_size,)](
            mask, listed, lengths, mask.shape[1], mask.stride(0), mask.stride(1), BLOCK_S=1024, num_warps=4
        )
    known = edges if mask is None else None
    _offset_kernel[(1,)](known, lengths, group_offsets, call.batch_size, call.max_seqlen, BLOCK_B=1024, num_warps=4)
    return Tokens(edges[:-1], lengths, listed, group_offsets)


def slices(
    call: PoolingCall, vocab_size: int, hidden: Tensor, key_bytes: int, group_bytes: int = 0, partial_rows: int = 0
) -> Iterator[slice]:
    """The batch in slices whose keys and packed rows stay below ``SLICE_BYTES`` each, as far as the host can tell.

    So does a buffer of ``group_bytes`` for each group of packed rows, and, unless ``partial_rows`` is 0, the keys
    together with as many again for every ``partial_rows`` packed rows.
    """
    total_rows, hidden_size = hidden.shape
    group_bytes = max(group_bytes, GROUP * hidden_size * call.compute_dtype.itemsize)
    sequence_bytes = vocab_size * key_bytes
    partial_bytes = triton.cdiv(sequence_bytes * GROUP, partial_rows) if partial_rows else 0
    step = SLICE_BYTES // max(1, sequence_bytes)
    capacity = group_capacity(call, call.batch_size, total_rows)
    # Each slice of packed tokens has to reserve as many rows as the bound on a length allows. Where that is several
    # times the tokens there are, rows do not limit a slice: together they are no more than a copy of the hidden states.
    groups = triton.cdiv(call.max_seqlen, GROUP)
    if call.cu_seqlens is None or call.batch_size * groups * GROUP <= LOOSE_BOUND * total_rows:
        for fixed, growing in ((0, group_bytes), (sequence_bytes, partial_bytes)):
            if call.batch_size * fixed + capacity * growing > SLICE_BYTES:
                step = min(step, SLICE_BYTES // max(1, fixed + groups * growing))
    step = max(1, step)
    for first in range(0, call.batch_size, step):
        yield slice(first, min(first + step, call.batch_size))


def group_capacity(call: PoolingCall, sequences: int, total_rows: int) -> int:
    """Most groups that so many of the sequences can have, as far as the host can tell."""
    capacity: int = sequences * triton.cdiv(call.max_seqlen, GROUP)
    return capacity if call.cu_seqlens is None else min(capacity, sequences + total_rows // GROUP)


def pack_sequences(call: PoolingCall, tokens: Tokens, hidden: Tensor, part: slice) -> Packed:
    """The real tokens of the sequences ``part``."""
    offsets = tokens.group_offsets[part.start : part.stop + 1]
    groups = group_capacity(call, part.stop - part.start, hidden.shape[0])
    offsets = offsets - offsets[0] if part.start > 0 else offsets
    return _pack(call, tokens, hidden, part, offsets, groups, TAIL_GROUPS)


def pack_groups(call: PoolingCall, tokens: Tokens, hidden: Tensor, first: int, groups: int) -> Packed:
    """``groups`` groups of the whole packed batch from ``first`` on; earlier sequences have negative offsets."""
    return _pack(call, tokens, hidden, slice(0, call.batch_size), tokens.group_offsets - first, groups, ALL_GROUPS)


def _pack(
    call: PoolingCall, tokens: Tokens, hidden: Tensor, part: slice, offsets: Tensor, groups: int, tail: int
) -> Packed:
    hidden_size = hidden.shape[1]
    lengths, listed = tokens.lengths[part], tokens.listed
    rows = hidden.new_empty(groups * GROUP, hidden_size, dtype=call.compute_dtype)
    positions = torch.empty(groups * GROUP, device=hidden.device, dtype=torch.int32)
    group_sequence = torch.empty(groups, device=hidden.device, dtype=torch.int32)
    sources = hidden, tokens.starts[part], lengths, listed if listed is None else listed[part], offsets
    sizes = len(lengths), hidden_size, call.max_seqlen, tail, *hidden.stride()
    block_d = min(256, triton.next_power_of_2(max(hidden_size, 1)))
    _pack_kernel[(groups,)](*sources, rows, positions, group_sequence, *sizes, BLOCK_D=block_d, num_warps=4)
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


@triton.jit(do_not_specialize=["sequences", "bound"])
def _offset_kernel(edge_ptr, length_ptr, group_offset_ptr, sequences, bound, BLOCK_B: tl.constexpr):
    """``group_offset[b + 1] = Σ ceil(length[i] / 16)`` over ``i <= b``; lengths from ``edge`` if given. One program."""
    groups = tl.full((), 0, tl.int32)
    tl.store(group_offset_ptr, groups)
    for first in range(0, sequences, BLOCK_B):
        o_b = first + tl.arange(0, BLOCK_B)
        m_b = o_b < sequences
        if edge_ptr is not None:
            length = tl.load(edge_ptr + o_b + 1, mask=m_b, other=0) - tl.load(edge_ptr + o_b, mask=m_b, other=0)
            length = tl.minimum(length, bound)
            tl.store(length_ptr + o_b, length, mask=m_b)
        else:
            length = tl.load(length_ptr + o_b, mask=m_b, other=0)
        count = (length + GROUP_ROWS - 1) // GROUP_ROWS
        tl.store(group_offset_ptr + 1 + o_b, groups + tl.cumsum(count, 0), mask=m_b)
        groups += tl.sum(count, 0)


@triton.jit(
    do_not_specialize=["sequences", "list_stride", "tail"],
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
    tail,
    stride_hn,
    stride_hd,
    BLOCK_D: tl.constexpr,
):
    """One group of 16 packed rows: ``row[16 g + i] = h[start + position(rank)]``, rank 0 again past the end.

    Past the last group there are ``tail`` groups of zeros, of sequence -1; beyond them nothing is read.
    """
    g = tl.program_id(0)
    o_i = tl.arange(0, GROUP_ROWS)
    packed_row = g.to(tl.int64) * GROUP_ROWS + o_i
    count = tl.load(offset_ptr + sequences)
    inside = g < count
    if g >= count + tail:
        return

    # Bisect for the last sequence whose first group is not past g: empty ones share their offset with the next one.
    low = tl.full((), 0, tl.int32)
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offset_ptr + middle) <= g:
            low = middle
        else:
            high = middle
    rank = (g - tl.load(offset_ptr + low)) * GROUP_ROWS + o_i
    rank = tl.where(inside & (rank < tl.load(length_ptr + low)), rank, 0)
    if listed_ptr is not None:
        position = tl.load(listed_ptr + low.to(tl.int64) * list_stride + rank, mask=inside, other=0)
    else:
        position = rank
    tl.store(group_sequence_ptr + g, tl.where(inside, low, -1))
    tl.store(position_ptr + packed_row, position)

    source = (tl.load(start_ptr + low) + position).to(tl.int64) * stride_hn
    for first in range(0, hidden_size, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_d = (o_d < hidden_size)[None, :]
        # [GROUP, BLOCK_D]
        p_hidden = hidden_ptr + source[:, None] + o_d.to(tl.int64)[None, :] * stride_hd
        values = tl.load(p_hidden, mask=m_d & inside, other=0.0)
        p_row = row_ptr + packed_row[:, None] * hidden_size + o_d[None, :]
        tl.store(p_row, narrow(values, row_ptr.dtype.element_ty), mask=m_d)
