"""Result files: what a killed run leaves, what --append keeps and replaces, and what a row says of its run."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from bench import measure
from bench.harness import environment, result_file
from bench.harness.result_file import Budget, Result, load
from bench.inputs.cases import CASES, SCREENING, SHOWN_IN, Case
from bench.tables import markdown

ROOT = Path(__file__).parents[2]
TINY = Case("tiny", 2, 6, hidden_size=16, vocab_size=60, lengths="ragged")


def commits(content: dict[str, object]) -> dict[str, str]:
    """The commit of each job's rows."""
    runs = content["provenance"]
    return {row["job"]: runs[row["provenance"]]["environment"]["commit"] for row in content["rows"]}


def test_what_a_killed_run_leaves_is_whole_and_append_continues_it(measured, monkeypatch, tmp_path):
    run, done = measure.measure, []

    def killed(*arguments):
        if done:
            raise SystemExit("the device is gone")
        done.append(run(*arguments))
        return done[-1]

    monkeypatch.setattr(environment, "_commit", lambda: "first")
    monkeypatch.setattr(measure, "measure", killed)
    with pytest.raises(SystemExit, match="gone"):
        measured("head", {"tiny": TINY}, "--variant=ours")
    left = json.loads((tmp_path / "result.json").read_text())
    assert [row["job"] for row in left["rows"]] == ["forward"] * 3
    monkeypatch.setattr(measure, "measure", lambda make, *rest: [] if make.args[2] == "forward" else run(make, *rest))
    monkeypatch.setattr(environment, "_commit", lambda: "second")
    content = measured("head", {"tiny": TINY}, "--variant=ours", "--append")
    assert [row["job"] for row in content["rows"]] == ["forward"] * 3 + ["forward_backward"]
    assert commits(content) == {"forward": "first", "forward_backward": "second"}
    monkeypatch.setattr(measure, "measure", run)
    monkeypatch.setattr(environment, "_commit", lambda: "third")
    again = measured("head", {"tiny": TINY}, "--variant=ours", "--append")
    assert len(again["rows"]) == 4
    assert set(commits(again).values()) == {"third"}
    assert "--append" not in again["provenance"][-1]["command"]
    assert len(measured("head", {"tiny": TINY}, "--variant=ours")["provenance"]) == 1


def test_a_row_of_another_device_stays_and_is_another_result(tmp_path, monkeypatch):
    path, row = tmp_path / "head.json", {"case": "dev", "precision": "bf16", "job": "forward", "variant": "ours"}
    for name, median in (("A", 1), ("B", 2), ("A", 3)):
        monkeypatch.setattr(result_file, "describe", lambda name=name: {"device": name, "gpu": True})
        Result("head", "bench.measure", path, append=True).add(row | {"median": median})
    found = load([path])
    assert [[row["median"] for row in result["rows"]] for result in found] == [[2], [3]]
    assert [markdown.device(result) for result in found] == ["B", "A"]
    assert [len(result["runs"]) for result in found] == [1, 1]


def test_rows_alike_of_one_run_all_stay_and_another_kind_is_refused(tmp_path):
    result = Result("tuning", "bench.tune", tmp_path / "a.json", table=[])
    for number in range(2):
        result.add({"kind": "maximum", "number": number})
    result.rows[2:] = [{"kind": "maximum", "number": 2}]
    result.write()
    assert [(row["number"], row["provenance"]) for row in result.rows] == [(0, 0), (1, 0), (2, 0)]
    with pytest.raises(SystemExit, match="expected a result of kind 'head' in .*, got 'tuning'"):
        Result("head", "bench.measure", result.path, append=True)


def test_what_had_been_left_out_and_is_measured_is_left_out_no_more(tmp_path):
    path = tmp_path / "head.json"
    first = Result("head", "bench.measure", path)
    for case in ("dev", "long"):
        first.leave_out("no time", {"case": case, "precision": "bf16"})
    second = Result("head", "bench.measure", path, append=True)
    second.add({"case": "dev", "precision": "bf16", "job": "forward", "variant": "ours"})
    assert second.content["left_out"] == [{"case": "long", "precision": "bf16", "reason": "no time"}]


def test_what_fails_is_left_out_with_its_reason_and_the_rest_is_measured(tmp_path):
    result, budget = Result("head", "bench.measure", tmp_path / "head.json"), Budget(60)
    assert result.attempt(budget, {"case": "dev"}, lambda: [{"case": "dev"}]) == [{"case": "dev"}]
    assert result.attempt(Budget(0), {"case": "late"}, lambda: [{"case": "late"}]) == []
    assert result.attempt(budget, {"case": "wrong"}, lambda: [1 / 0]) == []
    with pytest.raises(SystemExit, match="^wrong: failed: ZeroDivisionError: division by zero$"):
        result.finish()
    (found,) = load([result.path])
    assert [row["case"] for row in found["rows"]] == ["dev"]
    assert {entry["reason"][:7] for entry in found["left_out"]} == {"no time", "failed:"}


def test_rows_of_the_checked_in_results_have_the_commit_that_measured_them():
    (result,) = load([ROOT / "bench/results/screening-cpu.json"])
    found = {row["case"]: row["run"]["environment"]["commit"] for row in result["rows"]}
    assert {case for case, commit in found.items() if commit == "63f381c25eb9"} == {"encode-squad"}
    assert set(found.values()) == {"63f381c25eb9", "f96e2cbb1af0"}
    environments = [
        run["environment"] for result in load((ROOT / "bench/results").glob("*.json")) for run in result["runs"]
    ]
    # A GPU is reached with a copy of the working tree: a hash of its sources, or the commit that it was changed from.
    commits = {False: "[0-9a-f]{12}", True: "(sources )?[0-9a-f]{12}(-dirty)?"}
    assert all(re.fullmatch(commits[found.get("gpu", False)], found["commit"]) for found in environments)


def test_cases_name_known_places():
    named = {place for case in (CASES | SCREENING).values() for place in case.shown_in}
    assert named == set(SHOWN_IN)


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
