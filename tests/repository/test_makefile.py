"""What `make test`, `test-all` and `test-cpus` run, with a Python that only notes what it is asked to run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(target: str, folder: Path, fails: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """``make target``, and the pytest command lines with what is special in their environment; those with ``fails`` in
    them fail."""
    python, log = folder / "python", folder / "log"
    python.write_text(f"""#!/bin/sh
line=$(echo $TRITON_INTERPRET $ATEN_CPU_CAPABILITY $ONEDNN_MAX_CPU_ISA $PYTEST_ADDOPTS $*)
echo "$line" >> {log}
case "$line" in *"{fails}"*) exit 3;; esac
""")
    python.chmod(0o755)
    (folder / ".ready").touch()
    command = ["make", target, f"VENV={folder}", f"RUN={python}"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    return done, [line for line in log.read_text().splitlines() if " -m pytest " in f" {line}"]


@pytest.mark.parametrize(
    ("fails", "answers"),
    [
        ("nothing", None),
        ("1 -m pytest", (3, 0)),
        ("slow tests/bench/test_resources.py", (0, 3)),
        ("-m pytest", (3, 3)),
    ],
    ids=str,
)
def test_both_processes_run_whichever_fails(fails, answers, tmp_path):
    done, (interpreted, others) = make("test", tmp_path, fails)
    options = "-m pytest -n auto --dist loadfile -m not slow"
    assert interpreted.startswith(f"1 {options} --ignore=tests/bench/test_resources.py")
    assert others.startswith(f"{options} tests/bench/test_resources.py")
    assert (done.returncode == 0) is (answers is None)
    answer = "make test: pytest ended with {} under Triton's interpreter, and with {} for tests/bench/test_resources.py"
    assert done.stderr.startswith(answer.format(*answers) if answers else "")


def test_everything_is_selected_by_test_all(tmp_path):
    _, lines = make("test-all", tmp_path, "nothing")
    assert len(lines) == 2
    assert all("--hostile-cases 10000" in line and "slow" not in line for line in lines)


@pytest.mark.parametrize("fails", [None, "AVX2", "--cpu vnni --cpu"], ids=str)
def test_every_kind_of_cpu_is_tried_whichever_fails(fails, tmp_path):
    done, lines = make("test-cpus", tmp_path, fails or "nothing")
    kinds = [line.split(" -m pytest ")[0] for line in lines]
    simulated = ["--cpu plain", "--cpu vnni", "--cpu vnni --cpu bf16 --cpu plain"]
    assert kinds == [f"1 {kind}" for kind in ("avx2", "AVX2", *simulated)]
    assert (done.returncode == 0) is (fails is None)
    failed = {None: "", "AVX2": "[ONEDNN_MAX_CPU_ISA=AVX2]", "--cpu vnni --cpu": f"[PYTEST_ADDOPTS={simulated[-1]}]"}
    assert done.stderr.startswith(f"make test-cpus: failed with {failed[fails]}\n" if fails else "")
