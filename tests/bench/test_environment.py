"""What a result says of the code it measured."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from bench.harness import environment


def test_a_commit_is_dirty_by_code_and_not_by_what_measuring_writes(tmp_path: Path):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    files = ("bench/results/head.json", "bench/RESULTS.md", "docs/bench/a.png", "docs/screening.md", "README.md")
    for name in (*files, "bench/code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    clean = environment._commit(tmp_path / "bench")
    assert clean
    assert "dirty" not in clean
    for name in files:
        (tmp_path / name).write_text("new")
    assert environment._commit(tmp_path / "bench") == clean
    (tmp_path / "bench/code.py").write_text("new")
    assert environment._commit(tmp_path / "bench") == f"{clean}-dirty"
    assert environment._commit(tmp_path.parent) is None


def test_without_git_a_hash_of_the_sources_stands_for_the_commit(monkeypatch):
    monkeypatch.setattr(environment, "_commit", lambda: None)
    found = environment.describe()["commit"]
    assert found == environment.describe()["commit"]
    assert re.fullmatch(r"sources [0-9a-f]{12}", str(found))
    monkeypatch.setattr(environment.Path, "read_bytes", lambda path: str(path).encode())
    assert environment.describe()["commit"] != found
