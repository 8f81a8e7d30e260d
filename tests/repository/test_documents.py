"""Numbers in documents are those of the result files beside them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.tables import short_sequences as short_sequences_tables
from examples.demo.report import render
from splade_kernels import csr
from tests.integrations import test_st_causal
from tests.lm_models import batch, folder
from tests.st_models import sparse_encoder

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_checked_in_demo_result():
    expected = render(json.loads((ROOT / "docs/demo/result.json").read_text())).strip()
    assert expected in (ROOT / "README.md").read_text()


def test_the_tables_on_short_sequences_are_the_models():
    assert short_sequences_tables.block() in (ROOT / "docs/kernels.md").read_text()


def test_the_page_on_onnx_shows_the_checked_in_result():
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed: pip install '.[onnx]'")
    from examples import onnx_encoder

    assert onnx_encoder.block(ROOT / "docs/onnx/result.json") in (ROOT / "docs/onnx.md").read_text()


def test_the_page_on_long_documents_shows_the_checked_in_result():
    """And what the formula says today of the cases that were measured."""
    from examples import long_documents

    expected = long_documents.block(ROOT / "docs/long-documents/result.json")
    assert expected in (ROOT / "docs/long-documents.md").read_text()


def test_lines_quoted_from_a_gpu_are_those_of_the_files():
    boxes = re.findall(r"```text\n(\S+)\n(.*?)```", (ROOT / "docs/h200.md").read_text(), re.DOTALL)
    assert len(boxes) == 3
    for name, lines in boxes:
        file = (ROOT / "bench/results/h200" / name).read_text().splitlines()
        assert set(lines.splitlines()) <= set(file), name


def test_local_links_in_documents_exist():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_code_for_plain_pytorch_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "from_linear" in block]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_readme_code_for_other_libraries_runs():
    """As printed, but for the models: tiny ones."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    tiny = {
        "answerdotai/ModernBERT-base": folder("modernbert"),
        "distilbert/distilbert-base-uncased": folder("distilbert"),
    }
    names = {}
    for code in (block for block in blocks if "integrations" in block):
        for name, path in tiny.items():
            code = code.replace(name, str(path))
        exec(code, names)
    assert names["embeddings"].shape == (1, len(names["tokenizer"]))
    assert names["loss"].model is names["model"]


def test_the_code_on_long_documents_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/long-documents.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert capsys.readouterr().out.count("\n") == 2 + len({row.length for row in names["rows"]})


def test_the_code_on_search_runs(monkeypatch, capsys):
    """As printed, but for the model: a tiny one."""
    monkeypatch.setattr("sentence_transformers.SparseEncoder", lambda name: sparse_encoder())
    page, names = (ROOT / "docs/search.md").read_text(), {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert f"`[V, {csr.QUERIES}]`" in page
    assert f"`[{csr.QUERIES}, {csr.DOCUMENTS}]`" in page
    scores, ids = names["scores"], names["ids"]
    assert capsys.readouterr().out.count("->") == len(ids) == 2
    assert torch.equal(names["streamed_scores"], scores)
    assert torch.equal(names["streamed_ids"], ids)
    assert torch.allclose(torch.from_numpy(names["all_scores"].toarray()).gather(1, ids), scores)
    assert names["first_rows"].shape == (1, names["documents"].shape[1])
    assert [[hit["corpus_id"] for hit in hits] for hits in names["hits"]] == ids.tolist()
    assert torch.allclose(names["cosines"].gather(1, names["cosine_ids"]), names["cosine_scores"])


def test_the_code_on_causal_models_runs():
    """As printed, but for the model: a tiny one."""
    page, names = (ROOT / "docs/sentence-transformers.md").read_text(), {}
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace('"Qwen/Qwen3-0.6B"', repr(str(folder("qwen3")))), names)
    recipe = {**test_st_causal.RECIPE}
    assert {name: getattr(names["transformer"], name) for name in recipe} == recipe
    bidirectional = test_st_causal.causal_encoder("qwen3", config={"is_causal": False})
    torch.testing.assert_close(
        names["model"].encode("what is rust").to_dense(), bidirectional.encode("what is rust").to_dense()
    )


def test_the_code_on_adapters_runs(monkeypatch, tmp_path):
    pytest.importorskip("peft")
    page, names = (ROOT / "docs/transformers.md").read_text(), {}
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "peft" in code]
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"google-bert/bert-base-uncased"', repr(str(folder("bert")))), names)
    assert names["encoder"](**batch()).shape[0] == 6


@pytest.mark.slow
@pytest.mark.parametrize("script", ["examples/train.py"])
def test_scripts_explain_themselves(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--stock" in done.stdout
