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
from bench.tables.screening import margins_table
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


def counts(alive: Tensor) -> Tensor:
    """Of ``[B, S, entries]`` pairs that are left: sequences, groups and tokens, each times vocabulary entries."""
    groups = torch.nn.functional.pad(alive, (0, 0, 0, -alive.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).any(dim=2)
    return torch.stack([alive.any(dim=1).sum(), groups.sum(), alive.sum()])


def survivors(case: Case) -> list[dict[str, Any]]:
    """A row for each number of levels; ``..._pairs``, ``..._groups`` and ``..._tokens`` are shares. A dot outside its
    bound is an error."""
    inputs = cases.make_inputs(case, PRECISIONS["float32"], CPU)
    hidden, weight, bias = (leaf.detach() for leaf in inputs.leaves)
    rows, shape, real = hidden.flatten(0, 1), inputs.mask.shape, inputs.mask[..., None] != 0
    quantised = [(quantise(rows, levels), quantise(weight, levels)) for levels in LEVELS]
    every = counts(real) * len(weight)
    active, moments = torch.zeros_like(every), torch.zeros(2, dtype=torch.float64)
    left = every.new_zeros(len(LEVELS), 2, 3)
    width = torch.zeros(len(LEVELS), dtype=torch.float64)
    for some in (slice(first, first + WIDTH) for first in range(0, len(weight), WIDTH)):
        dots = (rows.double() @ weight[some].double().t()).view(*shape, -1)
        active += counts((dots + bias[some] > 0) & real)
        moments += torch.stack([(dots * real).sum(), (dots * real).square().sum()])
        for i, (tokens, entries) in enumerate(quantised):
            # The dots of quantised rows, and how far from them the exact dots may be.
            near = (tokens[0].double() @ entries[0][some].double().t()).float().view(*shape, -1)
            radius, norm = entries[1][some], entries[2][some]
            far = (tokens[1][:, None] * (norm + radius) + tokens[2][:, None] * radius).view(*shape, -1)
            if not bool(((dots - near).abs() <= far).all()):
                raise ArithmeticError(f"{case.name}, {LEVELS[i]} levels: a dot is outside its bound")
            # By relu alone, and by the largest lower bound of the sequence as well.
            relu = ~(near + far <= -bias[some]) & real
            largest = (near - far).masked_fill_(~real, -torch.inf).amax(dim=1, keepdim=True)
            left[i] += torch.stack([counts(relu), counts(relu & ~(near + far < largest))])
            width[i] += (far.double() * real).sum()
    mean, square = (moments / every[2]).tolist()
    found = []
    for levels, by_criterion, total in zip(LEVELS, left, width.tolist(), strict=True):
        # The mean bound in standard deviations of the dots.
        bound = total / int(every[2]) / (square - mean**2) ** 0.5
        row = {"case": case.name, "shape": case.shape, "real_tokens": int(real.sum()), "levels": levels, "bound": bound}
        for name, count in zip(("active", "relu", "best"), (active, *by_criterion), strict=True):
            row |= zip(
                (f"{name}_pairs", f"{name}_groups", f"{name}_tokens"), (count.double() / every).tolist(), strict=True
            )
            if name != "active":
                row[f"{name}_tokens_per_active_pair"] = int(count[2]) / int(active[0]) if active[0] else None
        found.append(row)
    return found


def main() -> None:
    args = options.parser(__doc__).parse_args()
    result = Result("margins", "bench.margins", args.output, append=args.append, key=("case", "levels"))
    for case in cases.shown_in("margins"):
        if reason := text_model.why_absent(case):
            result.leave_out(reason, {"case": case.name})
            continue
        text_model.note(case, result.run)
        result.add(*survivors(cases.for_device(case, CPU)))
    result.write()
    print(margins_table(result.by_device()[-1]))


if __name__ == "__main__":
    main()
