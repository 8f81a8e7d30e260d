"""The rival of the packed maximum kernel: one program owns a sequence and a vocabulary tile, and stores y and a itself.

It needs no keys, no atomics and no second kernel, but the last block of tokens of a sequence holds no other sequence,
so that short ones waste most of it. The benchmarks measure it beside the kernel of the package, on the same packed
rows; it returns the same bits (``tests/triton/test_rival.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from splade_kernels.backends.pooling import PoolingCall
from splade_kernels.backends.triton.common import (
    GROUP_ROWS,
    activate,
    canonical,
    dot_precision,
    dots,
    is_active,
    maximum,
    narrow,
    ordered,
    tile_of,
    widen,
)
from splade_kernels.backends.triton.launch import tile_options
from splade_kernels.backends.triton.pack import find_tokens, pack_sequences, slices
from splade_kernels.backends.triton.tuning import MatmulConfig


def max_pool_forward(
    call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None, config: MatmulConfig
) -> tuple[Tensor, Tensor]:
    """As the package's kernel, with the tile ``[config.block_v, config.block_t]``."""
    vocab_size = weight.shape[0]
    output = hidden.new_empty(call.batch_size, vocab_size, dtype=call.out_dtype)
    argmax = call.new_argmax(hidden, vocab_size)
    weight = weight.to(call.compute_dtype)
    tokens = find_tokens(call, hidden)
    for part in slices(call, vocab_size, hidden, 0):
        packed = pack_sequences(call, tokens, hidden, part)
        sequences = part.stop - part.start
        owners = packed.group_offsets, packed.lengths, packed.positions
        targets = output[part], argmax[part] if call.need_argmax else None
        options = {"LOGS": call.logs, "PRECISION": dot_precision(call.compute_dtype), **tile_options(config)}
        _sequence_kernel[(sequences * triton.cdiv(vocab_size, config.block_v),)](
            weight, packed.rows, bias, *owners, *targets, sequences, *weight.shape, *weight.stride(), **options
        )
    return output, argmax


@triton.jit(do_not_specialize=["sequences"], do_not_specialize_on_alignment=["length_ptr", "output_ptr", "argmax_ptr"])
def _sequence_kernel(
    weight_ptr,
    row_ptr,
    bias_ptr,
    offset_ptr,
    length_ptr,
    position_ptr,
    output_ptr,
    argmax_ptr,
    sequences,
    vocab_size,
    hidden_size,
    stride_wv,
    stride_wd,
    LOGS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y[b, v] = act(max_t W[v] · h[t] + c[v])`` over the tokens of one sequence, and the first t that attains it."""
    tile_v, b = tile_of(tl.program_id(0), tl.cdiv(vocab_size, BLOCK_V), sequences, GROUP_V)
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < vocab_size
    first_row = tl.load(offset_ptr + b) * GROUP_ROWS
    length = tl.load(length_ptr + b)
    weight = weight_ptr, stride_wv, stride_wd
    best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    best_rank = tl.zeros((BLOCK_V,), tl.int32)
    for first in range(0, length, BLOCK_T):
        rank = first + tl.arange(0, BLOCK_T)
        m_t = rank < length
        # [BLOCK_V, BLOCK_T]
        dot = dots(weight, row_ptr, o_v, first_row + rank, m_v, m_t, hidden_size, hidden_size, BLOCK_K, PRECISION)
        dot = tl.where(m_t[None, :], canonical(dot), float("-inf"))
        largest = maximum(dot, 1)
        better = ordered(largest) > ordered(best)
        if argmax_ptr is not None:
            attains = dot.to(tl.int32, bitcast=True) == largest.to(tl.int32, bitcast=True)[:, None]
            index = tl.min(tl.where(attains, tl.arange(0, BLOCK_T)[None, :], BLOCK_T), axis=1)
            best_rank = tl.where(better, first + index, best_rank)
        best = tl.where(better, largest, best)
    if bias_ptr is not None:
        best += widen(tl.load(bias_ptr + o_v, mask=m_v, other=0.0))
    y = narrow(activate(best, None, None, LOGS), output_ptr.dtype.element_ty)
    o_y = b.to(tl.int64) * vocab_size + o_v
    tl.store(output_ptr + o_y, y, mask=m_v)
    if argmax_ptr is not None:
        active = m_v & is_active(widen(y))
        position = tl.load(position_ptr + first_row + best_rank, mask=active, other=0)
        tl.store(argmax_ptr + o_y, position.to(argmax_ptr.dtype.element_ty), mask=m_v)
