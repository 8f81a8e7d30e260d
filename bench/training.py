"""Whole training steps through ``SparseEncoderTrainer``, stock and fused: time, GPU time and peak memory of a step.

    python -m bench.training --output RESULT.json [--append] [--model distilbert] [--case gooaq full] [--budget 300]

Models have random weights and the size of DistilBERT (6 layers, V 30522) and of XLM-R base (12 layers, V 250002). Texts
have the lengths of GooAQ's, or ``max-length`` tokens each. Before anything is timed, the losses of stock and fused must
agree step by step from the same seed. On a CPU the models are scaled down unless ``--layers``, ``--hidden-size``,
``--batch-size`` and ``--max-length`` say otherwise. The file is rewritten after every row; what the budget leaves no
room for is named in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.harness import memory, options
from bench.harness.result_file import Budget, Result
from bench.inputs import encoders
from bench.jobs.training import Job, measure, step_losses
from bench.tables.training import training_table

HEADS = ("stock", "fused")
# Losses of one run, stock against fused, from the same seed. In bf16 stock rounds its logits, and fused does not.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
CHECK_STEPS = 4
SPARSE_TERMS = 200
# What makes two rows the same measurement.
KEY = ("model", "layers", "hidden_size", "vocab_size", "pairs_per_batch", "max_length", "lengths", "active_terms",
       "gradient_checkpointing", "precision", "head")  # fmt: skip

# Command-line defaults: on a GPU what users train, on a CPU what it can do in minutes.
GPU = {"device": "cuda", "precision": "bf16", "batch_size": 32, "max_length": 256, "timed_steps": 20}
CPU = {"device": "cpu", "precision": "fp32", "batch_size": 4, "max_length": 64, "timed_steps": 3}
CPU |= {"layers": 2, "hidden_size": 128}

# What a job with all terms active is changed to, by name. Most telling first, since a budget may cut the list; both
# heads are measured.
CASES: dict[str, dict[str, Any]] = {
    "gooaq": {"lengths": "gooaq", "active_terms": SPARSE_TERMS},
    "full": {"lengths": "full"},
    "gooaq-all-active": {"lengths": "gooaq"},
    "full-checkpointing": {"lengths": "full", "gradient_checkpointing": True},
}


def check(job: Job) -> dict[str, Any]:
    """Losses of stock and fused from the same seed, in float32 and in the job's precision. If they differ by more than
    ``TOLERANCE``, the command ends."""
    found: dict[str, Any] = {}
    short = replace(job, batch_size=min(8, job.batch_size), warm_up_steps=0, profiled_steps=0, timed_steps=CHECK_STEPS)
    for precision in dict.fromkeys(("fp32", job.precision)):
        stock, fused = (_run(step_losses, replace(short, precision=precision, head=head)) for head in HEADS)
        difference = max(abs(a - b) / abs(b) for a, b in zip(fused, stock, strict=True))
        found[precision] = {
            "steps": len(stock),
            "pairs_per_batch": short.batch_size,
            "tolerance": TOLERANCE[precision],
            "largest_relative_difference": difference,
            "stock_losses": stock,
            "fused_losses": fused,
        }
        if not difference <= TOLERANCE[precision]:
            raise SystemExit(f"losses of stock and fused disagree: {found[precision]}")
    return found


def _run(work: Callable[[Job], Any], job: Job) -> Any:
    """On a CPU in a process of its own, whose resident set is the run's alone; a GPU's allocator counts by itself."""
    return work(job) if job.device == "cuda" else memory.in_a_process(work, job)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = options.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=[*encoders.SIZES], default=[*encoders.SIZES])
    parser.add_argument("--case", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--layers", type=int, help="default: the model's own; 2 on a CPU")
    parser.add_argument("--hidden-size", type=int, help="default: the model's own; 128 on a CPU")
    parser.add_argument("--vocab-size", type=int, help="default: the model's own")
    parser.add_argument("--batch-size", type=int, help="pairs; default: 32, on a CPU 4")
    parser.add_argument("--max-length", type=int, help="tokens; default: 256, on a CPU 64")
    parser.add_argument("--timed-steps", type=int, help="default: 20, on a CPU 3")
    parser.set_defaults(**(GPU if torch.cuda.is_available() else CPU))
    args = parser.parse_args(arguments)
    budget = Budget(args.budget)
    result = Result("training", "bench.training", args.output, append=args.append, key=KEY, run={"checks": {}})
    for name in args.model:
        changes = {key: getattr(args, key) for key in ("layers", "hidden_size", "vocab_size") if getattr(args, key)}
        size = replace(encoders.SIZES[name], **changes)
        if not budget.has_room():
            result.leave_out("no time", {"model": name})
            continue
        job = Job(
            encoders.build(size, args.max_length), "stock", args.batch_size, args.max_length, "gooaq", args.precision,
            args.device, active_terms=SPARSE_TERMS, timed_steps=args.timed_steps,
            profiled_steps=3 if args.device == "cuda" else 0,
        )  # fmt: skip
        result.run["checks"][name] = budget.run(check, job)
        for case, head in itertools.product(args.case, HEADS):
            changed = {"active_terms": None, "head": head, **CASES[case]}
            result.attempt(
                budget,
                {"model": name, **vars(size), **changed},
                lambda job: _run(measure, job),
                replace(job, **changed),
            )
    print(training_table(result.by_device()[-1]))
    result.finish()
    return result.content


if __name__ == "__main__":
    main()
