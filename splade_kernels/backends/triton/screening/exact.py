"""Exact dots of the pairs that screening kept: a queue of them, drained into the keys of the unscreened kernel.

An entry is a word, a group of 16 packed tokens, and a bit for each of its tokens whose logit may be positive.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..common import GROUP, GROUP_ROWS, canonical, is_active, ordered, training_key, widen
from ..pack import Packed

# Of the 64 bits of an entry: 20 of word, 27 of group, 16 of tokens, never negative.
ENTRY_BYTES = 8
MAX_VOCAB_SIZE = 1 << 20
WORD_SHIFT = tl.constexpr(43)
GROUP_SHIFT = tl.constexpr(16)
_GROUP_MASK = tl.constexpr((1 << 27) - 1)
_TOKEN_MASK = tl.constexpr((1 << GROUP) - 1)
# Entries a program works on together, so that enough reads are under way.
ENTRIES = 8
BLOCK_D = 256
WARPS = 4
# Programs for each multiprocessor.
RESIDENT = 8


def compute_exactly(
    packed: Packed,
    weight: Tensor,
    bias: Tensor | None,
    dense_sequence: Tensor,
    outcome: Tensor,
    queue: Tensor,
    entry_count: Tensor,
    keys: Tensor,
) -> None:
    """The queue into the keys, but for the entries of dense sequences; at once done if there are no others."""
    vocab_size, hidden_size = weight.shape
    _exact_kernel[(RESIDENT * launch.multiprocessors(weight.device),)](
        weight,
        packed.rows,
        bias,
        packed.group_sequence,
        dense_sequence,
        outcome,
        entry_count,
        queue,
        keys,
        vocab_size,
        hidden_size,
        *weight.stride(),
        ENTRIES=ENTRIES,
        BLOCK_D=min(BLOCK_D, triton.next_power_of_2(hidden_size)),
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize_on_alignment=["entry_count_ptr"])
def _exact_kernel(
    weight_ptr,
    row_ptr,
    bias_ptr,
    group_sequence_ptr,
    dense_sequence_ptr,
    outcome_ptr,
    entry_count_ptr,
    queue_ptr,
    key_ptr,
    vocab_size,
    hidden_size,
    stride_wv,
    stride_wd,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``key[b, v] = max(key[b, v], key(W[v] · h[t]))`` for the tokens of every entry of a sequence that is not dense.

    A dot is one sum of float32 products, in an order that depends on D alone.
    """
    nothing = tl.full((), 0 if key_ptr.dtype.element_ty == tl.int64 else -0x80000000, key_ptr.dtype.element_ty)
    entries = tl.where(tl.load(outcome_ptr + 1) > 0, tl.load(entry_count_ptr), 0)
    step = tl.num_programs(0).to(tl.int64) * ENTRIES
    for first in range(tl.program_id(0).to(tl.int64) * ENTRIES, entries, step):
        o_e = first + tl.arange(0, ENTRIES)
        m_e = o_e < entries
        entry = tl.load(queue_ptr + o_e, mask=m_e, other=0)
        v = entry >> WORD_SHIFT
        group = (entry >> GROUP_SHIFT) & _GROUP_MASK
        tokens = (entry & _TOKEN_MASK).to(tl.int32)
        sequence = tl.load(group_sequence_ptr + group, mask=m_e, other=0)
        dense = tl.load(dense_sequence_ptr + group, mask=m_e, other=0) >= 0
        tokens = tl.where(dense, 0, tokens)
        bias = tl.zeros((ENTRIES,), dtype=tl.float32)
        if bias_ptr is not None:
            bias += widen(tl.load(bias_ptr + v, mask=m_e, other=0.0))
        best = tl.full((ENTRIES,), nothing, key_ptr.dtype.element_ty)
        while tl.max(tokens, axis=0) > 0:
            lowest = tokens & -tokens
            # The exponent of a power of two, as a float, is the place of its bit.
            place = tl.maximum((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, 0)
            packed_row = group * GROUP_ROWS + place
            m_row = tokens > 0
            # [ENTRIES, BLOCK_D]
            partial = tl.zeros((ENTRIES, BLOCK_D), dtype=tl.float32)
            for start in range(0, hidden_size, BLOCK_D):
                o_d = start + tl.arange(0, BLOCK_D)
                m_d = m_row[:, None] & (o_d < hidden_size)[None, :]
                p_w = weight_ptr + v[:, None] * stride_wv + o_d.to(tl.int64)[None, :] * stride_wd
                b_w = widen(tl.load(p_w, mask=m_d, other=0.0))
                b_h = tl.load(row_ptr + packed_row[:, None] * hidden_size + o_d[None, :], mask=m_d, other=0.0)
                partial += b_w * widen(b_h)
            dot = canonical(tl.sum(partial, axis=1))
            logit = dot + bias
            key = ordered(dot)
            if key_ptr.dtype.element_ty == tl.int64:
                key = training_key(dot, packed_row)
            best = tl.maximum(best, tl.where(m_row & is_active(logit), key, nothing))
            tokens ^= lowest
        p_key = key_ptr + sequence.to(tl.int64) * vocab_size + v
        tl.atomic_max(p_key, best, mask=best != nothing, sem="relaxed")
