"""The largest batch whose training step fits the memory of an RTX 3090, stock and fused. Needs a CUDA device.

    python -m bench.limits --output RESULT.json [--append] [--model distilbert --max-length 256 512] [--budget 300]

A larger GPU stands in for the smaller one: PyTorch's allocator is limited to 24 GiB less an allowance for what lies
outside of it (the CUDA context, the loaded kernels, the display). A trial is two steps of the user's training, so that
the second one runs beside the optimizer's state, with every token of both texts of every pair real. Sizes are doubled
until one does not fit and then bisected to within ``--resolution``. Models and training are those of
:mod:`bench.training`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench.harness import memory, options
from bench.harness.result_file import Budget, Result
from bench.inputs import encoders
from bench.jobs.training import Job, load, named, train
from bench.tables.training import limits_table
from bench.training import HEADS

TOTAL_GIB, ALLOWANCE_GIB = 24.0, 1.0
PRECISION = "bf16"
TRIAL_STEPS = 2
START = 8
KEY = ("model", "layers", "hidden_size", "vocab_size", "max_length", "precision", "gradient_checkpointing", "head")


class Largest(NamedTuple):
    """``fits`` is the largest size that was seen to fit (0: none), ``fails`` the smallest that did not (None: the
    search ended first)."""

    fits: int
    fails: int | None

    def complete(self, resolution: float) -> bool:
        return self.fails is not None and self.fails - self.fits <= max(1, resolution * self.fits)


def largest(fits: Callable[[int], bool], start: int, resolution: float, may_go_on: Callable[[], bool]) -> Largest:
    """Doubling from ``start`` until a size does not fit, then bisection until the gap is within ``resolution``."""
    found, size = Largest(0, None), start
    while may_go_on() and not found.complete(resolution):
        found = Largest(size, found.fails) if fits(size) else Largest(found.fits, size)
        size = 2 * found.fits if found.fails is None else (found.fits + found.fails) // 2
    return found


def hold_memory() -> float:
    """Limit PyTorch's allocator to what an RTX 3090 has for it; returns the share of this GPU's memory."""
    if not torch.cuda.is_available():
        raise SystemExit("bench.limits needs a CUDA device: a CPU has no limit of its own to find")
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    wanted = TOTAL_GIB - ALLOWANCE_GIB
    if total < wanted:
        raise SystemExit(f"bench.limits: expected a GPU with at least {wanted} GiB, got {total:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(wanted / total)
    return wanted / total


def search(job: Job, resolution: float, may_go_on: Callable[[], bool]) -> dict[str, Any]:
    """Largest number of pairs of ``job``, whose own ``batch_size`` is where the search begins."""
    model = load(job)
    seen: dict[str, Any] = {}

    def trial(size: int) -> None:
        dataset = encoders.pairs(TRIAL_STEPS * size, "full", job.max_length, len(model.tokenizer))
        memory.reset_peak(cuda=True)
        trainer = train(model, dataset, replace(job, batch_size=size), TRIAL_STEPS)
        seen.update(named(model, trainer), peak_memory_mib_at_largest=memory.peak(cuda=True) / 2**20)

    def fits(size: int) -> bool:
        fitted = True
        try:
            trial(size)
        except torch.cuda.OutOfMemoryError:
            fitted = False
        # Not in a handler: there, the exception's frames still hold what the trial allocated.
        model.zero_grad(set_to_none=True)
        memory.release()
        return fitted

    found = largest(fits, job.batch_size, resolution, may_go_on)
    return {
        **dict.fromkeys(("attention", "optimizer", "peak_memory_mib_at_largest")),
        **seen,
        "largest_pairs": found.fits,
        "smallest_pairs_that_failed": found.fails,
        "complete": found.complete(resolution),
        "held_by_weights_alone_mib": torch.cuda.memory_allocated() / 2**20,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = options.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=[*encoders.SIZES], default=[*encoders.SIZES])
    parser.add_argument("--max-length", type=int, nargs="+", default=[256, 512], help="tokens of every text")
    parser.add_argument("--start", type=int, default=START, help="pairs that the search begins with")
    parser.add_argument("--no-checkpointing", action="store_true", help="leave gradient checkpointing out")
    parser.add_argument("--resolution", type=float, default=0.03, help="largest gap to a size that failed, relative")
    args = parser.parse_args(arguments)
    share = hold_memory()
    budget = Budget(args.budget)
    limit = {
        "total_gib": TOTAL_GIB,
        "allowance_gib": ALLOWANCE_GIB,
        "share_of_this_gpu": share,
        "precision": PRECISION,
        "resolution": args.resolution,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }
    result = Result("limits", "bench.limits", args.output, append=args.append, key=KEY, run={"limit": limit})
    for max_length, name, checkpointing, head in itertools.product(
        args.max_length, args.model, (False,) if args.no_checkpointing else (False, True), HEADS
    ):
        size = encoders.SIZES[name]
        job = Job(
            encoders.build(size, max(args.max_length)), head, args.start, max_length, "full", PRECISION, "cuda",
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        chosen = {"head": head, "max_length": max_length, "precision": PRECISION}
        described = {"model": name, **vars(size), **chosen, "gradient_checkpointing": checkpointing}
        result.attempt(budget, described, search, job, args.resolution, budget.has_time)
    print(limits_table(result.by_device()[-1]))
    result.finish()
    return result.content


if __name__ == "__main__":
    main()
