"""Exact screening in PyTorch alone, around ``torch._int_mm``."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import int8_bound
from ..pooling import not_at_most

# For ``torch._int_mm`` the hidden dimensions of int8 rows are padded to a multiple of this.
INT_MM_MULTIPLE = 16
# Sizes in its self-test: rows on either side, and hidden dimensions.
SELF_TEST_ROWS = (1, 2, 33)
SELF_TEST_HIDDEN_SIZES = (1, 2, 15, 33, 768, 776)
# Elements per tile of bounds, and per block of rows gathered for exact dots.
TILE_ELEMENTS = 1 << 19


class Target(NamedTuple):
    """Where the maxima of packed sequences are written."""

    sequences: Tensor  # [n] row of each sequence in largest and argmax
    positions: Tensor  # [R] position of each packed row in its sequence
    largest: Tensor  # [B, V] largest dot if it may exceed -bias, else -inf
    argmax: Tensor | None  # [B, V] position that attains it, the lowest on ties; NaN is the largest


def int_mm(tokens: Tensor, weight: Tensor) -> Tensor:
    """``tokens @ weight.T`` of int8 rows by ``torch._int_mm``, in int32.

    With one hidden dimension the transposed weight has a row stride of 1, which oneDNN refuses as a leading dimension,
    and PyTorch returns uninitialised memory. So the hidden dimensions are padded with zeros.
    """
    missing = -tokens.shape[1] % INT_MM_MULTIPLE
    if missing:
        tokens, weight = (F.pad(rows, (0, missing)) for rows in (tokens, weight))
    return torch._int_mm(tokens, weight.t())


@functools.cache
def int_mm_is_right() -> bool:
    """Whether :func:`int_mm` is exact at small, odd and common sizes.

    Without VNNI or AMX oneDNN may add pairs of products in saturating int16.
    """
    generator, most = torch.Generator().manual_seed(0), int8_bound.LEVELS

    def operands(rows: int, size: int) -> tuple[Tensor, Tensor]:
        mixed = torch.randint(-most, most + 1, (rows, size), generator=generator, dtype=torch.int8)
        return torch.full((rows, size), most, dtype=torch.int8), mixed

    for rows, columns, size in itertools.product(SELF_TEST_ROWS, SELF_TEST_ROWS, SELF_TEST_HIDDEN_SIZES):
        for a, b in itertools.product(operands(rows, size), operands(columns, size)):
            try:
                if not torch.equal(int_mm(a, b).to(torch.float64), a.to(torch.float64) @ b.to(torch.float64).t()):
                    return False
            except RuntimeError:
                return False
    return True


@functools.cache
def int_mm_is_fast() -> bool:
    """Whether ``torch._int_mm`` is exact and the CPU has int8 instructions: without them float32 is faster."""
    return (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()) and int_mm_is_right()


def maximise(
    rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, target: Target, *prepared: Tensor
) -> int:
    """See :class:`.screening.Kernels`."""
    quantised, scale, radius, norm = prepared or int8_bound.quantise(weight)
    tokens, token_scale, token_radius, token_norm = (
        x if x.ndim == 2 else x[:, None] for x in int8_bound.quantise(rows)
    )
    lengths = offsets.diff()
    sizes, sequences, vocab_size = lengths.tolist(), len(lengths), len(weight)
    sequence = torch.repeat_interleave(torch.arange(sequences), lengths)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    computed = 0
    width = max(32, TILE_ELEMENTS // max(len(rows), 1) // 32 * 32)
    for first in range(0, vocab_size, width):
        columns = slice(first, min(first + width, vocab_size))
        near = _multiply(tokens, quantised[columns]).mul_(scale[columns]).mul_(token_scale)
        far = token_radius * (norm + radius)[columns]
        far += token_norm * radius[columns]
        lower = (near - far).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
        nothing = lower.new_full(lower.shape[1:], -torch.inf)
        # [n, columns]
        attained = torch.stack([x.amax(dim=0) if len(x) else nothing for x in lower.split(sizes)])
        # Frees a [R, columns] tensor, whose memory the allocator reuses for those below.
        del lower
        upper = near.add_(far)
        del far
        threshold = 0 if bias is None else -bias[columns]
        candidates = not_at_most(upper, threshold)
        # NaN is a candidate here as well.
        candidates &= (upper < attained.index_select(0, sequence)).logical_not_()
        t, v = candidates.nonzero(as_tuple=True)
        computed += len(t)
        dots = _dots(rows, weight[columns], t, v)
        place = sequence[t] * near.shape[1] + v
        largest = torch.full((sequences * near.shape[1],), -torch.inf, dtype=dtype)
        largest.scatter_reduce_(0, place, dots, "amax")
        target.largest[:, columns].index_copy_(0, target.sequences, largest.view(sequences, -1))
        if target.argmax is None:
            continue
        wins = (dots == largest[place]) | (dots.isnan() & largest[place].isnan())
        nowhere = torch.iinfo(torch.int64).max
        lowest = torch.full(largest.shape, nowhere)
        lowest.scatter_reduce_(0, place[wins], target.positions[t[wins]], "amin")
        lowest = torch.where(lowest == nowhere, 0, lowest).view(sequences, -1)
        target.argmax[:, columns].index_copy_(0, target.sequences, lowest.to(target.argmax.dtype))
    return computed


def _multiply(tokens: Tensor, weight: Tensor) -> Tensor:
    """``tokens @ weight.T`` of int8 rows, summed exactly and rounded to float32."""
    if int_mm_is_fast():
        return int_mm(tokens, weight).to(torch.float32)
    return (tokens.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.float32)


def _dots(rows: Tensor, weight: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """``rows[t] · weight[v]`` for each pair, in at least float32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    step = max(2, TILE_ELEMENTS // rows.shape[1])
    pairs = len(t)
    if pairs % step == 1:
        # PyTorch splits a sum over a single long row among its threads, which changes the order of additions.
        t, v = (torch.cat([x, x[-1:]]) for x in (t, v))
    parts = [(rows[a].to(dtype) * weight[b]).sum(dim=1) for a, b in zip(t.split(step), v.split(step), strict=True)]
    return torch.cat(parts)[:pairs] if parts else rows.new_empty(0, dtype=dtype)
