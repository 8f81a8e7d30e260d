"""``splade-kernels estimate``: the table of ``sk.estimate``, for a model named in any of three ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import splade_kernels as sk
from splade_kernels.memory import table
from tests.cli.commands import call
from tests.st_models import backbone, sparse_encoder


def printed(capsys: Any) -> tuple[str, str]:
    title, table = capsys.readouterr().out.split("\n\n")
    return title, table.rstrip("\n")


@pytest.mark.parametrize("kind", ["folder", "config.json", "sentence-transformers", "router"])
def test_a_model_by_folder_or_file(kind: str, tmp_path: Path, capsys: Any) -> None:
    model = backbone("bert")
    rows = sk.estimate(AutoConfig.from_pretrained(model), "24GiB")
    if kind == "config.json":
        model = model / "config.json"
    elif kind != "folder":
        encoder = sparse_encoder("bert")
        encoder.save_pretrained(str(tmp_path))
        model = tmp_path
        if kind == "router":  # whose modules are in folders
            (tmp_path / "inner").mkdir()
            (tmp_path / "config.json").rename(tmp_path / "inner" / "config.json")
            modules = (tmp_path / "modules.json").read_text().replace('"path": ""', '"path": "inner"')
            (tmp_path / "modules.json").write_text(modules)
    assert call("estimate", "--model", model, "--memory", "24GiB") == 0
    title, found = printed(capsys)
    assert title == (
        f"{model}: the largest batch in 24GiB on cuda, training with adamw, float32, by formula, not measured"
    )
    assert found == table(rows)


def test_every_option_reaches_the_formula(capsys: Any) -> None:
    model = backbone("modernbert")
    options: dict[str, Any] = {"lengths": (100, 700), "dtype": "bfloat16", "device": "cpu", "attention": "eager"}
    rows = sk.estimate(
        AutoConfig.from_pretrained(model),
        2**34,
        training=False,
        padded=False,
        reserve="2GiB",
        optimizer=None,
        **options,
    )
    given = ["--lengths", 100, 700, "--dtype", "bfloat16", "--device", "cpu", "--attention", "eager"]
    more = ["--inference", "--no-padding", "--reserve", "2GiB", "--optimizer", "none"]
    assert call("estimate", "--model", model, "--memory", 2**34, *given, *more) == 0
    title, found = printed(capsys)
    assert "in 17179869184 on cpu, inference, bfloat16, by formula" in title
    assert found == table(rows)
    rows = sk.estimate(AutoConfig.from_pretrained(model), "80GB", autocast="bfloat16", optimizer=None)
    given = ["--memory", "80GB", "--autocast", "bfloat16", "--optimizer", "none"]
    assert call("estimate", "--model", model, *given) == 0
    assert printed(capsys)[1] == table(rows)


def test_errors_have_one_line_and_a_status(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cases: list[tuple[int, str, list[Any]]] = [
        (1, "no configuration of transformers", [tmp_path, "24GiB"]),
        (1, "no configuration of transformers", ["nobody/nothing", "24GiB"]),
        (2, "memory: expected bytes", [backbone(), "lots"]),
        (2, "lengths: expected", [backbone(), "24GiB", "--lengths", "0"]),
        (2, "dtype", [backbone(), "24GiB", "--dtype", "float8"]),
        (2, "device", [backbone(), "24GiB", "--device", "tpu"]),
    ]
    capsys.readouterr()  # of saving the model
    for status, message, (model, memory, *more) in cases:
        assert call("estimate", "--model", model, "--memory", memory, *more) == status, message
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
