"""Measure kernel configurations on the GPU at hand and say which lines the table of tuning.py should have for it.

    python -m bench.tune --output RESULT.json [--kind maximum sum] [--dtype bfloat16] [--size 768x30522]
                         [--budget-seconds 480]
    python -m bench.tune --dry-run --arch 86        # no GPU: what the compiler says of every candidate

The result also serves as it is: ``SPLADE_KERNELS_CONFIG=RESULT.json`` makes the package read its ``table``. Candidates
that spill, exceed the shared memory or do not compile are dropped first; the others must give what the shipped
configuration gives. Both is found out side by side, in processes that a faulty candidate may take down. What is left is
timed in interleaved rounds: 3 for all, 9 for the best dozen, 25 for the best four. The file is rewritten after each of
these steps, and its ``table`` then holds the best configuration so far.
A configuration has to beat the shipped one by ``MARGIN`` to replace it. Forward and backward of sum pooling run with
the configuration of the maximum, and the tiles of the backward are chosen by the hidden size alone, so for those kinds
the result holds the measurements and no entry.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness.result_file import Budget, Result
from bench.harness.side_by_side import side_by_side
from bench.jobs.candidates import DTYPES, KINDS, Config, Question, candidates, examine, refinements, shipped
from splade_kernels.backends.pooling import PoolingCall
from splade_kernels.backends.triton import grad_hidden, launch, max_backward, max_forward, sum_pool
from splade_kernels.backends.triton.tuning import ARCHITECTURES, Shape

SIZES = ((768, 30522), (768, 250002), (1024, 30522), (1024, 250002))
ROUNDS = ((3, 12), (9, 4), (25, 1))
MARGIN = 0.02
_FLUSH_BYTES = 256 << 20
# Cycles that the device waits, about a millisecond, in which the host launches what is timed.
_HEAD_START = 2_000_000

Results = tuple[Tensor | None, ...]
Step = Callable[[], Results]


@dataclass(frozen=True)
class Load:
    """Every token is real; ``active_terms`` of each sequence are active, None: all that happen to be."""

    batch_size: int
    length: int
    active_terms: int | None = None


# What the choice is judged by, both loads together: a configuration may depend on neither.
FORWARD_LOADS = {"32 x 256": Load(32, 256), "32 x 60": Load(32, 60)}
BACKWARD_LOADS = {"32 x 256, most active": Load(32, 256), "32 x 256, 200 active": Load(32, 256, 200)}
# What results are compared on: lengths and words that fill no tile, and in the longest tiles one sequence alone.
CHECKED_LOAD = Load(3, 300)
# The second where the vocabulary is a multiple of 16, which kernels are compiled anew for: what is timed is checked.
CHECKED_VOCAB_SIZES = 4099, 4112


def loads(question: Question) -> dict[str, Load]:
    return BACKWARD_LOADS if question.kind.startswith("backward") else FORWARD_LOADS


def step(question: Question, load: Load, device: str, exact: bool = False) -> Callable[[Config], Results]:
    """What runs the operator's body as the package does, with a given configuration in place of its own.

    ``exact``: small integers, whose products and sums no order of addition changes.
    """
    dtype = DTYPES[question.dtype][1]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        if exact:
            return torch.randint(-2, 3, shape, generator=generator, device=device).to(dtype)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    kind = question.kind
    call = PoolingCall(
        load.batch_size, None, None, load.length, "sum" if kind == "sum" else "max", "relu", dtype, torch.float32,
        need_argmax=kind != "sum", need_hidden=kind != "backward-weight", need_weight=kind != "backward-hidden",
        need_bias=kind != "backward-hidden",
    )  # fmt: skip
    hidden = draw(load.batch_size * load.length, question.hidden_size)
    weight = draw(question.vocab_size, question.hidden_size)
    if not exact:
        weight *= question.hidden_size**-0.5
    bias = weight.new_zeros(question.vocab_size)
    grad = draw(load.batch_size, question.vocab_size).float()
    if kind == "maximum":
        return lambda config: _with(
            max_forward, "matmul_config", config, lambda: max_forward.max_pool_forward(call, hidden, weight, bias)
        )
    if kind == "sum":
        return lambda config: _with(
            sum_pool,
            "matmul_config",
            config,
            lambda: (
                *(found := sum_pool.sum_pool_forward(call, hidden, weight, bias))[:1],
                *sum_pool.sum_pool_backward(call, grad, *found, hidden, weight, bias),
            ),
        )
    output, argmax = max_forward.max_pool_forward(call, hidden, weight, bias)
    if load.active_terms is not None:
        least = output.topk(min(load.active_terms, question.vocab_size), dim=1).values[:, -1:]
        output = torch.where(output >= least, output, 0)
    module, name = (max_backward, "weight_config") if kind == "backward-weight" else (grad_hidden, "hidden_config")
    return lambda config: _with(
        module,
        name,
        config,
        lambda: max_backward.max_pool_backward(call, grad, output, argmax, hidden, weight, bias),
    )


def _with(module: Any, name: str, config: Config, run: Step) -> Results:
    with mock.patch.object(module, name, lambda *args, **kwargs: config):
        return run()


def disagreement(question: Question, config: Config, device: str) -> str | None:
    """How a candidate's results differ from the shipped configuration's, on exact integers; None if they do not.

    Dots are exact, so maxima and positions have to be equal; sums of activated values are only as close as rounding.
    """
    largest = CHECKED_VOCAB_SIZES[question.vocab_size % 16 == 0]
    small = dataclasses.replace(question, vocab_size=min(question.vocab_size, largest))
    run = step(small, CHECKED_LOAD, device, exact=True)
    # So few programs that a persistent one walks many tiles, as it will.
    with mock.patch.object(launch, "multiprocessors", lambda device: 3):
        pairs = list(zip(run(config), run(shipped(question)), strict=True))
    for number, (ours, theirs) in enumerate(pairs):
        if ours is None or theirs is None:
            continue
        error = (ours.double() - theirs.double()).abs().max().item()
        bound = 0.0
        if question.kind != "maximum":
            bound = 32 * torch.finfo(ours.dtype).eps * theirs.abs().max().item()
        if not error <= bound:
            return f"result {number} differs by {error:.3g} from the shipped configuration's, more than {bound:.3g}"
    return None


def tournament(
    entrants: Sequence[Config], first: Config, time_once: Callable[[Config], float], rounds: Iterable[tuple[int, int]]
) -> dict[Config, list[float]]:
    """Times of all, by interleaved rounds that fewer and fewer survive; ``first`` always does.

    Args:
        time_once: seconds (any unit) of one run; the score of a configuration is its median.
        rounds: ``(rounds, how many survive them)``.
    """
    times: dict[Config, list[float]] = {config: [] for config in entrants}
    alive = list(entrants)
    for count, survivors in rounds:
        for config in alive:
            times[config].clear()
        for _ in range(count):
            for config in alive:
                times[config].append(time_once(config))
        ranked = sorted(alive, key=lambda config: statistics.median(times[config]))
        alive = list(dict.fromkeys([first, *ranked[:survivors]]))
    return times


def choose(times: dict[Config, list[float]], first: Config) -> tuple[Config, float]:
    """The fastest of those timed as often as ``first`` if it wins by ``MARGIN``, and its time over ``first``'s."""
    baseline = statistics.median(times[first])
    finalists = [config for config in times if len(times[config]) == len(times[first])]
    best = min(finalists, key=lambda config: statistics.median(times[config]))
    ratio = statistics.median(times[best]) / baseline
    return (best, ratio) if ratio <= 1 - MARGIN else (first, 1.0)


def verdict(question: Question, config: Config, device: str) -> list[str]:
    """Why a candidate is out before it is timed: what the compiler says of it, or another result than the shipped
    configuration's. What it compiles here is what is timed, from Triton's cache."""
    # As in the process that times it: TF32 has to be allowed for the package to take it.
    torch.backends.cuda.matmul.allow_tf32 = True
    _, problems = examine(question, config)
    if config == shipped(question):
        problems = [problem for problem in problems if "spills" not in problem]  # what others are measured against
    difference = None if problems else disagreement(question, config, device)
    return problems if difference is None else [difference]


def admit(question: Question, configs: Sequence[Config], device: str) -> tuple[list[Config], list[dict[str, Any]]]:
    """The configurations to be timed, and a row for each of the others: dropped, and why."""
    admitted, rows = [], []
    tasks = [(question, config, device) for config in configs]
    for config, found in zip(configs, side_by_side(verdict, tasks), strict=True):
        dropped = [found] if isinstance(found, str) else found
        if dropped:
            rows.append(_row(question, config, dropped=dropped))
        else:
            admitted.append(config)
    return admitted, rows


def measure(
    question: Question, device: str, keep: Callable[[Config, list[dict[str, Any]]], None] = lambda best, rows: None
) -> tuple[Config, list[dict[str, Any]]]:
    """The configuration to take, and a row for every candidate: dropped and why, or its time over the shipped one's.

    ``keep(best, rows)`` is called with what is known so far, which a later call replaces.
    """
    first = shipped(question)
    entrants, dropped_rows = admit(question, candidates(question), device)
    if first not in entrants:
        raise SystemExit(f"the shipped configuration {first} of {question} is unusable: {dropped_rows[0]['dropped']}")
    keep(first, dropped_rows)
    runs = [step(question, load, device) for load in loads(question).values()]
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    single = {run: statistics.median(_milliseconds(run, first, flush) for _ in range(5)) for run in runs}

    def relative(config: Config) -> float:
        """Mean over the loads of the time against the shipped configuration's, so that no load outweighs the other."""
        return statistics.fmean(_milliseconds(run, config, flush) / single[run] for run in runs)

    for config in entrants:
        relative(config)  # compiles
    times = tournament(entrants, first, relative, ROUNDS)
    best, _ = choose(times, first)
    keep(best, dropped_rows + _timed(question, times, first))
    # Of the best, which has passed, another kernel each.
    refined, more_dropped = admit(question, refinements(best, question.kind), device)
    dropped_rows += more_dropped
    if len(refined) > 1:
        again = tournament(list(dict.fromkeys([first, *refined])), first, relative, ((25, 1),))
        times |= again
        best, _ = choose(again, first)
    rows = dropped_rows + _timed(question, times, first)
    shipped_milliseconds = dict(zip(loads(question), single.values(), strict=True))
    rows.append(_row(question, best, chosen=True, shipped_milliseconds=shipped_milliseconds))
    keep(best, rows)
    return best, rows


def _timed(question: Question, times: dict[Config, list[float]], first: Config) -> list[dict[str, Any]]:
    shipped_time = statistics.median(times[first])
    return [
        _row(question, config, time_over_shipped=statistics.median(samples) / shipped_time, rounds=len(samples))
        for config, samples in times.items()
    ]


def _row(question: Question, config: Config, **more: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    # In one column of a table, what the package reads in another form.
    text = ", ".join(f"{name} {value}" for name, value in fields.items())
    return {**dataclasses.asdict(question), "configuration": text, "config": fields, **more}


def _milliseconds(run: Callable[[Config], Results], config: Config, flush: Tensor) -> float:
    """One run by the device's clock, its operands out of the L2 cache and the host ahead of the device."""
    flush.zero_()
    torch.cuda._sleep(_HEAD_START)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(config)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def source_line(question: Question, config: Config) -> str:
    """The line for ``TUNED`` in tuning.py; for the backward what its function of the hidden size should return."""
    if question.kind == "maximum":
        shape = Shape(question.arch, question.dtype, question.hidden_size, question.vocab_size)
        return f"    {shape}: {config},"
    return f"    # {question.kind}, sm_{question.arch}, {question.dtype}, D {question.hidden_size}: {config}"


def questions(args: argparse.Namespace, arch: int) -> Iterator[Question]:
    """In the order of their use; the backward asks for D alone."""
    for kind, dtype, (hidden_size, vocab_size) in itertools.product(args.kind, args.dtype, args.size):
        if not (kind.startswith("backward") and vocab_size != args.size[0][1]):
            yield Question(kind, arch, dtype, hidden_size, vocab_size)


def dry_run(args: argparse.Namespace, arch: int) -> list[dict[str, Any]]:
    """Compile the candidates, print what each needs and what would be measured; returns the rows."""
    rows = []
    for question in questions(args, arch):
        kept = 0
        # Kernels are compiled once for all sizes; only the tiles of the backward follow D.
        if question.vocab_size == args.size[0][1] and (
            question.kind.startswith("backward") or question.hidden_size == args.size[0][0]
        ):
            for config in candidates(question)[: args.limit]:
                compiled, problems = examine(question, config)
                kept += not problems
                needs = [
                    {
                        "kernel": row.kernel,
                        "registers": row.registers,
                        "spilled": row.spill_bytes,
                        "shared": row.shared_bytes,
                    }
                    for row in compiled
                ]
                rows.append(_row(question, config, compiled=needs, dropped=problems))
                print(f"{question.kind} sm_{arch} {question.dtype} {config}")
                for need in needs:
                    print(
                        "    {kernel:28} {registers:4} registers {spilled:5} spilled {shared:7} shared".format(**need)
                    )
                for problem in problems:
                    print(f"    dropped: {problem}")
        print(
            f"would measure {question.kind} for D {question.hidden_size}, V {question.vocab_size}, {question.dtype}: "
            f"{' and '.join(loads(question))}"
        )
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the result as JSON, rewritten after every shape")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--size", type=_size, nargs="+", default=[*SIZES], metavar="DxV", help="hidden and vocabulary")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--dry-run", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="for --dry-run; default: the GPU at hand")
    parser.add_argument("--limit", type=int, help="for --dry-run: the first N candidates of each kind")
    args = parser.parse_args(arguments)
    if args.arch is None and not torch.cuda.is_available():
        parser.error("no CUDA device: expected --dry-run with --arch")
    if args.arch is not None and not args.dry_run:
        parser.error("--arch: the GPU at hand is what is tuned; expected --dry-run with it")
    return args


def _size(text: str) -> tuple[int, int]:
    hidden_size, vocab_size = map(int, text.split("x"))
    if hidden_size < 1 or vocab_size < 1:
        raise ValueError(f"--size: expected positive sizes such as 768x30522, got {text}")
    return hidden_size, vocab_size


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    if args.dry_run:
        arch = args.arch or _architecture()
        return {"architecture": arch, "rows": dry_run(args, arch)}
    arch = _architecture()
    budget = Budget(args.budget_seconds)
    result = Result("tuning", "bench.tune", args.output, architecture=arch, table=[])
    # TF32 has to be allowed for the package to take it: the choice is between its configurations.
    torch.backends.cuda.matmul.allow_tf32 = True
    lines = []
    for question in questions(args, arch):
        # The first question started the processes and compiled what the next ones find.
        if not budget.has_time():
            result.content["left_out"].append(dataclasses.asdict(question))
            continue
        before = len(result.rows), len(result.content["table"])

        def keep(best: Config, rows: list[dict[str, Any]], question: Question = question, before: Any = before) -> None:
            result.rows[before[0] :] = rows
            if question.kind == "maximum":
                shape = Shape(arch, question.dtype, question.hidden_size, question.vocab_size)
                result.content["table"][before[1] :] = [{**shape._asdict(), "config": dataclasses.asdict(best)}]
            result.write()

        best, _ = measure(question, "cuda", keep)
        lines.append(source_line(question, best))
    result.write()
    print("\n".join(lines))
    return result.content


def _architecture() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


if __name__ == "__main__":
    main()
