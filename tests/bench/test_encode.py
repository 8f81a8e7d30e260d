"""The benchmark of whole encodes: a small model with random weights, its memory, its tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import measure, report
from bench.harness import rows
from bench.inputs.cases import PRECISIONS
from bench.inputs.encoders import Size
from bench.jobs import encode
from tests.bench.synthetic import cells, result

CPU = torch.device("cpu")
FLOAT32 = PRECISIONS["float32"]
TINY = encode.Corpus("encode-tiny", 5, 2, Size("distilbert", 1, 64, 600), length=12)


def test_stock_and_fused_are_checked_timed_and_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = []

    def weigher(*arguments: object) -> object:
        return lambda step: weighed.append(arguments[2]) or 7 << 20

    monkeypatch.setattr(encode, "weigher", weigher)
    made = rows.run(encode.jobs(TINY, FLOAT32, CPU, ["stock", "ours"]), CPU, 0)
    assert [(row.variant, row.status) for row in made] == [("stock", "measured"), ("ours", "measured")]
    assert weighed == ["stock", "ours"]
    assert made[1].errors["output"] < 1e-5
    assert made[1].errors["bands_from_unscreened"] < 1
    assert 0 < made[0].active_share < 1
    text = report.render([result("encode", [asdict(row) for row in made])])
    (line,) = cells(text, "encode-tiny: 5 texts of 12 tokens, batch 2, 1 layers D64 V600")
    assert line[4:] == ["7 MiB", "7 MiB"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_the_logits_of_a_batch_are_in_the_memory_of_stock_and_not_in_ours() -> None:
    """5 texts of 128 tokens and 30,000 words: 73 MiB of logits."""
    corpus = encode.Corpus("encode-wide", 5, 5, Size("distilbert", 1, 64, 30_000))
    stock, ours = (encode.resident_bytes(corpus, "float32", name) for name in ("stock", "ours"))
    assert stock > ours + (50 << 20)


def test_what_is_measured_by_default() -> None:
    assert [name for name, _ in measure.plan("encode", measure.default_cases("encode", CPU), CPU)] == [*encode.CORPORA]
    assert measure.default_variants("encode") == ("stock", "ours")
    assert not any(corpus.from_text for corpus in encode.CORPORA.values())
    assert encode.SQUAD.from_text
