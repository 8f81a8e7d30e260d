"""A fused SparseEncoder outside its own process, saved, compiled and sharded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import MLMTransformer
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from splade_kernels.integrations.sentence_transformers import fuse
from tests import without_package
from tests.st_models import TEXTS, decoder_of, gradients, sparse_encoder


def encode(model: SparseEncoder) -> Tensor:
    return model.encode(TEXTS, batch_size=8, convert_to_sparse_tensor=False)


def saved_files(folder: Path) -> dict[str, bytes]:
    """Contents by relative path; the model card is left out, because it draws example sentences."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "README.md")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def legacy_folder(folder: Path) -> Path:
    """The layout that sentence-transformers 5.0 wrote."""
    sparse_encoder().save_pretrained(str(folder))
    modules = "sentence_transformers.sparse_encoder.models"
    contents: dict[str, Any] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{modules}.MLMTransformer"},
            {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": f"{modules}.SpladePooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "1_SpladePooling/config.json": {
            "pooling_strategy": "max",
            "activation_function": "relu",
            "word_embedding_dimension": decoder_of(sparse_encoder()).out_features,
        },
        "config_sentence_transformers.json": {
            "model_type": "SparseEncoder",
            "__version__": {"sentence_transformers": "5.0.0", "transformers": "4.50.3", "pytorch": "2.6.0"},
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def save_fused(tmp_path: Path) -> tuple[list[str], list[Tensor]]:
    """Folders of fused models, whose files are those of stock models, and their embeddings."""
    models = {
        "max": sparse_encoder(),
        "sum": sparse_encoder("bert", pooling_strategy="sum", activation_function="log1p_relu"),
        "legacy": SparseEncoder(str(legacy_folder(tmp_path / "stock-legacy")), device="cpu"),
    }
    expected = []
    for name, model in models.items():
        model.similarity_fn_name = "dot"
        stock = encode(model)
        model.save_pretrained(str(tmp_path / "stock" / name))
        expected.append(encode(fuse(model)))
        torch.testing.assert_close(expected[-1], stock, rtol=1e-5, atol=1e-6)
        model.save_pretrained(str(tmp_path / name))
        assert saved_files(tmp_path / name) == saved_files(tmp_path / "stock" / name)
    return [str(tmp_path / name) for name in models], expected


def test_saved_files_are_those_of_stock_models(tmp_path: Path) -> None:
    for folder, expected in zip(*save_fused(tmp_path), strict=True):
        torch.testing.assert_close(encode(SparseEncoder(folder, device="cpu")), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_saved_models_load_without_this_package(tmp_path: Path) -> None:
    folders, expected = save_fused(tmp_path)
    for actual, wanted in zip(without_package.encode(folders, TEXTS, tmp_path), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_legacy_folder(tmp_path: Path) -> None:
    model = SparseEncoder(str(legacy_folder(tmp_path)), device="cpu")
    assert type(model[0]) is MLMTransformer
    stock = encode(model)
    torch.testing.assert_close(stock, encode(sparse_encoder()), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(encode(fuse(model)), stock, rtol=1e-5, atol=1e-6)
    assert type(model[0]) is MLMTransformer


def test_a_saved_and_reloaded_model_can_be_fused_again(tmp_path: Path) -> None:
    model = fuse(sparse_encoder("xlm-roberta"))
    expected = encode(model)
    model.save_pretrained(str(tmp_path))
    other = SparseEncoder(str(tmp_path), device="cpu")
    assert not any("forward" in module.__dict__ for module in other.modules())
    torch.testing.assert_close(encode(fuse(other)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_multi_process_encode() -> None:
    """Spawned workers get the model by pickle."""
    model = sparse_encoder()
    stock = encode(model)
    fuse(model)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        fused = model.encode(TEXTS, pool=pool, chunk_size=8, convert_to_sparse_tensor=False)
    finally:
        model.stop_multi_process_pool(pool)
    torch.testing.assert_close(fused, stock, rtol=1e-5, atol=1e-6)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_encode_and_gradients_equal_eager() -> None:
    model = fuse(sparse_encoder())
    eager = model.encode(TEXTS[:4]).to_dense()
    eager_gradients = dict(gradients(model, TEXTS[:4]))
    model.compile(backend="aot_eager")
    torch.testing.assert_close(model.encode(TEXTS[:4]).to_dense(), eager, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model, TEXTS[:4]):
        torch.testing.assert_close(gradient, eager_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    inner: Any = model.transformers_model
    features = model.preprocess(TEXTS[:2])
    logits = inner(input_ids=features["input_ids"], attention_mask=features["attention_mask"]).logits
    assert logits.shape[-1] == decoder_of(model).out_features


@pytest.mark.usefixtures("fresh_compiler")
def test_modules_compile_without_a_graph_break() -> None:
    model = fuse(sparse_encoder().eval())
    features = {name: value for name, value in model.preprocess(TEXTS[:4]).items() if torch.is_tensor(value)}
    eager = model(dict(features))["sentence_embedding"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(dict(features))["sentence_embedding"], eager, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_inner_model_still_knows_who_calls_it() -> None:
    """The hand-off is read at trace time: dynamo has to guard on it, or one caller would get the other's output."""
    model = fuse(sparse_encoder().eval())
    inner: Any = model.transformers_model
    features = {name: model.preprocess(TEXTS[:4])[name] for name in ("input_ids", "attention_mask")}
    logits, embeddings = inner(**features).logits, model(dict(features))["sentence_embedding"]
    inner.forward = torch.compile(inner.forward, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(inner(**features).logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(dict(features))["sentence_embedding"], embeddings, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("fuse_first", [True, False])
def test_fully_sharded_encoder(fuse_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    stock = sparse_encoder()
    expected, expected_gradients = encode(stock), dict(gradients(stock, TEXTS[:4]))
    model = sparse_encoder()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    if fuse_first:
        fuse(model)
    fully_shard(model, mesh=mesh)
    if not fuse_first:
        fuse(model)
        assert sum("weights are sharded" in record.message for record in caplog.records) == 1
    model.train()
    actual_gradients = dict(gradients(model, TEXTS[:4]))
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name].full_tensor(), gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.distributed.tensor.DTensor in {type(parameter) for parameter in model.parameters()}
    torch.testing.assert_close(encode(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_sharding_the_decoder_alone_is_refused_at_run_time() -> None:
    model = fuse(sparse_encoder())
    fully_shard(decoder_of(model), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match="shard the whole SparseEncoder"):
        model(model.preprocess(TEXTS[:2]))
