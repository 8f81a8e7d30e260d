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

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import memory, options, roofline, rows, timing, truth
from bench.harness.result_file import Budget, Result
from bench.harness.rows import Job, Row
from bench.harness.steps import Step, Tensors, input_sets, unweighed, weigh_on_gpu
from bench.inputs import distributions
from bench.inputs.cases import PRECISIONS, Case, Inputs, Precision, for_device
from bench.jobs.operators import backward_operator, gradient_errors, training_forward
from bench.jobs.short_sequences import Rates, Shape, costs
from bench.tables import short_sequences as short_sequences_tables
from bench.tables.markdown import replace_block

KIND = "short-sequences"
TILE_BYTES = 256 << 20
LENGTHS = (14, 60, 256)
SHARES = (0.05, 1.0)
# Largest relative distance of a gradient. TF32 and half precision: the factors of the products are rounded. Twice as
# much for products, for which cuBLAS may split a long sum and add its parts in half precision.
BOUNDS = {"float32": 1e-4, "tf32": 1e-2, "bf16-autocast": 1e-2, "bf16": 1e-2}


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


def group(case: Case, share: float, precision: Precision, device: torch.device) -> list[Job]:
    """Both ways, the products alone and the training forward, of one length and active share."""
    sets = input_sets(case, precision, device)
    generate = distributions.at_share(share)
    drawn = [distributions.draw(generate, case, precision, device, seed) for seed in range(len(sets))]
    exact = truth.backward(*drawn[0], sets[0])
    active, tokens = int((drawn[0][0] > 0).sum()), case.batch_size * case.length
    row = Row(case.name, case.shape, precision.name, _job(share), "", scaled_from=case.scaled_from)
    row = replace(row, real_tokens=tokens, active_share=active / drawn[0][0].numel())
    weigh = weigh_on_gpu(device)
    forward, gather = roofline.forward(case, precision, tokens), roofline.backward(case, precision, active, tokens)

    def check(found: Tensors) -> dict[str, float]:
        return gradient_errors(found, exact)

    def job(variant: str, operations: int, make: Callable[..., Step], *, checked: bool, strict: bool = False) -> Job:
        mine = replace(row, variant=variant, errors={}, operations=operations)

        def steps() -> list[Step]:
            return [make(*pair) for pair in zip(sets, drawn, strict=True)]

        bound = BOUNDS[precision.name] * (1 if strict else 2)
        return Job(mine, steps, check if checked else None, bound, strict, weigh if checked else unweighed)

    def unscreened(inputs: Inputs, _: distributions.Draw) -> Step:
        return training_forward(precision, inputs, screening=False)

    return [
        job("gather", gather.operations, partial(backward_operator, case, precision), checked=True, strict=True),
        job("scatter", 2 * forward.operations, partial(scatter_step, precision), checked=True),
        job("products", 2 * forward.operations, partial(products_step, precision), checked=False),
        job("training-forward", forward.operations, unscreened, checked=False),
    ]


def measure(
    case: Case, share: float, precision: Precision, device: torch.device, seconds: float, rates: Rates
) -> list[dict[str, Any]]:
    """Rows of one group; those of both ways with what the model says at the rates measured here."""
    with precision.settings():
        measured = [asdict(row) for row in rows.run(group(case, share, precision, device), device, seconds)]
    memory.release()
    itemsize = precision.compute_dtype.itemsize
    shape = Shape(case.length, case.batch_size, case.hidden_size, case.vocab_size, itemsize)
    predicted = costs(shape, share, rates)._asdict()
    return [row | {"predicted_forwards": predicted.get(row["variant"])} for row in measured]


def measure_all(
    result: Result, cases: Sequence[Case], shares: Sequence[float], precision: Precision, device: torch.device,
    budget: Budget, seconds: float,
) -> None:  # fmt: skip
    """Add the rows of every case and share while there is time."""
    machine = result.run["machine"][precision.name]
    bandwidth = machine["bytes_per_second"]
    rates = Rates(machine["operations_per_second"], bandwidth, bandwidth, bandwidth)
    if device.type == "cuda" and cases:
        _warm_up(cases[0], precision, device)
    for case in cases:
        for share in shares:
            what = {"case": case.name, "precision": precision.name, "job": _job(share)}
            if not budget.has_room():
                result.leave_out("no time", what)
                continue
            try:
                measured = budget.run(measure, case, share, precision, device, seconds, rates)
            except Exception as error:  # the inputs themselves may not fit
                result.leave_out(rows.reason(error), what)
                continue
            result.add(*measured)
            for row in measured:
                print(short_sequences_tables.line(row), flush=True)
    result.write()


def _job(share: float) -> str:
    return f"active-{100 * share:g}%"


def _warm_up(case: Case, precision: Precision, device: torch.device) -> None:
    """Compile in advance, so that no group's time includes it; other batches and lengths do not compile again."""
    with precision.settings():
        for job in group(replace(case, batch_size=2), 1.0, precision, device):
            job.steps()[0]()
    memory.release()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = options.parser(__doc__, seconds=0.4)
    options.add_device(parser)
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
    shapes = [Case(f"S{n}", args.batch_size, n, args.hidden_size, args.vocab_size) for n in args.length]
    run = {"machine": timing.machine(device, [precision]), "tile_bytes": TILE_BYTES}
    result = Result(KIND, "bench.short_sequences", args.output, append=args.append, run=run)
    cases = [for_device(case, device) for case in shapes]
    measure_all(result, cases, args.share, precision, device, budget, args.seconds)
    red = [row for row in result.rows if rows.is_wrong(row["status"])]
    if red:
        raise SystemExit("\n".join(f"{row['case']} {row['job']} {row['variant']}: {row['status']}" for row in red))
    return result.content


if __name__ == "__main__":
    main()
