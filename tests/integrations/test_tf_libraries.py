"""``SpladeEncoder`` beside PEFT itself, and around encoders whose layers are quantised."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from torch import Tensor, nn
from transformers.integrations import peft as transformers_peft

from splade_kernels import flops_loss
from splade_kernels.integrations import _hand_off
from splade_kernels.integrations.transformers import SpladeEncoder
from tests.lm_models import assert_stock, batch, decoder_of, folder, language_model, stock
from tests.st_models import TEXTS

peft: Any = pytest.importorskip("peft")
LAYERS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def adapted(family: str = "bert", kind: str = "LoraConfig", **options: Any) -> Any:
    """A ``PeftModel`` whose adapters change what it computes."""
    options = {"target_modules": LAYERS[family]} | options
    if kind == "LoraConfig":
        options = {"r": 4, "init_lora_weights": False} | options
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(language_model(family), getattr(peft, kind)(**options)).eval()


def embed(model: Any) -> Tensor:
    with torch.no_grad():
        return stock(model, batch())


def trained(model: Any, forward: Callable[[], Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps, and the gradients of the first."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses, gradients = [], {}
    for step in range(4):
        optimizer.zero_grad(set_to_none=True)
        embeddings = forward()
        loss = (embeddings[:3] * embeddings[3:]).sum(dim=1).mean() * 0.1 + flops_loss(embeddings)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {
                name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
            }
        optimizer.step()
    return losses, gradients


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "ia3": {"kind": "IA3Config", "feedforward_modules": [], "init_ia3_weights": False},
    "loha": {"kind": "LoHaConfig", "r": 4, "init_weights": False},
    "head": {"modules_to_save": ["transform"]},
    "whole head": {"modules_to_save": ["cls"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_train_as_with_the_stock_head(adapter: str) -> None:
    model = adapted(**ADAPTERS[adapter])
    assert (embed(model) - embed(language_model("bert"))).abs().max() > (1e-3 if "head" not in adapter else 1e-4)
    other = copy.deepcopy(model)
    encoder = SpladeEncoder(model)
    assert_stock(encoder)
    losses, gradients = trained(model, lambda: encoder(**batch()))
    expected, expected_gradients = trained(other, lambda: stock(other, batch()))
    assert abs(expected[0] - expected[-1]) > 1e-3
    assert losses == pytest.approx(expected, rel=1e-5)
    assert min(value.abs().max() for value in expected_gradients.values()) > 0
    largest = max(value.abs().max().item() for value in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_causal_models_and_tasks(task: str | None) -> None:
    encoder = SpladeEncoder(adapted("llama", task_type=task))
    assert_stock(encoder)
    features = batch(side="left")
    generated = encoder.model.generate(**features, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == features["input_ids"].shape[1] + 3


def test_adapters_put_into_the_model_of_an_encoder() -> None:
    encoder = SpladeEncoder(language_model("bert"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        around = peft.get_peft_model(
            encoder.model, peft.LoraConfig(r=4, target_modules=LAYERS["bert"], init_lora_weights=False)
        )
    torch.testing.assert_close(encoder(**batch()), embed(around), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder(**batch()), SpladeEncoder(adapted())(**batch()))
    torch.testing.assert_close(SpladeEncoder(around)(**batch()), encoder(**batch()))
    encoder.model = around
    assert_stock(encoder)


def test_several_adapters() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["key"], init_lora_weights=False))
    encoder = SpladeEncoder(model)
    first = encoder(**batch())
    model.set_adapter("other")
    assert_stock(encoder)
    assert not torch.allclose(encoder(**batch()), first)
    with model.disable_adapter():
        torch.testing.assert_close(encoder(**batch()), embed(language_model("bert")))


def test_a_mixed_model() -> None:
    configuration = peft.LoraConfig(r=4, target_modules=LAYERS["bert"], init_lora_weights=False)
    model = peft.get_peft_model(language_model("bert"), configuration, mixed=True).eval()
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["key"], init_weights=False))
    model.set_adapter(["default", "other"])
    assert_stock(SpladeEncoder(model))


def test_merged_and_unmerged_are_equal() -> None:
    model = adapted()
    encoder = SpladeEncoder(model)
    expected = encoder(**batch()).detach()
    model.merge_adapter()
    torch.testing.assert_close(encoder(**batch()), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(encoder(**batch()), expected, rtol=1e-4, atol=1e-5)
    alone = model.merge_and_unload()
    torch.testing.assert_close(SpladeEncoder(alone)(**batch()), expected, rtol=1e-4, atol=1e-5)
    encoder.model = alone
    torch.testing.assert_close(encoder(**batch()), expected, rtol=1e-4, atol=1e-5)


# Folders


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_adapter_folder(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SpladeEncoder(adapted(family), pooling_strategy="sum")
    expected = encoder(**batch(TEXTS)).detach()
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "config.json").exists()
    loaded = SpladeEncoder.from_pretrained(tmp_path)
    assert isinstance(loaded.model, peft.PeftModel)
    assert loaded.pooling_strategy == "sum"
    torch.testing.assert_close(loaded(**batch(TEXTS)), expected)
    low = SpladeEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert decoder_of(low.model.get_base_model()).weight.dtype == torch.bfloat16
    # transformers may ask for a newer PEFT than there is.
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "0")
    sparse = SparseEncoder(str(tmp_path), device="cpu")
    actual = sparse.encode(TEXTS, batch_size=len(TEXTS), convert_to_sparse_tensor=False)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    injected = SpladeEncoder(sparse.transformers_model, pooling_strategy="sum")
    torch.testing.assert_close(injected(**batch(TEXTS)), expected, rtol=1e-5, atol=1e-5)


def test_a_model_is_not_saved_under_an_adapter(tmp_path: Path) -> None:
    """transformers would load the adapter around the merged model, and ``from_pretrained`` around the old one."""
    encoder = SpladeEncoder(adapted())
    for _ in range(2):
        encoder.save_pretrained(tmp_path)
    encoder.release()
    merged = SpladeEncoder(encoder.model.merge_and_unload())
    with pytest.raises(ValueError, match="folder: .* holds a PEFT adapter, which would be loaded on top of the model"):
        merged.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_adapter_whose_base_has_no_name(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"names no base model: .*peft\.PeftModel\.from_pretrained"):
        SpladeEncoder.from_pretrained(tmp_path)


# Refused


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"target_modules": ["decoder"]}, "peft.tuners.lora.layer.Linear"),
        (
            {"kind": "IA3Config", "target_modules": ["decoder"], "feedforward_modules": []},
            "peft.tuners.ia3.layer.Linear",
        ),
        ({"modules_to_save": ["decoder"]}, "peft.utils.other.ModulesToSaveWrapper"),
        ({"trainable_token_indices": {"word_embeddings": [5]}}, "peft.utils.other.TrainableTokensWrapper"),
    ],
    ids=["lora", "ia3", "saved", "tokens"],
)
def test_adapters_on_the_decoder_are_refused_with_the_remedy(options: dict[str, Any], kind: str) -> None:
    model = adapted(**options)
    with pytest.raises(TypeError, match=f"got {kind}: a PEFT adapter is on it.*target_modules.*merge_and_unload"):
        SpladeEncoder(model)
    with pytest.raises(TypeError, match=kind):
        SpladeEncoder(model.get_base_model())
    encoder = SpladeEncoder(language_model("bert"))
    options = {"target_modules": LAYERS["bert"]} | options
    options |= {"r": 4} if "kind" not in options else {}
    peft.get_peft_model(encoder.model, getattr(peft, options.pop("kind", "LoraConfig"))(**options))
    with pytest.raises(RuntimeError, match="the decoder is not the one that was fused"):
        encoder(**batch())


def test_all_linear_layers_are_those_beside_the_decoder() -> None:
    assert_stock(SpladeEncoder(adapted("llama", target_modules="all-linear", task_type="CAUSAL_LM")))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_prompts_are_refused_by_name(kind: str) -> None:
    configuration = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(language_model("llama"), configuration)
    with pytest.raises(ValueError, match=f"expected adapters on layers, got peft.*{kind}, which adds tokens"):
        SpladeEncoder(model)


def test_a_prompt_put_around_the_model_of_an_encoder() -> None:
    encoder = SpladeEncoder(language_model("llama"))
    configuration = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    encoder.model = peft.get_peft_model(encoder.model, configuration)
    with pytest.raises(RuntimeError, match=r"gave its decoder \[6, \d+\] tokens for \[6, \d+\], so it adds or drops"):
        encoder(batch()["input_ids"])


# Quantised


class WeightOnly(nn.Module):
    """A linear layer whose int8 weight becomes floating-point for each call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", torch.round(linear.weight.detach() / scale).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype) * self.scale.to(input.dtype)
        return nn.functional.linear(input, weight, self.bias)


def weight_only(body: nn.Module) -> None:
    for name, module in list(body.named_modules()):
        if type(module) is nn.Linear:
            body.set_submodule(name, WeightOnly(module))


def dynamically(body: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(body, {nn.Linear}, inplace=True)


@pytest.mark.parametrize("encoder_first", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("quantise", [weight_only, dynamically])
def test_layers_that_are_quantised(quantise: Callable[[nn.Module], None], family: str, encoder_first: bool) -> None:
    model = language_model(family)
    body = model.base_model
    if encoder_first:
        encoder = SpladeEncoder(model)
        quantise(body)
    else:
        quantise(body)
        encoder = SpladeEncoder(model)
    assert_stock(encoder)
    assert 0 < (embed(model) - embed(language_model(family))).abs().max() < 0.2
    copied = copy.deepcopy(encoder)
    assert_stock(copied)


def test_adapters_on_quantised_layers_train() -> None:
    model = language_model("bert")
    weight_only(model.bert.encoder.layer[0])
    configuration = peft.LoraConfig(
        r=4, target_modules=r".*layer\.1\..*(query|value)", init_lora_weights=False, modules_to_save=["transform"]
    )
    model = peft.get_peft_model(model, configuration)
    other = copy.deepcopy(model)
    encoder = SpladeEncoder(model)
    losses, _ = trained(model, lambda: encoder(**batch()))
    assert losses == pytest.approx(trained(other, lambda: stock(other, batch()))[0], rel=1e-5)


@pytest.mark.parametrize("quantise", [weight_only, dynamically])
def test_a_quantised_decoder_is_refused(quantise: Callable[[nn.Module], None]) -> None:
    model = language_model("bert")
    quantise(model)
    with pytest.raises(TypeError, match=r"decoder: expected exactly torch\.nn.*Linear, got .*(WeightOnly|quantized)"):
        SpladeEncoder(model)


def test_dtypes_that_fit_no_autocast() -> None:
    model = language_model("bert")
    decoder_of(model).bias = nn.Parameter(decoder_of(model).bias.detach().bfloat16())
    encoder = SpladeEncoder(model)
    with pytest.raises(TypeError, match=r"bias: expected torch\.float32"):
        encoder(**batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(**batch()).dtype == torch.float32
    assert _hand_off.own_forward(decoder_of(model)) is encoder._hand_off


def test_the_folder_of_the_tests_names_itself() -> None:
    """Adapters are saved with the name of their base model."""
    assert language_model("bert").name_or_path == str(folder("bert"))
