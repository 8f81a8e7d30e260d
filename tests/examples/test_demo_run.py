"""The demo's training, search, table and pictures on a model small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("bm25s")

import torch
from sentence_transformers import SparseEncoder

from bench.harness import memory
from examples.demo import __main__ as demo
from examples.demo import corpus, report
from examples.demo.corpus import Corpus, Pair
from examples.demo.memory import PeakMemory, measure_head
from examples.demo.model import build_model
from examples.demo.search import answer, build_evaluator, encode_passages, evaluate_bm25, evaluate_model
from examples.demo.settings import Settings
from examples.demo.training import train
from examples.demo.vocabulary import build_tokenizer, build_vocabulary, count_words

ANIMALS = ("otter", "heron", "badger", "lizard", "falcon", "beaver", "weasel", "magpie", "turtle", "hornet")
PLACES = ("river", "marsh", "forest", "desert", "cliff", "pond", "meadow", "garden", "beach", "attic")
PAIRS = [
    Pair("m", f"m.{animal}{place}", f"where the {animal} lives: {place}", f"In the {place} one may find the {animal}.")
    for animal in ANIMALS
    for place in PLACES
]
COLUMNS = {"query": [pair.query for pair in PAIRS], "passage": [pair.passage for pair in PAIRS]}
SETTINGS = Settings(
    steps=12,
    stock_steps=8,
    batch_size=8,
    seed=0,
    device="cpu",
    bf16=False,
    max_length=32,
    vocab_size=400,
    hidden_size=32,
    # The size of Adam's steps does not depend on the gradient's: much larger ones would amplify rounding.
    learning_rate=1e-3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    texts = [text for pair in PAIRS for text in (pair.query, pair.passage)]
    tokenizer = build_tokenizer(build_vocabulary(count_words(texts), 400), max_length=32)
    assert all(tokenizer.unk_token not in tokenizer.tokenize(text) for text in texts)
    build_model(tokenizer, hidden_size=32, max_length=32, seed=0).save_pretrained(str(folder / "start"))
    return folder


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {head: train(SETTINGS, head, COLUMNS, folder) for head in ("stock", "fused")}


def test_start_prefers_the_words_of_its_input(folder: Path) -> None:
    model = SparseEncoder(str(folder / "start"), device="cpu")
    embedding = model.encode("the otter lives in the river", convert_to_sparse_tensor=False, convert_to_tensor=True)
    own = model.tokenizer.convert_tokens_to_ids(["the", "otter", "lives", "in", "river"])
    others = [i for i in range(400) if i not in own]
    assert embedding[own].mean() > 3 * embedding[others].mean()


def test_stock_and_fused_share_their_first_losses(records: dict[str, dict[str, Any]]) -> None:
    stock, fused = records["stock"], records["fused"]
    assert len(stock["losses"]) == len(stock["seconds"]) == 8
    assert len(fused["losses"]) == len(fused["seconds"]) == 12
    differences = report.relative_differences(stock["losses"], fused["losses"])
    assert len(differences) == 8
    assert max(differences) < 1e-4
    # The weights did move, so that agreement means something.
    assert fused["losses"][7] < 0.9 * fused["losses"][0]


def test_search_uses_one_metric_code_for_all(folder: Path, records: dict[str, dict[str, Any]]) -> None:
    evaluator = build_evaluator(PAIRS, batch_size=32)
    bm25 = evaluate_bm25(evaluator)
    # Every pair shares its two words with nobody else, so BM25 is perfect on it.
    assert bm25 == {"ndcg@10": 1.0, "mrr@10": 1.0}

    model = SparseEncoder(str(folder / "trained"), device="cpu")
    passages = encode_passages(model, PAIRS, batch_size=32)
    scores = evaluate_model(evaluator, model, passages)
    assert 0 < scores["mrr@10"] <= scores["ndcg@10"] <= 1
    active = (passages.to_dense() > 0).sum(dim=1).float().mean().item()
    assert scores["passage_active_terms"] == pytest.approx(active)

    found = answer(model, PAIRS, passages, ["otter river"], top_terms=5)
    assert len(found) == 1 and len(found[0]["question_terms"]) == 5
    best = next(pair for pair in PAIRS if pair.name == found[0]["name"])
    assert best.passage == found[0]["passage"]
    scored = model.similarity(model.encode_query("otter river"), passages)
    assert found[0]["score"] == pytest.approx(scored.max().item(), rel=1e-5)


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_whole_demo_on_a_few_pairs(processes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "build_corpus", lambda: Corpus(PAIRS[:80], PAIRS[80:], {"train": 80}, 0.0, "ab" * 32))
    if not processes:
        monkeypatch.setattr(memory, "in_a_process", lambda function, *arguments: function(*arguments))
    settings = replace(SETTINGS, steps=3, stock_steps=2, memory_lengths=(4, 8))
    result = json.loads(json.dumps(demo.run(settings, tmp_path, save_model=tmp_path / "kept")))
    assert [len(result["training"][head]["losses"]) for head in ("stock", "fused")] == [2, 3]
    assert result["training"]["fused"]["losses"][:2] == pytest.approx(result["training"]["stock"]["losses"], rel=1e-4)
    assert [len(result["memory"][head]) for head in ("stock", "fused")] == [2, 2]
    assert result["retrieval"]["before"] != result["retrieval"]["after"]
    assert len(result["answers"]) == 3
    assert "BM25" in report.render(result)
    kept = SparseEncoder(str(tmp_path / "kept"), device="cpu").encode(["otter river"]).to_dense()
    assert torch.equal(kept, SparseEncoder(str(tmp_path / "trained"), device="cpu").encode(["otter river"]).to_dense())


@pytest.mark.slow
def test_the_command_writes_numbers_and_pictures(tmp_path: Path) -> None:
    options = ["--steps=2", "--stock-steps=2", "--batch-size=2", f"--output={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "examples.demo", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert report.markdown_table(json.loads((tmp_path / "result.json").read_text())) in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "loss.png", "memory.png"}


def test_peak_memory_sees_a_tensor_that_is_gone() -> None:
    peak = PeakMemory(torch.device("cpu"))
    tensor = torch.ones(64, 2**18)
    del tensor
    assert 60 <= peak.mib() <= 90


def test_stock_memory_grows_with_the_length_and_fused_does_not() -> None:
    settings = replace(SETTINGS, vocab_size=8192, memory_batch_size=4, memory_hidden_size=32, memory_lengths=(16, 256))
    logits_mib = 4 * 256 * 8192 * 4 / 2**20
    stock, fused = measure_head(settings, "stock"), measure_head(settings, "fused")
    assert stock[1] - stock[0] > 1.5 * logits_mib
    assert fused[1] < logits_mib


def _result(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    scores = {"ndcg@10": 0.25, "mrr@10": 0.2, "query_active_terms": 24.0, "passage_active_terms": 52.0}
    return {
        "command": "python -m examples.demo",
        "seconds": 1.0,
        "machine": {"cpu": "A CPU", "cpu_capability": "AVX512", "threads": 2, "gpu": None, "system": "Linux"},
        "versions": {"python": "3.12", "torch": "2.13", "sentence-transformers": "6.2"},
        "settings": {
            **{"steps": 12, "batch_size": 8, "max_length": 32, "hidden_size": 32, "vocab_size": 400, "bf16": False}
        },
        "corpus": {"sha256": "ab" * 32, "counts": {"train": 100}},
        "summary": report.summarize(records["stock"], records["fused"]),
        "retrieval": {"before": scores, "after": {**scores, "ndcg@10": 0.5}, "bm25": {"ndcg@10": 0.6, "mrr@10": 0.6}},
        "memory": {
            **{"lengths": [32, 64], "batch_size": 8, "hidden_size": 32, "vocab_size": 400},
            **{"stock": [10.0, 20.0], "fused": [5.0, 5.0]},
        },
        "training": records,
    }


def test_summary_times_the_shared_steps_after_the_warm_up() -> None:
    stock = {
        "losses": [2.0, 1.0, 1.0, 1.0],
        "seconds": [9.0, 9.0, 4.0, 6.0],
        "others": [1.0, 1.0, 0.0, 0.1],
        "peak_mib": 800.0,
    }
    fused = {
        "losses": [2.0, 1.0, 1.1, 1.0, 7.0],
        "seconds": [9.0, 9.0, 1.0, 1.0, 9.0],
        "others": [0.0, 0.0, 0.5, 0.7, 0.0],
        "peak_mib": 100.0,
    }
    summary = report.summarize(stock, fused)
    assert summary["stock_seconds_per_step"] == 5.0
    assert summary["fused_seconds_per_step"] == 1.0
    assert summary["speedup"] == 5.0
    assert (summary["stock_others"], summary["fused_others"]) == (pytest.approx(0.05), pytest.approx(0.6))
    assert summary["peak_ratio"] == 8.0
    assert summary["largest_relative_loss_difference"] == pytest.approx(0.1)
    assert (summary["shared_steps"], summary["timed_steps"]) == (4, 2)


def test_table_is_rectangular_and_says_who_wins(records: dict[str, dict[str, Any]]) -> None:
    result = json.loads(json.dumps(_result(records)))
    lines = report.markdown_table(result).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert {line.count("|") for line in lines} == {5}
    assert any("0.250" in line and "0.500" in line and "0.600" in line for line in lines)
    assert "BM25 wins" in report.verdict(result)
    result["retrieval"]["after"]["ndcg@10"] = 0.7
    assert "BM25 wins" not in report.verdict(result)
    assert "torch 2.13" in report.render(result) and "abababababab" in report.render(result)


def test_a_slower_head_and_a_busy_machine_are_said(records: dict[str, dict[str, Any]]) -> None:
    result = json.loads(json.dumps(_result(records)))
    result["summary"].update(speedup=0.25, stock_others=0.1, fused_others=0.1)
    assert "4.0x slower" in report.markdown_table(result)
    assert report.disturbance(result) == ""
    result["summary"].update(fused_others=1.5)
    assert "1.5 beside the median fused" in report.render(result)


def test_pictures_are_written(records: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    figures = pytest.importorskip("examples.demo.figures")
    figures.plot_losses(_result(records), tmp_path / "loss.png")
    figures.plot_memory(_result(records), tmp_path / "memory.png")
    for name in ("loss.png", "memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
