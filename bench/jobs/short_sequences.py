"""Two ways to the gradients of the maximum, and what each should cost by sequence length: a model, no measurement.

gather (what the package does): for every active entry (b, v) one row of h, for dW, and one row of W, for dh.
scatter: g[b, v] into row (b, a[b, v]) of a matrix G [T, V] of zeros, then the products dh = G W and dW = Gᵀ h.

Times come from operations and bytes over rates that are given, and are expressed in forwards: the product of all
T = B·S tokens with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.harness.roofline import RTX_3090

# A write of a few bytes into zeros reads and writes one of these.
SECTOR_BYTES = 32
# What the backward of the package writes and reads again for an active entry: g as float32, a row and a word of int32.
SORTED_BYTES = 2 * (4 + 8)
LENGTHS = (8, 14, 32, 60, 128, 256, 512)
SHARES = (0.005, 0.01, 0.05, 0.2, 0.5, 1.0)
# Operations for each byte of memory: the RTX 3090's datasheet, and two rounder numbers above it. Parameters, all three.
INTENSITIES = (RTX_3090.operations_per_second / RTX_3090.bytes_per_second, 150.0, 300.0)
# How many times memory's rate rows of h are gathered at from L2, where they are.
L2_FACTOR = 3.0


class Shape(NamedTuple):
    """``[batch_size, length, hidden_size]`` times ``[vocab_size, hidden_size]``, all tokens real."""

    length: int
    batch_size: int = 32
    hidden_size: int = 768
    vocab_size: int = 30522
    itemsize: int = 2


class Rates(NamedTuple):
    """Operations a second of a matmul; bytes a second of memory, and of gathered rows of h and of W."""

    operations: float
    bytes: float
    gathered_hidden: float
    gathered_weight: float

    @classmethod
    def of(cls, intensity: float, l2_factor: float = 1.0) -> Rates:
        """In units of memory's rate; rows of h come ``l2_factor`` times as fast as memory."""
        return cls(intensity, 1.0, l2_factor, 1.0)


class Costs(NamedTuple):
    """Seconds of a forward, and both ways in forwards."""

    forward: float
    gather: float
    scatter: float


def costs(shape: Shape, share: float, rates: Rates) -> Costs:
    """With ``share`` of the (sequence, vocabulary entry) pairs active."""
    length, batch_size, hidden_size, vocab_size, itemsize = shape
    tokens, entries = batch_size * length, batch_size * vocab_size
    hidden_bytes, weight_bytes = tokens * hidden_size * itemsize, vocab_size * hidden_size * itemsize
    # Of y, its gradient and the argmax (int16).
    entry_bytes, active = entries * (2 * itemsize + 2), share * entries

    def product(moved: int) -> float:
        return max(2 * tokens * hidden_size * vocab_size / rates.operations, moved / rates.bytes)

    # One product; h and W are read, y and the argmax written.
    forward = product(hidden_bytes + weight_bytes + entries * (itemsize + 2))
    row_bytes = hidden_size * itemsize
    gathered = active * row_bytes / rates.gathered_hidden + active * row_bytes / rates.gathered_weight
    streamed = entry_bytes + active * SORTED_BYTES + hidden_bytes + weight_bytes
    # G is zeroed and filled before the products, each of which reads it, one factor, and writes one gradient.
    gradient_bytes = tokens * vocab_size * itemsize
    filled = entry_bytes + gradient_bytes + active * 2 * SECTOR_BYTES
    scatter = filled / rates.bytes + 2 * product(gradient_bytes + hidden_bytes + weight_bytes)
    return Costs(forward, (gathered + streamed / rates.bytes) / forward, scatter / forward)


def crossing_share(shape: Shape, rates: Rates) -> float | None:
    """The active share above which scattering costs less; None: no share does. Both costs are straight lines in it."""
    none, everything = costs(shape, 0.0, rates), costs(shape, 1.0, rates)
    behind, ahead = none.scatter - none.gather, everything.gather - everything.scatter
    return behind / (behind + ahead) if ahead > 0 else None


def crossing_length(share: float, rates: Rates, lengths: Sequence[int] = range(1, 1025)) -> int | None:
    """The longest of these lengths, in the default shape, at which scattering costs less."""
    found = {length: costs(Shape(length), share, rates) for length in lengths}
    return max((length for length, cost in found.items() if cost.scatter < cost.gather), default=None)


def length_rows() -> list[list[str]]:
    """A header and a row for each length and intensity."""
    header = ["operations per byte", "S", "gather, all active", "with h from L2", "gather, 5 %", "scatter, all active"]
    rows = [[*header, "scatter, 5 %", "scatter costs less above a share of", "with h from L2"]]
    for intensity in INTENSITIES:
        memory, cached = Rates.of(intensity), Rates.of(intensity, L2_FACTOR)
        for length in LENGTHS:
            shape = Shape(length)
            everything, few = costs(shape, 1.0, memory), costs(shape, 0.05, memory)
            found = [everything.gather, costs(shape, 1.0, cached).gather, few.gather, everything.scatter, few.scatter]
            shares = [crossing_share(shape, rates) for rates in (memory, cached)]
            crossings = ["-" if share is None else f"{share:.1%}" for share in shares]
            rows.append([f"{intensity:.0f}", str(length), *(f"{value:.2f}" for value in found), *crossings])
    return rows


def share_rows() -> list[list[str]]:
    """A header and a row for each intensity: up to which length scattering costs less, by active share."""
    rows = [["operations per byte", "rows of h", *(f"{share:.1%}" for share in SHARES)]]
    for intensity in INTENSITIES:
        for factor, source in ((1.0, "memory"), (L2_FACTOR, "L2")):
            longest = [crossing_length(share, Rates.of(intensity, factor)) for share in SHARES]
            rows.append([f"{intensity:.0f}", source, *("-" if length is None else str(length) for length in longest)])
    return rows
