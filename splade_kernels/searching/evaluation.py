"""Judging a run by relevance judgements: ir-measures, on files whose mistakes are named."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..encoding.errors import DataError, UsageError
from .lines import read_lines

METRICS = ("nDCG@10", "RR@10", "R@1000")
BEIR_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class Evaluation:
    """The mean of each metric over ``queries``, the queries that have judgements.

    ``missing`` of them are not in the run and count 0. ``unjudged`` are queries of the run without judgements, which
    are left out.
    """

    metrics: dict[str, float]
    queries: int
    missing: int
    unjudged: int


def evaluate(run: Path, qrels: Path, metrics: Sequence[str] = METRICS) -> Evaluation:
    """The mean of each metric, named as ir-measures names them, over the queries that ``qrels`` judges.

    Raises:
        UsageError: a metric is unknown or cannot be computed.
        DataError: ir-measures is not installed; a line is broken, see :func:`read_run` and :func:`read_qrels`.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise DataError("evaluate needs ir-measures: pip install 'splade-kernels[cli]'") from error
    measures = {name: _parse(ir_measures, name) for name in dict.fromkeys(metrics)}
    judged, ranked = read_qrels(qrels), read_run(run)
    found = {query: documents for query, documents in ranked.items() if query in judged}
    # Not ir-measures' own mean: some metrics leave out a query that is missing, others are sums.
    values = {measure: dict.fromkeys(judged, 0.0) for measure in measures.values()}
    try:
        for one in ir_measures.iter_calc(values, judged, found):
            values[one.measure][one.query_id] = one.value
    except Exception as error:  # of any kind: each metric has a program of its own, perl's among them
        message = " ".join(str(error).split())
        raise DataError(f"--metrics {' '.join(measures)}: {type(error).__name__}: {message}") from error
    return Evaluation(
        {name: statistics.fmean(values[measure].values()) for name, measure in measures.items()},
        queries=len(judged),
        missing=len(judged) - len(found),
        unjudged=len(ranked) - len(found),
    )


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """Scores by query and document of a TREC run, ``qid Q0 docid rank score tag``. Ranks are not read.

    Raises:
        DataError: a line has not 6 fields, a score that is no finite number, or a document that its query has already.
    """
    run: dict[str, dict[str, float]] = {}
    for where, fields in _fields(path, 6, "qid Q0 docid rank score tag"):
        query, _, document, _, text, _ = fields
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise DataError(f"{where}: score: expected a finite number, got {text!r}")
        _put(run, query, document, score, where)
    return run


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Relevance by query and document: TREC's ``qid 0 docid relevance``, or BEIR's TSV, which has the header
    ``query-id corpus-id score``.

    Raises:
        DataError: a line is neither, a relevance is no integer, a pair is judged twice, or there is no judgement.
    """
    qrels: dict[str, dict[str, int]] = {}
    _, first = next(read_lines(path), (0, ""))
    beir = first.split("\t") == BEIR_HEADER
    rows = _beir_fields(path) if beir else _fields(path, 4, f"qid 0 docid relevance, or the header {BEIR_HEADER}")
    for where, (query, *_, document, text) in rows:
        try:
            relevance = int(text)
        except ValueError:
            name = "score" if beir else "relevance"
            raise DataError(f"{where}: {name}: expected an integer, got {text!r}") from None
        _put(qrels, query, document, relevance, where)
    if not qrels:
        raise DataError(f"{path}: expected at least one judgement, got none")
    return qrels


def _fields(path: Path, count: int, expected: str) -> Iterator[tuple[str, list[str]]]:
    for number, line in read_lines(path):
        fields = line.split()
        if len(fields) != count:
            raise DataError(f"{path}:{number}: expected {count} fields, {expected}, got {len(fields)}")
        yield f"{path}:{number}", fields


def _beir_fields(path: Path) -> Iterator[tuple[str, list[str]]]:
    for place, (number, line) in enumerate(read_lines(path)):
        fields = line.split("\t")
        if len(fields) != 3:
            raise DataError(f"{path}:{number}: expected 3 fields separated by tabs, got {len(fields)}")
        if place:
            yield f"{path}:{number}", fields


def _put(table: dict[str, dict[str, Any]], query: str, document: str, value: float, where: str) -> None:
    documents = table.setdefault(query, {})
    if document in documents:
        raise DataError(f"{where}: query {query!r} and document {document!r} stand on an earlier line as well")
    documents[document] = value


def _parse(ir_measures: Any, name: str) -> Any:
    wrong = UsageError(f"--metrics: expected metrics of ir-measures such as {', '.join(METRICS)}, got {name!r}")
    try:
        measure = ir_measures.parse_measure(name)
        supported = ir_measures.DefaultPipeline.supports(measure)
    except (AssertionError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise wrong from error
    cutoff = measure.params.get("cutoff", 1)
    if not supported or not isinstance(cutoff, int) or cutoff < 1:
        raise wrong
    return measure
