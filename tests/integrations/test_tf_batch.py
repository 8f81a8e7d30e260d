"""What a ``SpladeEncoder`` makes of a batch: masks, positions, caches, flattened sequences, autocast."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, BatchEncoding

from splade_kernels.integrations.transformers import SpladeEncoder
from tests.lm_models import HEADS, assert_stock, batch, language_model, stock
from tests.tf_models import FAMILIES


def flat(features: dict[str, Tensor]) -> dict[str, Any]:
    real = features["attention_mask"].bool()
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), real.sum(dim=1).cumsum(0)]).to(torch.int32)
    return {"input_ids": features["input_ids"][real].unsqueeze(0), "cu_seq_lens_q": ends}


def wide(features: dict[str, Tensor]) -> Tensor:
    """The 4D mask of a bidirectional model."""
    mask = features["attention_mask"][:, None, None, :].bool()
    return mask.expand(-1, 1, mask.shape[-1], -1)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "labels": (lambda f: f | {"labels": f["input_ids"]}, TypeError, "labels: expected none"),
    "4D": (lambda f: f | {"attention_mask": wide(f)}, ValueError, r"a pooling_mask \[B, S\] beside it, got torch.bool"),
    "dictionary": (lambda f: f | {"attention_mask": {"full_attention": wide(f)}}, ValueError, "beside it, got dict"),
    "float": (
        lambda f: f | {"attention_mask": f["attention_mask"].float()},
        TypeError,
        r"attention_mask: expected a bool or integer tensor \[B, S\], got torch.float32 \[6, ",
    ),
    "float pooling": (lambda f: f | {"pooling_mask": f["attention_mask"] * 1.0}, TypeError, "pooling_mask: expected"),
    "4D pooling": (lambda f: f | {"pooling_mask": wide(f)}, ValueError, r"pooling_mask: expected \[B, S\], got torch"),
    "list": (lambda f: f | {"pooling_mask": [[1]]}, TypeError, "pooling_mask: .*got list"),
    "short": (
        lambda f: f | {"attention_mask": f["attention_mask"][:, :-1]},
        ValueError,
        r"attention_mask: expected \[6, \d+\], got \[6, \d+\]",
    ),
    "one row": (lambda f: f | {"pooling_mask": f["attention_mask"][:1]}, ValueError, r"pooling_mask: .*got \[1, "),
    "last logits": (lambda f: f | {"logits_to_keep": 1}, ValueError, "logits_to_keep: expected 0, for all tokens, got"),
    "some logits": (lambda f: f | {"logits_to_keep": torch.tensor([0, 1])}, ValueError, "logits_to_keep: expected 0"),
    "flattened": (flat, ValueError, "cu_seq_lens_q: expected an attention that keeps .*got 'sdpa'"),
    "lengths": (lambda f: f | {"max_length_q": 3}, ValueError, "cu_seq_lens_q: expected an attention"),
    "nothing": (lambda f: {}, ValueError, "input_ids: expected token ids"),
    "one sequence": (lambda f: {"input_ids": f["input_ids"][0]}, ValueError, r"input_ids: expected a tensor \[B, S\]"),
    "list of ids": (lambda f: {"input_ids": f["input_ids"].tolist()}, ValueError, "input_ids: .*got list"),
    "device": (lambda f: {"input_ids": f["input_ids"].to("meta")}, RuntimeError, "input_ids is on meta.*torchrun"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_batches_that_are_refused_by_name(case: str) -> None:
    change, kind, message = REFUSED[case]
    for family in ("bert", "llama"):
        encoder = SpladeEncoder(language_model(family))
        with pytest.raises(kind, match=message):
            encoder(**change(batch()))
        assert_stock(encoder)


def test_tokens_that_the_model_adds() -> None:
    model = language_model("llama")
    encoder = SpladeEncoder(model)
    body = model.model.forward

    def with_another_token(inputs_embeds: Any = None, input_ids: Any = None, **kwargs: Any) -> Any:
        embeds = model.model.embed_tokens(input_ids)
        return body(inputs_embeds=torch.cat([embeds[:, :1], embeds], dim=1), **kwargs)

    model.model.forward = with_another_token
    with pytest.raises(RuntimeError, match=r"gave its decoder \[6, 21\] tokens for \[6, 20\]"):
        encoder(torch.ones(6, 20, dtype=torch.int64))


def test_a_replica_of_data_parallel_is_refused() -> None:
    replica = SpladeEncoder(language_model("bert"))._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel.*torchrun"):
        replica(**batch())


# What is accepted


@pytest.mark.parametrize(("pooling_strategy", "activation_function"), HEADS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_masks_of_every_kind(family: str, pooling_strategy: str, activation_function: str) -> None:
    model = language_model(family)
    encoder = SpladeEncoder(model, pooling_strategy=pooling_strategy, activation_function=activation_function)
    features = batch()
    head = pooling_strategy, activation_function
    expected = stock(model, features, *head)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(encoder(**features), expected, **close)
    torch.testing.assert_close(encoder(**BatchEncoding(features)), expected, **close)
    torch.testing.assert_close(encoder(features["input_ids"], features["attention_mask"].bool()), expected, **close)
    embedded = model.get_input_embeddings()(features["input_ids"])
    other = {"inputs_embeds": embedded, "attention_mask": features["attention_mask"]}
    torch.testing.assert_close(encoder(**other), expected, **close)

    words = features["attention_mask"].clone()
    words[:, 0] = 0
    torch.testing.assert_close(encoder(**features, pooling_mask=words), stock(model, features, *head, mask=words))
    four = {"input_ids": features["input_ids"], "attention_mask": wide(features)}
    expected = stock(model, four, *head, mask=words)
    torch.testing.assert_close(encoder(**four, pooling_mask=words), expected, **close)

    one = {"input_ids": features["input_ids"][:1]}
    expected = stock(model, one, *head, mask=torch.ones_like(one["input_ids"]))
    torch.testing.assert_close(encoder(**one), expected, **close)


def test_positions_and_types_reach_the_model() -> None:
    encoder = SpladeEncoder(language_model("bert"))
    features = batch()
    features["token_type_ids"] = torch.ones_like(features["input_ids"])
    features["position_ids"] = torch.arange(features["input_ids"].shape[1]).flip(0).unsqueeze(0)
    assert_stock(encoder, features)
    assert not torch.allclose(encoder(**features), encoder(**batch()))


def test_nothing_is_cached_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SpladeEncoder(language_model("llama"))
    asked: list[Any] = []
    body = encoder.model.model.forward

    def record(**kwargs: Any) -> Any:
        output = body(**kwargs)
        asked.append((kwargs["use_cache"], output.past_key_values is None))
        return output

    encoder.model.model.forward = record
    encoder(**batch())
    encoder(**batch(), use_cache=True)
    assert asked == [(False, True), (True, False)]


def test_all_logits_may_be_asked_for() -> None:
    encoder = SpladeEncoder(language_model("llama"))
    assert torch.equal(encoder(**batch(), logits_to_keep=0), encoder(**batch()))


def apart(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Attention of flattened sequences as flash attention computes it, or as it does without all four arguments."""
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    given = [kwargs.get(name) for name in names]
    length = query.shape[2]
    ends = [0, length] if any(value is None for value in given) else given[1].tolist()
    assert given[2] is None or given[2] >= max(end - start for start, end in itertools.pairwise(ends))
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for start, end in itertools.pairwise(ends):
        allowed[start:end, start:end] = True
    causal = kwargs.get("is_causal")
    if module.is_causal if causal is None else causal:
        allowed = allowed.tril()
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, scale=kwargs.get("scaling")
    )
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def varlen() -> Iterator[None]:
    AttentionInterface.register("flash_on_a_cpu", apart)
    yield
    AttentionInterface._global_mapping.pop("flash_on_a_cpu")


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("given", ["q", "all"])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert", "llama", "gpt2"])
def test_flattened_sequences_stay_apart(family: str, given: str) -> None:
    model = language_model(family)
    encoder = SpladeEncoder(model)
    features = batch(family=family)
    expected = encoder(**features)
    model.config._attn_implementation = "flash_on_a_cpu"
    flattened = flat(features)
    if given == "all":
        lengths = features["attention_mask"].sum(dim=1)
        longest = int(lengths.max())
        first = 2 if family == "xlm-roberta" else 0
        flattened |= {
            "cu_seq_lens_k": flattened["cu_seq_lens_q"],
            "max_length_q": longest,
            "max_length_k": longest,
            "position_ids": torch.cat([torch.arange(int(length)) + first for length in lengths]).unsqueeze(0),
        }
    torch.testing.assert_close(encoder(**flattened), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("varlen")
def test_flattened_sequences_that_are_refused() -> None:
    model = language_model("bert")
    encoder = SpladeEncoder(model)
    model.config._attn_implementation = "flash_on_a_cpu"
    flattened = flat(batch())
    for change, message in (
        ({"attention_mask": torch.ones_like(flattened["input_ids"])}, "attention_mask: expected none"),
        ({"pooling_mask": torch.ones_like(flattened["input_ids"])}, "attention_mask: expected none"),
        ({"cu_seq_lens_q": None, "max_length_q": 3}, "cu_seq_lens_q: expected the cumulative lengths"),
        ({"input_ids": flattened["input_ids"].expand(2, -1)}, r"input_ids: expected \[1, T\] beside cu_seq_lens_q"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(**flattened | change)


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("name", ["Nemotron", "StableLM", "GPT-Neo"])
def test_flattened_sequences_whose_lengths_never_reach_the_attention(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    encoder = SpladeEncoder(family.build())
    expected, implementation = encoder(**family.batch()), encoder.config._attn_implementation
    encoder.config._attn_implementation = "flash_on_a_cpu"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cu_seq_lens_q: \w+ForCausalLM does not give it to its attention"):
            encoder(**flat(family.batch()))
    assert not any(module._forward_pre_hooks for module in encoder.modules())
    encoder.config._attn_implementation = implementation
    assert torch.equal(encoder(**family.batch()), expected)


def test_autocast_gives_float32_and_is_no_worse_than_stock() -> None:
    model = language_model("bert")
    encoder = SpladeEncoder(model)
    exact = encoder(**batch())
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = encoder(**batch()), stock(model, batch())
    assert actual.dtype == torch.float32
    assert (actual - exact).abs().max() <= 1.2 * (expected - exact).abs().max()
