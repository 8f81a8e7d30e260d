"""Maxima and sums over consecutive rows, by operations that every device has.

``torch.segment_reduce`` has no kernel on MPS (pytorch#197880), and sums scattered with atomics are not repeatable. Here
small groups of rows are reduced with ``amax``, ``amin`` or ``sum`` over one dimension of a ``[groups, members,
columns]`` tensor, until one row per segment is left. Padded input takes one such step, with one group per sequence. For
packed input the number of steps follows from the host-known bound on the length, so nothing is read back from the
device, and each segment is padded by at most ``GROUP`` rows, however uneven the lengths are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pooling import PoolingCall

# Rows per group of a packed segment.
GROUP = 8
# Elements per block of weighted rows in bag_sum: 64 MiB of float32.
BAG_ELEMENTS = 16 << 20


@dataclass(frozen=True)
class Step:
    """One reduction of rows, in G groups of L members, to G rows."""

    index: Tensor | None  # [G, L] row of each member of each group; None: every L consecutive rows are a group
    real: Tensor  # [G, L] False for padding


@dataclass(frozen=True)
class Segments:
    """Segments of consecutive rows of a ``[N, columns]`` tensor, which are reduced to one row each."""

    steps: list[Step]
    position: Tensor  # [G, L] positions in their segment of the members of the first step; float32, exact to 2^24
    occupied: Tensor  # [n] whether a segment has a row

    @property
    def rows(self) -> int:
        """Rows that the first reduction gathers, padding included."""
        return self.position.numel()

    def sum(self, values: Tensor) -> Tensor:
        for step in self.steps:
            values = _members(values, step, 0).sum(dim=1)
        return values

    def maximum(self, values: Tensor, need_position: bool) -> tuple[Tensor, Tensor | None]:
        """Maximum (-inf of an empty segment) and its position: NaN is the largest, ties go to the lowest position."""
        position = self.position[..., None]
        for number, step in enumerate(self.steps):
            members = _members(values, step, -torch.inf)
            values = members.amax(dim=1)
            if need_position:
                largest = values[:, None]
                attains = step.real[..., None] & ((members == largest) | (members.isnan() & largest.isnan()))
                if number > 0:
                    position = _members(position, step, torch.inf)
                position = torch.where(attains, position, torch.inf).amin(dim=1)
        return values, position if need_position else None


def of_call(call: PoolingCall, hidden: Tensor) -> Segments:
    """The sequences of a call with at least one sequence and one row."""
    if call.cu_seqlens is not None:
        return of_edges(call.edges(hidden), hidden.shape[0], call.max_seqlen)
    shape = call.batch_size, call.max_seqlen
    real = hidden.new_ones(shape, dtype=torch.bool) if call.attention_mask is None else call.attention_mask != 0
    position = torch.arange(shape[1], device=hidden.device).to(torch.float32).expand(shape)
    return Segments([Step(None, real)], position, real.any(dim=1))


def of_edges(edges: Tensor, rows: int, longest: int) -> Segments:
    """Segment i has the rows ``edges[i] .. edges[i + 1] - 1`` of ``rows > 0``, at most ``longest`` of them."""
    first, *others = _steps(edges.to(torch.int64), rows, max(1, min(longest, rows)))
    return Segments([first[0], *(step for step, _ in others)], first[1], edges[:-1] < edges[1:])


def _steps(edges: Tensor, rows: int, longest: int) -> Iterator[tuple[Step, Tensor]]:
    segments = len(edges) - 1
    while True:
        size = min(GROUP, longest)
        if longest == size:
            begin, end, offset = edges[:-1], edges[1:], torch.zeros_like(edges[:-1])
        else:
            counts = ((edges[1:] - edges[:-1] + size - 1) // size).clamp_min(1)
            bounds = F.pad(counts.cumsum(0), (1, 0))
            # Their number is an upper bound. Surplus groups begin behind the last segment and have no members.
            groups = torch.arange(rows // size + segments, device=edges.device)
            owner = torch.searchsorted(bounds[1:], groups, right=True).clamp_max(segments - 1)
            offset = (groups - bounds[owner]) * size
            begin, end = edges[owner] + offset, edges[owner + 1]
        member = torch.arange(size, device=edges.device)
        index = begin[:, None] + member
        yield Step(index.clamp_max(rows - 1), index < end[:, None]), (offset[:, None] + member).to(torch.float32)
        if longest == size:
            return
        edges, rows, longest = bounds, len(groups), -(-longest // size)


def _members(values: Tensor, step: Step, absent: float) -> Tensor:
    """``[G, L, columns]``, with the value ``absent`` for padding."""
    if step.index is not None:
        values = values.index_select(0, step.index.view(-1))
    return torch.where(step.real[..., None], values.view(*step.real.shape, values.shape[1]), absent)


def bag_sum(index: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """``out[i] = Σ weights[j] · table[index[j]]`` over ``offsets[i] <= j < offsets[i + 1]``, in a fixed order.

    For devices without a kernel of ``embedding_bag``. The host waits for the length of the longest bag.
    """
    bags, width = len(offsets) - 1, table.shape[1]
    total = table.new_zeros(bags, width)
    longest = int((offsets[1:] - offsets[:-1]).max()) if len(index) and bags else 0
    block = max(bags, BAG_ELEMENTS // max(width, 1))
    for first in range(0, len(index) if longest else 0, block):
        part = slice(first, first + block)
        rows = table.index_select(0, index[part]) * weights[part, None]
        edges = (offsets.to(torch.int64) - first).clamp(0, len(rows))
        total += of_edges(edges, len(rows), longest).sum(rows)
    return total
