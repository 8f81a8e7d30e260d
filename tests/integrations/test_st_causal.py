"""Causal language models in a sentence-transformers ``SparseEncoder``, fused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
from torch import Tensor

from splade_kernels.integrations.sentence_transformers import encode_sparse, fuse, unfuse
from splade_kernels.integrations.transformers import SpladeEncoder
from tests.integrations.test_st_trainer import RELATIVE_LOSS_DIFFERENCE, largest_relative_difference, train
from tests.lm_models import CAUSAL, TRANSFORMED, decoder_of, folder
from tests.st_models import TEXTS, gradients, sparse_encoder

HEADS = [("max", "relu"), ("sum", "log1p_relu")]
# As docs/sentence-transformers.md has them.
RECIPE: dict[str, Any] = {
    "transformer_task": "text-generation",
    "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    "module_output_name": "token_embeddings",
    "processing_kwargs": {"text": {"logits_to_keep": 0}},
}


def causal_encoder(
    family: str = "llama",
    pooling_strategy: Any = "max",
    activation_function: Any = "relu",
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> SparseEncoder:
    recipe = {name: value for name, value in (RECIPE | changes).items() if value is not None}
    transformer = Transformer(str(folder(family, **(config or {}))), **recipe)
    return SparseEncoder(modules=[transformer, SpladePooling(pooling_strategy, activation_function)], device="cpu")


def encode(model: SparseEncoder) -> Tensor:
    return model.encode(TEXTS, batch_size=5, convert_to_sparse_tensor=False)


@pytest.mark.parametrize(("pooling_strategy", "activation_function"), HEADS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("family", CAUSAL + TRANSFORMED)
def test_embeddings_and_gradients_equal_stock(
    family: str, is_causal: bool, pooling_strategy: str, activation_function: str
) -> None:
    config = {} if is_causal else {"is_causal": False}
    model = causal_encoder(family, pooling_strategy, activation_function, config)
    stock, stock_gradients = encode(model.eval()), dict(gradients(model, TEXTS[:5]))
    fuse(model.eval())
    assert 0.05 < (stock > 0).double().mean() < 1
    torch.testing.assert_close(encode(model), stock, rtol=1e-5, atol=1e-6)
    largest = max(gradient.abs().max().item() for gradient in stock_gradients.values())
    for name, gradient in gradients(model, TEXTS[:5]):
        torch.testing.assert_close(gradient, stock_gradients[name], rtol=1e-4, atol=2e-6 * largest, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_bidirectional_model_is_another_one(family: str) -> None:
    first, second = (encode(fuse(causal_encoder(family, config=config))) for config in ({}, {"is_causal": False}))
    assert (first - second).abs().max() > 1e-2


def test_sparse_batches_equal_encode() -> None:
    model = fuse(causal_encoder())
    batches = torch.cat([rows.to_dense() for rows in encode_sparse(model, TEXTS, batch_size=5)])
    torch.testing.assert_close(batches, encode(model), rtol=1e-5, atol=1e-6)


def test_losses_equal_stock_step_by_step(tmp_path: Path) -> None:
    stock = train(causal_encoder("qwen3"), tmp_path, max_steps=3)
    fused = train(fuse(causal_encoder("qwen3")), tmp_path, max_steps=3, fused_flops=True)
    assert largest_relative_difference(fused, stock) <= RELATIVE_LOSS_DIFFERENCE


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = fuse(causal_encoder(config={"is_causal": False}))
    expected = encode(model)
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert saved == RECIPE
    loaded = SparseEncoder(str(tmp_path), device="cpu")
    torch.testing.assert_close(encode(loaded), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encode(fuse(loaded)), expected, rtol=1e-5, atol=1e-6)
    encoder = SpladeEncoder.from_pretrained(tmp_path)
    features = {name: value for name, value in loaded.preprocess(TEXTS).items() if torch.is_tensor(value)}
    torch.testing.assert_close(encoder(**features), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "setting"), [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")])
def test_what_follows_the_decoder_matters_and_may_not_change(family: str, setting: str, tmp_path: Path) -> None:
    model = fuse(causal_encoder(family))
    expected = encode(model)
    assert (expected - encode(causal_encoder(family, config={setting: 1000.0}))).abs().max() > 1e-2
    losses = train(model, tmp_path, max_steps=2)
    assert largest_relative_difference(losses, train(causal_encoder(family), tmp_path, max_steps=2)) <= 1e-4
    setattr(model.transformers_model.config, setting, 7.0)
    with pytest.raises(RuntimeError, match=rf"config\.{setting} was .* and is 7\.0 now: call unfuse"):
        encode(model)
    unfuse(model)
    changed = encode(model)
    torch.testing.assert_close(encode(fuse(model)), changed, rtol=1e-5, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no-modality-config": (
        {"modality_config": None, "module_output_name": None},
        "module_output_name: expected 'token_embeddings', got 'causal_logits', which .* without modality_config",
    ),
    "other-output": ({"module_output_name": "causal_logits"}, "module_output_name: expected 'token_embeddings'"),
    "no-processing-kwargs": (
        {"processing_kwargs": None},
        r"processing_kwargs: expected \{'text': \{'logits_to_keep': 0\}\}.*got logits_to_keep=1",
    ),
    "last-token": ({"processing_kwargs": {"text": {"logits_to_keep": 1}}}, "processing_kwargs: .*logits_to_keep=1"),
    "not-of-the-text": (
        {"processing_kwargs": {"common": {"logits_to_keep": 0}}},
        "processing_kwargs: .*logits_to_keep=1",
    ),
    "hidden-states": (
        {"modality_config": {"text": {"method": "forward", "method_output_name": ["hidden_states", -1]}}},
        "modality_config: expected .*'logits'.*hidden_states",
    ),
    "generate": (
        {"modality_config": {"text": {"method": "generate", "method_output_name": "logits"}}},
        "modality_config: expected .*'forward'.*generate",
    ),
    "another-modality": (
        {"modality_config": RECIPE["modality_config"] | {"message": {"method": "forward", "method_output_name": None}}},
        "modality_config: expected .* for 'message'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_recipes_are_refused_by_the_key(case: str) -> None:
    changes, message = REFUSED[case]
    model = causal_encoder(**changes)
    with pytest.raises(ValueError, match=message):
        fuse(model)
    assert "forward" not in decoder_of(model.transformers_model).__dict__


def test_without_an_output_name_sentence_transformers_refuses_itself() -> None:
    with pytest.raises(ValueError, match="module_output_name"):
        causal_encoder(module_output_name=None)


@pytest.mark.parametrize("output", [["logits"], ("logits",)], ids=str)
def test_the_output_may_be_written_as_a_path(output: Any) -> None:
    model = causal_encoder(modality_config={"text": {"method": "forward", "method_output_name": output}})
    stock = encode(model)
    torch.testing.assert_close(encode(fuse(model)), stock, rtol=1e-5, atol=1e-6)


def test_logits_to_keep_of_one_call() -> None:
    model = fuse(causal_encoder())
    expected = encode(model)
    features = model.preprocess(TEXTS[:3], processing_kwargs={"text": {"logits_to_keep": 1}})
    with pytest.raises(ValueError, match="logits_to_keep: expected 0, for all tokens, got 1"):
        model(features)
    features = model.preprocess(TEXTS[:3], processing_kwargs={"text": {"logits_to_keep": 0}})
    torch.testing.assert_close(model(features)["sentence_embedding"], expected[:3], rtol=1e-5, atol=1e-6)


def test_generation_goes_on() -> None:
    model = causal_encoder()
    features = {name: value for name, value in model.preprocess(TEXTS[:3]).items() if name != "modality"}
    del features["logits_to_keep"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    inner: Any = model.transformers_model
    expected = inner.generate(**features, **options)
    fuse(model)
    encode(model)
    assert torch.equal(inner.generate(**features, **options), expected)
    unfuse(model)
    assert torch.equal(inner.generate(**features, **options), expected)


def wide_vocabulary(model: SparseEncoder) -> SparseEncoder:
    """As many vocabulary entries as the decoder is wide: hidden states and logits have the same shape."""
    inner: Any = model.transformers_model
    rows = decoder_of(inner).in_features
    assert rows < len(model.tokenizer)
    inner.resize_token_embeddings(rows)
    model.tokenizer._tokenizer.enable_truncation(8)
    return model


@pytest.mark.parametrize("make", [causal_encoder, sparse_encoder], ids=["causal", "masked"])
def test_as_many_words_as_hidden_units(make: Callable[[], SparseEncoder]) -> None:
    model = wide_vocabulary(make()).eval()
    ids = torch.arange(18).view(3, 6) + 4
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0

    def embed() -> Tensor:
        features = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            embeddings: Tensor = model(features)["sentence_embedding"]
        return embeddings

    stock = embed()
    assert stock.shape == (3, decoder_of(model.transformers_model).in_features)
    torch.testing.assert_close((fuse(model), embed())[1], stock, rtol=1e-5, atol=1e-6)
    unfuse(model)
    assert torch.equal(embed(), stock)
