"""``splade-kernels evaluate``: its options and what it prints; the numbers are tests/searching/test_evaluation.py's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splade_kernels.cli.several import repeated
from tests.cli.commands import call
from tests.searching.test_evaluation import write


def evaluate(folder: Path, *more: Any) -> int:
    run, qrels = write(folder)
    return call("evaluate", "--run", run, "--qrels", qrels, *more)


def test_the_default_metrics_as_text(tmp_path: Path, capsys: Any) -> None:
    assert evaluate(tmp_path) == 0
    assert capsys.readouterr().out == (
        "nDCG@10  0.3699\n"
        "RR@10    0.3750\n"
        "R@1000   0.3750\n"
        "over 4 queries with judgements; 2 of them are missing from the run and count 0\n"
        "left out: 2 queries of the run without judgements\n"
    )


@pytest.mark.parametrize(
    "metrics",
    [
        ["--metrics", "nDCG@10", "RR@10", "R@1000", "--json"],
        ["--json", "--metrics", "nDCG@10", "RR@10", "R@1000"],
        ["--metrics", "nDCG@10", "--json", "--metrics", "RR@10", "R@1000"],
        ["--metrics=nDCG@10", "RR@10", "--metrics=R@1000", "--json"],
    ],
)
def test_several_metrics_as_json(metrics: list[str], tmp_path: Path, capsys: Any) -> None:
    assert evaluate(tmp_path, *metrics) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["metrics", "queries", "missing", "unjudged"]
    assert list(found["metrics"]) == ["nDCG@10", "RR@10", "R@1000"]
    assert found["metrics"]["R@1000"] == 0.375
    assert (found["queries"], found["missing"], found["unjudged"]) == (4, 2, 2)


def test_errors_have_one_line_and_a_status(tmp_path: Path, capsys: Any) -> None:
    cases: list[tuple[int, str, list[str]]] = [
        (2, "--metrics: expected metrics of ir-measures such as nDCG@10", ["--metrics", "nDCG@10", "nDCG10"]),
        (2, "unexpected extra argument", ["--json", "RR@10"]),
        (2, "requires an argument", ["--metrics"]),
        (1, "none.txt: No such file", ["--qrels", str(tmp_path / "none.txt")]),
    ]
    for status, message, more in cases:
        assert evaluate(tmp_path, *more) == status, message
        assert message in capsys.readouterr().err


def test_a_list_ends_at_the_next_option() -> None:
    given = ["a", "--m", "1", "2", "--x", "3", "4", "--m=5", "6", "-", "-k", "7"]
    expected = ["a", "--m", "1", "--m", "2", "--x", "3", "4", "--m=5", "--m", "6", "--m", "-", "-k", "7"]
    assert list(repeated(given, {"--m"})) == expected
