"""Measure kernel configurations on the GPU at hand and write the table of the best ones.

    python -m bench.tune --output RESULT.json [--kind maximum sum] [--dtype bfloat16] [--size 768x30522]
                         [--budget 480]
    python -m bench.tune --dry-run --arch 86        # no GPU: what the compiler says of every candidate

The package reads the result as it is, from ``SPLADE_KERNELS_CONFIG=RESULT.json`` or where it ships (docs/tuning.md).
Candidates that spill, exceed the shared memory or do not compile are dropped first; the others must give the results of
the default configuration. Both checks run side by side, in processes that a faulty candidate may take down. The rest is
timed in interleaved rounds: 3 for all, 9 for the best dozen, 25 for the best four. The file is rewritten after each of
these steps, and its ``table`` then holds the best configuration so far. A configuration has to beat the default one by
``MARGIN`` to replace it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.options import plain
from bench.harness.result_file import Budget, Result
from bench.harness.side_by_side import side_by_side
from bench.jobs.candidates import DTYPES, candidates, examine, refinements, shipped
from splade_kernels.backends.pooling import PoolingCall
from splade_kernels.backends.triton import tuning
from splade_kernels.backends.triton.max_backward import max_pool_backward
from splade_kernels.backends.triton.max_forward import max_pool_forward
from splade_kernels.backends.triton.sum_pool import sum_pool_backward, sum_pool_forward
from splade_kernels.backends.triton.tuning import Config, MatmulConfig, Shape

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


# The choice is judged by all loads of a kind together, since a configuration may depend on none of them.
FORWARD_LOADS = {"32 x 256": Load(32, 256), "32 x 60": Load(32, 60), "64 x 512": Load(64, 512)}
BACKWARD_LOADS = {"32 x 256, most active": Load(32, 256), "32 x 256, 200 active": Load(32, 256, 200)}
# What results are compared on: sizes that fill no tile, and sequences longer than any tile.
CHECKED_LOAD = Load(3, 300)
# The second where the vocabulary is a multiple of 16: Triton compiles another kernel for it, and that one is timed.
CHECKED_VOCAB_SIZES = 4099, 4112


def loads(shape: Shape) -> dict[str, Load]:
    return BACKWARD_LOADS if shape.kind.startswith("backward") else FORWARD_LOADS


def step(shape: Shape, load: Load, device: str, exact: bool = False) -> Callable[[Any], Results]:
    """What runs the kernels of the shape's kind as the package does, with a given configuration.

    ``exact``: small integers, whose products and sums no order of addition changes.
    """
    kind, dtype = shape.kind, DTYPES[shape.dtype][1]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        if exact:
            return torch.randint(-2, 3, size, generator=generator, device=device).to(dtype)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    call = PoolingCall(
        batch_size=load.batch_size,
        attention_mask=None,
        cu_seqlens=None,
        max_seqlen=load.length,
        pooling_strategy="sum" if kind == "sum" else "max",
        activation_function="relu",
        compute_dtype=dtype,
        out_dtype=torch.float32,
        screening="on" if kind == "int8" else "off",
        need_argmax=kind not in ("sum", "int8"),
        need_hidden=kind != "backward-weight",
        need_weight=kind != "backward-hidden",
        need_bias=kind != "backward-hidden",
    )
    hidden = draw(load.batch_size * load.length, shape.hidden_size)
    weight = draw(shape.vocab_size, shape.hidden_size)
    if not exact:
        weight *= shape.hidden_size**-0.5
    bias = weight.new_zeros(shape.vocab_size)
    if kind == "int8":
        # Four standard deviations of a logit below 0: few pairs survive, as in a trained model.
        bias -= round(8 * shape.hidden_size**0.5) if exact else 4
    grad = draw(load.batch_size, shape.vocab_size).float()
    inputs = hidden, weight, bias
    if kind == "sum":

        def both(config: MatmulConfig) -> Results:
            output, argmax = sum_pool_forward(call, *inputs, config)
            return output, *sum_pool_backward(call, grad, output, argmax, *inputs, config)

        return both
    if kind == "int8":
        return lambda config: max_pool_forward(call, *inputs, int8_config=config)[:1]
    if kind == "maximum":
        return lambda config: max_pool_forward(call, *inputs, config)
    output, argmax = max_pool_forward(call, *inputs)
    if load.active_terms is not None:
        least = output.topk(min(load.active_terms, shape.vocab_size), dim=1).values[:, -1:]
        output = torch.where(output >= least, output, 0)
    backward = partial(max_pool_backward, call, grad, output, argmax, *inputs)
    if kind == "backward-weight":
        return lambda config: backward(weight_config=config)
    return lambda config: backward(hidden_config=config)


def disagreement(shape: Shape, config: Config, device: str) -> str | None:
    """How a candidate's results differ from those of the default configuration, on integers; None if they do not.

    Dots are exact, so maxima and positions have to be equal; sums of activated values may differ by rounding.
    """
    largest = CHECKED_VOCAB_SIZES[shape.vocab_size % 16 == 0]
    small = shape._replace(vocab_size=min(shape.vocab_size, largest))
    if isinstance(config, MatmulConfig):
        # So few programs that each walks many tiles, as with a real vocabulary.
        config = dataclasses.replace(config, programs=3)
    run = step(small, CHECKED_LOAD, device, exact=True)
    for number, (ours, theirs) in enumerate(zip(run(config), run(shipped(shape)), strict=True)):
        if ours is None or theirs is None:
            continue
        error = (ours.double() - theirs.double()).abs().max().item()
        bound = 0.0
        if shape.kind not in ("maximum", "int8"):
            bound = 32 * torch.finfo(ours.dtype).eps * theirs.abs().max().item()
        if not error <= bound:
            return f"result {number} differs by {error:.3g} from the shipped configuration's, more than {bound:.3g}"
    return None


def tournament(
    entrants: Sequence[Config], first: Config, time_once: Callable[[Config], float], rounds: Iterable[tuple[int, int]]
) -> dict[Config, list[float]]:
    """Times of all entrants in interleaved rounds, ``(rounds, how many survive them)``, that ``first`` always survives.
    ``time_once`` gives the time of one run in any unit; the score of a configuration is its median."""
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


def verdict(shape: Shape, config: Config, device: str) -> list[str]:
    """Why a candidate is dropped before it is timed: the compiler's problems, or a wrong result. The kernels that this
    compiles are timed later, from Triton's cache."""
    # As in the process that times: the package uses TF32 only where it is allowed.
    torch.backends.cuda.matmul.allow_tf32 = True
    _, problems = examine(shape, config)
    if config == shipped(shape):
        problems = [problem for problem in problems if "spills" not in problem]  # the others are compared with it
    difference = None if problems else disagreement(shape, config, device)
    return problems if difference is None else [difference]


def admit(shape: Shape, configs: Sequence[Config], device: str) -> tuple[list[Config], list[dict[str, Any]]]:
    """The configurations to be timed, and a row for each of the others that says why it was dropped."""
    admitted, rows = [], []
    tasks = [(shape, config, device) for config in configs]
    for config, found in zip(configs, side_by_side(verdict, tasks), strict=True):
        dropped = [found] if isinstance(found, str) else found
        if dropped:
            rows.append(_row(shape, config, dropped=dropped))
        else:
            admitted.append(config)
    return admitted, rows


def measure(
    shape: Shape, device: str, keep: Callable[[Config, list[dict[str, Any]]], None] = lambda best, rows: None
) -> tuple[Config, list[dict[str, Any]]]:
    """The configuration to take, and a row for every candidate: dropped and why, or its time over the shipped one's.

    ``keep(best, rows)`` is called with what is known so far, which a later call replaces.
    """
    first = shipped(shape)
    entrants, dropped_rows = admit(shape, candidates(shape), device)
    if first not in entrants:
        raise SystemExit(f"the shipped configuration {first} of {shape} is unusable: {dropped_rows[0]['dropped']}")
    keep(first, dropped_rows)
    runs = [step(shape, load, device) for load in loads(shape).values()]
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    single = {run: statistics.median(_milliseconds(run, first, flush) for _ in range(5)) for run in runs}

    def relative(config: Config) -> float:
        """Mean over the loads of the time over the default's, so that no load outweighs the other."""
        return statistics.fmean(_milliseconds(run, config, flush) / single[run] for run in runs)

    for config in entrants:
        relative(config)  # compiles
    times = tournament(entrants, first, relative, ROUNDS)
    best, _ = choose(times, first)
    keep(best, dropped_rows + _timed(shape, times, first))
    # Refinements of the best are kernels of their own and have to pass as well.
    refined, more_dropped = admit(shape, refinements(best, shape.kind), device)
    dropped_rows += more_dropped
    if len(refined) > 1:
        again = tournament(list(dict.fromkeys([first, *refined])), first, relative, ((25, 1),))
        times |= again
        best, _ = choose(again, first)
    rows = dropped_rows + _timed(shape, times, first)
    shipped_milliseconds = dict(zip(loads(shape), single.values(), strict=True))
    rows.append(_row(shape, best, chosen=True, shipped_milliseconds=shipped_milliseconds))
    keep(best, rows)
    return best, rows


def _timed(shape: Shape, times: dict[Config, list[float]], first: Config) -> list[dict[str, Any]]:
    shipped_time = statistics.median(times[first])
    return [
        _row(shape, config, time_over_shipped=statistics.median(samples) / shipped_time, rounds=len(samples))
        for config, samples in times.items()
    ]


def _row(shape: Shape, config: Config, **more: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    # For tables, whose cells are text.
    text = ", ".join(f"{name} {value}" for name, value in fields.items())
    return {**shape._asdict(), "configuration": text, "config": fields, **more}


def _milliseconds(run: Callable[[Config], Results], config: Config, flush: Tensor) -> float:
    """One run by the device's clock, with a cold L2 cache and the host ahead of the device."""
    flush.zero_()
    torch.cuda._sleep(_HEAD_START)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(config)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def shapes(args: argparse.Namespace, arch: int) -> Iterator[Shape]:
    """In the order of their use; the backward asks for D alone."""
    for kind, dtype, (hidden_size, vocab_size) in itertools.product(args.kind, args.dtype, args.size):
        if not (kind.startswith("backward") and vocab_size != args.size[0][1]):
            yield Shape(kind, arch, dtype, hidden_size, vocab_size)


def dry_run(args: argparse.Namespace, arch: int) -> list[dict[str, Any]]:
    """Compile the candidates, print what each needs and what would be measured; returns the rows."""
    rows = []
    for shape in shapes(args, arch):
        # Kernels are compiled once for all sizes; only the tiles of the backward follow D.
        if shape.vocab_size == args.size[0][1] and (
            shape.kind.startswith("backward") or shape.hidden_size == args.size[0][0]
        ):
            for config in candidates(shape)[: args.limit]:
                compiled, problems = examine(shape, config)
                print(f"{shape.kind} sm_{arch} {shape.dtype} {config}")
                needs = []
                for row in compiled:
                    numbers = {"registers": row.registers, "spilled": row.spill_bytes, "shared": row.shared_bytes}
                    needs.append({"kernel": row.kernel, **numbers})
                    print(f"    {row.kernel:28}", *(f"{value:7} {name}" for name, value in numbers.items()))
                for problem in problems:
                    print(f"    dropped: {problem}")
                rows.append(_row(shape, config, compiled=needs, dropped=problems))
        print(
            f"would measure {shape.kind} for D {shape.hidden_size}, V {shape.vocab_size}, {shape.dtype}: "
            f"{' and '.join(loads(shape))}"
        )
    return rows


def _size(text: str) -> tuple[int, int]:
    hidden_size, vocab_size = map(int, text.split("x"))
    if hidden_size < 1 or vocab_size < 1:
        raise ValueError(f"--size: expected positive sizes such as 768x30522, got {text}")
    return hidden_size, vocab_size


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = plain(__doc__)
    parser.add_argument("--output", type=Path, help="write the result as JSON, rewritten after every shape")
    parser.add_argument("--kind", nargs="+", choices=tuning.KINDS, default=[*tuning.KINDS])
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--size", type=_size, nargs="+", default=[*SIZES], metavar="DxV", help="hidden and vocabulary")
    parser.add_argument("--budget", type=float, default=float("inf"))
    parser.add_argument("--dry-run", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--arch", type=int, choices=tuning.ARCHITECTURES, help="for --dry-run; default: this GPU's")
    parser.add_argument("--limit", type=int, help="for --dry-run: the first N candidates of each kind")
    args = parser.parse_args(arguments)
    if args.arch is None and not torch.cuda.is_available():
        parser.error("no CUDA device: expected --dry-run with --arch")
    if args.arch is not None and not args.dry_run:
        parser.error("--arch: the GPU at hand is what is tuned; expected --dry-run with it")
    if args.dry_run:
        arch = args.arch or _architecture()
        return {"architecture": arch, "rows": dry_run(args, arch)}
    arch = _architecture()
    budget = Budget(args.budget)
    result = Result("tuning", "bench.tune", args.output, architecture=arch, table=[])
    # The package uses TF32 only where it is allowed.
    torch.backends.cuda.matmul.allow_tf32 = True
    for shape in shapes(args, arch):
        # The first shape started the processes and compiled what the next ones find.
        if not budget.has_time():
            result.leave_out("no time", shape._asdict())
            continue
        before = len(result.rows), len(result.content["table"])

        def keep(best: Config, rows: list[dict[str, Any]], shape: Shape = shape, before: Any = before) -> None:
            result.rows[before[0] :] = rows
            result.content["table"][before[1] :] = [tuning.entry(shape, best)]
            result.write()

        best, _ = measure(shape, "cuda", keep)
        print(f"{shape}: {best}", flush=True)
    result.write()
    return result.content


def _architecture() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


if __name__ == "__main__":
    main()
