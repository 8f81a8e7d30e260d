"""Rows as a format can hold them: weights scaled and rounded, those that vanish dropped, those above clipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..encoding.errors import DataError, UsageError
from ..encoding.output import Output
from .formats import INT32_MAX, MOST_DROPPED, Format

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Rows in the order of the input: ``ids`` [n], ``offsets`` int64 [n + 1], ``indices`` int32 and ``values`` [nnz].

    ``values`` are int32 where the format holds integers, float32 elsewhere.
    """

    ids: pa.Array
    offsets: Array
    indices: Array
    values: Array

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def numbers(self) -> Array:
        """The row of each term, counted from this batch's first, int64 [nnz]."""
        return np.repeat(np.arange(len(self), dtype=np.int64), np.diff(self.offsets))

    @property
    def sums(self) -> Array:
        """The sum of each row's integers, int64 [n]."""
        running = np.concatenate([[0], np.cumsum(self.values, dtype=np.int64)])
        return np.asarray(running[self.offsets[1:]] - running[self.offsets[:-1]])


@dataclass
class Survey:
    """What a first pass over all rows finds.

    ``frequencies`` [V]: the rows of each term; ``total`` and ``largest_sum``: of a row's weights, over all rows.
    """

    frequencies: Array
    rows: int = 0
    terms: int = 0
    dropped: int = 0
    clipped: int = 0
    total: int = 0
    largest_sum: int = 0
    longest_id: int = 0
    warnings: list[str] = field(default_factory=list)


class Weights:
    """The rows of an output, scaled for a format; every pass reads the parts again.

    Args:
        output: a complete output of ``encode``.
        form: the format.
        scale: what weights are multiplied by; None: the format's default.

    Raises:
        UsageError: the scale is not a positive number, or cannot keep anything of weights as integers.
    """

    def __init__(self, output: Output, form: Format, scale: float | None = None) -> None:
        self.output, self.form = output, form
        self.scale = form.scale if scale is None else scale
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UsageError(f"--scale: expected a number above 0, got {self.scale:g}")
        if form.integers and self.scale <= 1:
            raise UsageError(
                f"--scale: expected more than 1 for {form.name}, which holds whole numbers, got {self.scale:g}: "
                f"weights would lose their fractions (default: {form.scale:g})"
            )

    def __iter__(self) -> Iterator[Rows]:
        for rows in self._unscaled():
            scaled, kept, _ = self._scaled(rows.values)
            offsets = rows.offsets
            if not kept.all():
                offsets = np.concatenate([[0], np.cumsum(kept)])[rows.offsets]
            yield Rows(rows.ids, offsets, rows.indices[kept], scaled[kept])

    def survey(self) -> Survey:
        """A pass that checks every row, and counts.

        Raises:
            DataError: a row that no output of ``encode`` holds, or an id that the format cannot take.
            UsageError: under this scale all weights of a row vanish, or more than ``MOST_DROPPED`` of all weights.
        """
        found = Survey(np.zeros(self.output.vocabulary_size, np.int64))
        emptied, least = None, math.inf
        for rows in self._unscaled():
            self._check(rows)
            scaled, kept, clipped = self._scaled(rows.values)
            found.rows += len(rows)
            found.terms += int(kept.sum())
            found.dropped += int(len(kept) - kept.sum())
            found.clipped += int(clipped.sum())
            found.frequencies += np.bincount(rows.indices[kept], minlength=len(found.frequencies))
            found.longest_id = max([found.longest_id, *pc.utf8_length(rows.ids).to_pylist()])
            before = np.diff(rows.offsets)
            after = np.bincount(rows.numbers[kept], minlength=len(rows))
            for row in np.flatnonzero((before > 0) & (after == 0)):
                emptied = emptied or rows.ids[int(row)].as_py()
                least = min(least, float(rows.values[rows.offsets[row] : rows.offsets[row + 1]].max()))
            if self.form.integers:
                sums = Rows(rows.ids, rows.offsets, rows.indices, np.where(kept, scaled, 0)).sums
                found.total += int(sums.sum())
                found.largest_sum = max(found.largest_sum, int(sums.max(initial=0)))
        if found.rows != self.output.rows:
            raise DataError(f"{self.output.folder}: expected the manifest's {self.output.rows} rows, got {found.rows}")
        self._refuse(found, emptied, least)
        return found

    def _unscaled(self) -> Iterator[Rows]:
        for batch in self.output.batches():
            ids, indices, values = (batch.column(name) for name in ("id", "indices", "values"))
            if ids.null_count or indices.null_count or values.null_count or not indices.offsets.equals(values.offsets):
                where = f"the batch that begins with the row {ids[0].as_py()!r}"
                raise DataError(f"{self.output.folder}: {where}: expected as many indices as values, and no nulls")
            offsets = indices.offsets.to_numpy().astype(np.int64)
            flat = (column.flatten().to_numpy(zero_copy_only=False) for column in (indices, values))
            yield Rows(ids, offsets - offsets[0], *flat)

    def _scaled(self, values: Array) -> tuple[Array, Array, Array]:
        """Values as the format holds them, which of them are kept, and which were clipped."""
        scaled = values.astype(np.float64) * self.scale
        if self.form.integers:
            scaled = np.rint(scaled)
        clipped = scaled > self.form.largest
        scaled = np.minimum(scaled, self.form.largest).astype(np.int32 if self.form.integers else np.float32)
        return scaled, scaled >= self.form.smallest, clipped

    def _check(self, rows: Rows) -> None:
        vocabulary = self.output.vocabulary_size
        steps = np.diff(rows.indices.astype(np.int64), prepend=-1)
        steps[rows.offsets[:-1][np.diff(rows.offsets) > 0]] = 1
        usable = np.isfinite(rows.values) & (rows.values > 0)
        for wrong, what in (
            (~usable, "values: expected finite weights above 0"),
            ((rows.indices < 0) | (rows.indices >= vocabulary), f"indices: expected 0 to {vocabulary - 1}"),
            (steps <= 0, "indices: expected them ascending"),
        ):
            if wrong.any():
                term = int(np.flatnonzero(wrong)[0])
                row = rows.ids[int(rows.numbers[term])].as_py()
                got = f"{float(rows.values[term]):g} at index {int(rows.indices[term])}"
                raise DataError(f"{self.output.folder}: the row {row!r}: {what}, got {got}")
        if self.form.id_lines:
            self._refuse_ids(rows, pc.match_substring_regex(rows.ids, "[\r\n]"), "without line breaks")
        if limit := self.form.id_bytes:
            self._refuse_ids(rows, pc.greater(pc.binary_length(rows.ids), limit), f"of up to {limit} bytes")

    def _refuse_ids(self, rows: Rows, wrong: pa.Array, expected: str) -> None:
        if pc.any(wrong).as_py():
            row = rows.ids[pc.index(wrong, True).as_py()].as_py()
            raise DataError(f"{self.output.folder}: id: expected ids {expected} for {self.form.name}, got {row!r}")

    def _refuse(self, found: Survey, emptied: str | None, least: float) -> None:
        name, scale = self.form.name, f"--scale {self.scale:g}"
        if emptied is not None:
            needed = (0.5 if self.form.integers else self.form.smallest) / least
            raise UsageError(
                f"{scale}: all weights of the row {emptied!r} vanish in {name}: expected more than {needed:.6g}"
            )
        if found.dropped > MOST_DROPPED * (found.terms + found.dropped):
            raise UsageError(
                f"{scale}: {found.dropped} of {found.terms + found.dropped} weights vanish in {name}, more than "
                f"{MOST_DROPPED:.0%}: expected a larger scale"
            )
        if self.form.integers and found.largest_sum > INT32_MAX:
            raise UsageError(f"{scale}: the weights of a row add up to {found.largest_sum}, beyond {INT32_MAX:.0f}")
        if found.clipped:
            found.warnings.append(f"{found.clipped} weights were clipped to {self.form.largest:,.0f}")
