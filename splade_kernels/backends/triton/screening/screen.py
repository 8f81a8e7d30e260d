"""Exact screening: an int8 product bounds every logit from above, and only those that may be positive are computed.

``docs/screening.md`` derives the bound. Four kernels run on the device between pack and the unscreened kernel:

- budget: how many pairs (16-token group, vocabulary entry) each sequence may keep; empties the queue.
- screen: tiles as in ``max_forward``, of int8 rows. A pair with a token whose logit may be positive is appended to the
  queue, with a bit for every such token. A sequence that finds more pairs than its budget is *dense*.
- divide: leaves the groups of dense sequences, and no others, to the unscreened kernel.
- exact: float32 dots of the queued tokens, into the keys of the unscreened kernel, by an atomic maximum.

Whether a sequence is dense depends on its own tokens alone, not on the rest of the batch, its slices or its padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import weight_cache
from ...int8_bound import MAX_HIDDEN_SIZE
from ...pooling import PoolingCall
from .. import launch
from ..common import GROUP, GROUP_ROWS, not_at_most, tile_of, widen
from ..pack import TAIL_GROUPS, Packed
from ..tuning import MatmulConfig, screening_may_pay
from .exact import ENTRY_BYTES, GROUP_SHIFT, MAX_VOCAB_SIZE, WORD_SHIFT, compute_exactly
from .quantise import Quantised, quantise_packed, quantise_weight, requantise_weight

# A sequence keeps at most one in so many of its pairs. "auto" is reasoned, not measured: a kept pair costs a row of W
# and little more than one row of h, read from L2; a screened one saves half (Hopper) to three quarters (Ampere) of its
# product on tensor cores, which is worth a few per cent of such reads on Hopper and more on Ampere. "on" is what memory
# allows, a byte for each pair.
SHARE = {"auto": 32, "on": 8}
BLOCK = 1024


def can_screen(call: PoolingCall, weight: Tensor, arch: int) -> bool:
    """What the host decides, never from batch or length: "auto" screens on measured architectures alone."""
    vocab_size, hidden_size = weight.shape
    wanted = call.screening == "on" or (call.screening == "auto" and screening_may_pay(arch))
    return wanted and 0 < hidden_size <= MAX_HIDDEN_SIZE and vocab_size <= MAX_VOCAB_SIZE


def quantised(call: PoolingCall, original: Tensor, weight: Tensor, arch: int) -> Quantised | None:
    """The int8 rows of ``weight``, which is ``original`` in the compute dtype; None where the call is not screened.

    Inference calls keep the result for the next one; a training call, screened or not, drops it.
    """
    if call.need_argmax:
        weight_cache.forget(original)
    if not can_screen(call, weight, arch):
        return None
    if call.need_argmax:
        return quantise_weight(weight)
    sample = weight_cache.sample(original)
    kind = f"triton int8 of {call.compute_dtype}"
    kept, kept_sample = weight_cache.cached(original, kind, lambda: (quantise_weight(weight), _normal_copy(sample)))
    # Writes that bypass the version counter can only be detected by comparing values on the device.
    requantise_weight(weight, kept, (sample != kept_sample).any())
    kept_sample.copy_(sample)
    return kept


def _normal_copy(tensor: Tensor) -> Tensor:
    """A copy that may be written inside and outside of inference mode."""
    with torch.inference_mode(False):
        return tensor.clone()


def queue_bytes(call: PoolingCall, vocab_size: int) -> int:
    """Most bytes of queue that one group takes."""
    return vocab_size // SHARE[call.screening] * ENTRY_BYTES


def screen(
    config: MatmulConfig,
    share: int,
    packed: Packed,
    weight: Tensor,
    quantised_weight: Quantised,
    bias: Tensor | None,
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the keys of all sequences that are not dense.

    Returns:
        ``[G]`` int32 sequence of each group that is left to the unscreened kernel, -1 for the others; and ``[1]`` the
        number of groups up to the last such one.
    """
    vocab_size = weight.shape[0]
    groups = len(packed.group_sequence)
    rows = quantise_packed(packed)
    queue = torch.empty(groups * (vocab_size // share), device=weight.device, dtype=torch.int64)
    budget = torch.empty(len(packed.lengths), device=weight.device, dtype=torch.int64)
    entry_count = torch.empty(1, device=weight.device, dtype=torch.int64)
    dense_sequence = torch.empty_like(packed.group_sequence)
    # The number of groups up to the last dense one; whether the exact kernel has anything to do.
    outcome = torch.empty(2, device=weight.device, dtype=torch.int32)

    _budget_kernel[(triton.cdiv(len(budget), BLOCK),)](
        packed.group_offsets, budget, entry_count, len(budget), vocab_size // share, BLOCK_B=BLOCK, num_warps=4
    )
    programs, matrices, options = launch.tiled_launch(config, quantised_weight.rows, rows.rows)
    bounds = quantised_weight.statistics, rows.statistics, bias
    owners = packed.group_sequence, packed.group_offsets[-1:], budget
    sizes = vocab_size, rows.rows.shape[1], groups * GROUP
    _screen_kernel[(programs,)](*matrices, *bounds, packed.positions, *owners, entry_count, queue, *sizes, **options)
    _divide_kernel[(1,)](*owners, dense_sequence, outcome, groups, TAIL_GROUPS, BLOCK_G=BLOCK, num_warps=BLOCK // 128)
    compute_exactly(packed, weight, bias, dense_sequence, outcome, queue, entry_count, keys)
    return dense_sequence, outcome[:1]


@triton.jit(do_not_specialize=["sequences"], do_not_specialize_on_alignment=["offset_ptr"])
def _budget_kernel(offset_ptr, budget_ptr, entry_count_ptr, sequences, kept, BLOCK_B: tl.constexpr):
    """``budget[b] = kept · groups of b``, below 0 once the sequence is dense; and an empty queue."""
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < sequences
    p_offset = offset_ptr + o_b
    groups = tl.load(p_offset + 1, mask=m_b, other=0) - tl.load(p_offset, mask=m_b, other=0)
    tl.store(budget_ptr + o_b, groups.to(tl.int64) * kept, mask=m_b)
    if tl.program_id(0) == 0:
        tl.store(entry_count_ptr, tl.full((), 0, tl.int64))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["group_count_ptr"])
def _screen_kernel(
    weight,
    row,
    weight_statistics_ptr,
    row_statistics_ptr,
    bias_ptr,
    position_ptr,
    group_sequence_ptr,
    group_count_ptr,
    budget_ptr,
    entry_count_ptr,
    queue_ptr,
    vocab_size,
    width,
    rows,
    DESCRIPTORS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
):
    """Append to the queue every pair (group, v) that has a token with ``d + B > -c``; count them by sequence.

    ``d = s_t s_v i`` from the product i of the quantised rows, ``B = s_t (ρ (N_v + R_v) + ν R_v)`` with the largest
    ratios ``ρ = R_t / s_t``, ``ν = N_t / s_t`` over the tokens of a group. That is little more than the bound of each
    token, since residuals are about half a step whatever the row, and takes three quarters of the registers.

    ``weight`` and ``row`` are int8, pointers or TMA descriptors, as in the unscreened kernel.
    """
    tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    tiles_t = tl.cdiv(tl.load(group_count_ptr) * GROUP_ROWS, BLOCK_T)
    statistics = weight_statistics_ptr, row_statistics_ptr, bias_ptr, position_ptr, group_sequence_ptr
    rest = statistics, (budget_ptr, entry_count_ptr, queue_ptr, vocab_size, rows)
    tile = tl.program_id(0)
    if DESCRIPTORS:
        for tile in tl.range(tl.program_id(0), tiles_v * tiles_t, tl.num_programs(0)):
            tile_v, tile_t = tile_of(tile, tiles_v, tiles_t, GROUP_V)
            if _is_open(group_sequence_ptr, budget_ptr, tile_t, rows, BLOCK_T):
                # [BLOCK_V, BLOCK_T]
                product = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.int32)
                for first in range(0, width, BLOCK_K):
                    b_w = weight.load([tile_v * BLOCK_V, first])
                    b_h = row.load([tile_t * BLOCK_T, first])
                    product = tl.dot(b_w, b_h.T, product, out_dtype=tl.int32)
                _append(product, rest, tile_v, tile_t)
    elif tile < tiles_v * tiles_t:
        tile_v, tile_t = tile_of(tile, tiles_v, tiles_t, GROUP_V)
        if _is_open(group_sequence_ptr, budget_ptr, tile_t, rows, BLOCK_T):
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
            _append(product, rest, tile_v, tile_t)


@triton.jit
def _is_open(group_sequence_ptr, budget_ptr, tile_t, rows, BLOCK_T: tl.constexpr):
    """Whether some sequence of the tile is not known to be dense yet; all threads of the program get one answer."""
    GROUPS: tl.constexpr = BLOCK_T // GROUP_ROWS
    largest = tl.full((), -1, tl.int64)
    for i in tl.static_range(GROUPS):
        g = tile_t * GROUPS + i
        sequence = tl.load(group_sequence_ptr + g, mask=g < rows // GROUP_ROWS, other=-1)
        # ``.cg`` bypasses L1, which is not coherent with other programs' atomics. A stale budget is only too high,
        # which is safe.
        budget = tl.load(budget_ptr + sequence, mask=sequence >= 0, other=-1, cache_modifier=".cg")
        largest = tl.maximum(largest, budget)
    # Threads may load different budgets while other programs update them, and diverging warps would deadlock at the
    # next barrier. So the decision of one thread is broadcast through shared memory: no element of a tensor of 1024 is
    # replicated across warps, so that reducing it needs the exchange.
    first = tl.arange(0, 1024) == 0
    return tl.max((first & (largest >= 0)).to(tl.int32), axis=0) > 0


@triton.jit
def _append(product, rest, tile_v, tile_t):
    """Count the pairs of a finished tile that can be active, and queue them as long as the budget lasts."""
    weight_statistics_ptr, row_statistics_ptr, bias_ptr, position_ptr, group_sequence_ptr = rest[0]
    budget_ptr, entry_count_ptr, queue_ptr, vocab_size, rows = rest[1]
    BLOCK_V: tl.constexpr = product.shape[0]
    BLOCK_T: tl.constexpr = product.shape[1]
    GROUPS: tl.constexpr = BLOCK_T // GROUP_ROWS
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_g = tile_t * GROUPS + tl.arange(0, GROUPS)
    m_v = o_v < vocab_size
    m_t = o_t < rows
    m_g = o_g < rows // GROUP_ROWS
    scale_w = tl.load(weight_statistics_ptr + o_v, mask=m_v, other=0.0)
    radius_w = tl.load(weight_statistics_ptr + vocab_size + o_v, mask=m_v, other=0.0)
    norm_w = tl.load(weight_statistics_ptr + 2 * vocab_size + o_v, mask=m_v, other=0.0)
    p_group = row_statistics_ptr + tl.cast(rows, tl.int64) + o_g
    scale_h = tl.load(row_statistics_ptr + o_t, mask=m_t, other=0.0)
    radius_ratio = tl.load(p_group, mask=m_g, other=0.0)
    norm_ratio = tl.load(p_group + rows // GROUP_ROWS, mask=m_g, other=0.0)
    threshold = tl.zeros((BLOCK_V,), dtype=tl.float32)
    if bias_ptr is not None:
        threshold -= widen(tl.load(bias_ptr + o_v, mask=m_v, other=0.0))
    # B / s, [BLOCK_V, GROUPS]
    bound = radius_ratio[None, :] * (norm_w + radius_w)[:, None] + norm_ratio[None, :] * radius_w[:, None]
    # (d + B) / s, [BLOCK_V, GROUPS, GROUP_ROWS]
    product = tl.reshape(product, (BLOCK_V, GROUPS, GROUP_ROWS)).to(tl.float32)
    largest = scale_w[:, None, None] * product + bound[:, :, None]
    logit = tl.reshape(scale_h, (GROUPS, GROUP_ROWS))[None, :, :] * largest
    # A bit for every token whose logit may be positive.
    bit = 1 << tl.arange(0, GROUP_ROWS)
    bits = tl.where(not_at_most(logit, threshold[:, None, None]), bit[None, None, :], 0)

    # Padding repeats the first token of the sequence, whose position is not above that of the group's first row: such a
    # row gets no bit, since the token has one already.
    position = tl.load(position_ptr + o_t, mask=m_t, other=0)
    start = tl.load(position_ptr + o_g * GROUP_ROWS, mask=m_g, other=0)
    later = tl.reshape(position, (GROUPS, GROUP_ROWS)) > start[:, None]
    sequence = tl.load(group_sequence_ptr + o_g, mask=m_g, other=-1)
    real = 1 + tl.sum(tl.where(later, bit[None, :], 0), axis=1)
    real = tl.where(sequence >= 0, real, 0)
    # [BLOCK_V, GROUPS]
    tokens = tl.where(m_v[:, None], tl.sum(bits, axis=2) & real[None, :], 0)

    survives = tokens != 0
    pairs = tl.sum(survives.to(tl.int32), axis=0).to(tl.int64)
    before = tl.atomic_add(budget_ptr + sequence, -pairs, mask=pairs > 0, sem="relaxed")
    kept = survives & (before >= pairs)[None, :]
    places = tl.reshape(kept.to(tl.int32), (BLOCK_V * GROUPS,))
    total = tl.sum(places, axis=0)
    if total > 0:
        first = tl.atomic_add(entry_count_ptr, total.to(tl.int64), sem="relaxed")
        entry = (o_v.to(tl.int64) << WORD_SHIFT)[:, None] | (o_g.to(tl.int64) << GROUP_SHIFT)[None, :] | tokens
        p_entry = queue_ptr + first + tl.cumsum(places, axis=0) - places
        tl.store(p_entry, tl.reshape(entry, (BLOCK_V * GROUPS,)), mask=places > 0)


@triton.jit(do_not_specialize=["groups", "tail"], do_not_specialize_on_alignment=["group_count_ptr"])
def _divide_kernel(
    group_sequence_ptr,
    group_count_ptr,
    budget_ptr,
    dense_sequence_ptr,
    outcome_ptr,
    groups,
    tail,
    BLOCK_G: tl.constexpr,
):
    """``dense[g] = sequence of group g`` if it found more pairs than it may keep, else -1. One program."""
    end = tl.zeros((BLOCK_G,), dtype=tl.int32)
    screened = tl.zeros((BLOCK_G,), dtype=tl.int32)
    count = tl.minimum(tl.load(group_count_ptr) + tail, groups)
    for first in range(0, count, BLOCK_G):
        o_g = first + tl.arange(0, BLOCK_G)
        m_g = o_g < count
        sequence = tl.load(group_sequence_ptr + o_g, mask=m_g, other=-1)
        real = sequence >= 0
        dense = tl.load(budget_ptr + sequence, mask=real, other=0) < 0
        tl.store(dense_sequence_ptr + o_g, tl.where(dense, sequence, -1), mask=m_g)
        end = tl.maximum(end, tl.where(dense, o_g + 1, 0))
        screened |= (real & ~dense).to(tl.int32)
    tl.store(outcome_ptr, tl.max(end, axis=0))
    tl.store(outcome_ptr + 1, tl.max(screened, axis=0))
