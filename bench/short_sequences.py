"""The backward of short sequences by rows that are gathered, as the package does it, and by two products.

    python -m bench.short_sequences                             # the model's tables; --document docs/kernels.md
    python -m bench.short_sequences --output RESULT.json [--append] [--device cuda] [--budget 25]
                                    [--length 14 60 256] [--share 0.05 1.0]

:mod:`bench.jobs.short_sequences` says what each should cost; this command measures both, and the training forward
beside them. Gradients are first compared with float64 sums. The second way is written with PyTorch's operations and is
no part of the package: G is filled in tiles of the vocabulary of at most ``TILE_BYTES``, each multiplied by
``torch.mm`` twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import options, timing
from bench.harness.result_file import Budget, Result
from bench.harness.rows import Job
from bench.harness.steps import Step, Tensors
from bench.inputs import distributions
from bench.inputs.cases import PRECISIONS, Case, Inputs, Precision, for_device
from bench.jobs.operators import Backward
from bench.jobs.short_sequences import Rates, Shape, costs
from bench.measure import measure_jobs
from bench.tables import short_sequences as short_sequences_tables
from bench.tables.markdown import replace_block

KIND = "short-sequences"
TILE_BYTES = 256 << 20
LENGTHS = (14, 60, 256)
SHARES = (0.05, 1.0)
# Largest relative distance of a gradient of the products, twice that of the package's: cuBLAS may split a long sum and
# add its parts in half precision. TF32 and half precision: the factors of the products are rounded.
BOUNDS = {"float32": 2e-4, "tf32": 2e-2, "bf16-autocast": 2e-2, "bf16": 2e-2}


def tile_width(tokens: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Vocabulary entries of a tile of G."""
    return max(1, min(vocab_size, TILE_BYTES // (tokens * dtype.itemsize)))


def scatter_step(precision: Precision, inputs: Inputs, drawn: distributions.Draw) -> Step:
    """Gradients of hidden states, weight and bias by two products of the scattered gradient."""
    output, argmax, grad = drawn
    dtype = precision.compute_dtype
    batch, length, hidden_size = inputs.hidden.shape
    vocab_size, tokens = len(inputs.weight), batch * length
    width = tile_width(tokens, vocab_size, dtype)

    def gradients() -> Tensors:
        hidden, weight = (leaf.detach().to(dtype) for leaf in (inputs.hidden, inputs.weight))
        rows_of_h = hidden.flatten(0, 1)
        slope = torch.where(output > 0, grad.float() * torch.exp(-output.float()), 0)
        values, winners = slope.to(dtype), argmax.long()
        space = hidden.new_empty(tokens * width)
        grad_hidden: Tensor | None = None
        grad_weight = hidden.new_empty(vocab_size, hidden_size)
        for first in range(0, vocab_size, width):
            some = slice(first, min(first + width, vocab_size))
            tile = space[: tokens * (some.stop - first)].view(batch, length, -1).zero_()
            # [T, entries of the tile]
            g = tile.scatter_(1, winners[:, None, some], values[:, None, some]).flatten(0, 1)
            product = torch.mm(g, weight[some])
            grad_hidden = product if grad_hidden is None else grad_hidden.float() + product
            torch.mm(g.t(), rows_of_h, out=grad_weight[some])
        assert grad_hidden is not None
        return (
            grad_hidden.view_as(hidden).to(inputs.hidden.dtype),
            grad_weight.to(inputs.weight.dtype),
            slope.sum(0).to(inputs.bias.dtype),
        )

    return gradients


def products_step(precision: Precision, inputs: Inputs, drawn: distributions.Draw) -> Step:
    """The two products alone, with G at hand: the least that scattering takes. One tile stands for all of them."""
    dtype = precision.compute_dtype
    hidden, weight = (leaf.detach().to(dtype) for leaf in (inputs.hidden, inputs.weight))
    rows_of_h, vocab_size = hidden.flatten(0, 1), len(weight)
    width = tile_width(len(rows_of_h), vocab_size, dtype)
    output, argmax, grad = (part[:, None, :width] for part in drawn)
    tile = hidden.new_zeros(*inputs.mask.shape, width)
    tile.scatter_(1, argmax.long(), torch.where(output > 0, grad, 0).to(dtype))
    g = tile.flatten(0, 1)
    grad_hidden, grad_weight = torch.empty_like(rows_of_h), torch.empty_like(weight)

    def products() -> Tensors:
        for first in range(0, vocab_size, width):
            some = slice(first, min(first + width, vocab_size))
            part = g[:, : some.stop - first]
            torch.mm(part, weight[some], out=grad_hidden)
            torch.mm(part.t(), rows_of_h, out=grad_weight[some])
        return grad_hidden, grad_weight

    return products


def group(case: Case, share: float, precision: Precision, rates: Rates, device: torch.device) -> list[Job]:
    """Both ways, with what the model says of them, the products alone and the training forward."""
    made = Backward(case, precision, _job(share), partial(distributions.at_share, share), device)
    shape = Shape(case.length, case.batch_size, case.hidden_size, case.vocab_size, precision.compute_dtype.itemsize)
    predicted, operations = costs(shape, share, rates), 2 * made.forward.operations
    return [
        made.ours("gather", predicted_forwards=predicted.gather),
        made.variant(
            "scatter", partial(scatter_step, precision), BOUNDS[precision.name],
            operations=operations, predicted_forwards=predicted.scatter,
        ),
        made.variant("products", partial(products_step, precision), operations=operations),
        made.beside(screening=False),
    ]  # fmt: skip


def _job(share: float) -> str:
    return f"active-{100 * share:g}%"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = options.parser(__doc__, seconds=0.4)
    parser.add_argument("--document", type=Path, help="replace the model's tables between their markers")
    parser.add_argument("--precision", choices=list(BOUNDS), help="default: bf16 on a GPU, float32 on a CPU")
    parser.add_argument("--length", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--share", type=float, nargs="+", default=list(SHARES), help="active shares, 0 to 1")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=30522)
    args = parser.parse_args(arguments)
    if args.output is None:
        if args.document:
            args.document.write_text(replace_block(args.document.read_text(), short_sequences_tables.block()))
        else:
            print(short_sequences_tables.block())
        return None
    budget, device = Budget(args.budget), torch.device(args.device)
    precision = PRECISIONS[args.precision or ("bf16" if device.type == "cuda" else "float32")]
    machine = timing.machine(device, [precision])
    run = {"machine": machine, "tile_bytes": TILE_BYTES}
    result = Result(KIND, "bench.short_sequences", args.output, append=args.append, run=run)
    bandwidth = machine[precision.name]["bytes_per_second"]
    rates = Rates(machine[precision.name]["operations_per_second"], bandwidth, bandwidth, bandwidth)
    for length in args.length:
        case = for_device(Case(f"S{length}", args.batch_size, length, args.hidden_size, args.vocab_size), device)
        jobs = {_job(share): partial(group, case, share, precision, rates, device) for share in args.share}
        measure_jobs(result, budget, case.name, precision, jobs, device, args.seconds)
    result.finish(*short_sequences_tables.VARIANTS)
    return result.content


if __name__ == "__main__":
    main()
