"""The three commands for a GPU, end to end, with a CPU in its place; what is left when a stage or all is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, sanitize, smoke
from bench.harness.environment import NOT_HERE
from bench.harness.result_file import Result
from bench.tables import summary
from tests.bench.synthetic import kernels

ROWS = (
    "from pathlib import Path as P; from bench.harness.result_file import Result; "
    "Result('x', 'x', P({path!r})).add({{'a': 1}})"
)
HANG = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(97.5)']); "
    "time.sleep(300)"
)


@pytest.fixture
def stand_in(monkeypatch):
    """A device that is there as far as the runner asks."""
    properties = SimpleNamespace(name="stand-in", major=8, minor=6, total_memory=4 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))


def own(monkeypatch, *codes: str, seconds: float = 60) -> tuple[gpu.Stage, ...]:
    """Stages of Python code."""
    monkeypatch.setattr(gpu, "arguments", lambda stage, *_: [sys.executable, "-c", stage.command])
    return tuple(gpu.Stage(f"stage-{number}", seconds, code) for number, code in enumerate(codes))


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run in Triton's interpreter here")
@pytest.mark.parametrize("name", list(gpu.STAGES))
def test_a_command_runs_end_to_end_on_a_stand_in(name, tmp_path, monkeypatch, stand_in):
    monkeypatch.setattr(gpu, "PYTHON", [sys.executable, "-m", "tests.stand_in"])
    monkeypatch.setattr(gpu, "KERNEL_TESTS", ("contract/test_modules.py",))
    # Beside other tests a process alone may take a minute to start.
    stages = tuple(replace(stage, seconds=300) for stage in gpu.STAGES[name])
    outcomes = {one.name: one.status for one in gpu.run(name, stages, tmp_path, 3000)}
    text = (tmp_path / name / "SUMMARY.md").read_text()
    logs = "\n".join(path.read_text()[-2000:] for path in (tmp_path / name / "logs").glob("*.log"))
    assert all(status == "passed" or status.startswith("not here") for status in outcomes.values()), (outcomes, logs)
    assert {one for one, status in outcomes.items() if status != "passed"} <= {"memcheck"}
    for stage in stages:
        if stage.command.startswith("bench."):
            result = json.loads((tmp_path / name / f"{stage.name}.json").read_text())
            assert result["rows"]
            assert not result.get("left_out")
            statuses = {row.get("status", "measured") for row in result["rows"]}
            assert all(status.startswith(("measured", "passed", "not here")) for status in statuses)
    assert len(text.splitlines()) <= summary.MAX_LINES
    assert "cannot be summarised" not in text
    expected = {
        "check": "2 of 3 passed; passed; dev bf16: forward: stock; screened",
        "tune": "maximum bfloat16 D32 V40; block_v; dev bf16: forward: unscreened",
        "bench": "hot: ours; share-0.1 bf16: forward; dev tf32; flops; bucket; short-sequences S14; distilbert",
    }
    assert [word for word in expected[name].split("; ") if word not in text] == []
    if name == "tune":
        tuned = json.loads((tmp_path / name / "headline-tuned.json").read_text())
        assert tuned["provenance"][0]["environment"]["config"] == str(tmp_path / name / "tuning.json")
    with tarfile.open(tmp_path / f"gpu-{name}.tar.gz") as tar:
        names = {*tar.getnames()}
    assert {f"{name}/{file}" for file in ("status.json", "SUMMARY.md", "plan.txt", "logs/extension.log")} <= names


def test_budgets_add_up_and_thirty_rows_are_named():
    assert {name: sum(stage.seconds for stage in stages) for name, stages in gpu.STAGES.items()} == gpu.SECONDS
    assert gpu.SECONDS == {"check": 275, "tune": 200, "bench": 273}
    named = [row for stage in gpu.STAGES["bench"] for row in stage.rows.split()]
    assert len(named) == len(set(named)) <= 30
    assert all((gpu.ROOT / "tests" / name).exists() for name in gpu.KERNEL_TESTS)


def test_what_a_machine_without_network_may_lack_is_not_imported():
    """datasets and others that only whole models need; and what takes seconds to import, once a stage."""
    modules = {stage.command.split()[0] for stages in gpu.STAGES.values() for stage in stages if not stage.needs}
    modules = {name for name in modules if name.startswith("bench.")} | {"bench.gpu", "bench.sanitize"}
    absent = ("datasets", "bm25s", "peft", "sentence_transformers", "transformers", "matplotlib", "tokenizers")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {', '.join(modules)}"
    assert "bench.measure" in modules
    subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, check=True)


def test_the_plan_says_what_fits_and_what_is_missing():
    needy = gpu.Stage("b", 30, "", "r1", needs=("no_such_package",))
    stages = gpu.Stage("a", 60, ""), needy, gpu.Stage("c", 50, "", "r2")
    first, second, third = gpu.plan(stages, 100)
    assert first.split() == ["a", "60", "s"]
    assert "not here: no_such_package not installed" in second
    assert "does not fit" in third
    assert "r2" in third
    assert "does not fit" not in list(gpu.plan(stages, 110))[2]


def test_stages_that_hang_fail_and_die_leave_all_rows(tmp_path, monkeypatch, stand_in):
    rows = ROWS.format(path=str(tmp_path / "c" / "rows.json"))
    dies, absent = "import os; os.kill(os.getpid(), 9)", f"print('not here: no tool'); raise SystemExit({NOT_HERE})"
    hangs, *stages = own(monkeypatch, HANG, rows, "raise SystemExit(3)", dies, absent, seconds=60)
    outcomes = gpu.run("c", [replace(hangs, seconds=4), *stages], tmp_path, 300)
    statuses = [one.status for one in outcomes]
    assert statuses == ["timeout", "passed", "failed", "failed", "not here: no tool"]
    assert [one.exit_status for one in outcomes] == [None, 0, 3, -9, NOT_HERE]
    assert _running() == 0
    assert json.loads((tmp_path / "c/rows.json").read_text())["rows"] == [{"a": 1, "provenance": 0}]
    assert "stage-0: **timeout**" in (tmp_path / "c/SUMMARY.md").read_text()
    assert gpu.run("c", stages[:1], tmp_path, 1)[0].status == "left out: no time"
    earlier = [path for path in tmp_path.iterdir() if path.name.startswith("c-until-")]
    assert json.loads((earlier[0] / "rows.json").read_text())["rows"] == [{"a": 1, "provenance": 0}]


@pytest.mark.slow
def test_a_signal_to_the_runner_leaves_a_summary_and_an_archive(tmp_path):
    code = f"""
from tests.bench import test_gpu as t
import pytest, sys, torch
from bench import gpu
patch = pytest.MonkeyPatch()
gpu.STAGES["check"] = t.own(patch, {ROWS.format(path=str(tmp_path / "check" / "rows.json"))!r}, {HANG!r}, seconds=200)
t.torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda device: t.SimpleNamespace(name="x", major=8, minor=6, total_memory=1)
torch.cuda.get_device_capability = lambda device=None: (8, 6)
gpu.main(["check", "--output", {str(tmp_path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu.ROOT)
    summed = tmp_path / "check/SUMMARY.md"
    for _ in range(600):
        # The runner, the stage and its child.
        if (tmp_path / "check/logs/stage-1.log").exists() and summed.exists() and _running() == 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "stage-1: **killed**" in summed.read_text()
    with tarfile.open(tmp_path / "gpu-check.tar.gz") as tar:
        assert {"check/rows.json", "check/SUMMARY.md", "check/logs/stage-1.log"} <= {*tar.getnames()}
    assert _running() == 0


def _running() -> int:
    """Processes with the sleep of HANG's child in their command lines."""
    command = ["pgrep", "-c", "-f", r"time\.sleep\(97\.5\)"]
    return int(subprocess.run(command, capture_output=True, text=True).stdout)


def test_the_summary_has_sixty_lines_and_the_archive_a_size(tmp_path, monkeypatch, stand_in):
    folder = tmp_path / "check"
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps([vars(gpu.Outcome("tests", "timeout", 55.0))]))
    (folder / "logs").mkdir()
    log = "tests/test_a.py::x PASSED [  1%]\n[gw1] [ 50%] FAILED tests/test_b.py::y[1-2]\ntests/test_a.py::z PASSED\n"
    (folder / "logs/tests.log").write_text(log)
    result = Result("strange", "x", folder / "many.json")
    for number in range(100):
        result.add({"number": number})
    (folder / "broken.json").write_text("{")
    summary.write("check", folder)
    lines = (folder / "SUMMARY.md").read_text().splitlines()
    assert len(lines) == summary.MAX_LINES
    assert "- tests: **timeout** in 55 s: 2 passed, 1 failed (tests/test_b.py::y[1-2])" in lines
    assert any("broken.json: cannot be summarised" in line for line in lines) or "lines more" in lines[-1]
    (folder / "noise").write_bytes(os.urandom(200_000))
    monkeypatch.setattr(summary, "MAX_ARCHIVE_BYTES", 100_000)
    summary.archive(folder, tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        assert tar.extractfile("check/LEFT_OUT.txt").read() == b"noise\n"
        assert "check/SUMMARY.md" in tar.getnames()


# In every run; seconds each in the interpreter.
QUICK = (
    "training-float32", "screened-training-bf16", "sum-bf16", "flops-threshold-float32", "compaction"
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in smoke.SMOKES
        if name != "graph-bf16"
    ],
)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run in Triton's interpreter here")
def test_every_smoke_passes_and_a_wrong_result_is_seen(name, monkeypatch):
    found = smoke.SMOKES[name]()
    monkeypatch.setitem(smoke.SMOKES, name, lambda: found)
    assert smoke.row(name)["status"] == "passed"
    value, exact = found["output" if "output" in found else next(iter(found))]
    changed = value.clone()
    changed.view(-1)[-1] += max(1, value.abs().max().item())
    found["output"] = changed, exact
    assert smoke.row(name)["status"].startswith("wrong: ")


def test_a_smoke_says_what_is_not_here():
    assert smoke.row("graph-bf16")["status"] == "not here: CUDA graphs need a CUDA device"


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run in Triton's interpreter here")
def test_the_smokes_launch_every_kernel_of_the_package(monkeypatch):
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction

    monkeypatch.setenv("SPLADE_KERNELS_BACKEND", "triton")
    launched = set()
    call = GridExecutor.__call__

    def note(self, *arguments, **options):
        launched.add(self.fn.__name__)
        return call(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", note)
    for name in "training-bf16 long-runs-bf16 screened-bf16 sum-bf16 flops-threshold-float32 packed-bf16".split():
        smoke.SMOKES[name]()
    assert launched >= kernels(InterpretedFunction) != set()


@pytest.mark.parametrize(("says", "status"), [
    ("========= Error: Device not supported. Please refer to the docs\n", NOT_HERE),
    ("UserWarning: Failed to initialize NumPy\n========= ERROR SUMMARY: 0 errors\n", 0),
    ("========= Program hit cudaErrorNotSupported: operation not supported\n========= ERROR SUMMARY: 1 error\n", 9),
    ("========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error\n", 9),
    ("", "expected a line with ERROR SUMMARY"),
])  # fmt: skip
def test_a_sanitizer_that_is_refused_is_not_here(says, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize.subprocess, "run", lambda *_, **__: None)  # what is not watched
    tool = tmp_path / "compute-sanitizer"
    code = 9 if status in (9, NOT_HERE) else 0
    tool.write_text(f"#!/bin/sh\ncat <<'X'\n{says}X\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SystemExit) as ended:
        sanitize.sanitize("memcheck")
    assert ended.value.code == status or str(status) in str(ended.value.code)
    if status == NOT_HERE:
        assert capsys.readouterr().out.splitlines()[-1].startswith("not here: the device refuses compute-sanitizer")
