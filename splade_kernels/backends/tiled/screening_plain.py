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

# Hidden dimensions of int8 rows are filled up to a multiple of this for ``torch._int_mm``, and the sizes that its
# self-test asks: rows of either side, and hidden dimensions.
INT_MM_MULTIPLE = 16
SELF_TEST_ROWS = (1, 2, 33)
SELF_TEST_HIDDEN_SIZES = (1, 2, 15, 33, 768, 776)
# Elements of a tile of bounds, and of the rows gathered for exact dots at a time.
TILE_ELEMENTS = 1 << 19


class Target(NamedTuple):
    """Where the maxima of packed sequences go."""

    sequences: Tensor  # [n] their rows in what follows
    positions: Tensor  # [R] position of each packed row in its sequence
    largest: Tensor  # [B, V] largest dot where one may exceed -bias, else -inf
    argmax: Tensor | None  # [B, V] position that attains it, the lowest on ties; NaN is the largest


def int_mm(tokens: Tensor, words: Tensor) -> Tensor:
    """``[R, words]`` int32 products of int8 rows by ``torch._int_mm``.

    With one hidden dimension the words, transposed, have a stride of 1 from row to row, which oneDNN refuses as a
    leading dimension, and PyTorch returns the result unwritten. So the hidden dimension is filled up with zeros.
    """
    missing = -tokens.shape[1] % INT_MM_MULTIPLE
    if missing:
        tokens, words = (F.pad(rows, (0, missing)) for rows in (tokens, words))
    return torch._int_mm(tokens, words.t())


@functools.cache
def int_mm_is_right() -> bool:
    """Whether :func:`int_mm` is right, asked at small, odd and common sizes.

    Without VNNI or AMX oneDNN may add pairs of products in saturating int16.
    """
    generator = torch.Generator().manual_seed(0)
    for tokens, words, size in itertools.product(SELF_TEST_ROWS, SELF_TEST_ROWS, SELF_TEST_HIDDEN_SIZES):
        shapes = (tokens, size), (words, size)
        full = [torch.full(shape, int8_bound.LEVELS, dtype=torch.int8) for shape in shapes]
        mixed = [
            torch.randint(-int8_bound.LEVELS, int8_bound.LEVELS + 1, shape, generator=generator, dtype=torch.int8)
            for shape in shapes
        ]
        try:
            for a, b in itertools.product((full[0], mixed[0]), (full[1], mixed[1])):
                if not torch.equal(int_mm(a, b).to(torch.float64), a.to(torch.float64) @ b.to(torch.float64).t()):
                    return False
        except RuntimeError:
            return False
    return True


@functools.cache
def int_mm_is_fast() -> bool:
    """Whether ``torch._int_mm`` is right and has instructions of its own; without, it takes longer than float32."""
    return (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()) and int_mm_is_right()


def maximise(
    rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, target: Target, *prepared: Tensor
) -> int:
    quantised, scale, radius, norm = prepared or int8_bound.quantise(weight)
    tokens, token_scale, token_radius, token_norm = (
        x if x.ndim == 2 else x[:, None] for x in int8_bound.quantise(rows)
    )
    lengths = offsets.diff()
    sizes, sequences, vocab_size = lengths.tolist(), len(lengths), len(weight)
    sequence = torch.repeat_interleave(torch.arange(sequences), lengths)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    evaluated = 0
    width = max(32, TILE_ELEMENTS // max(len(rows), 1) // 32 * 32)
    for first in range(0, vocab_size, width):
        words = slice(first, min(first + width, vocab_size))
        near = _multiply(tokens, quantised[words]).mul_(scale[words]).mul_(token_scale)
        far = token_radius * (norm + radius)[words]
        far += token_norm * radius[words]
        lower = (near - far).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
        nothing = lower.new_full(lower.shape[1:], -torch.inf)
        # [n, words]
        attained = torch.stack([x.amax(dim=0) if len(x) else nothing for x in lower.split(sizes)])
        # Keep few [R, words] tensors alive: the allocator reuses what is freed here for those below.
        del lower
        upper = near.add_(far)
        del far
        threshold = 0 if bias is None else -bias[words]
        candidates = not_at_most(upper, threshold)
        candidates &= (upper < attained.index_select(0, sequence)).logical_not_()  # so that NaN is a candidate
        t, v = candidates.nonzero(as_tuple=True)
        evaluated += len(t)
        dots = _dots(rows, weight[words], t, v)
        place = sequence[t] * near.shape[1] + v
        largest = torch.full((sequences * near.shape[1],), -torch.inf, dtype=dtype)
        largest.scatter_reduce_(0, place, dots, "amax")
        target.largest[:, words].index_copy_(0, target.sequences, largest.view(sequences, -1))
        if target.argmax is None:
            continue
        wins = (dots == largest[place]) | (dots.isnan() & largest[place].isnan())
        nowhere = torch.iinfo(torch.int64).max
        lowest = torch.full(largest.shape, nowhere)
        lowest.scatter_reduce_(0, place[wins], target.positions[t[wins]], "amin")
        lowest = torch.where(lowest == nowhere, 0, lowest).view(sequences, -1)
        target.argmax[:, words].index_copy_(0, target.sequences, lowest.to(target.argmax.dtype))
    return evaluated


def _multiply(tokens: Tensor, words: Tensor) -> Tensor:
    """``[R, words]`` float32 products of int8 rows, summed exactly."""
    if int_mm_is_fast():
        return int_mm(tokens, words).to(torch.float32)
    return (tokens.to(torch.float64) @ words.to(torch.float64).t()).to(torch.float32)


def _dots(rows: Tensor, words: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """``rows[t] · words[v]`` for each pair, in at least float32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    step = max(2, TILE_ELEMENTS // rows.shape[1])
    pairs = len(t)
    if pairs % step == 1:
        # One long row alone PyTorch would share out among its threads, and add up in another order.
        t, v = (torch.cat([x, x[-1:]]) for x in (t, v))
    parts = [(rows[a].to(dtype) * words[b]).sum(dim=1) for a, b in zip(t.split(step), v.split(step), strict=True)]
    return torch.cat(parts)[:pairs] if parts else rows.new_empty(0, dtype=dtype)
