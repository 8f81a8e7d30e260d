"""Encoders on one decoder come and go; copies, processes, threads; what they refuse to be made on."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
from torch import Tensor, nn

from splade_kernels.integrations import _hand_off
from splade_kernels.integrations.sentence_transformers import fuse, unfuse
from splade_kernels.integrations.transformers import SpladeEncoder
from tests import without_package
from tests.lm_models import assert_stock, batch, decoder_of, folder, language_model, stock
from tests.st_models import TEXTS, tokenizer


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
    assert not torch.allclose(other(**batch()), expected)
    encoder.release()
    assert is_free(encoder.model)
    assert torch.equal(twin(**batch()), expected)
    twin.release()
    assert is_free(twin.model)
    with pytest.raises(RuntimeError, match="released"):
        COPIES[how](encoder)(**batch())


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
    without_package.run(WORKS, tmp_path / "model.pt")


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


def test_importing_does_not_import_sentence_transformers() -> None:
    code = "import sys, splade_kernels.integrations.transformers; assert 'sentence_transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "USE_TF": "0"})


def test_the_tokenizer_of_the_tests_has_no_types() -> None:
    """``batch`` leaves them out, so that one batch fits every family."""
    assert set(tokenizer()(TEXTS[:1])) >= set(batch())
