"""``splade-kernels evaluate``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from .several import SeveralValues as Command

__all__ = ["Command", "command"]


def command(
    run: Annotated[Path, typer.Option(metavar="FILE", help="TREC run: qid Q0 docid rank score tag.")],
    qrels: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Judgements: TREC's four columns, or BEIR's TSV (header query-id corpus-id score)."
        ),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help="As ir-measures names them.  [default: nDCG@10 RR@10 R@1000]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Judge a run: the mean of each metric over the queries that have judgements.

    A query that is missing from the run counts 0. One without judgements is left out and counted.
    """
    from ..searching.evaluation import METRICS, evaluate

    found = evaluate(run, qrels, metrics or METRICS)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    width = max(map(len, found.metrics))
    for name, value in found.metrics.items():
        print(f"{name:{width}}  {value:.4f}")
    print(f"over {found.queries} queries with judgements; {found.missing} of them are missing from the run and count 0")
    if found.unjudged:
        print(f"left out: {found.unjudged} queries of the run without judgements")
