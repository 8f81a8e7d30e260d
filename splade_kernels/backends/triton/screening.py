"""Exact screening: int8 products show which logits can be positive, and only those are computed.

``docs/screening.md`` derives the bound. Three kernels, between pack and the unscreened kernel, all on the device:

screen: tiles as in ``pool_forward``, of quantised rows. A pair (16-token group, word) with a token whose logit may be
positive is appended to a queue, with a bit for every such token. Every sequence may keep a share of its pairs; one that
keeps more is *dense*.

divide: the groups of dense sequences, for the unscreened kernel; no others are left to it.

exact: dots of the queue's tokens in float32, into the keys of the unscreened kernel. Their maximum does not depend on
the order of the queue.

Whether a sequence is dense depends on its own tokens alone, and so does everything computed for it: on nothing else in
the batch, nor on how the batch was cut or padded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import weight_cache
from ..pooling import PoolingCall
from .common import GROUP, GROUP_ROWS, tile_of
from .exact import ENTRY_BYTES, GROUP_SHIFT, MAX_VOCAB_SIZE, WORD_SHIFT, compute_exactly
from .pack import TAIL_GROUPS, Packed
from .quantise import MAX_HIDDEN_SIZE, Quantised, quantise_packed, quantise_weight
from .tuning import MatmulConfig, fits_descriptor, multiprocessors

# A sequence keeps at most one of so many of its pairs. "auto": estimated from datasheets, not measured. A kept pair
# reads a row of W and 1.2 rows of tokens from L2, a tile of tensor cores saves half to three quarters of the pair's
# product: the two meet at one pair in 40 on Hopper, one in 8 on Ampere. "on": what memory allows, a byte a pair.
SHARE = {"auto": 32, "on": 8}
DIVIDE_BLOCK = 1024


def can_screen(call: PoolingCall, weight: Tensor) -> bool:
    vocab_size, hidden_size = weight.shape
    return call.screening != "off" and 0 < hidden_size <= MAX_HIDDEN_SIZE and vocab_size <= MAX_VOCAB_SIZE


def quantised(call: PoolingCall, original: Tensor, weight: Tensor) -> Quantised:
    """The rows of ``weight``, which is ``original`` in the compute dtype; kept from one inference call to the next."""
    if call.need_argmax:
        weight_cache.forget(original)
        return quantise_weight(weight)
    kind = f"triton int8 of {call.compute_dtype}"
    return weight_cache.cached(original, kind, lambda: quantise_weight(weight))


def queue_bytes(call: PoolingCall, vocab_size: int) -> int:
    """Of one group, at most."""
    return triton.cdiv(vocab_size * ENTRY_BYTES, SHARE[call.screening])


def screen(
    config: MatmulConfig,
    share: int,
    packed: Packed,
    weight: Tensor,
    quantised_weight: Quantised,
    bias: Tensor | None,
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys of all sequences that are not dense.

    Returns:
        ``[G]`` int32 sequence of each group that is left to the unscreened kernel, -1 for the others, and ``[1]`` the
        number of groups up to the last such one.
    """
    vocab_size, hidden_size = weight.shape
    groups, sequences = len(packed.group_sequence), len(packed.lengths)
    rows = quantise_packed(packed)
    queue = torch.empty(groups * vocab_size // share, device=weight.device, dtype=torch.int64)
    # Pairs of each sequence that can be active; entries of the queue.
    found = torch.zeros(sequences + 1, device=weight.device, dtype=torch.int64)
    # Groups up to the last dense one; whether there is anything for the exact kernel.
    outcome = torch.zeros(2, device=weight.device, dtype=torch.int32)
    dense_sequence = torch.empty_like(packed.group_sequence)

    programs = triton.cdiv(vocab_size, config.block_v) * triton.cdiv(groups * GROUP, config.block_t)
    tiles: tuple[Tensor | TensorDescriptor, ...] = (quantised_weight.rows, rows.rows)
    descriptors = config.tma and fits_descriptor(quantised_weight.rows) and fits_descriptor(rows.rows)
    if descriptors:
        programs = min(programs, config.resident * multiprocessors(weight.device))
        tiles = (
            TensorDescriptor.from_tensor(quantised_weight.rows, [config.block_v, config.block_k]),
            TensorDescriptor.from_tensor(rows.rows, [config.block_t, config.block_k]),
        )
    _screen_kernel[(programs,)](
        *tiles,
        quantised_weight.statistics,
        rows.statistics,
        bias,
        packed.positions,
        packed.group_sequence,
        packed.group_offsets,
        found,
        queue,
        sequences,
        vocab_size,
        rows.rows.shape[1],
        groups * GROUP,
        share,
        DESCRIPTORS=descriptors,
        BLOCK_V=config.block_v,
        BLOCK_T=config.block_t,
        BLOCK_K=config.block_k,
        GROUP_V=config.group_v,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _divide_kernel[(triton.cdiv(groups, DIVIDE_BLOCK),)](
        packed.group_sequence,
        packed.group_offsets,
        found,
        dense_sequence,
        outcome,
        sequences,
        groups,
        vocab_size,
        share,
        TAIL_GROUPS,
        BLOCK_G=DIVIDE_BLOCK,
        num_warps=4,
    )
    compute_exactly(packed, weight, bias, dense_sequence, outcome, queue, found[-1:], keys)
    return dense_sequence, outcome[:1]


@triton.jit
def _pairs_allowed(offset_ptr, sequence, mask, vocab_size, share):
    """How many pairs the sequences may keep."""
    first = tl.load(offset_ptr + sequence, mask=mask, other=0)
    last = tl.load(offset_ptr + sequence + 1, mask=mask, other=0)
    return (last - first).to(tl.int64) * vocab_size // share


@triton.jit(
    do_not_specialize=["sequences", "rows", "share"],
    do_not_specialize_on_alignment=["offset_ptr"],
)
def _screen_kernel(
    weight,
    row,
    weight_statistics_ptr,
    row_statistics_ptr,
    bias_ptr,
    position_ptr,
    group_sequence_ptr,
    offset_ptr,
    found_ptr,
    queue_ptr,
    sequences,
    vocab_size,
    width,
    rows,
    share,
    DESCRIPTORS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
):
    """Append to the queue every pair (group, v) that has a token with ``d + B > -c``; count them by sequence.

    ``weight`` and ``row`` are int8, pointers or TMA descriptors, as in the unscreened kernel.
    """
    tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    tiles_t = tl.cdiv(tl.load(offset_ptr + sequences) * GROUP_ROWS, BLOCK_T)
    tile = tl.program_id(0)
    if DESCRIPTORS:
        for tile in tl.range(tl.program_id(0), tiles_v * tiles_t, tl.num_programs(0)):
            tile_v, tile_t = tile_of(tile, tiles_v, tiles_t, GROUP_V)
            sequence, allowed, wanted = _sequences(
                group_sequence_ptr, offset_ptr, found_ptr, tile_t, vocab_size, rows, share, BLOCK_T
            )
            if wanted:
                # [BLOCK_V, BLOCK_T]
                product = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.int32)
                for first in range(0, width, BLOCK_K):
                    b_w = weight.load([tile_v * BLOCK_V, first])
                    b_h = row.load([tile_t * BLOCK_T, first])
                    product = tl.dot(b_w, b_h.T, product, out_dtype=tl.int32)
                _append(
                    product, weight_statistics_ptr, row_statistics_ptr, bias_ptr, position_ptr, found_ptr, queue_ptr,
                    sequence, allowed, tile_v, tile_t, sequences, vocab_size, rows,
                )  # fmt: skip
    elif tile < tiles_v * tiles_t:
        tile_v, tile_t = tile_of(tile, tiles_v, tiles_t, GROUP_V)
        sequence, allowed, wanted = _sequences(
            group_sequence_ptr, offset_ptr, found_ptr, tile_t, vocab_size, rows, share, BLOCK_T
        )
        if wanted:
            o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
            o_t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
            o_k = tl.arange(0, BLOCK_K)
            p_w = weight + o_v.to(tl.int64)[:, None] * width + o_k[None, :]
            p_h = row + o_t.to(tl.int64)[None, :] * width + o_k[:, None]
            product = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.int32)
            for first in range(0, width, BLOCK_K):
                b_w = tl.load(p_w + first, mask=(o_v < vocab_size)[:, None], other=0)
                b_h = tl.load(p_h + first, mask=(o_t < rows)[None, :], other=0)
                product = tl.dot(b_w, b_h, product, out_dtype=tl.int32)
            _append(
                product, weight_statistics_ptr, row_statistics_ptr, bias_ptr, position_ptr, found_ptr, queue_ptr,
                sequence, allowed, tile_v, tile_t, sequences, vocab_size, rows,
            )  # fmt: skip


@triton.jit
def _sequences(
    group_sequence_ptr, offset_ptr, found_ptr, tile_t, vocab_size, rows, share, BLOCK_T: tl.constexpr
):
    """Of a tile's groups: their sequences, the pairs these may keep, and whether any of them is not known as dense."""
    GROUPS: tl.constexpr = BLOCK_T // GROUP_ROWS
    o_g = tile_t * GROUPS + tl.arange(0, GROUPS)
    sequence = tl.load(group_sequence_ptr + o_g, mask=o_g < rows // GROUP_ROWS, other=-1)
    real = sequence >= 0
    allowed = _pairs_allowed(offset_ptr, sequence, real, vocab_size, share)
    # Past the first cache, which would not see what other programs count. An old count is only ever too low.
    found = tl.load(found_ptr + sequence, mask=real, other=0, cache_modifier=".cg")
    return sequence, allowed, tl.max((real & (found <= allowed)).to(tl.int32), 0) > 0


@triton.jit
def _append(
    product,
    weight_statistics_ptr,
    row_statistics_ptr,
    bias_ptr,
    position_ptr,
    found_ptr,
    queue_ptr,
    sequence,
    allowed,
    tile_v,
    tile_t,
    sequences,
    vocab_size,
    rows,
):
    """The pairs of a finished tile that can be active: all are counted, and those within the allowance are queued."""
    BLOCK_V: tl.constexpr = product.shape[0]
    BLOCK_T: tl.constexpr = product.shape[1]
    GROUPS: tl.constexpr = BLOCK_T // GROUP_ROWS
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_g = tile_t * GROUPS + tl.arange(0, GROUPS)
    m_v = o_v < vocab_size
    m_t = o_t < rows
    p_w = weight_statistics_ptr + o_v
    p_h = row_statistics_ptr + o_t
    scale_w = tl.load(p_w, mask=m_v, other=0.0)
    radius_w = tl.load(p_w + vocab_size, mask=m_v, other=0.0)
    norm_w = tl.load(p_w + 2 * vocab_size, mask=m_v, other=0.0)
    scale_h = tl.load(p_h, mask=m_t, other=0.0)
    radius_h = tl.load(p_h + tl.cast(rows, tl.int64), mask=m_t, other=0.0)
    norm_h = tl.load(p_h + 2 * tl.cast(rows, tl.int64), mask=m_t, other=0.0)
    threshold = tl.zeros((BLOCK_V,), dtype=tl.float32)
    if bias_ptr is not None:
        threshold -= tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)
    # [BLOCK_V, BLOCK_T]
    estimate = scale_h[None, :] * (scale_w[:, None] * product.to(tl.float32))
    bound = radius_h[None, :] * (norm_w + radius_w)[:, None] + norm_h[None, :] * radius_w[:, None]
    inactive = estimate + bound <= threshold[:, None]
    # A bit for every token, written so that NaN has one.
    bit = 1 << (tl.arange(0, BLOCK_T) % GROUP_ROWS)
    bits = tl.reshape(tl.where(inactive, 0, bit[None, :]), (BLOCK_V, GROUPS, GROUP_ROWS))

    # Repeats, which fill a sequence up, are its first token: no later than what precedes them, and left to that one.
    position = tl.load(position_ptr + o_t, mask=m_t, other=0)
    start = tl.load(position_ptr + o_g * GROUP_ROWS, mask=o_g < rows // GROUP_ROWS, other=0)
    later = tl.reshape(position, (GROUPS, GROUP_ROWS)) > start[:, None]
    real = 1 + tl.sum(tl.where(later, tl.reshape(bit, (GROUPS, GROUP_ROWS)), 0), axis=1)
    real = tl.where(sequence >= 0, real, 0)
    # [BLOCK_V, GROUPS]
    tokens = tl.where(m_v[:, None], tl.sum(bits, axis=2) & real[None, :], 0)

    survives = tokens != 0
    pairs = tl.sum(survives.to(tl.int32), axis=0).to(tl.int64)
    before = tl.atomic_add(found_ptr + sequence, pairs, mask=pairs > 0, sem="relaxed")
    kept = survives & (before + pairs <= allowed)[None, :]
    places = tl.reshape(kept.to(tl.int32), (BLOCK_V * GROUPS,))
    total = tl.sum(places, axis=0)
    if total > 0:
        first = tl.atomic_add(found_ptr + sequences, total.to(tl.int64), sem="relaxed")
        entry = (o_v.to(tl.int64) << WORD_SHIFT)[:, None] | (o_g.to(tl.int64) << GROUP_SHIFT)[None, :] | tokens
        p_entry = queue_ptr + first + tl.cumsum(places, axis=0) - places
        tl.store(p_entry, tl.reshape(entry, (BLOCK_V * GROUPS,)), mask=places > 0)


@triton.jit(
    do_not_specialize=["sequences", "groups", "share", "tail"], do_not_specialize_on_alignment=["offset_ptr"]
)
def _divide_kernel(
    group_sequence_ptr,
    offset_ptr,
    found_ptr,
    dense_sequence_ptr,
    outcome_ptr,
    sequences,
    groups,
    vocab_size,
    share,
    tail,
    BLOCK_G: tl.constexpr,
):
    """``dense[g] = sequence of group g`` if it found more pairs than it may keep, else -1."""
    o_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    m_g = o_g < tl.minimum(tl.load(offset_ptr + sequences) + tail, groups)
    sequence = tl.load(group_sequence_ptr + o_g, mask=m_g, other=-1)
    real = sequence >= 0
    found = tl.load(found_ptr + sequence, mask=real, other=0)
    dense = real & (found > _pairs_allowed(offset_ptr, sequence, real, vocab_size, share))
    tl.store(dense_sequence_ptr + o_g, tl.where(dense, sequence, -1), mask=m_g)
    end = tl.max(tl.where(dense, o_g + 1, 0), axis=0)
    tl.atomic_max(outcome_ptr, end, sem="relaxed")
    screened = tl.max((real & (found > 0) & ~dense).to(tl.int32), axis=0)
    tl.atomic_max(outcome_ptr + 1, screened, sem="relaxed")
