"""``examples/train.py`` on real text: the whole script, through ``main``, with a small model and a part of SQuAD."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")

from sentence_transformers import SparseEncoder  # noqa: E402
from sentence_transformers.base.sampler import BatchSamplers  # noqa: E402
from sentence_transformers.sparse_encoder import losses  # noqa: E402
from transformers import BertTokenizerFast, DistilBertConfig, DistilBertForMaskedLM  # noqa: E402

from examples import train as example  # noqa: E402
from examples.beir import InputError, read_beir  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.path.relpath(REPOSITORY.parent / "shared" / "data"))
for needed in (DATA / "vocab.txt", DATA / "squad" / "corpus.jsonl", DATA / "scifact" / "corpus.jsonl"):
    if not needed.is_file():
        pytest.skip(f"{needed} is not there", allow_module_level=True)

PASSAGES = {"train": 12, "dev": 6, "test": 6}
STEPS, BATCH_SIZE, MAX_LENGTH = 6, 8, 48
RUN = [f"--batch-size={BATCH_SIZE}", f"--max-length={MAX_LENGTH}", "--logging-steps=1", "--lr=1e-3"]
# Large enough that the FLOPS losses are a good part of the total, whose equality then speaks for them too.
LAMBDAS = ["--lambda-query=0.5", "--lambda-document=0.3"]
TEXTS = ["when did the oil crisis begin?", "the rhine is a river", "who?", "a long line of rivers " * 20]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Any:
    """No test of this file may reach the hub, or wait for it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    tokenizer = BertTokenizerFast(vocab=str(DATA / "vocab.txt"), do_lower_case=True)
    assert len(tokenizer) == 30522
    return tokenizer


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: BertTokenizerFast) -> Path:
    """A DistilBERT whose head starts as the identity with a negative bias: a sparse lexical encoder, untrained."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=64, n_layers=2, n_heads=2, hidden_dim=128, initializer_range=0.05
    )
    model = DistilBertForMaskedLM(config)
    with torch.no_grad():
        model.vocab_transform.weight.copy_(torch.eye(64))
        model.vocab_projector.bias.fill_(-1.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory, tokenizer: BertTokenizerFast) -> Path:
    """The first passages of each split of SQuAD, with all their questions."""
    folder = tmp_path_factory.mktemp("squad")
    (folder / "qrels").mkdir()
    whole = read_beir(DATA / "squad")
    passages: dict[str, None] = {}
    questions: dict[str, None] = {}
    for split, count in PASSAGES.items():
        chosen = list(dict.fromkeys(ids[0] for ids in whole.relevant[split].values()))[:count]
        rows = [(question, ids[0]) for question, ids in whole.relevant[split].items() if ids[0] in chosen]
        passages.update(dict.fromkeys(chosen))
        questions.update(dict.fromkeys(question for question, _ in rows))
        lines = ["query-id\tcorpus-id\tscore", *(f"{question}\t{passage}\t1" for question, passage in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    for name, ids, texts in (("corpus", passages, whole.corpus), ("queries", questions, whole.queries)):
        lines = [json.dumps({"_id": identifier, "text": texts[identifier]}) for identifier in ids]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        unknown = sum(tokenizer(texts[identifier])["input_ids"].count(tokenizer.unk_token_id) for identifier in ids)
        assert unknown == 0
    return folder


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
    argv = ["--model", tiny_model, "--data", squad, f"--max-steps={STEPS}", "--eval-steps=3", *RUN, *LAMBDAS]
    return {
        "fused": Run(*argv, "--output", folder / "fused"),
        "stock": Run(*argv, "--output", folder / "stock", "--stock"),
    }


def test_each_head_is_the_one_asked_for(runs: dict[str, Run]) -> None:
    assert runs["fused"].fused_parts == ["fuse", "FlopsLoss", "FlopsLoss"]
    assert runs["stock"].fused_parts == []
    assert type(runs["stock"].loss.document_regularizer) is losses.FlopsLoss
    assert {name: run.summary["head"] for name, run in runs.items()} == {"fused": "fused", "stock": "stock"}


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


def test_fused_and_stock_have_the_same_evaluation(runs: dict[str, Run]) -> None:
    fused, stock = (runs[name].summary["metrics"] for name in ("fused", "stock"))
    assert fused == pytest.approx(stock, abs=0.02, rel=0.02)
    assert 0.1 < stock["test_dot_ndcg@10"] <= 1
    assert 1 < stock["test_corpus_active_dims"] < 15000


def test_results_are_written(runs: dict[str, Run]) -> None:
    for run in runs.values():
        output = Path(run.summary["arguments"]["output"])
        assert json.loads((output / "train_summary.json").read_text()) == run.summary
        assert run.summary["steps"] == STEPS
        assert run.summary["steps_per_second"] > 0
        assert run.summary["peak_memory_mib"] > 100
        assert run.summary["versions"]["torch"] == torch.__version__
        # dev chooses the checkpoint, at steps 3 and 6; test is evaluated once, at the end
        scores = [entry["eval_dev_dot_ndcg@10"] for entry in run.summary["log_history"] if "eval_runtime" in entry]
        best = [3, 6][scores.index(max(scores))]
        assert Path(run.summary["best_checkpoint"]) == output / f"checkpoint-{best}"
        written = {}
        for split in ("dev", "test"):
            with (output / "eval" / f"Information-Retrieval_evaluation_{split}_results.csv").open() as file:
                written[split] = [float(row["dot-NDCG@10"]) for row in csv.DictReader(file)]
        assert written["dev"] == pytest.approx(scores)
        assert written["test"] == pytest.approx([run.summary["metrics"]["test_dot_ndcg@10"]])


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


def test_defaults_are_the_model_cards() -> None:
    arguments = vars(example.make_parser().parse_args([]))
    assert arguments == {
        "model": "distilbert/distilbert-base-uncased",
        "dataset": "sentence-transformers/gooaq",
        "data": None,
        "output": Path("outputs/train"),
        "stock": False,
        "max_steps": None,
        "batch_size": 32,
        "cached": None,
        "max_length": 256,
        "lr": 2e-5,
        "lambda_query": 5e-5,
        "lambda_document": 3e-5,
        "threshold": None,
        "precision": "auto",
        "eval_steps": 4000,
        "logging_steps": 2000,
        "seed": 42,
    }


@pytest.mark.parametrize(
    ("missing", "wanted"),
    [("model", "distilbert/distilbert-base-uncased"), ("dataset", "sentence-transformers/gooaq")],
)
def test_without_the_hub_the_error_names_the_way_out(
    missing: str, wanted: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [] if missing == "model" else ["--model", str(tiny_model)]
    with pytest.raises(SystemExit) as raised:
        example.main([*argv, "--output", str(tmp_path / "run")])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert f"wanted '{wanted}' (--{missing})" in error
    assert "--model takes a local folder, and --data a local BEIR folder" in error


def test_a_used_output_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-4000").mkdir()
    with pytest.raises(SystemExit):
        example.main(["--output", str(tmp_path)])
    assert f"--output {tmp_path}: expected a new or empty folder" in capsys.readouterr().err


def test_flops_loss_gets_the_process_group_only_where_there_is_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = example.make_parser().parse_args([])
    model = example.load_model(str(tiny_model), MAX_LENGTH)
    assert example.make_loss(model, arguments).document_regularizer.process_group is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        loss = example.make_loss(model, arguments)
        assert loss.document_regularizer.process_group is dist.group.WORLD is not None
        assert loss.query_regularizer.process_group is dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("way", ["module", "file"])
def test_both_ways_to_start_it(way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delitem(sys.modules, "examples.train")
    with pytest.raises(SystemExit) as raised:
        if way == "module":
            runpy.run_module("examples.train", run_name="__main__")
        else:
            monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
            runpy.run_path(str(REPOSITORY / "examples" / "train.py"), run_name="__main__")
    assert raised.value.code == 0
    assert "(default: distilbert/distilbert-base-uncased)" in capsys.readouterr().out


def test_whole_collections_are_read() -> None:
    squad, scifact = (read_beir(DATA / name) for name in ("squad", "scifact"))
    counts = {split: (len(queries), len(squad.pairs(split))) for split, queries in squad.relevant.items()}
    assert (len(squad.corpus), len(squad.queries)) == (2067, 10570)
    assert counts == {"train": (7398, 7398), "dev": (740, 740), "test": (2432, 2432)}
    counts = {split: (len(queries), len(scifact.pairs(split))) for split, queries in scifact.relevant.items()}
    assert (len(scifact.corpus), len(scifact.queries)) == (5183, 1109)
    assert counts == {"train": (809, 919), "test": (300, 339)}
    title, text = "1973 oil crisis", "The 1973 oil crisis began in October 1973"
    assert squad.corpus["1973_oil_crisis#0"].startswith(f"{title} {text}")


CORPUS = '{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "text": "two"}\n{"_id": "d3", "text": ""}\n'
QUERIES = '{"_id": "q1", "text": "first"}\n\n{"_id": "q2", "text": "second"}\n'
HEADER = "query-id\tcorpus-id\tscore\n"


def write_beir(folder: Path, files: dict[str, str]) -> Path:
    (folder / "qrels").mkdir()
    good = {
        "corpus.jsonl": CORPUS,
        "queries.jsonl": QUERIES,
        "qrels/train.tsv": HEADER + "q1\td1\t1\nq1\td2\t0\n",
        "qrels/test.tsv": HEADER + "q2\td1\t0\nq2\td2\t2\n",
    }
    for name, content in {**good, **files}.items():
        (folder / name).write_text(content)
    return folder


def test_scores_above_zero_are_relevant(tmp_path: Path) -> None:
    beir = read_beir(write_beir(tmp_path, {}))
    assert beir.corpus == {"d1": "T one", "d2": "two", "d3": ""}
    assert beir.relevant == {"train": {"q1": ["d1"]}, "test": {"q2": ["d2"]}}
    assert beir.pairs("train") == [("first", "T one")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", CORPUS + "{oops\n", "corpus.jsonl:4: expected a JSON object"),
        ("corpus.jsonl", CORPUS + "[1]\n", "corpus.jsonl:4: expected a JSON object, got list"),
        (
            "corpus.jsonl",
            CORPUS + '{"_id": "d1", "text": "x"}\n',
            "corpus.jsonl:4: '_id' 'd1' stands on an earlier line",
        ),
        ("corpus.jsonl", '{"_id": 7, "text": "x"}\n', "corpus.jsonl:1: '_id': expected a non-empty string, got 7"),
        (
            "corpus.jsonl",
            '{"_id": "d1", "title": 1, "text": "x"}\n',
            "corpus.jsonl:1: 'title': expected a string, got 1",
        ),
        ("queries.jsonl", QUERIES + '{"_id": "q3"}\n', "queries.jsonl:4: 'text': expected a string, got None"),
        ("qrels/train.tsv", "q1\td1\t1\n", "train.tsv:1: expected the header"),
        ("qrels/train.tsv", "", "train.tsv:1: expected the header"),
        ("qrels/train.tsv", HEADER + "q1\td1\n", "train.tsv:2: expected 3 fields separated by tabs, got 2"),
        ("qrels/train.tsv", HEADER + "q1\td1\t1\nq9\td1\t1\n", "train.tsv:3: 'q9' is not an '_id' of queries.jsonl"),
        ("qrels/train.tsv", HEADER + "q1\td9\t1\n", "train.tsv:2: 'd9' is not an '_id' of corpus.jsonl"),
        ("qrels/train.tsv", HEADER + "q1\td1\tyes\n", "train.tsv:2: score: expected an integer, got 'yes'"),
        (
            "qrels/train.tsv",
            HEADER + "q1\td1\t1\nq1\td1\t1\n",
            "train.tsv:3: 'q1' and 'd1' are judged on an earlier line",
        ),
        ("qrels/train.tsv", HEADER + "q1\td3\t1\n", "train.tsv:2: the text of 'q1' or of 'd3' is empty"),
        ("qrels/train.tsv", HEADER + "q1\td1\t0\n", "train.tsv: expected at least one pair with a score above 0"),
        ("qrels/test.tsv", HEADER + "q1\td2\t1\n", "test.tsv:2: query 'q1' belongs to the split 'train' as well"),
    ],
)
def test_a_bad_line_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_beir(write_beir(tmp_path, {name: content}))
    assert str(raised.value).startswith(f"{tmp_path / name}"[: -len(Path(name).name)] + message)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    write_beir(tmp_path, {})
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        read_beir(tmp_path)


def test_a_split_to_evaluate_on_is_needed(tmp_path: Path) -> None:
    write_beir(tmp_path, {})
    (tmp_path / "qrels" / "test.tsv").unlink()
    with pytest.raises(InputError, match="expected dev.tsv or test.tsv"):
        example.beir_task(tmp_path)
