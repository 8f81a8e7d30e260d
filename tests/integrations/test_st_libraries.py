"""``fuse`` beside other libraries that change a model: adapters, quantisation, offloading, partitioning, export."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from sentence_transformers import SparseEncoder
from torch import Tensor, nn
from transformers.integrations import peft as transformers_peft

from splade_kernels.integrations import _hand_off
from splade_kernels.integrations.sentence_transformers import fuse, unfuse
from tests.st_models import TEXTS, decoder_of, gradients, sparse_encoder

peft: Any = pytest.importorskip("peft")
CPU = torch.device("cpu")


def encode(model: SparseEncoder) -> Tensor:
    return model.encode(TEXTS[:6], convert_to_sparse_tensor=False)


def tensors(model: SparseEncoder) -> dict[str, Tensor]:
    return {name: value for name, value in model.preprocess(TEXTS[:4]).items() if torch.is_tensor(value)}


def embed(model: SparseEncoder) -> Tensor:
    with torch.no_grad():
        return model.eval()(tensors(model))["sentence_embedding"]


def assert_same(model: SparseEncoder, expected: Tensor, compute: Callable[[SparseEncoder], Tensor] = encode) -> None:
    assert (expected != 0).any(dim=1).all()
    torch.testing.assert_close(compute(model), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers may ask for a newer PEFT than there is."""
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "0")


def adapted(*target_modules: str, **options: Any) -> SparseEncoder:
    model = sparse_encoder()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=list(target_modules), init_lora_weights=False, **options))
    return model


@pytest.mark.usefixtures("any_peft")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("targets", [("q_lin", "v_lin"), ("word_embeddings",)], ids=str)
def test_adapters_that_leave_the_decoder_alone(targets: tuple[str, ...], merged: bool) -> None:
    model = adapted(*targets)
    if merged:
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge()
    stock = encode(model)
    assert (stock - encode(sparse_encoder())).abs().max() > 1e-3
    assert_same(fuse(model), stock)


@pytest.mark.usefixtures("any_peft")
def test_adapters_train_as_with_the_stock_head() -> None:
    def trained(model: SparseEncoder) -> dict[str, Tensor]:
        return {name: value for name, value in gradients(model, TEXTS[:4]) if "lora" in name}

    stock, fused = trained(adapted("q_lin", "v_lin")), trained(fuse(adapted("q_lin", "v_lin")))
    assert min(value.abs().max() for value in stock.values()) > 1e-4
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("any_peft")
def test_an_adapter_added_after_fuse() -> None:
    stock = encode(adapted("q_lin"))
    model = fuse(sparse_encoder())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_lin"], init_lora_weights=False))
    assert_same(model, stock)


def test_a_peft_model_around_the_inner_one() -> None:
    model = sparse_encoder()
    transformer: Any = model[0]
    transformer.model = peft.get_peft_model(
        transformer.model, peft.LoraConfig(r=4, target_modules=["q_lin"], init_lora_weights=False)
    )
    stock = encode(model)
    assert_same(fuse(model), stock)


@pytest.mark.usefixtures("any_peft")
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"target_modules": ["vocab_projector"]}, "peft.tuners.lora.layer.Linear"),
        (
            {"target_modules": ["q_lin"], "modules_to_save": ["vocab_projector"]},
            "peft.utils.other.ModulesToSaveWrapper",
        ),
        (
            {"target_modules": ["q_lin"], "trainable_token_indices": {"word_embeddings": [5]}},
            "peft.utils.other.TrainableTokensWrapper",
        ),
    ],
    ids=["target", "saved", "tokens"],
)
def test_adapters_on_the_decoder_are_refused_with_the_remedy(options: dict[str, Any], kind: str) -> None:
    model = sparse_encoder()
    model.add_adapter(peft.LoraConfig(r=4, **options))
    with pytest.raises(
        TypeError,
        match=f"got {kind}: a PEFT adapter is on it.*target_modules.*trainable_token_indices.*merge_and_unload",
    ):
        fuse(model)


def test_the_remedy_for_an_adapter_on_the_decoder() -> None:
    model = sparse_encoder()
    decoder_of(model).weight = nn.Parameter(decoder_of(model).weight.detach().clone())  # merging would move a tied one
    transformer: Any = model[0]
    configuration = peft.LoraConfig(r=4, target_modules=["vocab_projector"], init_lora_weights=False)
    wrapped = peft.get_peft_model(transformer.model, configuration)
    transformer.model = wrapped
    stock = encode(model)
    transformer.model = wrapped.merge_and_unload()
    assert_same(fuse(model), stock)


def quantise(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, inplace=True)


@pytest.mark.parametrize("fuse_first", [False, True])
def test_quantising_the_encoder_alone(fuse_first: bool) -> None:
    model = sparse_encoder()
    model.transformers_model.is_quantized = True  # as transformers marks a model that is quantised in part
    for step in (fuse, quantise) if fuse_first else (quantise, fuse):
        step(model if step is fuse else model.transformers_model.distilbert)
    fused = encode(model)
    assert_same(unfuse(model), fused)


def test_a_quantised_decoder_is_refused_by_its_class() -> None:
    model = sparse_encoder()
    quantise(model)
    with pytest.raises(
        TypeError, match=r"got torch\.ao\.nn\.quantized\..*\.Linear: quantise the layers of the encoder"
    ):
        fuse(model)


class Packed(Tensor):
    """As quantisation libraries leave a weight: a tensor subclass inside a plain nn.Linear."""


def test_a_quantised_weight_is_refused_by_its_class() -> None:
    model = sparse_encoder()
    weight = decoder_of(model).weight.detach().as_subclass(Packed)
    decoder_of(model).weight = nn.Parameter(weight)
    with pytest.raises(
        ValueError, match=r"a floating-point nn\.Parameter, got tests\.integrations\.test_st_libraries\.Packed"
    ):
        fuse(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_of_another_dtype_under_autocast(dtype: torch.dtype) -> None:
    model = sparse_encoder().to(dtype)
    decoder = decoder_of(model)
    decoder.bias = nn.Parameter(decoder.bias.detach().float())
    exact = encode(sparse_encoder().double()).double()
    with torch.autocast("cpu", dtype):
        stock = encode(model).double()
        fused = encode(fuse(model))
    assert fused.dtype == torch.float32
    assert (fused.double() - exact).abs().max() <= 1.2 * (stock - exact).abs().max()
    with pytest.raises(TypeError, match=f"bias: expected {dtype} to match hidden_states, got torch.float32"):
        encode(model)


def test_dtypes_that_cannot_be_multiplied_are_named() -> None:
    model = sparse_encoder()
    decoder_of(model).bias = nn.Parameter(decoder_of(model).bias.detach().double())
    with pytest.raises(ValueError, match="weight and bias, torch.float32 and torch.float64"):
        fuse(model)


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloading_after_fuse(to: str, tmp_path: Path) -> None:
    model = sparse_encoder()
    stock = embed(model)
    if to == "cpu":
        accelerate.cpu_offload(fuse(model), execution_device=CPU)
    else:
        accelerate.disk_offload(fuse(model), str(tmp_path), execution_device=CPU)
    assert decoder_of(model).weight.is_meta
    assert_same(model, stock, embed)
    if hasattr(model, "clear_placement_cache"):  # of sentence-transformers 6.2, which is to be told of the hooks
        model.clear_placement_cache()
        assert_same(model, stock, lambda model: encode(model)[:4])
    assert decoder_of(model).weight.is_meta
    forward = model[1].__dict__["forward"]
    assert fuse(model, screening=False) is model
    assert forward.screening is False
    unfuse(model)
    inner: Any = model.transformers_model
    with torch.no_grad():
        assert inner(**tensors(model)).logits.shape[-1] == decoder_of(model).out_features
    assert_same(model, stock, embed)


def test_offloading_before_fuse_names_accelerate_and_the_order_that_works() -> None:
    model = sparse_encoder()
    stock = embed(model)
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(
        ValueError,
        match=r"torch\.nn.*Linear carries hooks of accelerate: .*remove_hook_from_module.*; fuse, then offload",
    ):
        fuse(model)
    remove_hook_from_module(model, recurse=True)
    accelerate.cpu_offload(fuse(model), execution_device=CPU)
    assert_same(model, stock, embed)


def test_inputs_on_another_device_are_left_to_the_hooks_of_accelerate() -> None:
    """It brings them to the decoder's device for the decoder's own call; without it they are a replica's."""
    decoder, elsewhere = nn.Linear(2, 3), torch.empty(1, device="meta")
    with pytest.raises(RuntimeError, match="input_ids is on meta.*torchrun"):
        _hand_off.check_device("input_ids", elsewhere, decoder)
    add_hook_to_module(decoder, ModelHook())
    _hand_off.check_device("input_ids", elsewhere, decoder)


def partition(model: nn.Module) -> None:
    """What DeepSpeed ZeRO-3 does on one rank: parameters are empty but while a hook of their module has gathered them.

    The backward gathers them again when the gradient of the module's output arrives. DeepSpeed 0.19.8 itself, on a CPU
    and one rank, gives stock's embeddings and gradients in both orders too; it takes minutes to install.
    """
    whole: dict[nn.Parameter, Tensor] = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    for parameter, value in whole.items():
        parameter.ds_id, parameter.ds_shape = id(parameter), value.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def release(module: nn.Module, _: Any, output: Any) -> None:
        outputs = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: gather(module))
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for hook in (gather, release):
        hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)


@pytest.mark.parametrize("fuse_first", [True, False])
def test_parameters_that_are_empty_between_calls(fuse_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    stock = sparse_encoder("bert")
    expected, expected_gradients = encode(stock), dict(gradients(stock, TEXTS[:4]))
    model = sparse_encoder("bert")
    for step in (fuse, partition) if fuse_first else (partition, fuse):
        step(model)
    told = [record.message for record in caplog.records if "partitioned by DeepSpeed ZeRO-3" in record.message]
    assert len(told) == (0 if fuse_first else 1)
    assert decoder_of(model).weight.numel() == 0
    assert_same(model, expected)
    assert decoder_of(model).weight.numel() == 0
    for name, gradient in gradients(model, TEXTS[:4]):
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_partitioned_weight_that_nothing_gathers_is_named() -> None:
    model = fuse(sparse_encoder())
    decoder = decoder_of(model)
    decoder.weight.ds_id, decoder.weight.data = 0, torch.empty(0)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"partitioned by DeepSpeed ZeRO-3.*deepspeed\.zero\.GatheredParameters"):
        model[1]({"token_embeddings": torch.randn(1, 2, 32), "attention_mask": torch.ones(1, 2, dtype=torch.int64)})


class Embeddings(nn.Module):
    """An encoder as tracers want it: tensors in, one tensor out."""

    def __init__(self, model: SparseEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeddings: Tensor = self.model({"input_ids": input_ids, "attention_mask": attention_mask})[
            "sentence_embedding"
        ]
        return embeddings


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_are_saved_and_loaded(strict: bool) -> None:
    model = Embeddings(fuse(sparse_encoder().eval()))
    features = tensors(model.model)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (), features, strict=strict), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(**features), model(**features))


def test_traced_programs_are_saved_and_loaded() -> None:
    model = Embeddings(fuse(sparse_encoder().eval()))
    features = tensors(model.model)
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, example_kwarg_inputs=features), file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(**features), model(**features))


@pytest.mark.usefixtures("autocast_cache")
def test_an_export_to_onnx_names_unfuse() -> None:
    model = Embeddings(fuse(sparse_encoder().eval()))
    features = tensors(model.model)
    with pytest.raises(RuntimeError, match=r"ONNX has no operator.*unfuse\(model\)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (features["input_ids"], features["attention_mask"]), io.BytesIO(), dynamo=False)
