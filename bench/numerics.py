"""How far values, choice of tokens and gradients of each head are from float64, by precision, length and hidden size.

    python -m bench.numerics --output RESULT.json [--append] [--device cuda] [--case S128-D768 ...]
                             [--precision bf16 ...] [--variant stock ours ...]

Nothing is timed. ``python -m bench.report --numerics docs/numerics.md`` makes the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.harness import options
from bench.harness.result_file import Budget, Result, Row
from bench.inputs.cases import PRECISIONS, Case
from bench.inputs.variants import why_not
from bench.jobs.numerics import Exact, errors
from bench.tables.numerics import LABELS, numerics_table

VARIANTS = tuple(LABELS)
# Lengths at one hidden size, and hidden sizes at one length.
SHAPES = ((32, 768), (128, 768), (256, 768), (128, 128), (128, 384))


def measure(exact: Exact, name: str, device: torch.device) -> Row:
    absent = why_not(name, device, training=True)
    return {"status": f"not here: {absent}", "errors": {}} if absent else errors(exact, name, device)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options.parser(__doc__, required=True, device=True)
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), help="default: all that the device has")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--case", nargs="+", choices=[f"S{length}-D{size}" for length, size in SHAPES])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=5000)
    args = parser.parse_args(arguments)
    device, budget = torch.device(args.device), Budget(args.budget)
    result = Result("numerics", "bench.numerics", args.output, append=args.append)
    usual = [name for name, precision in PRECISIONS.items() if device.type == "cuda" or not precision.tf32]
    for precision in (PRECISIONS[name] for name in args.precision or usual):
        for length, size in SHAPES:
            case = Case(f"S{length}-D{size}", args.batch_size, length, size, args.vocab_size)
            if args.case and case.name not in args.case:
                continue
            exact = Exact(case, precision, device)
            for name in args.variant:
                what = {"case": case.name, "shape": case.shape, "precision": precision.name, "job": "numerics"}
                result.attempt(budget, what | {"variant": name}, partial(measure, exact, name, device))
    result.finish(*VARIANTS)
    print(numerics_table(result.by_device()[-1]))
    return result.content


if __name__ == "__main__":
    main()
