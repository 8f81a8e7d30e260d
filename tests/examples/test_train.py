"""``examples/train.py``: its options, its errors, and what it builds from them. Whole runs: test_train_runs.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

from examples import train as example
from examples.beir import InputError
from tests.examples.test_beir import write_beir

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_LENGTH = 48


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


def test_a_split_to_evaluate_on_is_needed(tmp_path: Path) -> None:
    write_beir(tmp_path, {})
    (tmp_path / "qrels" / "test.tsv").unlink()
    with pytest.raises(InputError, match="expected dev.tsv or test.tsv"):
        example.beir_task(tmp_path)
