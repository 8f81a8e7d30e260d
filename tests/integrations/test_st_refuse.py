"""What ``fuse`` refuses, and what a fused model refuses at run time: nothing is silently wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import (
    Dense,
    Router,
    SparseStaticEmbedding,
    SpladePooling,
    Transformer,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from splade_kernels.integrations import _probe
from splade_kernels.integrations.sentence_transformers import fuse, unfuse
from tests.st_models import HIDDEN_SIZE, TEXTS, backbone, decoder_of, replace_decoder, sparse_encoder


class _OtherLinear(nn.Linear):
    pass


def _subclassed_decoder(model: SparseEncoder) -> None:
    old = decoder_of(model)
    replace_decoder(model, _OtherLinear(old.in_features, old.out_features))


def _own_forward(model: SparseEncoder) -> None:
    decoder_of(model).forward = lambda input: input.new_zeros(())  # type: ignore[method-assign]


def _change_logits(change: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[SparseEncoder], None]:
    """A model class whose forward changes the logits, as models with a logit scale or a soft cap do."""

    def apply(model: SparseEncoder) -> None:
        inner: Any = model.transformers_model
        stock = type(inner)

        class Changed(stock):  # type: ignore[misc, valid-type]
            def forward(self, **kwargs: Any) -> Any:
                output = stock.forward(self, **kwargs)
                output.logits = change(self, output.logits)
                return output

        inner.__class__ = Changed

    return apply


def _learned_scale(model: SparseEncoder) -> None:
    inner: Any = model.transformers_model
    inner.logit_scale = nn.Parameter(torch.ones(()))
    _change_logits(lambda module, logits: logits * module.logit_scale)(model)  # type: ignore[operator]


def _learned_bias(model: SparseEncoder) -> None:
    inner: Any = model.transformers_model
    inner.extra_bias = nn.Parameter(torch.zeros(decoder_of(model).out_features))
    _change_logits(lambda module, logits: logits.add_(module.extra_bias))(model)  # type: ignore[arg-type]


def _twice(model: SparseEncoder) -> None:
    inner: Any = model.transformers_model
    stock = type(inner)

    class Twice(stock):  # type: ignore[misc, valid-type]
        def forward(self, **kwargs: Any) -> Any:
            stock.forward(self, **kwargs)
            return stock.forward(self, **kwargs)

    inner.__class__ = Twice


def _watch(*_: Any) -> None:
    pass


def _hook_on_head(model: SparseEncoder) -> None:
    model.transformers_model.cls.predictions.register_forward_hook(_watch)  # type: ignore[union-attr]


def _set(index: int, name: str, value: Any) -> Callable[[SparseEncoder], None]:
    return lambda model: setattr(model[index], name, value)


def _own_pooling_forward(model: SparseEncoder) -> None:
    class Scaled(SpladePooling):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return {"sentence_embedding": super().forward(features)["sentence_embedding"] * 2}

    model[1].__class__ = Scaled


REFUSED: dict[str, tuple[Callable[[SparseEncoder], Any], str]] = {
    "decoder-subclass": (
        _subclassed_decoder,
        "exactly torch.nn.Linear, got tests.integrations.test_st_refuse._OtherLinear",
    ),
    "decoder-parametrized": (
        lambda m: parametrizations.weight_norm(decoder_of(m)),
        "got torch.nn.utils.parametrize.ParametrizedLinear",
    ),
    "decoder-hook": (
        lambda m: decoder_of(m).register_forward_hook(_watch),
        "without hooks, got tests.integrations.test_st_refuse._watch",
    ),
    "decoder-pre-hook": (lambda m: decoder_of(m).register_forward_pre_hook(lambda *_: None), "without hooks"),
    "decoder-backward-hook": (lambda m: decoder_of(m).register_full_backward_hook(lambda *_: None), "without hooks"),
    "decoder-own-forward": (_own_forward, "instance-level forward of its own"),
    "decoder-integer-weight": (
        lambda m: setattr(
            decoder_of(m), "weight", nn.Parameter(decoder_of(m).weight.data.to(torch.int8), requires_grad=False)
        ),
        "torch.int8",
    ),
    "head-hook": (_hook_on_head, "cls.predictions: has hooks .*: tests.integrations.test_st_refuse._watch"),
    "scaled": (_change_logits(lambda _, logits: logits * 0.5), "changes its logits"),
    "soft-capped": (_change_logits(lambda _, logits: 30 * torch.tanh(logits / 30)), "changes its logits"),
    "hard-capped": (_change_logits(lambda _, logits: logits.clamp_(max=1000)), "changes its logits"),
    "learned-scale-still-one": (_learned_scale, "changes its logits"),
    "learned-bias-still-zero": (_learned_bias, "parameters of its own"),
    "decoder-applied-twice": (_twice, "applied once"),
    "onnx": (_set(0, "backend", "onnx"), "backend: expected 'torch', got 'onnx'"),
    "other-task": (_set(0, "transformer_task", "feature-extraction"), "transformer_task: expected 'fill-mask'"),
    "other-output": (_set(0, "module_output_name", "causal_logits"), "token_embeddings"),
    "pooling-subclass": (_own_pooling_forward, "forward of its own"),
    "pooling-own-forward": (_set(1, "forward", lambda features: features), "instance-level forward of its own"),
    "reader-after-pooling": (lambda m: m.append(Pooling(HIDDEN_SIZE)), "Pooling may read the decoder's logits"),
    "reader-by-configuration": (
        lambda m: m.append(Dense(HIDDEN_SIZE, 8, module_input_name="token_embeddings")),
        "Dense may read the decoder's logits",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_reason_and_nothing_changed(case: str) -> None:
    model = sparse_encoder("bert")
    change, reason = REFUSED[case]
    change(model)
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    training = [module.training for module in model.modules()]
    with pytest.raises((TypeError, ValueError), match=reason):
        fuse(model)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == before
    assert [module.training for module in model.modules()] == training


def test_the_learned_bias_case_would_pass_a_comparison_of_values() -> None:
    model = sparse_encoder("bert")
    features = model.preprocess(TEXTS[:2])
    stock = model(dict(features))["sentence_embedding"]
    _learned_scale(model)
    assert torch.equal(model(dict(features))["sentence_embedding"], stock)


def test_modules_that_read_only_the_embedding_are_accepted() -> None:
    model = sparse_encoder()
    model.append(Dense(decoder_of(model).out_features, 8))
    stock = model.encode(TEXTS[:4], convert_to_sparse_tensor=False)
    fused = fuse(model).encode(TEXTS[:4], convert_to_sparse_tensor=False)
    torch.testing.assert_close(fused, stock, rtol=1e-5, atol=1e-6)


def test_refuses_what_holds_no_splade_head() -> None:
    with pytest.raises(TypeError, match="expected a SparseEncoder"):
        fuse(nn.Linear(2, 3))
    with pytest.raises(TypeError, match="model: expected a SparseEncoder .*got NoneType"):
        fuse(None)
    base = sparse_encoder()
    static = SparseStaticEmbedding(tokenizer=base.tokenizer)
    with pytest.raises(TypeError, match="no SpladePooling"):
        fuse(SparseEncoder(modules=[static], device="cpu"))


def test_refuses_a_pooling_that_two_decoders_feed() -> None:
    query, document = sparse_encoder("bert"), sparse_encoder("distilbert")
    router = Router.for_query_document(query_modules=[query[0]], document_modules=[document[0]])
    with pytest.raises(ValueError, match="fed by several decoders"):
        fuse(SparseEncoder(modules=[router, SpladePooling()], device="cpu"))


def test_refuses_a_reader_in_another_route() -> None:
    base = sparse_encoder()
    router = Router.for_query_document(
        query_modules=[base[0], Pooling(decoder_of(base).out_features)], document_modules=list(base)
    )
    with pytest.raises(ValueError, match="Pooling may read"):
        fuse(SparseEncoder(modules=[router], device="cpu"))


def test_probe_sees_a_fused_head_that_is_wrong() -> None:
    model = sparse_encoder()
    pooling: Any = model[1]

    def wrong(features: dict[str, Any]) -> dict[str, Any]:
        hidden = features["token_embeddings"]
        decoder = decoder_of(model)
        logits = hidden @ decoder.weight.T * 1.001 + decoder.bias
        return SpladePooling.forward(pooling, {**features, "token_embeddings": logits})

    with pytest.raises(ValueError, match="differs from the stock one"):
        _probe.probe_pooling(pooling, decoder_of(model), wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_probe_accepts_every_precision_and_a_collapsed_model(dtype: torch.dtype, strategy: str) -> None:
    model = sparse_encoder(pooling_strategy=strategy).to(dtype)
    with torch.no_grad():
        decoder_of(model).bias.fill_(-1000)
    assert "forward" in fuse(model)[0].__dict__


def test_probe_runs_without_the_callers_autocast() -> None:
    model = sparse_encoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fuse(model)
    with torch.inference_mode():
        fuse(sparse_encoder())


def test_probe_is_skipped_on_the_meta_device_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = sparse_encoder().to("meta")
    with caplog.at_level(logging.WARNING):
        fuse(model)
    assert [record.message for record in caplog.records if "did not compare" in record.message] == [
        "fuse did not compare the fused head with the stock one, because the weights are on the meta device; "
        "fuse before that to have it checked."
    ]
    assert "forward" in model[0].__dict__


def test_partly_fused_is_an_error() -> None:
    model = fuse(sparse_encoder())
    del model[1].__dict__["forward"]
    with pytest.raises(ValueError, match="call unfuse"):
        fuse(model)
    assert fuse(unfuse(model)) is model


def test_a_wrong_screening_is_refused_before_anything_changes() -> None:
    model = sparse_encoder()
    with pytest.raises(ValueError, match="screening: expected 'auto', True or False, got 'off'"):
        fuse(model, screening="off")
    assert "forward" not in decoder_of(model).__dict__
    model[1].pooling_strategy = "sum"
    with pytest.raises(ValueError, match="screening: expected 'auto' or False with pooling_strategy='sum'"):
        fuse(model, screening=True)


def test_transformer_without_pooling_next_to_a_head_is_left_alone() -> None:
    head = sparse_encoder()
    plain = Transformer(str(backbone("bert")), transformer_task="feature-extraction")
    router = Router.for_query_document(
        query_modules=[plain, Pooling(HIDDEN_SIZE)], document_modules=list(head), default_route="document"
    )
    fuse(SparseEncoder(modules=[router], device="cpu"))
    assert "forward" not in plain.__dict__
    assert "forward" in head[0].__dict__


def test_a_model_without_a_decoder_is_refused() -> None:
    model = sparse_encoder()
    transformer: Any = model[0]
    transformer.model.get_output_embeddings = SimpleNamespace  # returns something that is no nn.Linear
    with pytest.raises(TypeError, match="exactly torch.nn.Linear, got types.SimpleNamespace"):
        fuse(model)
