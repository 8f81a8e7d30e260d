"""Metrics of a run, by hand and against pytrec_eval; what a broken line is answered with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splade_kernels.encoding.errors import DataError, UsageError
from splade_kernels.searching.evaluation import evaluate, read_qrels, read_run

RUN = """\
q1 Q0 d2 1 3.5 tag
q1 Q0 d1 2 2.25 tag
q1 Q0 d9 3 1e-05 tag
q2 Q0 d3 1 1 tag
q8 Q0 d1 1 1 tag
q9 Q0 d1 1 1 tag
"""
TREC = "q1 0 d1 2\nq1 0 d2 0\nq1 0 d3 1\nq2 0 d3 1\nq3 0 d1 1\nq4\t0\td1\t0\n"
HEADER = "query-id\tcorpus-id\tscore\n"
BEIR = HEADER + "q1\td1\t2\nq1\td2\t0\nq1\td3\t1\nq2\td3\t1\nq3\td1\t1\nq4\td1\t0\n"


def write(folder: Path, run: str = RUN, qrels: str = TREC) -> tuple[Path, Path]:
    paths = folder / "run.trec", folder / "qrels.txt"
    for path, content in zip(paths, (run, qrels), strict=True):
        path.write_text(content)
    return paths


@pytest.mark.parametrize("qrels", [TREC, BEIR, BEIR.replace("\n", "\r\n")], ids=["trec", "beir", "beir-crlf"])
def test_metrics_are_those_computed_by_hand(qrels: str, tmp_path: Path) -> None:
    """q1 finds its best document second, and not the other one; q2 is perfect; q3 is not in the run and q4 has no
    relevant document: both count 0. q8 and q9 are judged by nobody and left out."""
    found = evaluate(*write(tmp_path, qrels=qrels))
    ndcg = (2 / math.log2(3)) / (2 / math.log2(2) + 1 / math.log2(3))
    expected = {"nDCG@10": (ndcg + 1) / 4, "RR@10": (1 / 2 + 1) / 4, "R@1000": (1 / 2 + 1) / 4}
    assert found.metrics == pytest.approx(expected, rel=1e-12)
    assert (found.queries, found.missing, found.unjudged) == (4, 2, 2)


def test_metrics_are_those_of_trec_eval(tmp_path: Path) -> None:
    """Many queries, graded judgements and equal scores; pytrec_eval itself skips a query that is not in the run."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    generator = np.random.default_rng(0)
    qrels = {
        f"q{q}": {f"d{d}": int(generator.integers(0, 4)) for d in generator.integers(0, 60, 12)} for q in range(40)
    }
    run = {
        f"q{q}": {f"d{d}": float(generator.integers(1, 30)) for d in generator.permutation(60)[:30]}
        for q in range(5, 50)
    }
    lines = [f"{q} Q0 {d} 0 {s} t" for q, documents in run.items() for d, s in documents.items()]
    judgements = [f"{q} 0 {d} {r}" for q, documents in qrels.items() for d, r in documents.items()]
    names = {"nDCG@10": "ndcg_cut_10", "R@20": "recall_20", "P@5": "P_5", "AP": "map", "nDCG": "ndcg"}
    result = pytrec_eval.RelevanceEvaluator(qrels, set(names.values())).evaluate(run)
    assert len(result) == 35
    expected = {ours: sum(row[theirs] for row in result.values()) / 40 for ours, theirs in names.items()}
    found = evaluate(*write(tmp_path, "\n".join(lines), "\n".join(judgements)), tuple(names))
    assert found.metrics == pytest.approx(expected, rel=1e-12)
    assert min(expected.values()) > 0.05
    assert (found.queries, found.missing, found.unjudged) == (40, 5, 10)


def test_an_empty_run_counts_0(tmp_path: Path) -> None:
    found = evaluate(*write(tmp_path, run=""))
    assert set(found.metrics.values()) == {0.0}
    assert (found.queries, found.missing, found.unjudged) == (4, 4, 0)


@pytest.mark.parametrize(
    "name", ["nDCG10", "foo", "nDCG@", "nDCG@x", "RR@0", "R", "nDCG@-1", "P(x=1)@5", "", "α_nDCG@10"]
)
def test_unknown_metrics_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--metrics: expected metrics of ir-measures such as nDCG@10"):
        evaluate(*write(tmp_path), ["nDCG@10", name])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (RUN + "q1 Q0 d7 1 2.0\n", r"run.trec:7: expected 6 fields, qid Q0 docid rank score tag, got 5"),
        (RUN + "q1 Q0 d 7 1 2.0 t\n", r"run.trec:7: expected 6 fields, .*, got 7"),
        ("q1 Q0 d7 1 much t\n", r"run.trec:1: score: expected a finite number, got 'much'"),
        ("q1 Q0 d7 1 nan t\n", r"run.trec:1: score: expected a finite number, got 'nan'"),
        (RUN + "\nq1 Q0 d1 9 1 t\n", r"run.trec:8: query 'q1' and document 'd1' stand on an earlier line"),
    ],
)
def test_broken_runs_are_refused(run: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_run(write(tmp_path, run=run)[0])


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("q1 0 d1\n", r"qrels.txt:1: expected 4 fields, qid 0 docid relevance, or the header .*, got 3"),
        (TREC + "q1 0 d7 1.5\n", r"qrels.txt:7: relevance: expected an integer, got '1.5'"),
        (BEIR + "q1 d7 1\n", r"qrels.txt:8: expected 3 fields separated by tabs, got 1"),
        (BEIR + "q1\td7\tyes\n", r"qrels.txt:8: score: expected an integer, got 'yes'"),
        (BEIR + "q1\td1\t1\n", r"qrels.txt:8: query 'q1' and document 'd1' stand on an earlier line"),
        (HEADER, r"qrels.txt: expected at least one judgement"),
        ("", r"qrels.txt: expected at least one judgement"),
    ],
)
def test_broken_judgements_are_refused(qrels: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_qrels(write(tmp_path, qrels=qrels)[1])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    run, qrels = write(tmp_path)
    with pytest.raises(DataError, match=r"none\.trec: No such file"):
        evaluate(tmp_path / "none.trec", qrels)
    run.write_bytes(b"q1 Q0 d1 1 1 t\nq1 Q0 d\xff 1 1 t\n")
    with pytest.raises(DataError, match=r"run\.trec:2: expected UTF-8, got the byte 0xff"):
        read_run(run)


def test_both_ways_of_equal_scores_are_known(tmp_path: Path) -> None:
    """docs/command-line.md says so: trec_eval takes the last id first, RR@k the first one."""
    paths: Any = write(tmp_path, "q Q0 a 1 1 t\nq Q0 b 2 1 t\n", "q 0 b 1\n")
    assert evaluate(*paths, ["RR@10", "nDCG@10", "RR"]).metrics == {"RR@10": 0.5, "nDCG@10": 1.0, "RR": 1.0}


def test_a_query_that_is_missing_counts_in_every_metric(tmp_path: Path) -> None:
    """ir-measures' own mean of Accuracy and sum of NumRet leave it out."""
    paths = write(
        tmp_path, run="q1 Q0 d1 1 2 tag\nq1 Q0 d2 2 1 tag\n", qrels="q1 0 d1 1\nq1 0 d2 0\nq2 0 d1 1\nq2 0 d2 0\n"
    )
    assert evaluate(*paths, metrics=["Accuracy@10", "NumRet"]).metrics == {"Accuracy@10": 0.5, "NumRet": 1.0}


@pytest.mark.parametrize("metric", ["AP(rel=0)", "nDCG@99999999999999999999"])
def test_a_metric_that_fails_is_named(metric: str, tmp_path: Path) -> None:
    with pytest.raises((DataError, UsageError), match="--metrics"):
        evaluate(*write(tmp_path), metrics=[metric])
