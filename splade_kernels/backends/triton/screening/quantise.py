"""Rows in int8 with what is known about them: what screening multiplies, and how far off it can be.

``docs/screening.md`` derives the bound. A row x is kept as ``q = round(x / s)`` with its own scale s, ``max|x| / 127``,
an upper bound N on its norm, and a radius R that bounds ``‖x - s q‖`` together with the rounding of every product that
the row may take part in.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import int8_bound
from ..common import GROUP, GROUP_ROWS, INT8_WIDTH, widen
from ..pack import TAIL_GROUPS, Packed

BLOCK_D = INT8_WIDTH
LEVELS = tl.constexpr(float(int8_bound.LEVELS))
UNIT = tl.constexpr(int8_bound.UNIT)
NORM_SLACK = tl.constexpr(float(int8_bound.NORM_SLACK))
DOT_SLACK = tl.constexpr(float(int8_bound.DOT_SLACK))
# The range of the largest magnitude of a row that is quantised, as the bits of float32.
_LEAST_BITS, _MOST_BITS = map(tl.constexpr, struct.unpack("2i", struct.pack("2f", int8_bound.TINY, int8_bound.HUGE)))


@dataclass(frozen=True)
class Quantised:
    rows: Tensor  # [n, D filled up] int8
    # float32. Of a weight: [n] scales, [n] radii, [n] norms. Of packed rows: [n] scales, and of every group of 16 the
    # largest ratios [n / 16] of radius and [n / 16] of norm to scale.
    statistics: Tensor


def quantise_weight(weight: Tensor) -> Quantised:
    """All rows of ``[V, D]``, with any strides."""
    quantised = _empty(weight, 3 * len(weight))
    _launch(weight, quantised)
    return quantised


def requantise_weight(weight: Tensor, quantised: Quantised, wanted: Tensor) -> None:
    """Once more, in place, if the device finds ``wanted`` (0-dimensional bool) true."""
    _launch(weight, quantised, wanted=wanted)


def quantise_packed(packed: Packed) -> Quantised:
    """The rows of all groups and of the zeros that follow them; what is behind these is left as it is."""
    groups = len(packed.group_sequence)
    quantised = _empty(packed.rows, groups * (GROUP + 2))
    _launch(packed.rows, quantised, group_count=packed.group_offsets[-1:])
    return quantised


def _empty(source: Tensor, statistics: int) -> Quantised:
    count, hidden_size = source.shape
    width = triton.cdiv(hidden_size, INT8_WIDTH) * INT8_WIDTH
    return Quantised(
        torch.empty(count, width, device=source.device, dtype=torch.int8),
        torch.empty(statistics, device=source.device, dtype=torch.float32),
    )


def _launch(
    source: Tensor, quantised: Quantised, *, group_count: Tensor | None = None, wanted: Tensor | None = None
) -> None:
    count, hidden_size = source.shape
    _quantise_kernel[(triton.cdiv(count, GROUP),)](
        source,
        group_count,
        wanted,
        quantised.rows,
        quantised.statistics,
        count,
        hidden_size,
        quantised.rows.shape[1],
        TAIL_GROUPS,
        *source.stride(),
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows", "tail"], do_not_specialize_on_alignment=["group_count_ptr", "wanted_ptr"])
def _quantise_kernel(
    source_ptr,
    group_count_ptr,
    wanted_ptr,
    quantised_ptr,
    statistics_ptr,
    rows,
    hidden_size,
    width,
    tail,
    stride_n,
    stride_d,
    BLOCK_D: tl.constexpr,
):
    """16 rows: ``m = max|x|``, ``s = m / 127``, ``q = round(x / s)``, ``R >= ‖x - s q‖ + A N`` and ``N >= ‖x‖``.

    A and delta are multiples of float32's unit in the last place: A covers the rounding of dots of such rows in any
    order of summation, of the residual and of the bound that is computed from it, delta that of the two sums here. Rows
    with NaN, infinities or a largest magnitude outside of 2^-40 to 2^40 are not quantised: s = NaN, of which no bound
    comes out, so that every pair with one of them is computed exactly.
    """
    g = tl.program_id(0)
    if group_count_ptr is not None:
        if g >= tl.load(group_count_ptr) + tail:
            return
    if wanted_ptr is not None:
        if tl.load(wanted_ptr) == 0:
            return
    o_n = g * GROUP_ROWS + tl.arange(0, GROUP_ROWS)
    m_n = o_n < rows
    p_n = source_ptr + o_n.to(tl.int64)[:, None] * stride_n

    # Magnitudes are compared as bits, where NaN is larger than infinity.
    largest = tl.zeros((GROUP_ROWS,), dtype=tl.int32)
    for first in range(0, hidden_size, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_d = m_n[:, None] & (o_d < hidden_size)[None, :]
        x = widen(tl.load(p_n + o_d.to(tl.int64)[None, :] * stride_d, mask=m_d, other=0.0))
        largest = tl.maximum(largest, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    plain = (largest == 0) | ((largest >= _LEAST_BITS) & (largest <= _MOST_BITS))
    magnitude = tl.where(plain, largest, 0).to(tl.float32, bitcast=True)
    scale = magnitude / LEVELS
    inverse = tl.where(magnitude > 0, LEVELS / tl.where(magnitude > 0, magnitude, 1.0), 0.0)

    squares = tl.zeros((GROUP_ROWS, BLOCK_D), dtype=tl.float32)
    residual_squares = tl.zeros((GROUP_ROWS, BLOCK_D), dtype=tl.float32)
    for first in range(0, width, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_d = (m_n & plain)[:, None] & (o_d < hidden_size)[None, :]
        x = widen(tl.load(p_n + o_d.to(tl.int64)[None, :] * stride_d, mask=m_d, other=0.0))
        # Any whole number within the levels will do: the residual is that of the one chosen.
        q = tl.floor(x * inverse[:, None] + 0.5)
        residual = x - scale[:, None] * q
        squares += x * x
        residual_squares += residual * residual
        p_q = quantised_ptr + o_n.to(tl.int64)[:, None] * width + o_d[None, :]
        tl.store(p_q, q.to(tl.int8), mask=m_n[:, None])
    delta = (hidden_size + NORM_SLACK) * UNIT
    allowance = (hidden_size + DOT_SLACK) * UNIT
    norm = tl.sqrt_rn(tl.sum(squares, axis=1)) * (1.0 + delta)
    radius = (tl.sqrt_rn(tl.sum(residual_squares, axis=1)) + allowance * norm) * (1.0 + delta)
    tl.store(statistics_ptr + o_n, tl.where(plain, scale, float("nan")), mask=m_n)
    if group_count_ptr is None:
        tl.store(statistics_ptr + rows + o_n, radius, mask=m_n)
        tl.store(statistics_ptr + 2 * rows + o_n, norm, mask=m_n)
    else:
        p_group = statistics_ptr + tl.cast(rows, tl.int64) + g
        tl.store(p_group, tl.max(radius * inverse, axis=0))
        tl.store(p_group + rows // GROUP_ROWS, tl.max(norm * inverse, axis=0))
