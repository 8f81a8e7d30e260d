"""A ``SpladeEncoder`` compiled, exported, offloaded, sharded, distributed, and on the meta device."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from splade_kernels.integrations import _hand_off
from splade_kernels.integrations.transformers import SpladeEncoder
from tests.lm_models import assert_stock, batch, decoder_of, language_model
from tests.st_models import TEXTS


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_compiled_in_one_graph_for_all_shapes_and_threads(family: str) -> None:
    encoder = SpladeEncoder(language_model(family))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(encoder, backend=counter, fullgraph=True, dynamic=True)
    results: list[tuple[Tensor, Tensor]] = []

    def run() -> None:
        with torch.no_grad():
            for texts in (TEXTS[:2], TEXTS[3:6], TEXTS[5:12]):
                results.append((compiled(**batch(texts)), encoder(**batch(texts))))

    run()
    other = threading.Thread(target=run)
    other.start()
    other.join()
    assert len(results) == 6
    assert counter.frame_count == 1
    for actual, expected in results:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_gradients_equal_eager() -> None:
    encoder = SpladeEncoder(language_model("bert"))

    def step(module: Any) -> list[Tensor]:
        encoder.zero_grad(set_to_none=True)
        module(**batch()).sum().backward()
        return [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]

    eager = step(encoder)
    compiled = step(torch.compile(encoder, backend="aot_eager", fullgraph=True))
    assert len(eager) == len(compiled) > 10
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_compiled_in_place_knows_who_calls_it() -> None:
    model = language_model("bert")
    logits = model(**batch()).logits
    encoder = SpladeEncoder(model)
    expected = encoder(**batch())
    model.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(model(**batch()).logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder(**batch()), expected, rtol=1e-5, atol=1e-6)
    encoder.release()
    torch.testing.assert_close(model(**batch()).logits, logits, rtol=1e-5, atol=1e-5)


class Positional(nn.Module):
    def __init__(self, encoder: SpladeEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeddings: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return embeddings


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool) -> None:
    encoder = SpladeEncoder(language_model("bert"))
    file = io.BytesIO()
    torch.export.save(torch.export.export(encoder, (), batch(), strict=strict), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(**batch()), encoder(**batch()))


def test_traced() -> None:
    encoder = SpladeEncoder(language_model("bert"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Positional(encoder), tuple(batch().values()))
        torch.testing.assert_close(traced(*batch().values()), encoder(**batch()))


@pytest.mark.usefixtures("autocast_cache")
def test_an_export_to_onnx_names_what_to_do() -> None:
    encoder = SpladeEncoder(language_model("bert"))
    with pytest.raises(RuntimeError, match=r"ONNX has no operator.*release\(\)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Positional(encoder), tuple(batch().values()), io.BytesIO(), dynamo=False)


# Offloading, sharding and several processes


def test_offloading_after_the_encoder_was_made() -> None:
    encoder = SpladeEncoder(language_model("bert"))
    with torch.no_grad():
        expected = encoder(**batch())
        accelerate.cpu_offload(encoder, execution_device=torch.device("cpu"))
        assert decoder_of(encoder.model).weight.is_meta
        torch.testing.assert_close(encoder(**batch()), expected)
        assert encoder.model(**batch()).logits.shape[-1] == expected.shape[1]
        encoder.release()
        assert _hand_off.own_forward(decoder_of(encoder.model)) is None
        assert encoder.model(**batch()).logits.shape[-1] == expected.shape[1]


def test_offloading_before_names_the_order_that_works() -> None:
    model = language_model("bert")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="carries hooks of accelerate.*then offload"):
        SpladeEncoder(model)
    remove_hook_from_module(model, recurse=True)
    assert_stock(SpladeEncoder(model))


def gradients(encoder: Any) -> dict[str, Tensor]:
    encoder.zero_grad(set_to_none=True)
    embeddings = encoder(**batch())
    (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
    return {
        name.removeprefix("module."): parameter.grad
        for name, parameter in encoder.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("encoder_first", [True, False])
def test_fully_sharded(encoder_first: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    plain = SpladeEncoder(language_model("bert"))
    expected, expected_gradients = plain(**batch()), gradients(plain)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    encoder: Any = SpladeEncoder(language_model("bert"))
    if not encoder_first:
        inner = encoder.model
        encoder.release()
    layers = (encoder if encoder_first else inner).modules()
    for layer in [module for module in layers if type(module).__name__ == "BertLayer"]:
        fully_shard(layer, mesh=mesh)
    if not encoder_first:
        encoder = SpladeEncoder(inner)
        assert sum("weights are sharded" in record.message for record in caplog.records) == 1
    fully_shard(encoder, mesh=mesh)
    torch.testing.assert_close(encoder(**batch()), expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(encoder).items():
        torch.testing.assert_close(gradient.full_tensor(), expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    assert torch.distributed.tensor.DTensor in {type(parameter) for parameter in encoder.parameters()}


@pytest.mark.usefixtures("one_rank")
def test_sharding_the_model_or_its_decoder_alone_is_refused() -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    encoder = SpladeEncoder(language_model("bert"))
    fully_shard(encoder.model, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"the model: has hooks.*FSDP"):
        encoder(**batch())
    encoder = SpladeEncoder(language_model("bert"))
    fully_shard(decoder_of(encoder.model), mesh=mesh)
    with pytest.raises(RuntimeError, match="SpladeEncoder"):
        encoder(**batch())


@pytest.mark.usefixtures("one_rank")
def test_distributed_data_parallel() -> None:
    encoder = SpladeEncoder(language_model("bert"))
    expected = gradients(encoder)
    parallel = nn.parallel.DistributedDataParallel(encoder)
    torch.testing.assert_close(gradients(parallel), expected, rtol=1e-6, atol=1e-7)


def test_weights_that_are_not_there_yet(caplog: pytest.LogCaptureFixture) -> None:
    source = language_model("llama")
    with torch.device("meta"):
        model = LlamaForCausalLM(source.config).eval()
    with caplog.at_level(logging.WARNING):
        encoder = SpladeEncoder(model)
    assert sum("on the meta device" in record.message for record in caplog.records) == 1
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    model.model.rotary_emb = source.model.rotary_emb
    assert_stock(encoder)
    configuration = LlamaConfig(**source.config.to_dict() | {"final_logit_softcapping": 30.0})
    with torch.device("meta"), pytest.raises(ValueError, match=r"config\.final_logit_softcapping is 30\.0.*meta"):
        SpladeEncoder(LlamaForCausalLM(configuration))
