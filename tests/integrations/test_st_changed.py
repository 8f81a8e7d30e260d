"""What a fused model refuses at run time, and how: nothing is silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from splade_kernels.integrations.sentence_transformers import fuse, unfuse
from tests.st_models import HIDDEN_SIZE, TEXTS, decoder_of, replace_decoder, sparse_encoder


class _OtherLinear(nn.Linear):
    pass


MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "transformer": lambda model: model[0],
    "pooling": lambda model: model[1],
    "decoder": decoder_of,
}


@pytest.mark.parametrize(
    ("module", "positional", "keywords"),
    [
        ("pooling", ({},), {"x": 1}),
        ("decoder", ({},), {"x": 1}),
        # Its other keywords are the model's.
        ("transformer", ({},), {"features": {}}),
        *((module, (), {}) for module in MODULES),
        *((module, ({}, {}), {}) for module in MODULES),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_as_the_stock_module_names_them(
    module: str, positional: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    model = sparse_encoder()
    messages = []
    for make in (unfuse, fuse):
        with pytest.raises(TypeError) as raised:
            MODULES[module](make(model))(*positional, **keywords)
        messages.append(str(raised.value))
    assert messages[1] == messages[0]
    assert ".forward() " in messages[0]


def test_resized_untied_embeddings_after_fuse() -> None:
    """transformers then makes a new decoder, which is not the one that was fused."""
    model = sparse_encoder()
    decoder_of(model).weight = nn.Parameter(decoder_of(model).weight.detach().clone())
    inner: Any = fuse(model).transformers_model
    vocab_size = decoder_of(model).out_features
    inner.config.tie_word_embeddings = False
    with torch.random.fork_rng():
        inner.resize_token_embeddings(vocab_size + 3)
    with pytest.raises(RuntimeError, match="resized or replaced.*unfuse"):
        model.encode(TEXTS[:1])
    with pytest.raises(ValueError, match="unfuse"):
        fuse(model)
    resized = unfuse(model).encode(TEXTS, convert_to_sparse_tensor=False)
    fused = fuse(model).encode(TEXTS, convert_to_sparse_tensor=False)
    assert fused.shape[1] == vocab_size + 3
    torch.testing.assert_close(fused, resized, rtol=1e-5, atol=1e-6)


def test_resized_tied_embeddings_after_fuse() -> None:
    """transformers then keeps the decoder and resizes its parameters: the fused model follows."""
    model = fuse(sparse_encoder())
    inner: Any = model.transformers_model
    vocab_size = decoder_of(model).out_features
    with torch.random.fork_rng():
        inner.resize_token_embeddings(vocab_size + 3)
    fused = model.encode(TEXTS, convert_to_sparse_tensor=False)
    assert fused.shape[1] == vocab_size + 3
    stock = unfuse(model).encode(TEXTS, convert_to_sparse_tensor=False)
    torch.testing.assert_close(fused, stock, rtol=1e-5, atol=1e-6)


def test_hook_around_the_decoder_after_fuse() -> None:
    model = fuse(sparse_encoder("bert"))
    model.transformers_model.cls.predictions.register_forward_hook(lambda module, inputs, output: output * 0.5)
    with pytest.raises(RuntimeError, match=r"cls\.predictions: has hooks .*added after fuse.*unfuse"):
        model.encode(TEXTS[:2])
    twin = copy.deepcopy(fuse(sparse_encoder("bert")))
    twin.transformers_model.cls.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(RuntimeError, match="cls: has hooks"):
        twin.encode(TEXTS[:2])


def test_decoder_replaced_by_an_adapter_after_fuse() -> None:
    model = fuse(sparse_encoder())
    wrapper = nn.Module()
    wrapper.base_layer = decoder_of(model)
    replace_decoder(model, wrapper)
    with pytest.raises(RuntimeError, match="resized or replaced.*unfuse"):
        model.encode(TEXTS[:1])


@pytest.mark.parametrize(
    "change",
    [
        lambda decoder: decoder.register_forward_hook(lambda *_: None),
        lambda decoder: parametrizations.weight_norm(decoder),
        lambda decoder: setattr(decoder, "__class__", _OtherLinear),
    ],
    ids=["hook", "parametrization", "class"],
)
def test_decoder_changed_after_fuse(change: Callable[[nn.Module], Any]) -> None:
    model = fuse(sparse_encoder())
    change(decoder_of(model))
    with pytest.raises(RuntimeError, match="changed after fuse.*unfuse"):
        model.encode(TEXTS[:1])


def test_logits_given_to_a_fused_pooling() -> None:
    model = fuse(sparse_encoder())
    vocab_size = decoder_of(model).out_features
    features = {"token_embeddings": torch.randn(2, 3, vocab_size), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(RuntimeError, match=rf"got width {vocab_size}.*unfuse"):
        model[1](features)


def test_weight_on_another_device_names_data_parallel() -> None:
    model = fuse(sparse_encoder())
    elsewhere = {
        name: value.to("meta") for name, value in model.preprocess(TEXTS[:2]).items() if torch.is_tensor(value)
    }
    with pytest.raises(RuntimeError, match="input_ids is on meta.*torchrun"):
        model[0](dict(elsewhere))
    hidden = torch.empty(2, 3, HIDDEN_SIZE, device="meta")
    with pytest.raises(RuntimeError, match="token_embeddings is on meta.*torchrun"):
        model[1]({"token_embeddings": hidden, "attention_mask": torch.ones(2, 3, device="meta", dtype=torch.long)})


def test_a_data_parallel_replica_on_another_device_raises() -> None:
    """The replicas of ``nn.DataParallel`` copy the instance's ``__dict__``, so their forward is the original's."""
    model = fuse(sparse_encoder())
    replica: Any = model[0]._replicate_for_data_parallel()
    features = {name: value.to("meta") for name, value in model.preprocess(TEXTS[:2]).items() if torch.is_tensor(value)}
    with pytest.raises(RuntimeError, match="torchrun"):
        replica(features)


def test_sharded_weight_at_run_time() -> None:
    model = fuse(sparse_encoder())
    decoder_of(model).weight = nn.Parameter(torch.empty(0))
    hidden = torch.randn(2, 3, HIDDEN_SIZE)
    with pytest.raises(RuntimeError, match="weight is sharded"):
        model[1]({"token_embeddings": hidden, "attention_mask": torch.ones(2, 3, dtype=torch.long)})


def test_a_deep_copy_of_the_transformer_alone_still_works() -> None:
    model = fuse(sparse_encoder().eval())
    other = copy.deepcopy(model[0])
    features = other({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 4)})
    assert features["token_embeddings"].shape == (1, 4, HIDDEN_SIZE)
