"""Whole training steps through ``SparseEncoderTrainer``, stock and fused: time, GPU time and peak memory of a step.

    python -m bench.training --output RESULT.json [--model distilbert] [--case gooaq full] [--budget-seconds 300]

Models have random weights and the size of DistilBERT (6 layers, V 30522) and of XLM-R base (12 layers, V 250002). Texts
have the lengths of GooAQ's, or ``max-length`` tokens each. Before anything is timed, the losses of stock and fused must
agree step by step from the same seed. On a CPU the models are scaled down unless ``--layers``, ``--hidden-size``,
``--batch-size`` and ``--max-length`` say otherwise. The file is rewritten after every row, so that what was measured
survives an end by timeout; what the budget leaves no room for is named in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.harness.result_file import Budget, Result
from bench.inputs import encoders
from bench.jobs.training import Job, measure, step_losses
from bench.tables.training import table

HEADS = ("stock", "fused")
# Losses of one run, stock against fused, from the same seed. In bf16 stock rounds its logits, and fused does not.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
CHECK_STEPS = 4
SPARSE_TERMS = 200
# The run of the model card tomaarsen/splade-distilbert-base-uncased-gooaq on one RTX 3090.
SEED_RUN = {"steps": 94_110, "pairs_per_batch": 32, "max_length": 256, "hours_on_its_rtx_3090": 3.894}

# Command-line defaults: on a GPU what users train, on a CPU what it can do in minutes.
GPU_DEFAULTS = {"layers": None, "hidden_size": None, "batch_size": 32, "max_length": 256, "timed_steps": 20}
CPU_DEFAULTS = {"layers": 2, "hidden_size": 128, "batch_size": 4, "max_length": 64, "timed_steps": 3}


# What a job is changed to, by name. Most telling first, since a budget may cut the list; both heads are measured.
CASES: dict[str, dict[str, Any]] = {
    "gooaq": {"lengths": "gooaq", "active_terms": SPARSE_TERMS},
    "full": {"lengths": "full", "active_terms": None},
    "gooaq-all-active": {"lengths": "gooaq", "active_terms": None},
    "full-checkpointing": {"lengths": "full", "active_terms": None, "gradient_checkpointing": True},
}


def cases(job: Job, names: Sequence[str] = tuple(CASES)) -> Iterator[Job]:
    for name in names:
        yield replace(job, **CASES[name])


def check(job: Job) -> dict[str, Any]:
    """Losses of stock and fused from the same seed, in float32 and in the job's precision.

    Raises:
        SystemExit: they differ by more than ``TOLERANCE``.
    """
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


def predictions(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Hours of the seed's run on this GPU: its number of steps times the wall clock of a measured one.

    Only steps like its own count: DistilBERT in full size, batches of 32 pairs with GooAQ's lengths, bf16. Evaluation,
    which the hours of the model card may contain, is left out.
    """
    like_seed = {
        "model": "distilbert",
        "layers": encoders.SIZES["distilbert"].layers,
        "hidden_size": encoders.SIZES["distilbert"].hidden_size,
        "lengths": "gooaq",
        "precision": "bf16",
        "gradient_checkpointing": False,
        "pairs_per_batch": SEED_RUN["pairs_per_batch"],
        "max_length": SEED_RUN["max_length"],
        "device": "cuda",
        "out_of_memory": False,
    }
    found = []
    chosen = [row for row in rows if all(row.get(key) == value for key, value in like_seed.items())]
    for terms in dict.fromkeys(row["active_terms"] for row in chosen):
        step = {row["head"]: row["wall_ms_per_step"] for row in chosen if row["active_terms"] == terms}
        if set(step) != set(HEADS):
            continue
        hours = {head: SEED_RUN["steps"] * step[head] / 3.6e6 for head in HEADS}
        found.append(
            {
                "predicted_for": device,
                "active_terms": terms,
                "steps": SEED_RUN["steps"],
                "stock_hours": hours["stock"],
                "fused_hours": hours["fused"],
                "stock_over_fused": hours["stock"] / hours["fused"],
            }
        )
    return found


def _run(work: Callable[[Job], Any], job: Job) -> Any:
    """On a CPU in a process of its own, whose resident set is the run's alone. A GPU's allocator counts by itself."""
    if job.device == "cuda":
        return work(job)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, job).result()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--model", nargs="+", choices=[*encoders.SIZES], default=[*encoders.SIZES])
    parser.add_argument("--case", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--layers", type=int, help="default: the model's own; 2 on a CPU")
    parser.add_argument("--hidden-size", type=int, help="default: the model's own; 128 on a CPU")
    parser.add_argument("--vocab-size", type=int, help="default: the model's own")
    parser.add_argument("--batch-size", type=int, help="pairs; default: 32, on a CPU 4")
    parser.add_argument("--max-length", type=int, help="tokens; default: 256, on a CPU 64")
    parser.add_argument("--timed-steps", type=int, help="default: 20, on a CPU 3")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16, on a CPU fp32")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    args = parser.parse_args(arguments)
    on_device = torch.cuda.is_available()
    for name, value in (GPU_DEFAULTS if on_device else CPU_DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.precision = args.precision or ("bf16" if on_device else "fp32")
    args.device = "cuda" if on_device else "cpu"
    return args


def size_of(name: str, args: argparse.Namespace) -> encoders.Size:
    changes = {key: getattr(args, key) for key in ("layers", "hidden_size", "vocab_size") if getattr(args, key)}
    return replace(encoders.SIZES[name], **changes)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    budget = Budget(args.budget_seconds)
    result = Result("training", "bench.training", args.output, seed_run=SEED_RUN, checks={}, predictions=[])
    with tempfile.TemporaryDirectory() as root:
        for name in args.model:
            size = size_of(name, args)
            folder = Path(root) / name
            encoders.build(size, args.max_length, folder)
            job = Job(
                str(folder), "stock", args.batch_size, args.max_length, "gooaq", args.precision, args.device,
                active_terms=SPARSE_TERMS, timed_steps=args.timed_steps,
                profiled_steps=3 if args.device == "cuda" else 0,
            )  # fmt: skip
            if not budget.has_room():
                result.content["left_out"].append({"model": name})
                continue
            result.content["checks"][name] = budget.run(check, job)
            for case in cases(job, args.case):
                for head in HEADS:
                    described = {"model": name, **vars(size)}
                    if not budget.has_room():
                        left = {"head": head, "lengths": case.lengths, "active_terms": case.active_terms}
                        result.content["left_out"].append(described | left)
                        continue
                    row = budget.run(_run, measure, replace(case, head=head))
                    result.add(described | row)
    result.content["predictions"] = predictions(result.rows, str(result.content["environment"]["device"]))
    result.write()
    print(table(result.content))
    return result.content


if __name__ == "__main__":
    main()
