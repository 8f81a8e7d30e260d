"""Proof and numbers of a GPU in minutes: ``make gpu-check``, ``gpu-tune``, ``gpu-bench``, or ``make gpu`` for all.

    python -m bench.gpu check [tune] [bench] [--output outputs/gpu] [--budget N]

A command is a list of stages in the order of their worth, each a process with a budget of seconds; time that it does
not use goes to the next one. After every stage the status, ``SUMMARY.md`` and one archive of everything are written
anew, so that a stage that crashes, hangs or is killed leaves the results before it. docs/gpu.md says what each command
proves.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.harness.environment import NOT_HERE
from bench.harness.options import plain
from bench.harness.result_file import write
from bench.tables import summary

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable]
# What of a stage's time a command may plan with, so that it ends by itself; with less than the other nothing is begun.
PLANNED, LEAST_SECONDS = 0.85, 3
# The tests that run on the GPU's tensors, and the most processes that share it.
KERNEL_TESTS = ("triton", "contract", "backends/test_compaction.py")
TEST_PROCESSES = 14
# cuBLAS is deterministic only with a fixed workspace, which PyTorch demands in the tests.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass(frozen=True)
class Stage:
    """One command with its budget of seconds, the rows it measures by name, the packages without which it cannot run.

    A module of bench writes ``NAME.json`` and is told how long it may take; other command lines stand as they are.
    """

    name: str
    seconds: float
    command: str
    rows: str = ""
    needs: tuple[str, ...] = ()


@dataclass
class Outcome:
    """``status``: "passed", "failed", "timeout", "killed", "not here: …" or "left out: …"."""

    name: str
    status: str
    seconds: float
    exit_status: int | None = None


_TRAINER = ("sentence_transformers", "accelerate", "datasets")
_TWO = "--precision bf16 --case dev splade-v3 --variant"
_SHAPES = "gooaq-question gooaq-answer xlmr-64 qwen long query"
_SHARES = "sparse-normal share-0.1 share-5 dense"
_EXTENSION = Stage("extension", 25, "setup.py -q build_ext --inplace --parallel=2")
# fmt: off
STAGES: dict[str, tuple[Stage, ...]] = {
    "check": (
        _EXTENSION,
        Stage("smoke", 45, "bench.smoke"),
        Stage("headline", 40, f"bench.measure head {_TWO} stock ours unscreened screened", "dev splade-v3"),
        Stage("tests", 100, "-m pytest -v --tb=short -p no:cacheprovider -p tests.at_once TESTS", needs=("pytest",)),
        Stage("numerics", 25, "bench.numerics --precision bf16 --case S128-D768 --variant stock ours screened"),
        Stage("memcheck", 40, "-m bench.sanitize --tool=memcheck"),
    ),
    "tune": (
        _EXTENSION,
        Stage("tuning", 130, "bench.tune --kind maximum --dtype bfloat16 --size 768x30522 768x250002 1024x151936"),
        Stage("headline-tuned", 45, f"bench.measure head {_TWO} unscreened", "dev splade-v3"),
    ),
    "bench": (
        _EXTENSION,
        Stage("smoke", 25, "bench.smoke"),  # also compiles, on all cores
        Stage("head", 30, f"bench.measure head --precision bf16 --case {_SHAPES} --variant stock ours", _SHAPES),
        Stage("training", 70, "bench.training --model distilbert --case gooaq full --timed-steps 10",
              "step-gooaq step-full", _TRAINER),
        Stage("backward", 12, "bench.measure backward --precision bf16 --case splade-v3", "uniform zipf hot trained"),
        Stage("screening", 18, f"bench.measure screening --precision bf16 --case {_SHARES} --variant stock unscreened "
              "screened", "active-1.5% active-0.1% active-5% active-100%"),
        Stage("rivals", 35, "bench.measure head --precision bf16 --case splade-v3 dev --variant ours rival sparton "
              "compile", "compile-splade-v3 compile-dev rival sparton"),
        Stage("precisions", 10, "bench.measure head --precision tf32 bf16-autocast --case dev --variant stock ours",
              "dev-tf32 dev-autocast"),
        Stage("flops", 8, "bench.measure flops --precision bf16 --case B4096-V30522", "flops-B4096"),
        Stage("compaction", 12, "bench.compaction --rows=420 --vocab-size=250002 --active=250002", "bucket-B420"),
        Stage("limits", 18, "bench.limits --model distilbert --no-checkpointing --resolution=0.2 --start=64",
              "largest-256 largest-512", _TRAINER),
        Stage("short-sequences", 10, "bench.short_sequences --length 14 60 --share 0.05 1.0",
              "short-14-5% short-14-100% short-60-5% short-60-100%"),
    ),
}
# fmt: on
SECONDS = {"check": 275, "tune": 200, "bench": 273}


def arguments(stage: Stage, output: Path, seconds: float) -> list[str]:
    """The command line of a stage that has so many seconds."""
    # Of the tests that take every backend, those of this one; what only compiles needs no GPU.
    chosen = [f"tests/{name}" for name in KERNEL_TESTS]
    chosen += ["-k", "(triton or compaction or sparsify or flops) and not specialization"]
    if importlib.util.find_spec("xdist"):
        chosen += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    words = stage.command.split()
    if words[-1] == "TESTS":
        words[-1:] = chosen
    if words[0].startswith("bench."):
        words = ["-m", *words, f"--output={output}/{stage.name}.json", f"--budget={PLANNED * seconds:.0f}"]
    return [*PYTHON, *words]


def missing(stage: Stage) -> str | None:
    absent = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    return f"not here: {', '.join(absent)} not installed" if absent else None


def plan(stages: Sequence[Stage], seconds: float) -> Iterator[str]:
    """What fits into so many seconds, and what does not: that gets the time which others leave."""
    begin = 0.0
    for stage in stages:
        absent, fits = missing(stage), begin + stage.seconds <= seconds
        verdict = absent or ("" if fits else "does not fit: only in time that others leave")
        begin += 0 if absent else stage.seconds
        yield f"{stage.name:16} {stage.seconds:4.0f} s  {stage.rows}{verdict and f' [{verdict}]'}"


def run_stage(stage: Stage, output: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run one command in a process group of its own, which ends with it; its log is ``logs/NAME.log``."""
    absent = missing(stage) or ("left out: no time" if seconds < LEAST_SECONDS else None)
    if absent:
        return Outcome(stage.name, absent, 0.0)
    log = output / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command, begin = arguments(stage, output, seconds), time.monotonic()
    status, code = "killed", None
    with open(log, "w") as lines:
        print("$", *command, file=lines, flush=True)
        variables = {**os.environ, **ENVIRONMENT, **environment}
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=lines, stderr=lines, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            status = {0: "passed", NOT_HERE: "not here"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == "not here":
        status = log.read_text().rstrip().rsplit("\n", 1)[-1]
    return Outcome(stage.name, status, time.monotonic() - begin, code)


def run(name: str, stages: Sequence[Stage], output: Path, seconds: float) -> list[Outcome]:
    """One command, into ``output/NAME`` and ``output/gpu-NAME.tar.gz``."""
    folder = output / name
    if folder.exists():
        folder.rename(folder.with_name(f"{name}-until-{time.strftime('%Y%m%d-%H%M%S')}"))
    folder.mkdir(parents=True)
    environment = {"TORCH_CUDA_ARCH_LIST": ".".join(map(str, torch.cuda.get_device_capability()))}
    planned = "\n".join([f"gpu-{name}: {seconds:.0f} s on {summary.machine()}", *plan(stages, seconds)])
    print(planned, flush=True)
    (folder / "plan.txt").write_text(planned + "\n")
    outcomes: list[Outcome] = []
    end, saved = time.monotonic() + seconds, 0.0
    for stage in stages:
        granted = min(stage.seconds + saved, end - time.monotonic())
        outcomes.append(Outcome(stage.name, "killed", 0.0))
        try:
            outcomes[-1] = outcome = run_stage(stage, folder, granted, environment)
        finally:
            write(folder / "status.json", [asdict(one) for one in outcomes])
            summary.write(name, folder)
            summary.archive(folder, output / f"gpu-{name}.tar.gz")
        tuned = folder / "tuning.json"
        if tuned.exists() and json.loads(tuned.read_text())["table"]:
            environment["SPLADE_KERNELS_CONFIG"] = str(tuned)
        saved = max(0.0, granted - outcome.seconds)
        print(f"{outcome.name:16} {outcome.status:10} {outcome.seconds:6.1f} s", flush=True)
    print((folder / "SUMMARY.md").read_text(), flush=True)
    return outcomes


def main(options: Sequence[str] | None = None) -> None:
    parser = plain(__doc__)
    parser.add_argument("commands", nargs="+", choices=list(STAGES))
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--budget", type=float, help=f"seconds for each command; default: {SECONDS}")
    args = parser.parse_args(options)
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: expected a CUDA device, found none")
    for one in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, lambda number, _: sys.exit(128 + number))
    bad = []
    for name in args.commands:
        outcomes = run(name, STAGES[name], args.output.resolve(), args.budget or SECONDS[name])
        bad += [f"{name} {one.name}: {one.status}" for one in outcomes if one.status in ("failed", "timeout")]
    sys.exit("\n".join(bad) or None)


if __name__ == "__main__":
    main()
