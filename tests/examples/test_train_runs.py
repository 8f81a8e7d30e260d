"""``examples/train.py`` on real text: the whole script, through ``main``, with a small model and a part of SQuAD."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")

from sentence_transformers import SparseEncoder  # noqa: E402
from sentence_transformers.base.sampler import BatchSamplers  # noqa: E402
from sentence_transformers.sparse_encoder import losses  # noqa: E402

from examples import train as example  # noqa: E402
from examples.beir import read_beir  # noqa: E402

STEPS, EVAL_STEPS, BATCH_SIZE, MAX_LENGTH = 6, 3, 8, 48
RUN = [f"--batch-size={BATCH_SIZE}", f"--max-length={MAX_LENGTH}", "--logging-steps=1", "--lr=1e-3"]
# Large enough that the FLOPS losses contribute much of the total, so that its equality covers them too.
LAMBDAS = ["--lambda-query=0.5", "--lambda-document=0.3"]
TEXTS = ["when did the oil crisis begin?", "the rhine is a river", "who?", "a long line of rivers " * 20]


class Run:
    """One call of ``main``, with its summary, model, loss, document batches, and the fused parts it made."""

    def __init__(self, *argv: object) -> None:
        self.documents: list[torch.Tensor] = []
        self.fused_parts: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            load_model, make_loss = example.load_model, example.make_loss

            def keep_model(name: str, max_length: int) -> SparseEncoder:
                self.model = load_model(name, max_length)
                return self.model

            def keep_batches(*arguments: Any) -> torch.nn.Module:
                self.loss = make_loss(*arguments)
                self.loss.register_forward_pre_hook(self._see_batch)
                return self.loss

            def count(part: str) -> Any:
                original = getattr(example, part)
                return lambda *args, **kwargs: self.fused_parts.append(part) or original(*args, **kwargs)

            patch.setattr(example, "load_model", keep_model)
            patch.setattr(example, "make_loss", keep_batches)
            for part in ("fuse", "FlopsLoss"):
                patch.setattr(example, part, count(part))
            self.summary = example.main([str(argument) for argument in argv])

    def _see_batch(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self.documents.append(list(inputs[0])[1]["input_ids"])

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.summary["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, squad: Path) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    argv = [
        "--model",
        tiny_model,
        "--data",
        squad,
        f"--max-steps={STEPS}",
        f"--eval-steps={EVAL_STEPS}",
        *RUN,
        *LAMBDAS,
    ]
    return {
        "fused": Run(*argv, "--output", folder / "fused"),
        "stock": Run(*argv, "--output", folder / "stock", "--stock"),
    }


@pytest.mark.slow
def test_each_head_is_the_one_asked_for(runs: dict[str, Run]) -> None:
    assert runs["fused"].fused_parts == ["fuse", "FlopsLoss", "FlopsLoss"]
    assert runs["stock"].fused_parts == []
    assert type(runs["stock"].loss.document_regularizer) is losses.FlopsLoss
    assert {name: run.summary["head"] for name, run in runs.items()} == {"fused": "fused", "stock": "stock"}


@pytest.mark.slow
def test_fused_and_stock_have_the_same_losses(runs: dict[str, Run]) -> None:
    fused, stock = runs["fused"].losses, runs["stock"].losses
    assert len(stock) == STEPS
    assert fused == pytest.approx(stock, rel=1e-4)
    # The comparison must be about something: training moves, and the regularisers are a part of the loss.
    assert max(stock) > 1.1 * min(stock)
    last = runs["stock"].summary["log_history"][-3]
    assert last["step"] == STEPS
    for part in ("document_regularizer_loss", "query_regularizer_loss"):
        assert last[part] > 0.05 * last["loss"]


@pytest.mark.slow
def test_fused_and_stock_have_the_same_evaluation(runs: dict[str, Run]) -> None:
    fused, stock = (runs[name].summary["metrics"] for name in ("fused", "stock"))
    assert fused == pytest.approx(stock, abs=0.02, rel=0.02)
    assert 0.1 < stock["test_dot_ndcg@10"] <= 1
    assert 1 < stock["test_corpus_active_dims"] < 15000


@pytest.mark.slow
def test_results_are_written(runs: dict[str, Run]) -> None:
    for run in runs.values():
        output = Path(run.summary["arguments"]["output"])
        assert json.loads((output / "train_summary.json").read_text()) == run.summary
        assert run.summary["steps"] == STEPS
        assert run.summary["steps_per_second"] > 0
        assert run.summary["peak_memory_mib"] > 100
        assert run.summary["versions"]["torch"] == torch.__version__
        # dev chooses the checkpoint, twice; test is evaluated once, at the end
        scores = [entry["eval_dev_dot_ndcg@10"] for entry in run.summary["log_history"] if "eval_runtime" in entry]
        best = EVAL_STEPS * (1 + scores.index(max(scores)))
        assert Path(run.summary["best_checkpoint"]) == output / f"checkpoint-{best}"
        written = {}
        for split in ("dev", "test"):
            with (output / "eval" / f"Information-Retrieval_evaluation_{split}_results.csv").open() as file:
                written[split] = [float(row["dot-NDCG@10"]) for row in csv.DictReader(file)]
        assert written["dev"] == pytest.approx(scores)
        assert written["test"] == pytest.approx([run.summary["metrics"]["test_dot_ndcg@10"]])


@pytest.mark.slow
@pytest.mark.slow
def test_saved_model_needs_nothing_of_ours(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["fused"]
    here = run.model.encode(TEXTS, convert_to_sparse_tensor=False)
    code = (
        "import json, sys, torch; sys.modules['splade_kernels'] = None\n"
        "from sentence_transformers import SparseEncoder\n"
        "model = SparseEncoder(sys.argv[1], device='cpu')\n"
        "torch.save(model.encode(json.loads(sys.argv[2]), convert_to_sparse_tensor=False), sys.argv[3])\n"
    )
    folder, result = Path(run.summary["arguments"]["output"]) / "model", tmp_path / "embeddings.pt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, folder, json.dumps(TEXTS), result], check=True, env=environment)
    there = torch.load(result)
    assert (there > 0).sum(dim=1).min() > 0
    torch.testing.assert_close(here.cpu(), there, rtol=1e-4, atol=1e-5)


def repeated_rows(batch: torch.Tensor) -> int:
    return len(batch) - len({tuple(row) for row in batch.tolist()})


@pytest.mark.slow
def test_a_batch_never_holds_a_passage_twice(runs: dict[str, Run], squad: Path) -> None:
    """Several questions share a passage; in one batch, each would be the other's negative."""
    passages = [passage for _, passage in read_beir(squad).pairs("train")]
    assert len(passages) > 3 * len(set(passages))
    for run in runs.values():
        assert [len(batch) for batch in run.documents] == [BATCH_SIZE] * STEPS
        assert [repeated_rows(batch) for batch in run.documents] == [0] * STEPS


def test_the_batch_check_sees_repeats(
    tiny_model: Path, squad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unmasked:
        NO_DUPLICATES = BatchSamplers.BATCH_SAMPLER

    monkeypatch.setattr(example, "BatchSamplers", Unmasked)
    # Without dev.tsv: the last step is kept, and test does not choose.
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes((squad / name).read_bytes())
    run = Run("--model", tiny_model, "--data", tmp_path / "data", "--output", tmp_path / "run", "--max-steps=2", *RUN)
    assert sum(map(repeated_rows, run.documents)) > 0
    assert run.summary["best_checkpoint"] is None
    assert not any("eval_runtime" in entry for entry in run.summary["log_history"])
    assert "test_dot_ndcg@10" in run.summary["metrics"]


def write_pairs(folder: Path, squad: Path) -> int:
    pairs = read_beir(squad).pairs("train")
    rows = [{"id": index, "question": query, "answer": passage} for index, (query, passage) in enumerate(pairs)]
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def test_question_answer_pairs_from_a_local_folder(
    tiny_model: Path, squad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    count = write_pairs(tmp_path / "pairs", squad)
    argv = ["--model", tiny_model, "--dataset", tmp_path / "pairs", "--output", tmp_path / "run", "--max-steps=3"]
    run = Run(*argv, "--cached=4", "--threshold=5", "--precision=bf16", *RUN)
    assert isinstance(run.loss, losses.CachedSpladeLoss)
    assert run.loss.mini_batch_size == 4
    assert run.loss.document_regularizer.threshold == run.loss.query_regularizer.threshold == 5
    assert run.summary["train_pairs"] == count - count // 10
    assert run.summary["precision"] == "bf16"
    assert len(run.losses) == 3
    # The default --eval-steps is far behind the last step: there is an evaluation all the same.
    (evaluation,) = [entry for entry in run.summary["log_history"] if "eval_loss" in entry]
    assert evaluation["eval_loss"] > 0
    assert evaluation["eval_held_out_dot_ndcg@10"] == pytest.approx(run.summary["metrics"]["held_out_dot_ndcg@10"])


def test_default_task_with_the_hub_replaced_by_local_tables(
    tiny_model: Path, squad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and metrics of the default run: a wrong one would show at the first evaluation, after 4,000 steps."""
    beir = read_beir(squad)
    texts = {"corpus": beir.corpus, "queries": beir.queries}
    wanted = set()

    def table(evaluator: Any, subset: str, split: str, required_columns: list[str]) -> list[dict[str, str]]:
        wanted.add((evaluator.dataset_id, split))
        if subset == "qrels":
            relevant = list(beir.relevant["dev"].items())[:2]
            return [{"query-id": query, "corpus-id": passage} for query, passages in relevant for passage in passages]
        ids = {
            identifier
            for query, passages in list(beir.relevant["dev"].items())[:2]
            for identifier in [query, *passages]
        }
        return [{"_id": key, "text": text} for key, text in texts[subset].items() if key in ids]

    def load_dataset(name: str, split: str) -> Any:
        assert (name, split) == ("sentence-transformers/gooaq", "train")
        questions, answers = zip(*beir.pairs("train"), strict=True)
        return datasets.Dataset.from_dict({"question": questions, "answer": answers})

    monkeypatch.setattr(example, "load_dataset", load_dataset)
    monkeypatch.setattr(example.SparseNanoBEIREvaluator, "_load_dataset_subset_split", table)
    run = Run("--model", tiny_model, "--output", tmp_path / "run", "--max-steps=1", *RUN)
    assert len(wanted) == 13
    assert {name for name, _ in wanted} == {"sentence-transformers/NanoBEIR-en"}
    assert run.summary["best_checkpoint"] is not None
    assert 0 < run.summary["metrics"]["NanoBEIR_mean_dot_ndcg@10"] <= 1
