"""Vocabulary-tiled PyTorch: the fast path on a CPU, and the path of every device that Triton does not serve.

On a CPU the real tokens are packed first (padding is a third of a real batch), sequences of equal length side by side,
and the vocabulary is walked in tiles whose ``[tokens, tile]`` dots stay in cache: one matmul, one reduction over the
tokens, one store of ``[sequences, tile]``. Nothing of size tokens × vocabulary exists, forward or backward. Other
devices cannot pack without a host sync; :mod:`.device` reduces their tiles over segments instead. The backward of the
maximum is shared.

Accumulation is float32 (float64 for float64). bfloat16 dots use bfloat16 matmul instructions where the CPU has them and
are then rounded to bfloat16 before the maximum is taken, as the dense head does: PyTorch's CPU matmul has no wider
output. Every other half-precision dot is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import compaction, dispatch, screening, segments
from . import device as device_tiles
from .pooling import PoolingCall, activate, activation_gradient

# A tile of dots is at most this many elements (16 MiB of float32), so that it is reduced from cache.
TILE_ELEMENTS = 4 << 20
MAX_TILE_COLUMNS = 4096
# The sum and its gradient work on every dot and hold several tiles at a time.
SUM_TILE_ELEMENTS = TILE_ELEMENTS // 8
MIN_TILE_COLUMNS = 128
# Packed rows of one slice of the batch: what bounds the packed copy and keeps a tile at full width.
SLICE_ROWS = 4096
# BLAS rows do not depend on the other rows of a call from 16 rows on (float32); smaller calls take other routines.
MIN_ROWS = 16
# Tokens whose maximum is taken before anybody asks which; used where filling sequences up to whole groups adds at most
# this factor to the rows.
MAXIMUM_GROUP = 8
MAXIMUM_FILL = 1.07
# Entries [sequence, vocabulary] of one block of the backward: bounds its index, about 60 bytes an entry.
BACKWARD_ENTRIES = 1 << 20
# Inactive entries of one of the spare bags that keep them out of the last bag (see _bag_sum).
SPARE_BAG = 64


@dataclass(frozen=True)
class Slice:
    """Consecutive packed sequences, handled together. Every sequence is a whole number of groups of ``group`` rows,
    filled up with its own first token: a repeat changes neither a maximum nor its lowest position.
    """

    rows: Tensor  # [R] row of each packed token in the flat [N, D] hidden states
    positions: Tensor  # [R] position of each packed token in its sequence
    sequences: Tensor  # [n] index of each sequence in the batch
    lengths: list[int]  # [n] packed rows of each sequence
    group: int
    groups: Tensor  # [n, most groups of a sequence] packed groups of each sequence; past its last one, its first

    def offsets(self) -> Tensor:
        """``[n + 1]`` first packed row of each sequence."""
        return F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0))

    def tile_columns(self, elements: int) -> int:
        return max(MIN_TILE_COLUMNS, min(MAX_TILE_COLUMNS, elements // max(len(self.rows), 1)))


def pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(y [B, V], argmax [B, V])``; the argmax is a position in the sequence, and empty unless the call needs it."""
    if not _on_host(hidden):
        if call.screening == "on":
            raise RuntimeError(
                f"screening: the torch backend screens on a CPU only, and hidden_states is on {hidden.device}"
            )
        return device_tiles.pool_forward(call, hidden, weight, bias)
    return (_max_pool_forward if call.pooling_strategy == "max" else _sum_pool_forward)(call, hidden, weight, bias)


def _max_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (call.batch_size, weight.shape[0])
    dtype = call.accumulation_dtype
    largest = hidden.new_full(shape, -torch.inf, dtype=dtype)
    argmax = call.new_argmax(hidden, weight.shape[0]).zero_()
    screen = screening.screen(call, weight, bias, native_half=_rounds_dots(call))
    for part in _slices(call, hidden):
        packed = _gather_rows(hidden, part.rows, call.compute_dtype)
        rows, offsets = packed[: len(part.rows)], part.offsets()
        if screen is not None and screen.pays(rows, offsets):
            target = screening.Target(part.sequences, part.positions, largest, argmax if call.need_argmax else None)
            screen.maximise(rows, offsets, target)
            if bias is not None and _rounds_dots(call):
                largest.index_add_(0, part.sequences, bias.to(dtype).expand(len(part.sequences), -1))
            continue
        for columns, dots in _tiles(packed, part, weight, bias, call, TILE_ELEMENTS):
            values, positions = _segment_maximum(dots, part, call.need_argmax)
            largest[:, columns].index_copy_(0, part.sequences, values.to(dtype))
            if positions is not None:
                argmax[:, columns].index_copy_(0, part.sequences, positions.to(argmax.dtype))
    if bias is not None and not _rounds_dots(call):
        largest += bias.to(dtype)
    output = activate(largest, call.activation_function).to(call.out_dtype)
    _, lengths = call.real_rows()
    output.masked_fill_((lengths == 0)[:, None], 0)
    if call.need_argmax:
        argmax.masked_fill_(output <= 0, 0)
    return output, argmax


def _sum_pool_forward(call: PoolingCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    output = hidden.new_zeros(call.batch_size, weight.shape[0], dtype=call.out_dtype)
    for part in _slices(call, hidden):
        packed = _gather_rows(hidden, part.rows, call.compute_dtype)
        for columns, dots in _tiles(packed, part, weight, bias, call, SUM_TILE_ELEMENTS):
            values = activate(_logits(dots, bias, columns, call), call.activation_function)
            sums = torch.cat([block.sum(dim=0, keepdim=True) for block in values.split(part.lengths)])
            output[:, columns].index_copy_(0, part.sequences, sums.to(call.out_dtype))
    return output, call.new_argmax(hidden, weight.shape[0])


def max_pool_backward(
    call: PoolingCall, grad: Tensor, output: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Sparse backward of the maximum: two weighted gathers over the active entries, no atomics, a fixed order.

    One bag per vocabulary entry over the rows of ``h`` gives dW; one bag per token over the rows of ``W``, after a
    stable sort by token, gives dh. Entries with ``g = 0`` are left out, not multiplied.
    """
    vocab_size, hidden_size = weight.shape
    rows = hidden.shape[0]
    if rows == 0:
        return torch.zeros_like(hidden), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    table = hidden.to(call.accumulation_dtype).contiguous() if call.need_weight else hidden
    edges = call.edges(hidden)
    starts = edges[:-1]
    # The same order from a counting sort as from the stable sort, in a tenth of the time.
    compiled = _on_host(hidden) and call.accumulation_dtype == torch.float32 and compaction.is_compiled(hidden.device)
    grad_hidden: Tensor | None = None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if call.need_weight else None
    grad_bias = torch.empty_like(bias) if call.need_bias and bias is not None else None

    step = max(1, BACKWARD_ENTRIES // max(call.batch_size, 1))
    for first in range(0, vocab_size, step):
        columns = slice(first, min(first + step, vocab_size))
        gradient = activation_gradient(grad[:, columns], output[:, columns], call)
        values = gradient.t().contiguous()  # [v, B]
        if grad_bias is not None:
            grad_bias[columns] = values.sum(dim=1)
        if not (call.need_hidden or call.need_weight):
            continue
        if call.need_weight or not compiled:
            active = values != 0
            entries = _active_entries(active)
            weights = values.reshape(-1)[entries]
            token = (argmax[:, columns].to(torch.int32) + starts[:, None]).clamp_(0, rows - 1).t().reshape(-1)[entries]
        if grad_weight is not None:
            offsets = _exclusive_sum(active.sum(dim=1))
            block_gradient = _bag_sum(token, table, offsets, weights)
            if step >= vocab_size:
                grad_weight = block_gradient.to(weight.dtype)
            else:
                grad_weight[columns] = block_gradient
        if call.need_hidden:
            if compiled:
                words, weights, offsets = _bucket(argmax[:, columns], gradient, edges, rows)
            else:
                words = entries.div(call.batch_size, rounding_mode="floor").to(torch.int32)
                if not _may_wait(hidden):
                    in_use = torch.arange(len(entries), device=hidden.device) < active.sum()
                    token = torch.where(in_use, token, rows)
                token, order = torch.sort(token, stable=True)
                bounds = torch.arange(rows + 1, device=hidden.device, dtype=torch.int32)
                offsets = torch.searchsorted(token, bounds, out_int32=True)
                words, weights = words[order], weights[order]
            block = weight[columns].to(call.accumulation_dtype).contiguous()
            part = _bag_sum(words, block, offsets, weights)
            grad_hidden = part if grad_hidden is None else grad_hidden.add_(part)
    if call.need_hidden:
        grad_hidden = hidden.new_zeros(rows, hidden_size) if grad_hidden is None else grad_hidden.to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


def sum_pool_backward(
    call: PoolingCall, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward of the sum: recomputes the logits tile by tile and multiplies them out."""
    if not _on_host(hidden):
        return device_tiles.sum_pool_backward(call, grad, hidden, weight, bias)
    dtype = call.accumulation_dtype
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if call.need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if call.need_weight else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if call.need_bias else None
    for part in _slices(call, hidden):
        packed = _gather_rows(hidden, part.rows, call.compute_dtype)
        exact = packed.to(dtype)
        grad_packed = torch.zeros_like(exact) if call.need_hidden else None
        for columns, dots in _tiles(packed, part, weight, bias, call, SUM_TILE_ELEMENTS):
            logits = _logits(dots, bias, columns, call)
            grad_values = grad[:, columns].index_select(0, part.sequences).to(dtype)
            grad_logits = activation_gradient(
                _spread(grad_values, part), activate(logits, call.activation_function), call
            )
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


def flops_sums(embeddings: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """``[V]`` sums over the kept rows in at least float32, and ``[B]`` which rows were kept (empty: all)."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    if threshold is None:
        return embeddings.sum(dim=0, dtype=dtype), embeddings.new_empty(0, dtype=torch.bool)
    kept = (embeddings != 0).sum(dim=1) > threshold
    return torch.where(kept[:, None], embeddings, 0).sum(dim=0, dtype=dtype), kept


def _on_host(tensor: Tensor) -> bool:
    """Whether reading the data of ``tensor`` costs the host no sync."""
    return tensor.device.type == "cpu"


def _may_wait(tensor: Tensor) -> bool:
    """Whether the host may wait for a count on the device of ``tensor``: everywhere but on CUDA, whose work is queued
    far ahead of the GPU and may be captured into a graph."""
    return tensor.device.type != "cuda"


def _slices(call: PoolingCall, hidden: Tensor) -> Iterator[Slice]:
    """The batch as packed slices: sequences sorted by length, at most ``SLICE_ROWS`` tokens unless one is longer."""
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
            yield _slice(rows, first[members], lengths[members], starts[members], members, call.pooling_strategy)
            begin, size = end, length


def _slice(
    rows: Tensor, first: Tensor, lengths: Tensor, starts: Tensor, members: Tensor, pooling_strategy: str
) -> Slice:
    group = 1
    if pooling_strategy == "max":
        filled = (lengths + MAXIMUM_GROUP - 1) // MAXIMUM_GROUP * MAXIMUM_GROUP
        if int(filled.sum()) <= MAXIMUM_FILL * int(lengths.sum()):
            group = MAXIMUM_GROUP
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
    packed: Tensor, part: Slice, weight: Tensor, bias: Tensor | None, call: PoolingCall, elements: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(columns, dots [R, columns])``, about ``elements`` dots at a time, all written into the same buffer.

    A matmul that rounds its result to half precision gets the bias in its accumulator: dots far from zero would be
    rounded more coarsely than the logits, and tie more often.
    """
    dtype = _matmul_dtype(call)
    packed = packed.to(dtype)
    vocab_size = weight.shape[0]
    width = max(1, min(part.tile_columns(elements), vocab_size))
    buffer = packed.new_empty(len(packed) * width)
    for first in range(0, vocab_size, width):
        columns = slice(first, min(first + width, vocab_size))
        count = columns.stop - columns.start
        tile = buffer[: len(packed) * count].view(len(packed), count)
        words = weight[columns].to(call.compute_dtype).to(dtype).t()
        if bias is not None and _rounds_dots(call):
            torch.addmm(bias[columns].to(dtype), packed, words, out=tile)
        else:
            torch.mm(packed, words, out=tile)
        yield columns, tile[: len(part.rows)]


def _matmul_dtype(call: PoolingCall) -> torch.dtype:
    """The compute dtype where this CPU multiplies it natively; emulation is slower than float32."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if call.compute_dtype == torch.bfloat16 and has_bfloat16 else call.accumulation_dtype


def _rounds_dots(call: PoolingCall) -> bool:
    """Whether the matmul's result is rounded to half precision, and so has the bias inside."""
    return _matmul_dtype(call) != call.accumulation_dtype


def _logits(dots: Tensor, bias: Tensor | None, columns: slice, call: PoolingCall) -> Tensor:
    logits = dots.to(call.accumulation_dtype)
    return logits if bias is None or _rounds_dots(call) else logits + bias[columns].to(call.accumulation_dtype)


def _segment_maximum(dots: Tensor, part: Slice, need_position: bool) -> tuple[Tensor, Tensor | None]:
    """Maximum over each sequence's tokens ``[n, columns]`` and its position in the sequence.

    NaN is the largest, the lowest position wins ties. PyTorch's maximum without indices is vectorised, the one with is
    not: groups are reduced without, then the winning group is found, and the winner inside it.
    """
    members = dots.view(-1, part.group, dots.shape[1])
    heads = members.amax(dim=1) if part.group > 1 else dots
    heads = heads.index_select(0, part.groups.view(-1)).view(*part.groups.shape, -1)
    if not need_position:
        return heads.amax(dim=1), None
    largest, winner = heads.max(dim=1)
    row = part.groups.gather(1, winner)
    if part.group > 1:
        candidates = members.gather(0, row[:, None].expand(-1, part.group, -1))
        row.mul_(part.group).add_(candidates.max(dim=1).indices)
    return largest, part.positions[row]


def _spread(values: Tensor, part: Slice) -> Tensor:
    """``[n, columns]`` of the sequences to ``[R, columns]`` of their tokens."""
    return values.repeat_interleave(torch.tensor(part.lengths), dim=0)


def _active_entries(active: Tensor) -> Tensor:
    """Flat indices of the true entries, ascending; where counting them would sync, all others follow behind."""
    if _may_wait(active):
        return active.view(-1).nonzero().squeeze(1)
    return torch.argsort(active.view(-1).logical_not(), stable=True)


def _exclusive_sum(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _bucket(argmax: Tensor, gradient: Tensor, edges: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vocabulary ids and values of the active entries by token, without gaps, and ``[rows + 1]`` where each begins."""
    bounds, words, values = compaction.bucket_by_token(argmax, gradient, edges, rows)
    offsets = _exclusive_sum(bounds[:, 1] - bounds[:, 0])
    counts = offsets[edges.to(torch.int64)].diff().tolist()
    width = gradient.shape[1]
    packed = [torch.cat([t[b * width : b * width + n] for b, n in enumerate(counts)]) for t in (words, values)]
    return packed[0], packed[1], offsets


def _bag_sum(index: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """``out[i] = Σ weights[j] · table[index[j]]`` over ``offsets[i] <= j < offsets[i + 1]``, in a fixed order."""
    if not dispatch.has_kernel("_embedding_bag_forward_only", table.device.type):
        return segments.bag_sum(index, table, offsets, weights)
    bags = len(offsets) - 1
    if len(index) == 0:
        return table.new_zeros(bags, table.shape[1])
    if not _may_wait(table):
        # PyTorch's CUDA kernel may ignore the last offset (pytorch#178614). The last bag would then also sum all the
        # inactive entries behind it, one after the other. They get short spare bags, whose sums are dropped.
        ends = torch.arange(1, len(index) // SPARE_BAG + 2, device=offsets.device, dtype=torch.int32) * SPARE_BAG
        offsets = torch.cat([offsets, (offsets[-1:] + ends).clamp_max(len(index))])
    sums = F.embedding_bag(
        index.to(torch.int32), table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    return sums[:bags]
