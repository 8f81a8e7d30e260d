"""What int8 bounds leave over: shares of pairs, by levels and scales a row, by relu alone and with the maximum too.

    python -m bench.margins [--output bench/results/margins.json]

Arithmetic, nothing is timed. Rows are quantised and bounded by the code that screens; several scales a row, one for
each block of the hidden size, share one radius. Every dot is held against its bound in float64.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import screening_model
from bench.harness.result_file import Result
from bench.inputs import cases
from bench.inputs.cases import PRECISIONS, SCREENING, Case
from bench.tables import margins as margins_tables
from splade_kernels.backends import int8_bound

CASES = ("trained-squad", "sparse-normal", "dense")
# int8's own, and those of the AVX2 kernel.
LEVELS = (int8_bound.LEVELS, 63)
BLOCKS = (1, 2, 4, 8)
# Tokens of one sequence that the GPU's kernels screen together.
GROUP = 16
CPU = torch.device("cpu")
# Words whose bounds are held at a time.
WIDTH = 2048


class Rows(NamedTuple):
    """Rows with a scale for each block of the hidden size."""

    near: Tensor  # [blocks, n, D / blocks] int8
    scale: Tensor  # [blocks, n]
    radius: Tensor  # [n]
    norm: Tensor  # [n]


def quantise(rows: Tensor, levels: int, blocks: int) -> Rows:
    """``rows [n, D]`` float32."""
    count, size = rows.shape
    parts = rows.reshape(count * blocks, size // blocks)
    largest = parts.abs().amax(dim=1)
    scale = largest / levels
    near = (parts * torch.where(largest > 0, levels / largest, 0)[:, None]).round().to(torch.int8)
    radius, norm = int8_bound.radius_and_norm(rows, (near * scale[:, None]).view_as(rows))
    parts = near.view(count, blocks, -1).transpose(0, 1).contiguous()
    return Rows(parts, scale.view(count, blocks).t(), radius, norm)


def bounds(tokens: Rows, words: Rows, some: slice) -> tuple[Tensor, Tensor]:
    """``[T, some]`` what stands for the dots, and how far from it they may be."""
    near = torch.zeros(())
    for x, s, y, z in zip(tokens.near, tokens.scale, words.near[:, some], words.scale[:, some], strict=True):
        # Exact like int32, and on every CPU fast enough.
        products = (x.double() @ y.double().t()).float()
        near = near + products.mul_(z).mul_(s[:, None])
    radius, norm = words.radius[some], words.norm[some]
    return near, tokens.radius[:, None] * (norm + radius) + tokens.norm[:, None] * radius


class Layout:
    """Where packed tokens are in sequences and in groups."""

    def __init__(self, lengths: Tensor) -> None:
        groups = (lengths + GROUP - 1) // GROUP
        self.lengths, self.groups = lengths.tolist(), groups.tolist()
        first = GROUP * (groups.cumsum(0) - groups)
        self._places = torch.cat([f + torch.arange(n) for f, n in zip(first, self.lengths, strict=True)])

    def counts(self, alive: Tensor) -> Tensor:
        """Of ``[T, words]`` tokens that are left: sequences, groups and tokens times words."""
        padded = alive.new_zeros(GROUP * sum(self.groups), alive.shape[1])
        padded[self._places] = alive
        groups = padded.view(-1, GROUP, alive.shape[1]).any(dim=1)
        return torch.stack(
            [sum(part.any(dim=0).sum() for part in groups.split(self.groups)), groups.sum(), alive.sum()]
        )

    def largest(self, values: Tensor) -> Tensor:
        """``[T, words]``: the largest of each token's sequence."""
        return torch.cat([part.amax(dim=0).expand_as(part) for part in values.split(self.lengths)])


def criteria(near: Tensor, far: Tensor, bias: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """``[T, words]`` what is left by relu alone, and by the largest lower bound of the sequence as well."""
    upper = near + far
    relu = ~(upper <= -bias)
    return relu, relu & ~(upper < layout.largest(near - far))


def survivors(case: Case) -> list[dict[str, Any]]:
    """A row for each number of levels and of blocks; ``..._pairs``, ``..._groups`` and ``..._tokens`` are shares.

    Raises:
        ArithmeticError: a dot is outside its bound.
    """
    inputs = cases.make_inputs(case, PRECISIONS["float32"], CPU)
    hidden, weight, bias = (leaf.detach() for leaf in inputs.leaves)
    real = inputs.mask != 0
    rows, layout = hidden[real], Layout(real.sum(dim=1))
    settings = list(itertools.product(LEVELS, BLOCKS))
    quantised = [(quantise(rows, *setting), quantise(weight, *setting)) for setting in settings]
    active, moments = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)
    left = torch.zeros(len(settings), 2, 3, dtype=torch.int64)
    width = torch.zeros(len(settings), dtype=torch.float64)
    for some in (slice(first, first + WIDTH) for first in range(0, len(weight), WIDTH)):
        dots = rows.double() @ weight[some].double().t()
        active += layout.counts(dots + bias[some] > 0)
        moments += torch.stack([dots.sum(), dots.square().sum()])
        for i, (tokens, words) in enumerate(quantised):
            near, far = bounds(tokens, words, some)
            if not bool(((dots - near).abs() <= far).all()):
                raise ArithmeticError(f"{case.name}, levels and blocks {settings[i]}: a dot is outside its bound")
            left[i] += torch.stack([layout.counts(alive) for alive in criteria(near, far, bias[some], layout)])
            width[i] += far.double().sum()
    every = torch.tensor([len(layout.lengths), sum(layout.groups), len(rows)]) * len(weight)
    mean, square = (moments / every[2]).tolist()
    fixed = {"case": case.name, "shape": case.shape, "real_tokens": len(rows)}
    found = []
    for (levels, blocks), counts, total in zip(settings, left, width.tolist(), strict=True):
        # The mean bound in standard deviations of the dots.
        bound = total / int(every[2]) / (square - mean**2) ** 0.5
        row = fixed | {"levels": levels, "blocks": blocks, "bound": bound} | _shares("active", active, every)
        for name, count in zip(("relu", "best"), counts, strict=True):
            row |= _shares(name, count, every)
            row[f"{name}_tokens_per_active_pair"] = int(count[2]) / int(active[0]) if active[0] else None
        found.append(row)
    return found


def _shares(name: str, counts: Tensor, every: Tensor) -> dict[str, float]:
    shares = (counts.double() / every).tolist()
    return {f"{name}_{what}": share for what, share in zip(("pairs", "groups", "tokens"), shares, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="result file")
    result = Result("margins", "bench.margins", parser.parse_args().output)
    for name in CASES:
        case = SCREENING[name]
        if reason := cases.why_absent(case):
            result.content["left_out"].append(f"{name}: {reason}")
            continue
        if case.from_text:
            result.content["trained_model"] = screening_model.training_record()
        for row in survivors(cases.for_device(case, CPU)):
            result.add(row)
    result.write()
    print(margins_tables.tables(result.content))


if __name__ == "__main__":
    main()
