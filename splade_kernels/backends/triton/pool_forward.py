"""Maximum pooling forward: grouped-maximum matmul on packed tokens, then finalise.

Tiles are ``acc[BLOCK_V, BLOCK_T] = W_tile @ H_tile^T``, vocabulary on rows and tokens on columns, so that the maximum
over a group of 16 tokens stays inside a few lanes. Groups of one sequence meet in an atomic maximum over integers,
which is free of order and so deterministic.

training: int64 keys ``(ordered(dot) + 2^31) << 31 | (2^31 - 1 - packed row)``: always positive, NaN largest, lowest row
on ties. inference: int32 ``ordered(dot)``. Both hold raw dots. The bias gates the write (only dots with
``dot + c > 0``, or NaN, can matter) and is added by finalise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..pooling import PoolingCall
from .common import GROUP, activate, activation_is_double_log, dot_precision, interpreted, ordered, unordered
from .pack import Packed, find_tokens, pack, slices
from .tuning import MatmulConfig, architecture, fits_descriptor, matmul_config, multiprocessors

_NOTHING = tl.constexpr(-0x80000000)


def max_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`splade_kernels.backends.torch.pool_forward`, for ``pooling_strategy="max"``."""
    vocab_size, hidden_size = weight.shape
    output = hidden.new_empty(call.batch_size, vocab_size, dtype=call.out_dtype)
    argmax = call.new_argmax(hidden, vocab_size)
    if hidden.shape[0] == 0 or vocab_size == 0:
        return output.zero_(), argmax
    precision = dot_precision(call.compute_dtype)
    config = matmul_config(architecture(hidden.device), hidden_size, vocab_size, call.compute_dtype, precision)
    weight = weight.to(call.compute_dtype)
    bias = None if bias is None else bias.contiguous()
    tokens = find_tokens(call, hidden)
    key_dtype = torch.int64 if call.need_argmax else torch.int32
    nothing = 0 if call.need_argmax else torch.iinfo(torch.int32).min
    for part in slices(call, vocab_size, hidden_size, key_dtype.itemsize, hidden.shape[0]):
        packed = pack(call, tokens, hidden, part)
        shape = (part.stop - part.start, vocab_size)
        keys = torch.full(shape, nothing, device=hidden.device, dtype=key_dtype)
        _launch_maximum(config, precision, packed, weight, bias, keys)
        _finalise_kernel[(shape[0], triton.cdiv(vocab_size, 1024))](
            keys,
            bias,
            packed.positions,
            output[part],
            argmax[part],
            vocab_size,
            HAS_BIAS=bias is not None,
            NEED_ARGMAX=call.need_argmax,
            DOUBLE_LOG=activation_is_double_log(call),
            BLOCK_V=1024,
            num_warps=4,
        )
    return output, argmax


def _launch_maximum(
    config: MatmulConfig, precision: str, packed: Packed, weight: Tensor, bias: Tensor | None, keys: Tensor
) -> None:
    vocab_size, hidden_size = weight.shape
    capacity = packed.rows.shape[0]
    shared = {
        "HAS_BIAS": bias is not None,
        "NEED_ARGMAX": keys.dtype == torch.int64,
        "GROUP": GROUP,
        "BLOCK_V": config.block_v,
        "BLOCK_T": config.block_t,
        "BLOCK_K": config.block_k,
        "GROUP_V": config.group_v,
        "PRECISION": precision,
        "UPCAST": interpreted() and packed.rows.dtype == torch.bfloat16,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    arguments = (bias, packed.group_sequence, packed.group_offsets[-1:], keys, vocab_size, hidden_size, capacity)
    tiles = triton.cdiv(vocab_size, config.block_v) * triton.cdiv(capacity, config.block_t)
    if config.tma and fits_descriptor(weight) and fits_descriptor(packed.rows):
        weight_tiles = TensorDescriptor.from_tensor(weight, [config.block_v, config.block_k])
        row_tiles = TensorDescriptor.from_tensor(packed.rows, [config.block_t, config.block_k])
        programs = min(tiles, multiprocessors(weight.device))
        _maximum_descriptor_kernel[(programs,)](weight_tiles, row_tiles, *arguments, **shared)
    else:
        strides = (weight.stride(0), weight.stride(1))
        _maximum_kernel[(tiles,)](weight, packed.rows, *arguments, *strides, **shared)


@triton.jit
def _tile(pid, tiles_v, tiles_t, GROUP_V: tl.constexpr):
    """Tile of a program: strips of GROUP_V vocabulary tiles, tokens inside, so that a strip's rows of W stay in L2."""
    strip = pid // (GROUP_V * tiles_t)
    first = strip * GROUP_V
    height = tl.minimum(tiles_v - first, GROUP_V)
    within = pid - strip * (GROUP_V * tiles_t)
    return first + within % height, within // height


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["group_count_ptr"])
def _maximum_kernel(
    weight_ptr,
    row_ptr,
    bias_ptr,
    group_sequence_ptr,
    group_count_ptr,
    key_ptr,
    vocab_size,
    hidden_size,
    rows,
    stride_wv,
    stride_wd,
    HAS_BIAS: tl.constexpr,
    NEED_ARGMAX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``key[b, v] = max(key[b, v], key(max over a group of W[v] · h[t]))`` for every group of the tile."""
    tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    tiles_t = tl.cdiv(rows, BLOCK_T)
    tile_v, tile_t = _tile(tl.program_id(0), tiles_v, tiles_t, GROUP_V)
    if tile_t * (BLOCK_T // GROUP) >= tl.load(group_count_ptr):
        return
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_v = o_v < vocab_size
    m_t = o_t < rows
    p_w = weight_ptr + o_v.to(tl.int64)[:, None] * stride_wv
    p_h = row_ptr + o_t.to(tl.int64)[None, :] * hidden_size
    # [BLOCK_V, BLOCK_T]
    acc = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.float32)
    for first in range(0, hidden_size, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        m_k = o_k < hidden_size
        b_w = tl.load(p_w + o_k[None, :] * stride_wd, mask=m_v[:, None] & m_k[None, :], other=0.0)
        b_h = tl.load(p_h + o_k[:, None], mask=m_t[None, :] & m_k[:, None], other=0.0)
        if UPCAST:
            b_w = b_w.to(tl.float32)
            b_h = b_h.to(tl.float32)
        acc = tl.dot(b_w, b_h, acc, input_precision=PRECISION)
    _combine(
        acc, bias_ptr, group_sequence_ptr, key_ptr, tile_t, o_v, m_v, vocab_size, rows, HAS_BIAS, NEED_ARGMAX, GROUP,
        BLOCK_V, BLOCK_T,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["group_count_ptr"])
def _maximum_descriptor_kernel(
    weight_tiles,
    row_tiles,
    bias_ptr,
    group_sequence_ptr,
    group_count_ptr,
    key_ptr,
    vocab_size,
    hidden_size,
    rows,
    HAS_BIAS: tl.constexpr,
    NEED_ARGMAX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """:func:`_maximum_kernel` on TMA descriptors, by a persistent grid over the tiles that hold tokens."""
    tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    tiles_t = tl.cdiv(tl.load(group_count_ptr) * GROUP, BLOCK_T)
    for tile in tl.range(tl.program_id(0), tiles_v * tiles_t, tl.num_programs(0)):
        tile_v, tile_t = _tile(tile, tiles_v, tiles_t, GROUP_V)
        # [BLOCK_V, BLOCK_T]
        acc = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.float32)
        for first in range(0, hidden_size, BLOCK_K):
            b_w = weight_tiles.load([tile_v * BLOCK_V, first])
            b_h = row_tiles.load([tile_t * BLOCK_T, first])
            if UPCAST:
                b_w = b_w.to(tl.float32)
                b_h = b_h.to(tl.float32)
            acc = tl.dot(b_w, b_h.T, acc, input_precision=PRECISION)
        o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        _combine(
            acc, bias_ptr, group_sequence_ptr, key_ptr, tile_t, o_v, o_v < vocab_size, vocab_size, rows, HAS_BIAS,
            NEED_ARGMAX, GROUP, BLOCK_V, BLOCK_T,
        )  # fmt: skip


@triton.jit
def _combine(
    acc,
    bias_ptr,
    group_sequence_ptr,
    key_ptr,
    tile_t,
    o_v,
    m_v,
    vocab_size,
    rows,
    HAS_BIAS: tl.constexpr,
    NEED_ARGMAX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Group maxima of a finished tile into the keys of their sequences."""
    GROUPS: tl.constexpr = BLOCK_T // GROUP
    # [BLOCK_V, GROUPS, GROUP]
    o = tl.reshape(ordered(acc), (BLOCK_V, GROUPS, GROUP))
    # [BLOCK_V, GROUPS]
    largest = tl.max(o, axis=2)
    o_g = tile_t * GROUPS + tl.arange(0, GROUPS)
    sequence = tl.load(group_sequence_ptr + o_g, mask=o_g < rows // GROUP, other=-1)
    dot = unordered(largest)
    logit = dot
    if HAS_BIAS:
        logit += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)[:, None]
    # Written so that NaN passes.
    matters = m_v[:, None] & (sequence >= 0)[None, :] & ((logit > 0) | (logit != logit))
    p_key = key_ptr + sequence.to(tl.int64)[None, :] * vocab_size + o_v[:, None]
    if NEED_ARGMAX:
        o_i = tl.arange(0, GROUP)[None, None, :]
        index = tl.min(tl.where(o == largest[:, :, None], o_i, GROUP), axis=2)
        row = (o_g * GROUP)[None, :] + index
        key = ((largest.to(tl.int64) + 0x80000000) << 31) | (0x7FFFFFFF - row).to(tl.int64)
        tl.atomic_max(p_key, key, mask=matters, sem="relaxed")
    else:
        tl.atomic_max(p_key, largest, mask=matters, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["output_ptr", "argmax_ptr"])
def _finalise_kernel(
    key_ptr,
    bias_ptr,
    position_ptr,
    output_ptr,
    argmax_ptr,
    vocab_size,
    HAS_BIAS: tl.constexpr,
    NEED_ARGMAX: tl.constexpr,
    DOUBLE_LOG: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``y = act(dot + c)`` and the position that attained it, from the keys; nothing written means inactive."""
    b = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < vocab_size
    key = tl.load(key_ptr + b * vocab_size + o_v, mask=m_v, other=0)
    if NEED_ARGMAX:
        written = key != 0
        largest = ((key >> 31) - 0x80000000).to(tl.int32)
    else:
        written = key != _NOTHING
        largest = key
    logit = unordered(largest)
    if HAS_BIAS:
        logit += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)
    y = tl.where(written, activate(logit, DOUBLE_LOG), 0.0)
    tl.store(output_ptr + b * vocab_size + o_v, y.to(output_ptr.dtype.element_ty), mask=m_v)
    if NEED_ARGMAX:
        row = (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)
        rounded = y.to(output_ptr.dtype.element_ty)
        active = m_v & written & ((rounded > 0) | (rounded != rounded))
        position = tl.load(position_ptr + row, mask=active, other=0)
        tl.store(argmax_ptr + b * vocab_size + o_v, position.to(argmax_ptr.dtype.element_ty), mask=m_v)
