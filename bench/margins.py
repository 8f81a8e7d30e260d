"""What int8 bounds leave over: shares of pairs by levels, by relu alone and with the sequence's maximum as well.

    python -m bench.margins [--output bench/results/margins.json] [--append]

Arithmetic; nothing is timed. Rows are bounded by the code that screens. Every dot is compared with its bound in
float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import options
from bench.harness.result_file import Result
from bench.inputs import cases, text_model
from bench.inputs.cases import PRECISIONS, Case
from bench.tables import margins as margins_tables
from splade_kernels.backends import int8_bound

# int8's own, and those of the AVX2 kernel.
LEVELS = (int8_bound.LEVELS, 63)
# Tokens of one sequence that the GPU's kernels screen together.
GROUP = 16
CPU = torch.device("cpu")
# Vocabulary entries whose bounds are in memory at a time.
WIDTH = 2048

# Rows as they are multiplied, [n, D], their radius and their norm, each [n].
Bounded = tuple[Tensor, Tensor, Tensor]


def quantise(rows: Tensor, levels: int) -> Bounded:
    """``rows [n, D]`` float32 rounded to so many levels to either side of zero, with a scale each."""
    scale = rows.abs().amax(dim=1, keepdim=True) / levels
    near = (rows * torch.where(scale > 0, 1 / scale, 0)).round_() * scale
    return near, *int8_bound.radius_and_norm(rows, near)


def bounds(tokens: Bounded, entries: Bounded, some: slice) -> tuple[Tensor, Tensor]:
    """``[T, some]`` the dots of quantised rows, and how far from them the exact dots may be."""
    near = (tokens[0].double() @ entries[0][some].double().t()).float()
    radius, norm = entries[1][some], entries[2][some]
    return near, tokens[1][:, None] * (norm + radius) + tokens[2][:, None] * radius


class Layout:
    """Where packed tokens are in sequences and in groups."""

    def __init__(self, lengths: Tensor) -> None:
        groups = (lengths + GROUP - 1) // GROUP
        self.lengths, self.groups = lengths.tolist(), groups.tolist()
        first = GROUP * (groups.cumsum(0) - groups)
        self._places = torch.cat([f + torch.arange(n) for f, n in zip(first, self.lengths, strict=True)])

    def counts(self, alive: Tensor) -> Tensor:
        """Of ``[T, entries]`` pairs that are left: sequences, groups and tokens, each times vocabulary entries."""
        padded = alive.new_zeros(GROUP * sum(self.groups), alive.shape[1])
        padded[self._places] = alive
        groups = padded.view(-1, GROUP, alive.shape[1]).any(dim=1)
        sequences = sum(part.any(dim=0).sum() for part in groups.split(self.groups))
        return torch.stack([torch.as_tensor(sequences), groups.sum(), alive.sum()])

    def largest(self, values: Tensor) -> Tensor:
        """``[T, entries]``: the largest of each token's sequence."""
        return torch.cat([part.amax(dim=0).expand_as(part) for part in values.split(self.lengths)])


def criteria(near: Tensor, far: Tensor, bias: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """``[T, entries]`` what is left by relu alone, and by the largest lower bound of the sequence as well."""
    upper = near + far
    relu = ~(upper <= -bias)
    return relu, relu & ~(upper < layout.largest(near - far))


def survivors(case: Case) -> list[dict[str, Any]]:
    """A row for each number of levels; ``..._pairs``, ``..._groups`` and ``..._tokens`` are shares.

    Raises:
        ArithmeticError: a dot is outside its bound.
    """
    inputs = cases.make_inputs(case, PRECISIONS["float32"], CPU)
    hidden, weight, bias = (leaf.detach() for leaf in inputs.leaves)
    real = inputs.mask != 0
    rows, layout = hidden[real], Layout(real.sum(dim=1))
    quantised = [(quantise(rows, levels), quantise(weight, levels)) for levels in LEVELS]
    active, moments = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)
    left = torch.zeros(len(LEVELS), 2, 3, dtype=torch.int64)
    width = torch.zeros(len(LEVELS), dtype=torch.float64)
    for some in (slice(first, first + WIDTH) for first in range(0, len(weight), WIDTH)):
        dots = rows.double() @ weight[some].double().t()
        active += layout.counts(dots + bias[some] > 0)
        moments += torch.stack([dots.sum(), dots.square().sum()])
        for i, (tokens, entries) in enumerate(quantised):
            near, far = bounds(tokens, entries, some)
            if not bool(((dots - near).abs() <= far).all()):
                raise ArithmeticError(f"{case.name}, {LEVELS[i]} levels: a dot is outside its bound")
            left[i] += torch.stack([layout.counts(alive) for alive in criteria(near, far, bias[some], layout)])
            width[i] += far.double().sum()
    every = torch.tensor([len(layout.lengths), sum(layout.groups), len(rows)]) * len(weight)
    mean, square = (moments / every[2]).tolist()
    fixed = {"case": case.name, "shape": case.shape, "real_tokens": len(rows)}
    found = []
    for levels, counts, total in zip(LEVELS, left, width.tolist(), strict=True):
        # The mean bound in standard deviations of the dots.
        bound = total / int(every[2]) / (square - mean**2) ** 0.5
        row = fixed | {"levels": levels, "bound": bound} | _shares("active", active, every)
        for name, count in zip(("relu", "best"), counts, strict=True):
            row |= _shares(name, count, every)
            row[f"{name}_tokens_per_active_pair"] = int(count[2]) / int(active[0]) if active[0] else None
        found.append(row)
    return found


def _shares(name: str, counts: Tensor, every: Tensor) -> dict[str, float]:
    shares = (counts.double() / every).tolist()
    return {f"{name}_{what}": share for what, share in zip(("pairs", "groups", "tokens"), shares, strict=True)}


def main() -> None:
    args = options.parser(__doc__).parse_args()
    result = Result("margins", "bench.margins", args.output, append=args.append, key=("case", "levels"))
    for case in cases.shown_in("margins"):
        if reason := cases.why_absent(case):
            result.leave_out(reason, {"case": case.name})
            continue
        if case.from_text:
            result.run["trained_model"] = text_model.training_record()
        result.add(*survivors(cases.for_device(case, CPU)))
    result.write()
    print(margins_tables.tables(result.by_device()[-1]))


if __name__ == "__main__":
    main()
