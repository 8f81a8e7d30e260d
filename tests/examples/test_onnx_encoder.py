"""``examples/onnx_encoder.py`` on tiny models: the exported encoder, the head on it, and how far int8 is off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed: pip install '.[onnx]'")
pytest.importorskip("onnx", reason="the package onnx is not installed: pip install '.[onnx]'")

from examples import onnx_encoder as example
from splade_kernels.integrations.sentence_transformers import encode_sparse, fuse
from tests.examples.test_beir import write_beir
from tests.st_models import PAIRS, TEXTS, sparse_encoder


@pytest.fixture(scope="module", params=["distilbert", "bert"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved model, and the folder with what was exported of it."""
    folder = tmp_path_factory.mktemp(request.param)
    sparse_encoder(request.param).save_pretrained(str(folder / "model"), create_model_card=False)
    example.export_all(folder / "model", folder / "onnx")
    return folder / "model", folder / "onnx"


def encode(model: Any) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_sparse_tensor=False)


def test_the_float32_encoder_with_the_exact_head_is_the_fused_model(exported: tuple[Path, Path]) -> None:
    """Also in another batch and at other lengths than those that were traced, and through ``encode_sparse``."""
    exact = encode(fuse(example.load(exported[0], "torch", exported[1])))
    ours = example.load(exported[0], "onnx-encoder-float32", exported[1])
    assert (exact > 0).any(dim=1).all()
    torch.testing.assert_close(encode(ours), exact, rtol=1e-5, atol=5e-6)
    sparse = torch.cat([batch.to_dense() for batch in encode_sparse(ours, TEXTS, batch_size=3)])
    torch.testing.assert_close(sparse, exact, rtol=1e-5, atol=5e-6)


def test_the_session_returns_the_hidden_states_that_the_decoder_gets(exported: tuple[Path, Path]) -> None:
    model = example.load(exported[0], "torch", exported[1])
    features = model.preprocess(TEXTS[:5])
    with torch.no_grad():
        expected = model[0](dict(features))["token_embeddings"]
    served = example.load(exported[0], "onnx-encoder-float32", exported[1])
    found = served[0](dict(features))["token_embeddings"]
    real = features["attention_mask"].bool()
    assert found.shape == (*real.shape, 32)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", ["onnx-int8", "onnx-encoder"])
def test_int8_is_an_approximation_and_no_worse_than_that(exported: tuple[Path, Path], name: str) -> None:
    exact = encode(example.load(exported[0], "torch", exported[1]))
    found = example.compare(encode(example.load(exported[0], name, exported[1])), exact)
    assert 1e-4 < found["relative_error"] < 0.1
    assert 0.9 < found["support_overlap"] < 1


def test_compare_on_known_embeddings() -> None:
    exact = torch.tensor([[3.0, 0, 0, 4], [0, 0, 0, 0]])
    assert example.compare(exact, exact) == {"relative_error": 0, "support_overlap": 0.5}
    found = torch.tensor([[3.0, 1, 0, 0], [0, 0, 0, 0]])
    both = example.compare(found, exact)
    assert both["relative_error"] == pytest.approx(17**0.5 / 5)
    assert both["support_overlap"] == pytest.approx((1 / 3) / 2)


def test_a_whole_run(exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"_id": f"d{i}", "text": text}) for i, (_, text) in enumerate(PAIRS)]
    queries = [json.dumps({"_id": f"q{i}", "text": text}) for i, (text, _) in enumerate(PAIRS)]
    header = "query-id\tcorpus-id\tscore\n"
    files = {
        "corpus.jsonl": "\n".join(lines) + "\n",
        "queries.jsonl": "\n".join(queries) + "\n",
        "qrels/train.tsv": f"{header}q0\td0\t1\n",
        "qrels/test.tsv": header + "".join(f"q{i}\td{i}\t1\n" for i in range(1, len(PAIRS))),
    }
    data = write_beir(tmp_path, files)
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{example.block(tmp_path / 'page' / 'result.json')}\n\nafter\n")
    options = {"--model": exported[0], "--data": data, "--output": tmp_path / "output", "--document": page}
    example.main([str(word) for option in options.items() for word in option])
    assert page.read_text() == f"before\n\n{example.block(tmp_path / 'page' / 'result.json')}\n\nafter\n"
    assert "Not measured" not in page.read_text()
    result = json.loads((tmp_path / "output" / "result.json").read_text())
    assert example.render(result) in capsys.readouterr().out
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == list(example.VARIANTS)
    assert rows["onnx-encoder-float32"]["relative_error"] < 1e-5
    assert rows["onnx-encoder-float32"]["ndcg@10"] is None
    assert 0.3 < rows["torch"]["ndcg@10"] < 1
    for name in ("onnx-int8", "onnx-encoder"):
        assert rows[name]["ndcg@10"] == pytest.approx(rows["torch"]["ndcg@10"], abs=0.1)
