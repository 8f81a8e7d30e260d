"""Maximum pooling forward: grouped-maximum matmul on packed tokens, then finalise.

Tiles are ``acc[BLOCK_V, BLOCK_T] = W_tile @ H_tile^T``, vocabulary on rows and tokens on columns, so that few lanes
hold and reduce a group of 16 tokens. The groups of a sequence are combined by an integer atomic maximum, whose result
does not depend on the order of arrival. Keys hold raw dots: int64 with the packed row in training
(:func:`.common.training_key`), int32 ``ordered(dot)`` in inference. The bias only decides whether a key is written
(``dot + c > 0`` or NaN); finalise adds it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pooling import PoolingCall
from . import launch
from .common import (
    GROUP_ROWS,
    activate,
    canonical,
    dots,
    is_active,
    key_dot,
    key_row,
    maximum,
    multiply,
    narrow,
    ordered,
    tile_of,
    tiles_of_program,
    training_key,
    unordered,
    widen,
)
from .pack import find_tokens, pack_sequences, slices
from .screening.screen import SHARE, quantised, queue_bytes, screen
from .tuning import MatmulConfig, matmul_config

_NOTHING = tl.constexpr(-0x80000000)
FINALISE_BLOCK = 1024
# With partial maxima, a block of 1024 spills on sm_80 to sm_89.
PARTIAL_FINALISE_BLOCK = 512


def max_pool_forward(
    call: PoolingCall,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: MatmulConfig | None = None,
    int8_config: MatmulConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y [B, V], argmax [B, V])`` of ``pooling_strategy="max"``; see :class:`.Pooling`.

    Args:
        config: of the grouped-maximum kernel, by default what :mod:`.tuning` chooses.
        int8_config: of the screening kernel, likewise.
    """
    vocab_size = weight.shape[0]
    output = hidden.new_empty(call.batch_size, vocab_size, dtype=call.out_dtype)
    argmax = call.new_argmax(hidden, vocab_size)
    if hidden.shape[0] == 0 or vocab_size == 0:
        return output.zero_(), argmax.zero_()
    problem = launch.problem(call, weight)
    arch, *_, precision = problem
    config = config or matmul_config(*problem)
    original, weight = weight, weight.to(call.compute_dtype)
    quantised_weight = quantised(call, original, weight, arch)
    bias = None if bias is None else bias.contiguous()
    tokens = find_tokens(call, hidden)
    key_dtype = torch.int64 if call.need_argmax else torch.int32
    nothing = 0 if call.need_argmax else torch.iinfo(torch.int32).min
    group_bytes = 0
    if quantised_weight is not None:
        group_bytes = queue_bytes(call, vocab_size)
        config = replace(config, partials=False)  # exact dots and these maxima are combined in the keys
    partial_rows = config.block_t // config.epilogue_slices if config.partials else 0
    finalise_block = PARTIAL_FINALISE_BLOCK if config.partials else FINALISE_BLOCK
    for part in slices(call, vocab_size, hidden, key_dtype.itemsize, group_bytes, partial_rows):
        packed = pack_sequences(call, tokens, hidden, part)
        sequences = part.stop - part.start
        if config.partials:
            slots = sequences + triton.cdiv(len(packed.rows), partial_rows) - 1
            keys = torch.empty((slots, vocab_size), device=hidden.device, dtype=key_dtype)
        else:
            keys = torch.full((sequences, vocab_size), nothing, device=hidden.device, dtype=key_dtype)
        group_sequence, group_count = packed.group_sequence, packed.group_offsets[-1:]
        if quantised_weight is not None:
            tiles = int8_config or matmul_config(*problem, kind="int8")
            share = SHARE[call.screening]
            group_sequence, group_count = screen(tiles, share, packed, weight, quantised_weight, bias, keys)
        programs, matrices, options = launch.tiled_launch(config, weight, packed.rows)
        options["ORDER"] = config.order if options["DESCRIPTORS"] else "strips"
        options |= {"PRECISION": precision, "SLICES": config.epilogue_slices, "PARTIALS": config.partials}
        sizes = (*weight.shape, len(packed.rows), *weight.stride())
        _maximum_kernel[(programs,)](*matrices, bias, group_sequence, group_count, keys, *sizes, **options)
        offsets = packed.group_offsets if config.partials else None
        targets = output[part], argmax[part] if call.need_argmax else None
        options = launch.activation_options(call)
        options |= {"PARTIAL_ROWS": partial_rows, "BLOCK_V": finalise_block, "num_warps": 4}
        _finalise_kernel[(sequences, triton.cdiv(vocab_size, finalise_block))](
            keys, bias, packed.positions, offsets, *targets, vocab_size, **options
        )
        del packed, matrices, keys, group_sequence, group_count  # before the next slice allocates its own
    return output, argmax


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["group_count_ptr"])
def _maximum_kernel(
    weight,
    row,
    bias_ptr,
    group_sequence_ptr,
    group_count_ptr,
    key_ptr,
    vocab_size,
    hidden_size,
    rows,
    stride_wv,
    stride_wd,
    DESCRIPTORS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    PRECISION: tl.constexpr,
    ORDER: tl.constexpr,
    SLICES: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """``key[b, v] = max(key[b, v], key(max over a group of W[v] · h[t]))`` for every group of 16 tokens of a sequence.

    PARTIALS: ``key[i + b, v] = key(max of W[v] · h[t])`` over the tokens of sequence b in the i-th part of
    ``BLOCK_T / SLICES`` packed rows, stored without atomics. Along the rows i and b never decrease, and one of them
    grows from one pair (i, b) to the next, so each pair has a slot of its own. QuACK likewise stores one partial column
    sum for each tile, and Liger Kernel one partial weight gradient for each program.

    ``weight`` and ``row`` are pointers, with one program for each tile, or TMA descriptors with a persistent grid. Only
    tiles that hold tokens are computed, and only the device knows their number.
    """
    tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    tiles_t = tl.cdiv(tl.load(group_count_ptr) * GROUP_ROWS, BLOCK_T)
    target = bias_ptr, group_sequence_ptr, key_ptr, vocab_size, rows
    tile = tl.program_id(0)
    if DESCRIPTORS:
        first_tile, last_tile, step = tiles_of_program(tiles_v * tiles_t, ORDER)
        for tile in tl.range(first_tile, last_tile, step):
            tile_v, tile_t = tile_of(tile, tiles_v, tiles_t, GROUP_V, ORDER)
            if _is_wanted(group_sequence_ptr, tile_t, rows, BLOCK_T):
                # [BLOCK_V, BLOCK_T]
                acc = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.float32)
                for first in range(0, hidden_size, BLOCK_K):
                    b_w = weight.load([tile_v * BLOCK_V, first])
                    b_h = row.load([tile_t * BLOCK_T, first])
                    acc = multiply(b_w, b_h.T, acc, PRECISION)
                _combine(acc, target, tile_v, tile_t, SLICES, PARTIALS)
    elif tile < tiles_v * tiles_t:
        # No loop here: on sm_86 it takes a third more registers.
        tile_v, tile_t = tile_of(tile, tiles_v, tiles_t, GROUP_V)
        if _is_wanted(group_sequence_ptr, tile_t, rows, BLOCK_T):
            o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
            o_t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
            w = weight, stride_wv, stride_wd
            m_v, m_t = o_v < vocab_size, o_t < rows
            acc = dots(w, row, o_v, o_t, m_v, m_t, hidden_size, hidden_size, BLOCK_K, PRECISION)
            _combine(acc, target, tile_v, tile_t, SLICES, PARTIALS)


@triton.jit
def _is_wanted(group_sequence_ptr, tile_t, rows, BLOCK_T: tl.constexpr):
    """Whether any group of the tile is left to this kernel.

    Read as scalars, so that the compiler sees a uniform branch: behind a divergent one it emits every shuffle twice.
    """
    GROUPS: tl.constexpr = BLOCK_T // GROUP_ROWS
    largest = -1
    for i in tl.static_range(GROUPS):
        g = tile_t * GROUPS + i
        largest = tl.maximum(largest, tl.load(group_sequence_ptr + g, mask=g < rows // GROUP_ROWS, other=-1))
    return largest >= 0


@triton.jit
def _combine(acc, target, tile_v, tile_t, SLICES: tl.constexpr, PARTIALS: tl.constexpr):
    """Maxima of a finished tile, in SLICES of its tokens one after another, into the keys of their sequences.

    ``target``: what every step of this takes, from bias to the number of packed rows.
    """
    if SLICES == 1:
        _combine_tile(acc, target, tile_v, tile_t, PARTIALS)
    else:
        HALF: tl.constexpr = acc.shape[1] // 2
        # [BLOCK_V, HALF, 2]
        halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1))
        left, right = tl.split(halves)
        first = 2 * tile_t
        _combine(left, target, tile_v, first, SLICES // 2, PARTIALS)
        # A half that begins past the last row belongs to no sequence, and has no group_sequence to be read.
        if (first + 1) * HALF < target[4]:
            _combine(right, target, tile_v, first + 1, SLICES // 2, PARTIALS)


@triton.jit
def _combine_tile(acc, target, tile_v, tile_t, PARTIALS: tl.constexpr):
    """Maxima of a finished tile, or of one slice of it, into the keys of their sequences.

    A tile of one sequence is reduced as one run of tokens, in a third of the instructions that its groups would take.
    """
    _, group_sequence_ptr, _, _, rows = target
    BLOCK_V: tl.constexpr = acc.shape[0]
    BLOCK_T: tl.constexpr = acc.shape[1]
    GROUPS: tl.constexpr = BLOCK_T // GROUP_ROWS
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    dot = canonical(acc)
    first_g = tile_t * GROUPS
    last_g = first_g + GROUPS - 1
    first_sequence = tl.load(group_sequence_ptr + first_g)
    last_sequence = tl.load(group_sequence_ptr + last_g, mask=last_g < rows // GROUP_ROWS, other=-1)
    # Groups between two of one sequence belong to it; between two screened ones (-1) there may be others.
    if (first_sequence == last_sequence) & (first_sequence >= 0):
        _combine_runs(dot, target, tile_t, o_v, BLOCK_T, PARTIALS)
    else:
        _combine_runs(dot, target, tile_t, o_v, GROUP_ROWS, PARTIALS)


@triton.jit
def _combine_runs(dot, target, tile_t, o_v, WIDTH: tl.constexpr, PARTIALS: tl.constexpr):
    """Maxima over runs of WIDTH tokens into the keys of their sequences."""
    bias_ptr, group_sequence_ptr, key_ptr, vocab_size, rows = target
    BLOCK_V: tl.constexpr = dot.shape[0]
    RUNS: tl.constexpr = dot.shape[1] // WIDTH
    first_g = tile_t * (dot.shape[1] // GROUP_ROWS)
    m_v = o_v < vocab_size
    # [BLOCK_V, RUNS, WIDTH]
    dot = tl.reshape(dot, (BLOCK_V, RUNS, WIDTH))
    # [BLOCK_V, RUNS]
    largest = maximum(dot, 2)
    o_g = first_g + tl.arange(0, RUNS) * (WIDTH // GROUP_ROWS)
    sequence = tl.load(group_sequence_ptr + o_g, mask=o_g < rows // GROUP_ROWS, other=-1)
    if not PARTIALS:
        # Computed before the keys: in the other order most training kernels for sm_90 take more registers.
        logit = largest
        if bias_ptr is not None:
            logit += widen(tl.load(bias_ptr + o_v, mask=m_v, other=0.0))[:, None]
        matters = m_v[:, None] & (sequence >= 0)[None, :] & is_active(logit)
        p_key = key_ptr + sequence.to(tl.int64)[None, :] * vocab_size + o_v[:, None]
    key = ordered(largest)
    if key_ptr.dtype.element_ty == tl.int64:
        attains = dot.to(tl.int32, bitcast=True) == largest.to(tl.int32, bitcast=True)[:, :, None]
        index = tl.min(tl.where(attains, tl.arange(0, WIDTH)[None, None, :], WIDTH), axis=2)
        packed_row = (o_g * GROUP_ROWS)[None, :] + index
        key = training_key(largest, packed_row)
    if PARTIALS:
        _store_partials(key, sequence, group_sequence_ptr, key_ptr, tile_t, first_g, o_v, vocab_size, rows)
    else:
        tl.atomic_max(p_key, key, mask=matters, sem="relaxed")


@triton.jit
def _store_partials(key, sequence, group_sequence_ptr, key_ptr, tile_t, first_g, o_v, vocab_size, rows):
    """The largest key ``[BLOCK_V, RUNS]`` of each sequence of a tile into the slot of this tile and sequence.

    The bias is not needed: it does not change which dot is the largest, and finalise zeroes what is inactive.
    """
    RUNS: tl.constexpr = key.shape[1]
    m_v = o_v < vocab_size
    if RUNS == 1:
        p_key = key_ptr + (tile_t + sequence).to(tl.int64)[None, :] * vocab_size + o_v[:, None]
        tl.store(p_key, key, mask=m_v[:, None] & (sequence >= 0)[None, :])
    else:
        previous = -1
        for i in range(RUNS):
            b = tl.load(group_sequence_ptr + first_g + i, mask=first_g + i < rows // GROUP_ROWS, other=-1)
            if (b != previous) & (b >= 0):
                NOTHING: tl.constexpr = 0 if key.dtype == tl.int64 else _NOTHING
                # [BLOCK_V]
                largest = tl.max(tl.where((sequence == b)[None, :], key, NOTHING), axis=1)
                tl.store(key_ptr + (tile_t + b).to(tl.int64) * vocab_size + o_v, largest, mask=m_v)
            previous = b


@triton.jit
def _largest_partial(key_ptr, offset_ptr, b, o_v, vocab_size, PARTIAL_ROWS: tl.constexpr):
    """Maximum over the slots of sequence b, one for each part of PARTIAL_ROWS packed rows that holds a token of it."""
    first_g = tl.load(offset_ptr + b)
    last_g = tl.load(offset_ptr + b + 1)
    NOTHING: tl.constexpr = 0 if key_ptr.dtype.element_ty == tl.int64 else _NOTHING
    key = tl.full((o_v.shape[0],), NOTHING, key_ptr.dtype.element_ty)
    if first_g < last_g:
        for i in range(first_g * GROUP_ROWS // PARTIAL_ROWS, tl.cdiv(last_g * GROUP_ROWS, PARTIAL_ROWS)):
            p_key = key_ptr + (i + b) * vocab_size + o_v
            key = tl.maximum(key, tl.load(p_key, mask=o_v < vocab_size, other=NOTHING))
    return key


@triton.jit(do_not_specialize_on_alignment=["offset_ptr", "output_ptr", "argmax_ptr"])
def _finalise_kernel(
    key_ptr,
    bias_ptr,
    position_ptr,
    offset_ptr,
    output_ptr,
    argmax_ptr,
    vocab_size,
    logit_scale,
    logit_softcap,
    LOGS: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``y = act(dot + c)`` and the position that attained it, from the keys; a key that nobody wrote is inactive.

    With ``offset``, the first group of each sequence, the key is the maximum over the partial keys of its sequence.
    """
    b = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < vocab_size
    if offset_ptr is not None:
        key = _largest_partial(key_ptr, offset_ptr, b, o_v, vocab_size, PARTIAL_ROWS)
    else:
        key = tl.load(key_ptr + b * vocab_size + o_v, mask=m_v, other=0)
    if argmax_ptr is not None:
        written = key != 0
        logit = key_dot(key)
    else:
        written = key != _NOTHING
        logit = unordered(key)
    if bias_ptr is not None:
        logit += widen(tl.load(bias_ptr + o_v, mask=m_v, other=0.0))
    y = activate(logit, logit_scale, logit_softcap, LOGS)
    y = narrow(tl.where(written, y, 0.0), output_ptr.dtype.element_ty)
    tl.store(output_ptr + b * vocab_size + o_v, y, mask=m_v)
    if argmax_ptr is not None:
        packed_row = key_row(key)
        active = m_v & written & is_active(widen(y))
        position = tl.load(position_ptr + packed_row, mask=active, other=0)
        tl.store(argmax_ptr + b * vocab_size + o_v, position.to(argmax_ptr.dtype.element_ty), mask=m_v)
