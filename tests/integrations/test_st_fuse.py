"""``fuse`` changes how a SparseEncoder computes its embeddings and nothing else."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding, SpladePooling
from torch import Tensor

import splade_kernels
from splade_kernels.integrations.sentence_transformers import fuse, unfuse
from tests.st_models import ARCHITECTURES, HIDDEN_SIZE, TEXTS, decoder_of, gradients, sparse_encoder

HEADS = [(strategy, activation) for strategy in ("max", "sum") for activation in ("relu", "log1p_relu")]


def encode(model: SparseEncoder, texts: list[str] = TEXTS, **kwargs: Any) -> Tensor:
    kwargs.setdefault("convert_to_sparse_tensor", False)
    return model.encode(texts, batch_size=5, **kwargs)


def inner_features(model: SparseEncoder, texts: list[str]) -> dict[str, Tensor]:
    features = model.preprocess(texts)
    return {name: features[name] for name in ("input_ids", "attention_mask")}


def installed_forwards(model: SparseEncoder) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


def flattened(features: dict[str, Tensor]) -> dict[str, Any]:
    real = features["attention_mask"].bool()
    lengths = real.sum(dim=1)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    return {
        "input_ids": features["input_ids"][real].unsqueeze(0),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("pooling_strategy", "activation_function"), HEADS)
def test_embeddings_and_gradients_equal_stock(
    architecture: str, pooling_strategy: str, activation_function: str
) -> None:
    model = sparse_encoder(architecture, pooling_strategy=pooling_strategy, activation_function=activation_function)
    model.eval()
    stock = encode(model)
    stock_gradients = dict(gradients(model, TEXTS[:6]))
    fuse(model)
    assert model(model.preprocess(TEXTS[:2]))["token_embeddings"].shape[-1] == HIDDEN_SIZE
    assert 0.05 < (stock > 0).double().mean() < 0.6
    torch.testing.assert_close(encode(model), stock, rtol=1e-5, atol=1e-6)
    largest = max(gradient.abs().max().item() for gradient in stock_gradients.values())
    for name, gradient in gradients(model, TEXTS[:6]):
        torch.testing.assert_close(gradient, stock_gradients[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_sparse_output_and_max_active_dims_equal_stock() -> None:
    model = sparse_encoder()
    options: list[dict[str, Any]] = [
        {"convert_to_sparse_tensor": True},
        {"max_active_dims": 5},
        {"convert_to_sparse_tensor": True, "max_active_dims": 5},
    ]
    stock = [encode(model, **option) for option in options]
    fuse(model)
    for option, expected in zip(options, stock, strict=True):
        actual = encode(model, **option)
        assert actual.layout == expected.layout
        torch.testing.assert_close(actual.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-6)
    assert int((encode(model, max_active_dims=5) != 0).sum(dim=1).max()) == 5
    words, expected_words = (model.decode(row, top_k=3) for row in (encode(model)[0], stock[0][0].to_dense()))
    assert [word for word, _ in words] == [word for word, _ in expected_words]
    assert [weight for _, weight in words] == pytest.approx([weight for _, weight in expected_words], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_low_and_high_precision_are_no_worse_than_stock(dtype: torch.dtype) -> None:
    exact = encode(sparse_encoder().double()).double()
    model = sparse_encoder().to(dtype)
    stock = encode(model)
    fused = encode(fuse(model))
    assert fused.dtype == stock.dtype == dtype
    allowed = (stock.double() - exact).abs().max() + 8 * torch.finfo(dtype).eps
    assert (fused.double() - exact).abs().max() <= allowed


def test_autocast_gives_float32() -> None:
    model = sparse_encoder().eval()
    exact = encode(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = model(model.preprocess(TEXTS))["sentence_embedding"]
        fused = fuse(model)(model.preprocess(TEXTS))["sentence_embedding"]
    assert fused.dtype == torch.float32
    assert (fused - exact).abs().max() <= 1.2 * (stock - exact).abs().max()


def test_only_instance_forwards_change_and_unfuse_removes_them() -> None:
    model = sparse_encoder()
    types = {name: type(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    configs = [module.get_config_dict() for module in model]
    before = [set(vars(module)) for module in model.modules()]

    assert fuse(model) is model
    assert installed_forwards(model) == {"0", "0.model.vocab_projector", "1"}
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)] == parameters
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.get_config_dict() for module in model] == configs

    forwards = [module.__dict__["forward"] for module in (model[0], model[1], decoder_of(model))]
    assert fuse(model) is model
    assert [module.__dict__["forward"] for module in (model[0], model[1], decoder_of(model))] == forwards

    assert unfuse(model) is model
    assert [set(vars(module)) for module in model.modules()] == before
    assert unfuse(model) is model


def test_fuse_leaves_training_flags_and_random_state_alone() -> None:
    model = sparse_encoder()
    model.train()
    frozen: Any = model[0]
    frozen.model.distilbert.transformer.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    fuse(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unfuse_leaves_a_foreign_forward_alone() -> None:
    model = fuse(sparse_encoder())
    ours = model[1].__dict__["forward"]

    def wrapped(features: dict[str, Any]) -> dict[str, Any]:
        return ours(features)

    model[1].__dict__["forward"] = wrapped
    unfuse(model)
    assert model[1].__dict__["forward"] is wrapped
    assert "forward" not in model[0].__dict__


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inner_model_keeps_its_logits_and_loss(architecture: str) -> None:
    model = sparse_encoder(architecture).eval()
    features = inner_features(model, TEXTS[:4])
    inner: Any = model.transformers_model
    stock = inner(**features, labels=features["input_ids"])
    fuse(model)
    encode(model)
    fused = inner(**features, labels=features["input_ids"])
    assert torch.equal(fused.logits, stock.logits)
    assert torch.equal(fused.loss, stock.loss)


def test_decoder_is_stock_again_after_an_exception() -> None:
    model = fuse(sparse_encoder().eval())
    inner: Any = model.transformers_model
    features = inner_features(model, TEXTS[:2])
    vocab_size = decoder_of(model).out_features
    transform = inner.vocab_transform
    inner.vocab_transform = None
    with pytest.raises(TypeError):
        model(model.preprocess(TEXTS[:2]))
    inner.vocab_transform = transform
    assert inner(**features).logits.shape[-1] == vocab_size


def test_decoder_hands_through_only_in_the_thread_that_encodes() -> None:
    model = sparse_encoder().eval()
    inner: Any = model.transformers_model
    stock = encode(model)
    features = inner_features(model, TEXTS[:2])
    logits = inner(**features).logits
    fuse(model)

    inside, done = threading.Event(), threading.Event()
    embed = inner.distilbert.embeddings.forward
    owner = threading.current_thread()

    def wait_inside(*args: Any, **kwargs: Any) -> Tensor:
        if threading.current_thread() is owner:
            inside.set()
            assert done.wait(10)
        return embed(*args, **kwargs)

    seen: list[Tensor] = []

    def stock_call() -> None:
        assert inside.wait(10)
        with torch.no_grad():
            seen.append(inner(**features).logits)
        done.set()

    inner.distilbert.embeddings.forward = wait_inside
    other = threading.Thread(target=stock_call)
    other.start()
    encoded = encode(model)
    other.join()
    assert torch.equal(seen[0], logits)
    torch.testing.assert_close(encoded, stock, rtol=1e-5, atol=1e-6)


def test_nested_encoding_keeps_the_outer_hand_off() -> None:
    model = sparse_encoder().eval()
    stock = encode(model)
    fuse(model)
    inner: Any = model.transformers_model
    embed = inner.distilbert.embeddings.forward
    depth: list[int] = []

    def encode_inside(*args: Any, **kwargs: Any) -> Tensor:
        if not depth:
            depth.append(1)
            encode(model, TEXTS[:2])
        return embed(*args, **kwargs)

    inner.distilbert.embeddings.forward = encode_inside
    torch.testing.assert_close(encode(model), stock, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_refer_to_their_own_modules(how: str) -> None:
    model = fuse(sparse_encoder())
    stock = encode(model)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert installed_forwards(other) == installed_forwards(model)
    with torch.no_grad():
        decoder_of(other).bias.fill_(-1e6)
    assert torch.equal(encode(model), stock)
    assert int(encode(other).count_nonzero()) == 0
    inner: Any = other.transformers_model
    assert inner(**inner_features(other, TEXTS[:1])).logits.max() < 0
    unfuse(other)
    assert installed_forwards(model) == {"0", "0.model.vocab_projector", "1"}
    assert other.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(("pooling_strategy", "activation_function"), HEADS)
def test_flattened_input_equals_padded(
    monkeypatch: pytest.MonkeyPatch, pooling_strategy: str, activation_function: str
) -> None:
    """The inner model cannot run flattened without flash attention: its hidden states come from the padded run."""
    model = sparse_encoder(pooling_strategy=pooling_strategy, activation_function=activation_function).eval()
    padded = model.preprocess(TEXTS[:6])
    expected = model(dict(padded))["sentence_embedding"]
    real = padded["attention_mask"].bool()
    inner: Any = model.transformers_model
    hidden_states = inner.distilbert(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])[0]

    fuse(model)
    monkeypatch.setattr(inner.distilbert, "forward", lambda **_: _BaseOutput(hidden_states[real].unsqueeze(0)))
    features = model(flattened(padded))
    assert features["token_embeddings"].shape == (1, int(real.sum()), HIDDEN_SIZE)
    torch.testing.assert_close(features["sentence_embedding"], expected, rtol=1e-5, atol=1e-6)


class _BaseOutput(tuple[Tensor]):
    hidden_states = None
    attentions = None

    def __new__(cls, hidden_states: Tensor) -> _BaseOutput:
        return super().__new__(cls, (hidden_states,))


def test_pooling_passes_the_known_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from splade_kernels.integrations import _hand_off

    seen: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> Tensor:
        seen.update(kwargs)
        return splade_kernels.splade_pool(*args, **kwargs)

    model = fuse(sparse_encoder())
    monkeypatch.setattr(_hand_off, "splade_pool", record)
    features = flattened(model.preprocess(TEXTS[:3]))
    features["token_embeddings"] = torch.randn(1, features["input_ids"].shape[1], HIDDEN_SIZE)
    model[1](features)
    assert seen["cu_seqlens"] is features["cu_seq_lens_q"]
    assert seen["max_seqlen"] == features["max_length_q"]
    assert "attention_mask" not in seen


def test_screening_is_passed_on_and_may_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from splade_kernels.integrations import _hand_off

    seen: list[object] = []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["screening"])
        return splade_kernels.splade_pool(*args, **kwargs)

    model = fuse(sparse_encoder())
    decoder_forward = decoder_of(model).__dict__["forward"]
    monkeypatch.setattr(_hand_off, "splade_pool", record)
    encode(model)
    for setting in (False, True):
        assert fuse(model, screening=setting) is model
        encode(model)
    assert decoder_of(model).__dict__["forward"] is decoder_forward
    batches = len(seen) // 3
    assert seen == ["auto"] * batches + [False] * batches + [True] * batches


def test_chunk_size_has_no_effect_and_embedding_dimension_is_set() -> None:
    model = sparse_encoder()
    fuse(model)
    assert model[1].get_embedding_dimension() is None
    whole = encode(model)
    assert model.get_embedding_dimension() == decoder_of(model).out_features
    model.splade_pooling_chunk_size = 2
    assert torch.equal(encode(model), whole)


def test_fully_masked_row_is_zero_as_in_stock() -> None:
    model = sparse_encoder().eval()
    features = model.preprocess(TEXTS[:2])
    features["attention_mask"][1] = 0
    stock = model(dict(features))["sentence_embedding"]
    fused = fuse(model)(dict(features))["sentence_embedding"]
    assert int(stock[1].count_nonzero()) == int(fused[1].count_nonzero()) == 0
    torch.testing.assert_close(fused, stock, rtol=1e-5, atol=1e-6)


def test_router_with_a_static_query_side() -> None:
    document = sparse_encoder(activation_function="log1p_relu")
    static = SparseStaticEmbedding(tokenizer=document.tokenizer)
    torch.nn.init.constant_(static.weight, 0.5)
    router = Router.for_query_document(query_modules=[static], document_modules=list(document))
    model = SparseEncoder(modules=[router], similarity_fn_name="dot", device="cpu")

    def both() -> tuple[Tensor, Tensor]:
        queries = model.encode_query(TEXTS[:4], convert_to_sparse_tensor=False)
        return queries, model.encode_document(TEXTS[4:], convert_to_sparse_tensor=False)

    stock = both()
    fuse(model)
    assert len(installed_forwards(model)) == 3
    fused = both()
    assert torch.equal(fused[0], stock[0])
    torch.testing.assert_close(fused[1], stock[1], rtol=1e-5, atol=1e-6)


def test_every_pooling_that_a_shared_decoder_feeds_is_fused() -> None:
    base = sparse_encoder()
    poolings = [SpladePooling("max"), SpladePooling("sum", activation_function="log1p_relu")]
    router = Router.for_query_document(query_modules=[base[0], poolings[0]], document_modules=[base[0], poolings[1]])
    model = SparseEncoder(modules=[router], device="cpu")
    stock = [model.encode_query(TEXTS[:5]).to_dense(), model.encode_document(TEXTS[:5]).to_dense()]
    fuse(model)
    fused = [model.encode_query(TEXTS[:5]).to_dense(), model.encode_document(TEXTS[:5]).to_dense()]
    assert all("forward" in pooling.__dict__ for pooling in poolings)
    torch.testing.assert_close(fused, stock, rtol=1e-5, atol=1e-6)


def test_two_encoders_inside_another_module() -> None:
    models = [sparse_encoder("bert"), sparse_encoder("modernbert")]
    stock = [encode(model) for model in models]
    fuse(torch.nn.ModuleList(models))
    assert all(installed_forwards(model) for model in models)
    for model, expected in zip(models, stock, strict=True):
        torch.testing.assert_close(encode(model), expected, rtol=1e-5, atol=1e-6)


def test_importing_the_package_does_not_import_sentence_transformers() -> None:
    import subprocess
    import sys

    code = (
        "import sys, splade_kernels; assert 'sentence_transformers' not in sys.modules; "
        "assert 'sentence_transformers' in dir(splade_kernels.integrations)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert splade_kernels.integrations.sentence_transformers.fuse is fuse
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = splade_kernels.integrations.nothing_here
