"""The life of a ``SpladeEncoder``: what it shares with others on the same decoder, leaves behind, and refuses."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface, BatchEncoding, LlamaConfig, LlamaForCausalLM

from splade_kernels.integrations import _hand_off
from splade_kernels.integrations.sentence_transformers import fuse, unfuse
from splade_kernels.integrations.transformers import SpladeEncoder
from tests.lm_models import batch, decoder_of, folder, language_model, stock
from tests.st_models import TEXTS, tokenizer
from tests.tf_models import FAMILIES

HEADS = [(strategy, activation) for strategy in ("max", "sum") for activation in ("relu", "log1p_relu")]


def assert_stock(encoder: SpladeEncoder, features: dict[str, Any] | None = None) -> None:
    features = batch() if features is None else features
    with torch.no_grad():
        expected = stock(encoder.model, features, encoder.pooling_strategy, encoder.activation_function)
        actual = encoder(**features)
    assert 0.05 < (expected > 0).double().mean()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def is_free(model: Any) -> bool:
    return "forward" not in decoder_of(model).__dict__


def sparse_encoder_around(model: Any) -> SparseEncoder:
    transformer: Any = Transformer(str(folder("bert")), transformer_task="fill-mask")
    transformer.model = model
    return SparseEncoder(modules=[transformer, SpladePooling()], device="cpu")


# Sharing


def make_users(model: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Encoders on one decoder, made in the given order."""
    makers: dict[str, Callable[[], Any]] = {
        "max": lambda: SpladeEncoder(model),
        "sum": lambda: SpladeEncoder(model, pooling_strategy="sum", activation_function="log1p_relu", screening=False),
        "fused": lambda: fuse(sparse_encoder_around(model)),
    }
    return {name: makers[name]() for name in names}


def let_go(users: dict[str, Any], name: str, how: str) -> None:
    user = users.pop(name)
    if how == "garbage":
        del user
        gc.collect()
    elif isinstance(user, SpladeEncoder):
        user.release()
        with pytest.raises(RuntimeError, match="was released: make a new one"):
            user(**batch())
        user.release()
    else:
        unfuse(user)


def assert_work(model: Any, users: dict[str, Any], logits: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, logits)
        for user in users.values():
            if isinstance(user, SpladeEncoder):
                assert_stock(user)
            else:
                torch.testing.assert_close(
                    user.encode(TEXTS[:6], convert_to_sparse_tensor=False), stock(model, batch()), rtol=1e-5, atol=1e-6
                )


@pytest.mark.parametrize("how", ["release", "garbage"])
@pytest.mark.parametrize("made", [("max", "sum", "fused"), ("fused", "max", "sum")], ids="-".join)
def test_users_of_one_decoder_come_and_go_in_any_order(made: tuple[str, ...], how: str) -> None:
    model = language_model("bert")
    with torch.no_grad():
        logits = model(**batch()).logits
    keys = set(vars(model)), {name: set(vars(module)) for name, module in model.named_modules()}
    orders = itertools.permutations(made) if how == "release" else [made]  # a collection takes half a second
    for gone in orders:
        users = make_users(model, made)
        forward = decoder_of(model).__dict__["forward"]
        assert_work(model, users, logits)
        for name in gone:
            assert decoder_of(model).__dict__["forward"] is forward
            let_go(users, name, how)
        assert is_free(model)
        assert (set(vars(model)), {name: set(vars(module)) for name, module in model.named_modules()}) == keys
    users = make_users(model, made)
    let_go(users, made[0], how)
    assert_work(model, users, logits)


def test_the_decoder_keeps_its_forward_when_a_collection_comes_between_look_and_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = language_model("bert")
    users = [SpladeEncoder(model)]
    look = _hand_off.own_forward

    def collect_meanwhile(module: nn.Module) -> Any:
        found = look(module)
        users.clear()
        return found

    monkeypatch.setattr(_hand_off, "own_forward", collect_meanwhile)
    decoder, transform = decoder_of(model), users[0]._transform
    user = nn.Identity()
    forward = _hand_off.join(decoder, transform, user)
    assert decoder.__dict__["forward"] is forward


def test_users_that_would_change_the_logits_in_different_ways() -> None:
    model = language_model("bert")
    encoder = SpladeEncoder(model)
    sparse = sparse_encoder_around(model)
    encoder._hand_off.transform = dataclasses.replace(encoder._transform, scale=2.0)
    for make in (lambda: SpladeEncoder(model), lambda: fuse(sparse)):
        with pytest.raises(ValueError, match=r"scaled by 2\.0 and capped at None, this one scaled by 1\.0"):
            make()
    assert not any("forward" in module.__dict__ for module in sparse)
    encoder.release()
    assert is_free(model)


def test_an_encoder_is_the_model_and_nothing_else() -> None:
    model = language_model("bert")
    state = {f"model.{name}" for name in model.state_dict()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    encoder = SpladeEncoder(model)
    assert encoder.model is model
    assert set(encoder.state_dict()) == state
    assert [parameter.data_ptr() for parameter in encoder.parameters()] == pointers
    assert decoder_of(model).weight is model.get_input_embeddings().weight


# Copies

WORKS = """
import io, pickle, sys, torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "splade_kernels":
            raise ImportError("splade_kernels cannot be imported here")

sys.meta_path.insert(0, Blocked())
model, features, logits = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(**features).logits, logits)
"""

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch": lambda value: through_a_file(value),
}


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_copied_encoder_has_a_model_of_its_own(how: str, family: str) -> None:
    encoder = SpladeEncoder(language_model(family), pooling_strategy="sum", screening=False)
    other = COPIES[how](encoder)
    twin = COPIES[how](other)
    assert other._hand_off is not encoder._hand_off
    expected = encoder(**batch())
    assert torch.equal(twin(**batch()), expected)
    with torch.no_grad():
        decoder_of(other.model).weight.zero_()
    assert torch.equal(encoder(**batch()), expected)
    assert_not_equal(other(**batch()), expected)
    encoder.release()
    assert is_free(encoder.model)
    assert torch.equal(twin(**batch()), expected)
    twin.release()
    assert is_free(twin.model)
    with pytest.raises(RuntimeError, match="released"):
        COPIES[how](encoder)(**batch())


def assert_not_equal(first: Tensor, second: Tensor) -> None:
    assert not torch.allclose(first, second)


def test_a_copied_list_of_encoders_shares_one_copied_model() -> None:
    model = language_model("bert")
    first, second = copy.deepcopy([SpladeEncoder(model), SpladeEncoder(model, pooling_strategy="sum")])
    assert first.model is second.model is not model
    assert first._hand_off is second._hand_off
    first.release()
    assert_stock(second)
    del second
    assert is_free(first.model)


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_model_is_the_stock_one(how: str) -> None:
    encoder = SpladeEncoder(language_model("bert"))
    other = COPIES[how](encoder.model)
    assert torch.equal(other(**batch()).logits, encoder.model(**batch()).logits)
    assert _hand_off.own_forward(decoder_of(other)) is None
    assert_stock(SpladeEncoder(other))


def test_a_pickled_model_loads_without_this_package(tmp_path: Path) -> None:
    model = SpladeEncoder(language_model("bert")).model
    torch.save((model, batch(), model(**batch()).logits), tmp_path / "model.pt")
    assert b"splade_kernels" not in (tmp_path / "model.pt").read_bytes()
    subprocess.run([sys.executable, "-c", WORKS, tmp_path / "model.pt"], check=True, timeout=120)


# Processes and threads


def embed(encoder: SpladeEncoder, features: dict[str, Tensor]) -> Tensor:
    torch.set_num_threads(1)
    return encoder(**features).detach()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_other_processes(start: Any) -> None:
    encoder = SpladeEncoder(language_model("llama"))
    expected = embed(encoder, batch())
    with get_context(start).Pool(1) as pool:
        actual = pool.apply_async(embed, (encoder, batch())).get(120)
    torch.testing.assert_close(actual, expected)


def test_threads_that_encode_compute_logits_and_generate() -> None:
    model = language_model("llama")
    encoders = [SpladeEncoder(model), SpladeEncoder(model, pooling_strategy="sum", screening=False)]
    features = batch(side="left")
    generating = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    work: list[Callable[[], Tensor]] = [
        *(lambda encoder=encoder: encoder(**features) for encoder in encoders),
        lambda: model(**features).logits,
        lambda: model.generate(**features, **generating),
    ]
    with torch.no_grad():
        expected = [step() for step in work]
    barrier, wrong = threading.Barrier(len(work)), []

    def run(index: int) -> None:
        barrier.wait(30)
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(work[index](), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def inside() -> Iterator[Callable[[Any, Callable[[], Any]], None]]:
    """Has the embeddings of a BERT call a function in the midst of a forward."""

    def install(model: Any, call: Callable[[], Any]) -> None:
        embeddings = model.bert.embeddings
        stock_forward = embeddings.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            embeddings.__dict__.pop("forward", None)
            call()
            embeddings.forward = forward
            result: Tensor = stock_forward(*args, **kwargs)
            return result

        embeddings.forward = forward

    yield install


def test_an_encoder_inside_another_one(inside: Callable[[Any, Callable[[], Any]], None]) -> None:
    model = language_model("bert")
    encoder, other = SpladeEncoder(model), SpladeEncoder(model, pooling_strategy="sum", screening=False)
    expected = encoder(**batch())
    nested: list[Tensor] = []
    inside(model, lambda: nested.append(other(**batch(TEXTS[:2]))))
    assert torch.equal(encoder(**batch()), expected)
    del model.bert.embeddings.__dict__["forward"]
    assert torch.equal(nested[0], other(**batch(TEXTS[:2])))


def test_logits_inside_an_encoder_are_not_taken_for_its_own(inside: Callable[[Any, Callable[[], Any]], None]) -> None:
    model = language_model("bert")
    encoder = SpladeEncoder(model)
    inside(model, lambda: model(**batch()))
    with pytest.raises(RuntimeError, match="called its decoder twice in one forward"):
        encoder(**batch())


def test_an_error_inside_leaves_the_model_alone(inside: Callable[[Any, Callable[[], Any]], None]) -> None:
    model = language_model("bert")
    logits, encoder = model(**batch()).logits, SpladeEncoder(model)

    def fail() -> None:
        raise KeyError("inside")

    inside(model, fail)
    with pytest.raises(KeyError, match="inside"):
        encoder(**batch())
    assert torch.equal(model(**batch()).logits, logits)
    assert_stock(encoder)


# What is refused


@pytest.mark.parametrize("where", ["", "cls", "cls.predictions", "cls.predictions.decoder"])
def test_hooks_that_see_the_logits(where: str) -> None:
    model = language_model("bert")
    module = model.get_submodule(where)
    handle = module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks.*test_hooks_that_see_the_logits"):
        SpladeEncoder(model)
    assert is_free(model)
    handle.remove()
    encoder = SpladeEncoder(model)
    handle = module.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks.*test_hooks_that_see_the_logits"):
        encoder(**batch())
    handle.remove()
    assert_stock(encoder)


FOLLOWED_BY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bias in place": lambda logits, parameter: logits.add_(parameter - 1),
    "bias in another dtype": lambda logits, parameter: logits.double() + (parameter - 1),
    "scale of the configuration": lambda logits, parameter: logits * parameter,
}


@pytest.mark.parametrize("follows", FOLLOWED_BY)
def test_parameters_after_the_decoder_that_change_nothing_yet(follows: str) -> None:
    model = language_model("bert")
    model.temperature = nn.Parameter(torch.ones(()))
    model.config.logit_scale = 1.0
    stock_forward = model.forward

    def forward(**kwargs: Any) -> Any:
        output = stock_forward(**kwargs)
        output.logits = FOLLOWED_BY[follows](output.logits, model.temperature)
        return output

    model.forward = forward
    with pytest.raises(ValueError, match="applies parameters of its own to its logits after the decoder"):
        SpladeEncoder(model)
    assert is_free(model)
    assert torch.is_grad_enabled()


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
    assert_not_equal(encoder(**features), encoder(**batch()))


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


# Compilers and exporters


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


@pytest.fixture
def autocast_cache() -> Iterator[None]:
    enabled = torch.is_autocast_cache_enabled()
    yield
    torch.set_autocast_cache_enabled(enabled)


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


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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


def test_importing_does_not_import_sentence_transformers() -> None:
    code = "import sys, splade_kernels.integrations.transformers; assert 'sentence_transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "USE_TF": "0"})


def test_the_tokenizer_of_the_tests_has_no_types() -> None:
    """``batch`` leaves them out, so that one batch fits every family."""
    assert set(tokenizer()(TEXTS[:1])) >= set(batch())
