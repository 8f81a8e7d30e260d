"""The benchmark of whole encodes: a small model with random weights, its memory, its tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import measure, report
from bench.harness import rows
from bench.harness.steps import unweighed
from bench.inputs import text_model
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


def test_ways_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode.importlib.util, "find_spec", lambda name: None)
    jobs = encode.jobs(TINY, FLOAT32, CPU, encode.ONNX)
    assert {job.row.status for job in jobs} == {"not here: the package onnxruntime is not installed"}
    assert encode.why_not("ours", CPU) is None
    assert encode.why_not("onnx", torch.device("cuda")) == "for CPUs only"


def test_every_way_to_encode_is_timed_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in ONNX Runtime once, in float32; the int8 of the encoder is an approximation."""
    for package in ("onnxruntime", "onnx"):
        pytest.importorskip(package)
    monkeypatch.setattr(encode, "weigher", lambda *arguments: unweighed)
    both = [FLOAT32, PRECISIONS["bf16"]]
    made = rows.run(encode.together(TINY, both, CPU, ["stock", encode.SPARSE, *encode.ONNX]), CPU, 0)
    assert {row.status for row in made} == {"measured"}
    names = [(row.precision, row.variant) for row in made]
    in_both = ["stock", "encode_sparse"]
    expected = [("float32", name) for name in (*in_both, *encode.ONNX)] + [("bf16", name) for name in in_both]
    assert names == expected
    assert len({len(row.samples) for row in made}) == 1
    errors = {row.variant: row.errors["output"] for row in made if row.precision == "float32"}
    assert max(errors["encode_sparse"], errors["onnx"]) < 1e-5
    assert 1e-4 < errors["onnx-encoder"] < 0.1
    assert 1e-4 < errors["onnx-int8"] < 0.1


def test_passages_are_tokenised_as_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(ord("a") + i) for i in range(26))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    corpus = encode.Corpus("encode-text", 9, 4, Size("distilbert", 1, 64, len(words)), length=12, reads_data=True)
    monkeypatch.setattr(text_model, "DATA", tmp_path)
    monkeypatch.setattr(text_model, "VOCABULARY", tmp_path / "vocab.txt")
    assert text_model.why_absent(corpus).endswith("squad/corpus.jsonl beside the repository")
    texts = [" ".join("abcdefghijklmn"[: 1 + i]) for i in range(12)]
    monkeypatch.setattr(text_model, "squad_passages", lambda: texts)
    assert corpus.draw() == texts[:9]
    monkeypatch.setattr(encode, "ACTIVE_TERMS", 5)
    monkeypatch.setattr(encode, "weigher", lambda *arguments: unweighed)
    model = corpus.load(CPU)
    assert model.tokenizer(texts[2])["input_ids"] == [2, 5, 6, 7, 3]
    made = rows.run(encode.jobs(corpus, FLOAT32, CPU, ["stock", encode.SPARSE, encode.COMMAND])[1:], CPU, 0)
    assert [row.status for row in made] == ["measured", "measured"]
    assert made[0].shape.startswith("9 texts of up to 12 tokens, batch 4, 1 layers D64")


def test_what_is_measured_by_default() -> None:
    assert [name for name, _ in measure.plan("encode", measure.default_cases("encode", CPU), CPU)] == [*encode.CORPORA]
    assert measure.default_variants("encode") == ("stock", "ours", "encode_sparse", "command", *encode.ONNX)
    assert measure.default_precisions("encode", CPU) == ["float32", "bf16"]
    assert not any(corpus.from_text for corpus in encode.CORPORA.values())
    assert encode.SQUAD.from_text
