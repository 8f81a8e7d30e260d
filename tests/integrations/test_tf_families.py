"""Every family of the table in tests/tf_models.py does with ``SpladeEncoder`` what the table says."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from splade_kernels import reference
from splade_kernels.integrations.transformers import SpladeEncoder
from tests.lm_models import HEADS
from tests.tf_models import CAUSAL, FAMILIES, PAD, WORKING, Family, V

# With fullgraph=True in the ordinary run; all families are compiled in the slow one.
COMPILED = ("BERT", "Llama")
# PyTorch's FFT on a CPU takes no bfloat16.
NO_BFLOAT16 = ("FNet",)
# The stock gradients of float64 are NaN: its lowest float64 becomes -inf in the softmax, which it computes in float32.
NO_FLOAT64 = ("Longformer",)

families = pytest.mark.parametrize("family", WORKING, ids=lambda family: family.id)
causal = pytest.mark.parametrize("family", CAUSAL, ids=lambda family: family.id)


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only the families that this version of transformers has; without its remarks on tiny models."""
    family = getattr(request.node, "callspec", None) and request.node.callspec.params.get("family")
    if family and not family.available:
        pytest.skip(f"transformers {transformers.__version__} has no {family.model}")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@functools.cache
def shared(family: Family, dtype: torch.dtype = torch.float32) -> Any:
    """A model for all the tests that leave it as it was."""
    return family.build().to(dtype)


@contextmanager
def encoding(model: nn.Module, **options: Any) -> Iterator[SpladeEncoder]:
    encoder = SpladeEncoder(model, **options)
    try:
        yield encoder
    finally:
        encoder.release()
        model.zero_grad(set_to_none=True)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def pooled(logits: Tensor, mask: Tensor, pooling_strategy: str = "max", activation_function: str = "relu") -> Tensor:
    """The definition on logits: the product with the identity is exact."""
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype)
    options = {"pooling_strategy": pooling_strategy, "activation_function": activation_function}
    return reference.splade_pool(logits, identity, None, mask, **options)


def stock_head(logits: Tensor, mask: Tensor) -> Tensor:
    """Maximum and relu as they are computed without this package, in the dtype of the logits."""
    return (logits * mask[..., None].to(logits.dtype)).relu().log1p().amax(dim=1)


def stock_logits(model: Any, **batch: Any) -> Tensor:
    """Without a cache, as the encoder runs the model: the keys of some models otherwise have other strides, and with
    them other rounding."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        batch["use_cache"] = False
    logits: Tensor = model(**batch).logits
    return logits


def gradients(embeddings: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Of a fixed scalar of the embeddings, by name of the parameter."""
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 1, embeddings.numel(), dtype=embeddings.dtype).view_as(embeddings)
    (embeddings * weights).sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_near(actual: Tensor, expected: Tensor, message: str = "") -> None:
    """Equal up to a few roundings of float32: both are made from the same hidden states."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=message or None)


@families
def test_embeddings_are_those_of_the_stock_logits(family: Family) -> None:
    model, batch = shared(family), family.batch()
    with torch.no_grad():
        logits = stock_logits(model, **batch)
    assert logits.shape == (*batch["input_ids"].shape, V)
    for strategy, activation in HEADS:
        with encoding(model, pooling_strategy=strategy, activation_function=activation) as encoder, torch.no_grad():
            expected = pooled(logits, batch["attention_mask"], strategy, activation)
            assert_near(encoder(**batch), expected)
    # A head that was given other tokens, or none, would not pass for this one.
    assert 0.3 < (expected > 0).double().mean() <= 1
    assert (expected - expected[:1]).abs().max() > 1e-2


@families
def test_gradients_of_all_parameters_are_those_through_the_logits(family: Family) -> None:
    """In float64, where two orders of summation differ by about 1e-15 and a wrong gradient by much more.

    A cast to float32 within a model (RMSNorm) could make 1e-7 of that, but only for one number in 10⁸. In float32 a
    gradient is a sum of some hundred terms, so off by less than a thousand roundings of the largest.
    """
    dtype = torch.float32 if family.name in NO_FLOAT64 else torch.float64
    relative = 1e-9 if dtype is torch.float64 else 1000 * torch.finfo(dtype).eps
    model, batch = shared(family, dtype), family.batch()
    for strategy, activation in (HEADS[0], HEADS[-1]):
        expected = gradients(pooled(stock_logits(model, **batch), batch["attention_mask"], strategy, activation), model)
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        assert largest > 1e-3
        with encoding(model, pooling_strategy=strategy, activation_function=activation) as encoder:
            actual = gradients(encoder(**batch), model)
        assert actual.keys() == expected.keys()
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, expected[name], rtol=relative, atol=relative * largest, msg=name)


@families
def test_bfloat16_is_no_further_from_float64_than_stock(family: Family) -> None:
    batch = family.batch()
    mask = batch["attention_mask"]
    model = copy.deepcopy(shared(family)).bfloat16()
    with torch.no_grad():
        if family.name in NO_BFLOAT16:
            with pytest.raises(RuntimeError):
                model(**batch)
            return
        exact = pooled(stock_logits(copy.deepcopy(model).double(), **batch), mask)
        stock = stock_head(stock_logits(model, **batch), mask)
        with encoding(model) as encoder:
            actual = encoder(**batch)
    assert actual.dtype == stock.dtype == torch.bfloat16
    error, allowed = ((values.double() - exact).abs().max().item() for values in (actual, stock))
    # Half a unit in the last place of the largest embedding is lost where the result is rounded.
    assert error <= max(1.2 * allowed, torch.finfo(torch.bfloat16).eps / 2 * exact.max().item())


@families
def test_names_ties_and_saved_folders_are_the_models(family: Family, tmp_path: Path) -> None:
    model, batch = copy.deepcopy(shared(family)), family.batch()
    with torch.no_grad():
        logits = model(**batch).logits
    keys = list(model.state_dict())
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    encoder = SpladeEncoder(model, activation_function="log1p_relu")
    assert list(encoder.state_dict()) == [f"model.{key}" for key in keys]
    assert {f"model.{key}": place for key, place in places.items()} == {
        key: tensor.data_ptr() for key, tensor in encoder.state_dict().items()
    }
    with torch.no_grad():
        embeddings = encoder(**batch)
        with pytest.warns(UserWarning, match="without a tokenizer"):
            encoder.save_pretrained(tmp_path)
        loaded = auto_class(family).from_pretrained(tmp_path).eval()
        assert type(loaded) is type(model)
        assert torch.equal(loaded(**batch).logits, logits)
        again = SpladeEncoder.from_pretrained(tmp_path, activation_function="log1p_relu").eval()
        assert torch.equal(again(**batch), embeddings)
    state = loaded.state_dict()
    assert _tied(state) == _tied(model.state_dict())


def _tied(state: dict[str, Tensor]) -> set[tuple[str, ...]]:
    """Names that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    return {tuple(group) for group in names.values() if len(group) > 1}


def auto_class(family: Family) -> Any:
    return transformers.AutoModelForCausalLM if family.is_causal else transformers.AutoModelForMaskedLM


@families
def test_logits_and_generation_go_on_beside_an_encoder(family: Family) -> None:
    model, batch = shared(family), family.batch()
    prompt = batch["input_ids"][:1, :4]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD}
    with torch.no_grad():
        logits = model(**batch).logits
        generated = model.generate(prompt, **options) if family.is_causal else None
        with encoding(model) as encoder:
            assert torch.equal(model(**batch).logits, logits)
            encoder(**batch)
            assert encoder.model is model
            assert torch.equal(model(**batch).logits, logits)
            if family.is_causal:
                assert torch.equal(model.generate(prompt, **options), generated)
        assert torch.equal(model(**batch).logits, logits)


@families
def test_gradient_checkpointing_changes_no_gradient(family: Family) -> None:
    model, batch = copy.deepcopy(shared(family)).train(), family.batch()
    with encoding(model) as encoder:
        if not model.supports_gradient_checkpointing:
            with pytest.raises(ValueError, match="does not support"):
                encoder.activation_checkpointing_enable()
            return
        torch.manual_seed(0)
        expected = gradients(encoder(**batch), model)
        encoder.activation_checkpointing_enable()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        torch.manual_seed(0)
        actual = gradients(encoder(**batch), model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@families
def test_other_inputs_reach_the_model(family: Family) -> None:
    model, batch = shared(family), family.batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    takes = inspect.signature(model.forward).parameters
    positions = torch.arange(family.length).flip(0).add(2).expand_as(ids)
    inputs: list[dict[str, Any]] = [{"input_ids": ids}]
    if "inputs_embeds" in takes:
        inputs.append({"inputs_embeds": model.get_input_embeddings()(ids).detach(), "attention_mask": mask})
    if "position_ids" in takes:
        inputs.append({**batch, "position_ids": positions})
    if "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs.append({**batch, "token_type_ids": torch.arange(family.length).remainder(2).expand_as(ids)})
    with torch.no_grad(), encoding(model) as encoder:
        for given in inputs:
            expected = pooled(stock_logits(model, **given), given.get("attention_mask", torch.ones_like(mask)))
            assert_near(encoder(**given), expected, f"{list(given)}")


@families
def test_the_vocabulary_is_the_rows_of_the_decoder(family: Family) -> None:
    """Also those that pad it, which no tokenizer has; and those of the model as it is now, or an error."""
    model, batch = family.build(), family.batch()
    model.resize_token_embeddings(V, pad_to_multiple_of=32, mean_resizing=False)
    decoder = model.get_output_embeddings()
    with torch.no_grad(), encoding(model) as encoder:
        embeddings = encoder(**batch)
        assert embeddings.shape == (3, 64)
        assert_near(embeddings, pooled(stock_logits(model, **batch), batch["attention_mask"]))
        model.resize_token_embeddings(V + 8, mean_resizing=False)
        if model.get_output_embeddings() is decoder:  # where it is tied it gets other parameters
            again = encoder(**batch)
        else:
            with pytest.raises(RuntimeError, match=r"resized or replaced.*release\(\)"):
                encoder(**batch)
            encoder.release()
            again = SpladeEncoder(model)(**batch)
        assert again.shape == (3, V + 8)
        assert_near(again, pooled(stock_logits(model, **batch), batch["attention_mask"]))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.id, marks=() if family.name in COMPILED else pytest.mark.slow)
        for family in WORKING
    ],
)
def test_compiled_equals_eager(family: Family) -> None:
    model, batch = shared(family), family.batch()
    torch.compiler.reset()
    with torch.no_grad(), encoding(model) as encoder:
        expected = encoder(**batch)
        whole = family.name in COMPILED or _is_one_graph(model, batch)
        compiled = torch.compile(encoder, backend="eager", fullgraph=whole)
        assert torch.equal(compiled(**batch), expected)
    torch.compiler.reset()


def _is_one_graph(model: Any, batch: dict[str, Tensor]) -> bool:
    """Whether the stock model compiles without graph breaks."""
    try:
        torch.compile(model, backend="eager", fullgraph=True)(**batch)
    except Exception:
        return False
    finally:
        torch.compiler.reset()
    return True


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.refused], ids=lambda family: family.id)
def test_refused_families_name_their_class_and_the_reason(family: Family) -> None:
    assert family.error
    model = family.build()
    with pytest.raises(family.error[0], match=family.error[1]) as raised:
        SpladeEncoder(model)
    assert family.model in str(raised.value)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


# Bidirectional decoders


def full_mask(mask: Tensor) -> Tensor:
    """``[B, 1, S, S]``, to be added to the scores: every token attends to every real one."""
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(len(mask), 1, mask.shape[1], mask.shape[1]).masked_fill(mask[:, None, None] == 0, lowest)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def sees_later_tokens(encoder: SpladeEncoder, batch: dict[str, Tensor]) -> bool:
    """Whether the embedding of the first token depends on a later one, within a batch as it is."""
    first = torch.zeros_like(batch["input_ids"])
    first[:, 0] = 1
    other = batch["input_ids"].clone()
    other[:, 1] = other[:, 1] % 40 + 10
    with torch.no_grad():
        before, after = (
            encoder(**batch | {"input_ids": ids}, pooling_mask=first) for ids in (batch["input_ids"], other)
        )
    return not torch.equal(before, after)


@causal
def test_a_causal_model_is_causal_unless_its_configuration_says_otherwise(family: Family) -> None:
    batch = family.batch()
    with encoding(shared(family)) as encoder:
        assert not sees_later_tokens(encoder, batch)


@causal
def test_is_causal_false_is_honoured_or_warned_of(family: Family, tmp_path: Path) -> None:
    batch = family.batch()
    model = family.build(is_causal=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder = SpladeEncoder(model)
    said = [str(one.message) for one in caught if "is_causal" in str(one.message)]
    unpadded = {"input_ids": batch["input_ids"][:1]}
    seen = [sees_later_tokens(encoder, one) for one in (unpadded, batch)]
    if family.is_causal != "honoured":
        assert seen == [False, "padding" in str(family.is_causal)]
        assert len(said) == 1
        assert family.model in said[0]
        assert ("in batches without padding" in said[0]) == seen[1]
        return
    assert seen == [True, True]
    assert not said
    with torch.no_grad():
        embeddings = encoder(**batch)
        encoder.model.save_pretrained(tmp_path)
        again = SpladeEncoder.from_pretrained(tmp_path)
        assert again.config.is_causal is False
        assert torch.equal(again.eval()(**batch), embeddings)
        encoder.release()
        # The same where it was set after loading, before the encoder.
        model = family.build()
        model.config.is_causal = False
        with encoding(model) as later:
            assert torch.equal(later(**batch), embeddings)
        # A causal model with the mask written out.
        mask = batch["attention_mask"]
        whole = {"input_ids": batch["input_ids"], "attention_mask": full_mask(mask)}
        if family.name == "OPT":  # it counts positions in the 2D mask
            whole["position_ids"] = positions(mask)
        with encoding(shared(family)) as stock:
            assert_near(stock(**whole, pooling_mask=mask), embeddings)


@pytest.mark.parametrize(
    ("name", "attention", "where"),
    [
        ("Gemma 3", "sdpa", None),
        ("Gemma", "eager", ""),
        ("Gemma", "sdpa", " in batches with padding"),
        ("Llama", "sdpa", ""),
        ("Qwen3", "eager", ""),
    ],
)
def test_use_bidirectional_attention_is_warned_of_where_it_is_ignored(
    name: str, attention: str, where: str | None
) -> None:
    family = named(name)
    model = family.build(use_bidirectional_attention=True, attn_implementation=attention)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder = SpladeEncoder(model)
    said = [str(one.message) for one in caught if "use_bidirectional_attention" in str(one.message)]
    batch = family.batch()
    seen = [sees_later_tokens(encoder, one) for one in ({"input_ids": batch["input_ids"][:1]}, batch)]
    if where is None:
        assert (said, seen) == ([], [True, True])
        return
    assert seen == [where != "", False]
    assert len(said) == 1
    assert f"is True, but {family.model} ignores it{where}: " in said[0]
    assert caught[0].filename == __file__


def test_a_model_that_cannot_run_without_padding_is_named() -> None:
    model = named("ModernBERT decoder").build(is_causal=False, attn_implementation="eager")
    with pytest.raises(ValueError, match="ModernBertDecoderForCausalLM: .* without padding .*'eager'"):
        SpladeEncoder(model)


def named(name: str) -> Family:
    (family,) = (one for one in FAMILIES if one.name == name)
    return family


def left_padded(family: Family) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The embeddings of a text alone, and the text behind padding without and with its positions."""
    text = family.batch()["input_ids"][:1, :6]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    padded = {"input_ids": torch.cat([torch.full((1, 3), PAD), text], dim=1), "attention_mask": mask}
    return text, padded, {**padded, "position_ids": positions(mask)}


@pytest.mark.parametrize(("name", "changes"), [("GPT-2", True), ("Llama", False)])
def test_left_padding_without_positions_changes_absolute_positions_only(name: str, changes: bool) -> None:
    family = named(name)
    text, padded, placed = left_padded(family)
    with torch.no_grad(), encoding(shared(family)) as encoder:
        alone = encoder(text)
        distance = (encoder(**padded) - alone).abs().max().item()
        assert (distance > 0.05) if changes else (distance < 1e-5)
        assert_near(encoder(**placed), alone)


@pytest.mark.parametrize("attention", ["block_sparse", "original_full"])
def test_bigbird_keeps_its_attention(attention: str) -> None:
    """Its probe is short, and BigBird exchanges its modules for good when a text is too short for sparse attention."""
    family = named(f"BigBird {attention}")
    model, batch = family.build(), family.batch()
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad(), encoding(model) as encoder:
        assert model.config.attention_type == model.bert.attention_type == attention
        encoder(**batch)
    assert model.config.attention_type == model.bert.attention_type == attention
    assert [type(module) for module in model.modules()] == kinds
