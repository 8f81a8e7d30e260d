"""Floors: the operations and the fewest bytes of each job, and the time a machine needs for them at best.

A multiply-add counts as two operations. Bytes are those that must cross the memory bus once, with perfect caches.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.inputs.cases import Case, Precision

PASSES = ("forward", "forward_backward")


class Work(NamedTuple):
    operations: int
    bytes: int


class Machine(NamedTuple):
    """Rates of one device in one precision: measured ones, as results hold them, or a datasheet's."""

    bytes_per_second: float
    operations_per_second: float

    def seconds(self, work: Work) -> float:
        """The slower of the two, as if they overlapped perfectly."""
        return max(work.operations / self.operations_per_second, work.bytes / self.bytes_per_second)


# NVIDIA's GA102 whitepaper: dense tensor-core rate of bfloat16 with float32 accumulation.
RTX_3090 = Machine(936e9, 71e12)


def forward(case: Case, precision: Precision, tokens: int) -> Work:
    """Projection of ``tokens`` rows: read h, W and c, write y (and nothing of size tokens × vocabulary)."""
    size = precision.dtype.itemsize
    read = (tokens * case.hidden_size + case.vocab_size * (case.hidden_size + 1)) * size
    written = case.batch_size * case.vocab_size * precision.out_dtype.itemsize
    return Work(2 * tokens * case.hidden_size * case.vocab_size, read + written)


def backward(case: Case, precision: Precision, active: int, tokens: int) -> Work:
    """Two gathers of D numbers for each of the ``active`` entries; read y, dy, a, h and W, write dh, dW and dc."""
    size = precision.dtype.itemsize
    entries = case.batch_size * case.vocab_size
    index = 2 if case.length <= 32767 else 4
    moved = entries * (2 * precision.out_dtype.itemsize + index)
    matrices = (tokens + case.batch_size * case.length + 2 * case.vocab_size) * case.hidden_size * size
    return Work(4 * active * case.hidden_size, moved + matrices + case.vocab_size * size)
