"""The torch backend on a CPU: real tokens packed, vocabulary tiles that stay in cache.

The real tokens are packed first (padding is a third of a real batch), in the order of their sequences' lengths. The
vocabulary is then processed in tiles whose ``[tokens, tile]`` dots stay in cache: one matmul, one reduction over the
tokens, one store of ``[sequences, tile]``. Nothing of size tokens × vocabulary exists, forward or backward.

PyTorch's CPU matmul rounds its result to the dtype of its operands and has no wider output. Dots rounded to bfloat16
tie or change places, and then the gradient of their maximum goes to a wrong token (docs/numerics.md). So half-precision
dots of which a maximum is taken are computed in float32, and screened ones from the exact rows. In a sum of logits
nothing is chosen: where the CPU has bfloat16 matmul instructions, it is taken of rounded ones, as in the dense head.

Not built: the rounded product as a bound, from which only the tokens that may attain the maximum would be computed in
float32. Every CPU with bfloat16 instructions has int8 ones too, whose bound costs less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pooling import Gradients, PoolingCall, activate, recomputed_gradient
from . import screening
from .screening_plain import Target

# Elements per tile of dots, at most (16 MiB of float32), so that it is reduced from cache.
TILE_ELEMENTS = 4 << 20
MAX_TILE_COLUMNS = 4096
# The sum and its gradient hold several tiles at a time.
SUM_TILE_ELEMENTS = TILE_ELEMENTS // 8
MIN_TILE_COLUMNS = 128
# Packed rows per slice of the batch: bounds the packed copy, and keeps tiles wide.
SLICE_ROWS = 4096
# From 16 rows on, a row of a float32 BLAS matmul does not depend on the number of rows; below, other routines run.
MIN_ROWS = 16
# Rows per group of the two-stage argmax, used where padding sequences to whole groups makes at most this many times the
# rows.
ARGMAX_GROUP = 8
ARGMAX_PADDING = 1.07


@dataclass(frozen=True)
class Slice:
    """Consecutive packed sequences, handled together. Every sequence is padded to whole groups of ``group`` rows by
    repeating its own first token, which changes neither a maximum nor its lowest position.
    """

    rows: Tensor  # [R] row of each packed token in the flat [N, D] hidden states
    positions: Tensor  # [R] its position in its sequence
    sequences: Tensor  # [n] index of each sequence in the batch
    lengths: list[int]  # [n] packed rows of each sequence
    group: int
    groups: Tensor  # [n, most groups of a sequence] groups of each sequence; past its last group, its first one

    def offsets(self) -> Tensor:
        """``[n + 1]`` first packed row of each sequence."""
        return F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0))


def max_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (call.batch_size, weight.shape[0])
    dtype = call.accumulation_dtype
    largest = hidden.new_full(shape, -torch.inf, dtype=dtype)
    argmax = call.new_argmax(hidden, weight.shape[0]).zero_()
    screen = screening.screen(call, weight, bias)
    for part in _slices(call, hidden, ARGMAX_GROUP):
        packed = _gather_rows(hidden, part.rows, call.compute_dtype)
        rows, offsets = packed[: len(part.rows)], part.offsets()
        if screen is not None and screen.pays(rows, offsets):
            positions = argmax if call.need_argmax else None
            screen.maximise(rows, offsets, Target(part.sequences, part.positions, largest, positions))
            continue
        for columns, dots in _tiles(packed, part, weight, call, dtype, TILE_ELEMENTS):
            values, positions = _segment_maximum(dots, part, call.need_argmax)
            largest[:, columns].index_copy_(0, part.sequences, values)
            if positions is not None:
                argmax[:, columns].index_copy_(0, part.sequences, positions.to(argmax.dtype))
    if bias is not None:
        largest += bias.to(dtype)
    output = activate(largest, call).to(call.out_dtype)
    _, lengths = call.real_rows()
    output.masked_fill_((lengths == 0)[:, None], 0)
    if call.need_argmax:
        argmax.masked_fill_(output <= 0, 0)
    return output, argmax


def sum_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    output = hidden.new_zeros(call.batch_size, weight.shape[0], dtype=call.out_dtype)
    for part in _slices(call, hidden, 1):
        packed = _gather_rows(hidden, part.rows, call.compute_dtype)
        for columns, logits in _logits(packed, part, weight, bias, call):
            values = activate(logits, call)
            sums = torch.cat([block.sum(dim=0, keepdim=True) for block in values.split(part.lengths)])
            output[:, columns].index_copy_(0, part.sequences, sums.to(call.out_dtype))
    return output, call.new_argmax(hidden, weight.shape[0])


def sum_pool_backward(
    call: PoolingCall, grad: Tensor, output: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Gradients:
    """Recomputes the logits tile by tile and multiplies their gradients out; see :class:`.Pooling`."""
    dtype = call.accumulation_dtype
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if call.need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if call.need_weight else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if call.need_bias else None
    for part in _slices(call, hidden, 1):
        packed = _gather_rows(hidden, part.rows, call.compute_dtype)
        exact, repeats = packed.to(dtype), torch.tensor(part.lengths)
        grad_packed = torch.zeros_like(exact) if call.need_hidden else None
        for columns, logits in _logits(packed, part, weight, bias, call):
            grad_tokens = grad[:, columns].index_select(0, part.sequences).to(dtype).repeat_interleave(repeats, dim=0)
            grad_logits = recomputed_gradient(grad_tokens, logits.relu_(), call)
            if grad_bias is not None:
                grad_bias[columns] += grad_logits.sum(dim=0)
            if grad_weight is not None:
                grad_weight[columns].addmm_(grad_logits.t(), exact[: len(part.rows)])
            if grad_packed is not None:
                grad_packed[: len(part.rows)].addmm_(grad_logits, weight[columns].to(dtype))
        if grad_hidden is not None and grad_packed is not None:
            grad_hidden.index_copy_(0, part.rows, grad_packed[: len(part.rows)].to(hidden.dtype))
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _slices(call: PoolingCall, hidden: Tensor, group: int) -> Iterator[Slice]:
    """The batch as packed slices: sequences sorted by length, at most ``SLICE_ROWS`` tokens unless one is longer.

    Groups of ``group`` rows where padding to them adds little, else of one.
    """
    rows, lengths = call.real_rows()
    first = lengths.cumsum(0) - lengths
    starts = call.edges(hidden)[:-1]
    order = torch.argsort(lengths, stable=True)
    order = order[lengths[order] > 0]
    sizes = lengths[order].tolist()
    begin = size = 0
    for end, length in enumerate([*sizes, SLICE_ROWS]):
        size += length
        if size > SLICE_ROWS and end > begin:
            members = order[begin:end]
            yield _slice(rows, first[members], lengths[members], starts[members], members, group)
            begin, size = end, length


def _slice(rows: Tensor, first: Tensor, lengths: Tensor, starts: Tensor, members: Tensor, group: int) -> Slice:
    padded = (lengths + group - 1) // group * group
    if int(padded.sum()) > ARGMAX_PADDING * int(lengths.sum()):
        group = 1
    counts = (lengths + group - 1) // group
    packed = counts * group
    within = torch.arange(int(packed.sum())) - torch.repeat_interleave(packed.cumsum(0) - packed, packed)
    within = torch.where(within < torch.repeat_interleave(lengths, packed), within, 0)
    chosen = rows[torch.repeat_interleave(first, packed) + within]
    positions = chosen - torch.repeat_interleave(starts, packed)
    groups = torch.arange(int(counts.max()))
    groups = torch.where(groups < counts[:, None], groups, 0) + (counts.cumsum(0) - counts)[:, None]
    return Slice(chosen, positions, members, packed.tolist(), group, groups)


def _gather_rows(hidden: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    packed = hidden.new_zeros(max(len(rows), MIN_ROWS), hidden.shape[1], dtype=dtype)
    packed[: len(rows)] = hidden.index_select(0, rows)
    return packed


def _tiles(
    packed: Tensor, part: Slice, weight: Tensor, call: PoolingCall, dtype: torch.dtype, elements: int,
    bias: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Yield ``(columns, dots [R, columns])`` multiplied in ``dtype``, about ``elements`` dots at a time, all written
    into the same buffer. A ``bias`` is added in the matmul's accumulator.
    """
    packed = packed.to(dtype)
    vocab_size = weight.shape[0]
    width = max(MIN_TILE_COLUMNS, min(MAX_TILE_COLUMNS, elements // max(len(part.rows), 1)))
    width = max(1, min(width, vocab_size))
    buffer = packed.new_empty(len(packed) * width)
    for first in range(0, vocab_size, width):
        columns = slice(first, min(first + width, vocab_size))
        count = columns.stop - columns.start
        tile = buffer[: len(packed) * count].view(len(packed), count)
        words = weight[columns].to(call.compute_dtype).to(dtype).t()
        if bias is None:
            torch.mm(packed, words, out=tile)
        else:
            torch.addmm(bias[columns].to(dtype), packed, words, out=tile)
        yield columns, tile[: len(part.rows)]


def _logits(
    packed: Tensor, part: Slice, weight: Tensor, bias: Tensor | None, call: PoolingCall
) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(columns, logits [R, columns])`` for a sum of them, in the accumulation dtype.

    Where the matmul rounds its result to half precision, the bias is added before: dots lie further from zero than
    logits, and would be rounded more coarsely.
    """
    wide, dtype = call.accumulation_dtype, _sum_dtype(call)
    rounded = dtype != wide
    for columns, dots in _tiles(packed, part, weight, call, dtype, SUM_TILE_ELEMENTS, bias if rounded else None):
        logits = dots.to(wide)
        yield columns, logits if bias is None or rounded else logits + bias[columns].to(wide)


def _sum_dtype(call: PoolingCall) -> torch.dtype:
    """The compute dtype if this CPU multiplies it natively, else that of the accumulation: emulation is slower."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if call.compute_dtype == torch.bfloat16 and has_bfloat16 else call.accumulation_dtype


def _segment_maximum(dots: Tensor, part: Slice, need_position: bool) -> tuple[Tensor, Tensor | None]:
    """Maximum over each sequence's tokens ``[n, columns]`` and its position in the sequence.

    NaN is the largest, ties go to the lowest position. PyTorch's maximum is vectorised without indices only. So groups
    are reduced without, and the indices are found among the group maxima, then inside the winning group.
    """
    members = dots.view(-1, part.group, dots.shape[1])
    maxima = members.amax(dim=1) if part.group > 1 else dots
    maxima = maxima.index_select(0, part.groups.view(-1)).view(*part.groups.shape, -1)
    if not need_position:
        return maxima.amax(dim=1), None
    largest, winner = maxima.max(dim=1)
    row = part.groups.gather(1, winner)
    if part.group > 1:
        candidates = members.gather(0, row[:, None].expand(-1, part.group, -1))
        row.mul_(part.group).add_(candidates.max(dim=1).indices)
    return largest, part.positions[row]
