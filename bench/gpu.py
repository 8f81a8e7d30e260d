"""All that needs a GPU, in one go and within nine minutes: tests, sanitizer, benchmarks, report. ``make gpu``.

``make gpu-training`` takes as long again for whole training steps, the largest batch and the tuner.

Every stage has a budget of seconds, a log of its own and results that survive its end by timeout; what a stage leaves
of its time goes to the next. Nothing is downloaded. The status of each stage is in ``status.json``; the exit status is
1 when a stage failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# What runs on the GPU, in this order.
KERNEL_TESTS = ("triton", "pool", "autograd", "compaction", "sparsify", "flops", "modules")
# Test processes side by side, most of whose time goes into compiling: where pytest-xdist is installed, and so many that
# each finds this much of the GPU's memory.
TEST_PROCESSES, TEST_BYTES = 8, 16 << 30
# Test files that import a package which a machine without network may lack.
TEST_NEEDS = {
    "datasets": ("test_train_example.py", "test_st_trainer.py"),
    "bm25s": ("test_demo_corpus.py", "test_demo_run.py", "test_demo_vocabulary.py"),
}
# What the trainer needs beside PyTorch.
TRAINING_NEEDS = ("sentence_transformers", "accelerate", "datasets")
# Seconds of each.
SANITIZERS = {"memcheck": 40, "racecheck": 20, "initcheck": 20}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# cuBLAS is deterministic only with a fixed workspace, which PyTorch demands in the tests.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass
class Stage:
    """One command with the seconds it may take; ``needs`` is why it cannot run here, if so."""

    name: str
    command: list[str]
    seconds: float
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    name: str
    # "passed", "failed", "timeout" or "not here: …".
    status: str
    seconds: float
    exit_status: int | None = None


def stages(output: Path, python: str = sys.executable) -> Iterator[Stage]:
    """In the order of their worth: a later one may not get its turn."""
    pytest = None if importlib.util.find_spec("pytest") else "not here: pytest is not installed"
    missing = [name for name in TEST_NEEDS if importlib.util.find_spec(name) is None]
    left_out = {file for name in missing for file in TEST_NEEDS[name]}
    files = sorted(path.name for path in (ROOT / "tests").glob("test_*.py") if path.name not in left_out)
    subjects = {name: name.split("_")[1].removesuffix(".py") for name in files}
    first = [name for one in KERNEL_TESTS for name in files if subjects[name] == one]
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    processes = min(TEST_PROCESSES, os.cpu_count() or 1, gpu.total_memory // TEST_BYTES if gpu else TEST_PROCESSES)
    parallel = ["-n", str(processes)] if importlib.util.find_spec("xdist") and processes > 1 else []
    own = {"TORCH_CUDA_ARCH_LIST": f"{gpu.major}.{gpu.minor}"} if gpu else {}

    def tests(name: str, chosen: Sequence[str], seconds: float) -> Stage:
        paths = [f"tests/{file}" for file in chosen]
        command = [
            python,
            "-m",
            "pytest",
            "-v",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            f"--junitxml={output}/{name}.xml",
            *parallel,
        ]
        return Stage(name, command + paths, seconds, pytest, DETERMINISTIC)

    def measure(kind: str, name: str, seconds: float, *options: str) -> Stage:
        command = [python, "-m", "bench.measure", kind, f"--output={output}/{name}.json", "--seconds=0.5"]
        return Stage(name, [*command, f"--budget={0.8 * seconds:.0f}", *options], seconds)

    yield Stage("extension", [python, "setup.py", "-q", "build_ext", "--inplace"], 30, environment=own)
    yield tests("tests-kernels", first, 110)
    # Compiles the kernels that the tests did not, which under a sanitizer takes many times as long.
    yield Stage("unsanitized", [python, "-m", "bench.sanitize"], 40)
    for tool, seconds in SANITIZERS.items():
        yield _sanitizer(tool, seconds, python)
    two = ("--case", "splade-v3", "dev")
    yield measure("head", "head-gpu", 95, "--variant", "stock", "sparton", "rival", "ours", "--precision", "bf16")
    yield measure("backward", "backward-gpu", 30, "--precision", "bf16")
    yield measure("flops", "flops-gpu", 10, "--precision", "bf16", "bf16-autocast")
    shares = ("--case", "sparse-normal", "dense", "share-0.1", "share-5", "share-50")
    yield measure("screening", "screening-gpu", 40, "--precision", "bf16", *shares)
    all_active = "--rows=420 --vocab-size=250002 --active=250002 --rounds=5".split()
    compaction = [python, "-m", "bench.compaction", "--device=cuda", *all_active]
    yield Stage("compaction-gpu", [*compaction, f"--output={output}/compaction-gpu.json"], 10)
    rivals = ("--variant", "stock", "compile", "tiled", "ours", "--precision", "bf16", *two)
    yield measure("head", "head-gpu-rivals", 30, *rivals)
    yield measure("head", "head-gpu-precisions", 25, "--precision", "bf16-autocast", "tf32", "float32", *two)
    # The integrations' models are built on the CPU, where a trainer that sees a GPU would not leave them.
    others = tests("tests-others", [name for name in files if name not in first], 40)
    yield replace(others, environment=DETERMINISTIC | {"CUDA_VISIBLE_DEVICES": ""})


def training_stages(output: Path, python: str = sys.executable) -> Iterator[Stage]:
    """Whole training steps, the largest batch in 24 GiB, and the tuner: what takes minutes of its own."""
    missing = [name for name in TRAINING_NEEDS if importlib.util.find_spec(name) is None]
    needs = f"not here: {', '.join(missing)} not installed" if missing else None
    tune = ("bench.tune", ("--kind", "maximum", "--dtype", "bfloat16"), None)
    for name, module, options, needed, seconds in (
        ("training-gpu", "bench.training", (), needs, 200),
        ("limits-gpu", "bench.limits", (), needs, 160),
        ("tuning-gpu", *tune, 150),
    ):
        command = [python, "-m", module, f"--output={output}/{name}.json", f"--budget-seconds={0.8 * seconds:.0f}"]
        yield Stage(name, [*command, *options], seconds, needed)


def report_stage(output: Path, python: str = sys.executable) -> Stage:
    results = [str(path) for path in sorted(output.glob("*.json")) if path.name != "status.json"]
    command = [python, "-m", "bench.report", *results, f"--output={output}/RESULTS.md"]
    if importlib.util.find_spec("matplotlib"):
        command.append(f"--figures={output}")
    return Stage("report", command, 20, None if results else "not here: no result to report")


def run_stage(stage: Stage, logs: Path, seconds: float) -> Outcome:
    """Run one command in a process group of its own, which ends with it; its log is ``logs/NAME.log``."""
    if stage.needs:
        return Outcome(stage.name, stage.needs, 0.0)
    logs.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(logs / f"{stage.name}.log", "w") as log:
        print("$", *stage.command, file=log, flush=True)
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, **stage.environment},
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    code = None if status == "timeout" else process.returncode
    return Outcome(stage.name, status, time.monotonic() - begin, code)


def run_all(plan: Sequence[Stage], output: Path, seconds: float) -> list[Outcome]:
    """Run the stages in order; unused time is passed on, and ``status.json`` is written after each."""
    outcomes: list[Outcome] = []
    end = time.monotonic() + seconds
    saved = 0.0
    for stage in plan:
        granted = min(stage.seconds + saved, end - time.monotonic())
        outcome = run_stage(stage, output / "logs", granted) if granted > 0 else Outcome(stage.name, "timeout", 0.0)
        saved = max(0.0, granted - outcome.seconds)
        outcomes.append(outcome)
        (output / "status.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
        print(f"{outcome.name:20} {outcome.status:10} {outcome.seconds:6.1f} s", flush=True)
    return outcomes


def _sanitizer(tool: str, seconds: float, python: str) -> Stage:
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    found = shutil.which("compute-sanitizer") or (str(places[-1]) if places else None)
    command = [found or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", python, "-m", "bench.sanitize"]
    # With PyTorch's cache of memory, a read past the end of one tensor lands in another and is not seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(tool, command, seconds, None if found else "not here: compute-sanitizer is not installed", environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--seconds", type=float, default=535)
    parser.add_argument("--training", action="store_true", help="training steps, largest batch, tuner instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("make gpu: expected a CUDA device, found none")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    reserve = 20.0
    plan = list(training_stages(output) if args.training else stages(output))
    outcomes = run_all(plan, output, args.seconds - reserve)
    reported = run_stage(report_stage(output), output / "logs", reserve)
    bad = [f"{one.name}: {one.status}" for one in [*outcomes, reported] if one.status in ("failed", "timeout")]
    if bad:
        raise SystemExit("\n".join([*bad, f"logs: {output / 'logs'}"]))


if __name__ == "__main__":
    main()
