"""A fused SparseEncoder trains as a stock one does, step by step, on a model whose loss moves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder import losses
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from splade_kernels.integrations.sentence_transformers import FlopsLoss, fuse
from tests.st_models import TEXTS, decoder_of, gradients, pairs_dataset, sparse_encoder

# A step uses the gradients and the weights of those before it, so a few show most errors; the whole run has to learn.
STEPS = 20
steps = pytest.mark.parametrize("steps", [3, pytest.param(STEPS, marks=pytest.mark.slow)])
RELATIVE_LOSS_DIFFERENCE = 1e-4
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "max": ("distilbert", {}),
    "log1p_relu": ("bert", {"activation_function": "log1p_relu"}),
    "sum": ("distilbert", {"pooling_strategy": "sum"}),
}


class Recorder:
    """Mixed into a loss: keeps the total of every training step."""

    history: list[float]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        components: dict[str, Tensor] = super().forward(*args, **kwargs)  # type: ignore[misc]
        if self.training:  # type: ignore[attr-defined]
            self.history.append(sum(float(value.detach()) for value in components.values()))
        return components


class RecordedSpladeLoss(Recorder, losses.SpladeLoss):
    pass


class RecordedCachedSpladeLoss(Recorder, losses.CachedSpladeLoss):
    pass


def train(
    model: SparseEncoder,
    folder: Path,
    *,
    cached: bool = False,
    fused_flops: bool = False,
    loss_options: dict[str, Any] | None = None,
    seed: int = 1,
    **options: Any,
) -> list[float]:
    """Losses of every step; the model is trained in place."""
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 4e-3,
        "warmup_steps": 2,
        "logging_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }
    arguments.update(options)
    regularizers: dict[str, Any] = {"document_regularizer_weight": 3e-3, "query_regularizer_weight": 5e-3}
    if fused_flops:
        regularizers |= {"document_regularizer": FlopsLoss(model), "query_regularizer": FlopsLoss(model)}
    regularizers.update(loss_options or {})
    ranking = losses.SparseMultipleNegativesRankingLoss(model)
    if cached:
        loss: Any = RecordedCachedSpladeLoss(model, ranking, mini_batch_size=3, **regularizers)
    else:
        loss = RecordedSpladeLoss(model, ranking, **regularizers)
    loss.history = []
    dataset = pairs_dataset()
    SparseEncoderTrainer(
        model=model,
        args=SparseEncoderTrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)) if "eval_strategy" in options else None,
        loss=loss,
    ).train()
    return loss.history


def assert_learns(losses: list[float], steps: int) -> None:
    """A model that stands still would make any two heads agree. (The first steps are too few to tell.)"""
    assert len(losses) == steps
    assert steps < STEPS or sum(losses[-5:]) < 0.85 * sum(losses[:5])


def largest_relative_difference(losses: list[float], reference: list[float]) -> float:
    assert len(losses) == len(reference) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def mean_difference(losses: list[float], reference: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(losses, reference, strict=True)) / len(reference)


@steps
@pytest.mark.parametrize(
    ("head", "cached"),
    # `make test` runs each head with one of the two losses.
    [
        pytest.param(
            head,
            cached,
            id=f"{'cached-' * cached}splade-loss-{head}",
            marks=[pytest.mark.slow] * (cached != (head == "max")),
        )
        for head, cached in itertools.product(HEADS, (False, True))
    ],
)
def test_float32_losses_equal_stock_step_by_step(tmp_path: Path, head: str, cached: bool, steps: int) -> None:
    architecture, changes = HEADS[head]
    options: dict[str, Any] = {"cached": cached, "max_steps": steps}
    stock = train(sparse_encoder(architecture, **changes), tmp_path, **options)
    assert_learns(stock, steps)
    fused = train(fuse(sparse_encoder(architecture, **changes)), tmp_path, fused_flops=True, **options)
    assert largest_relative_difference(fused, stock) <= RELATIVE_LOSS_DIFFERENCE


def test_the_comparison_sees_a_small_error(tmp_path: Path) -> None:
    stock = train(sparse_encoder(), tmp_path, max_steps=3)
    other = sparse_encoder()
    with torch.no_grad():
        decoder_of(other).bias += 1e-3
    assert largest_relative_difference(train(other, tmp_path, max_steps=3), stock) > RELATIVE_LOSS_DIFFERENCE


def test_bfloat16_losses_are_near_those_of_float32(tmp_path: Path) -> None:
    exact = train(sparse_encoder(), tmp_path, max_steps=3)
    fused = train(fuse(sparse_encoder()), tmp_path, bf16=True, fused_flops=True, max_steps=3)
    assert 0 < largest_relative_difference(fused, exact) <= 1e-2


@pytest.mark.slow
def test_bfloat16_is_no_further_from_float32_than_stock(tmp_path: Path) -> None:
    stock_distance = fused_distance = 0.0
    for seed in range(1, 7):
        options: dict[str, Any] = {"seed": seed, "learning_rate": 2e-3}
        exact = train(sparse_encoder(), tmp_path, **options)
        stock = train(sparse_encoder(), tmp_path, bf16=True, **options)
        fused = train(fuse(sparse_encoder()), tmp_path, bf16=True, fused_flops=True, **options)
        assert_learns(fused, STEPS)
        stock_distance += mean_difference(stock, exact)
        fused_distance += mean_difference(fused, exact)
    assert stock_distance > 0
    assert fused_distance <= 1.2 * stock_distance


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = train(fuse(sparse_encoder("bert")), tmp_path, max_steps=3)
    checkpointed = train(fuse(sparse_encoder("bert")), tmp_path, max_steps=3, gradient_checkpointing=True)
    assert largest_relative_difference(checkpointed, plain) <= 1e-6


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_transformer_module_hands_through_when_recomputed(use_reentrant: bool) -> None:
    model = fuse(sparse_encoder())
    plain = dict(gradients(model, TEXTS[:4]))
    transformer = model[0]
    original = transformer.__dict__["forward"]

    def recomputed(features: dict[str, Any]) -> dict[str, Any]:
        anchor = torch.zeros((), requires_grad=True)
        hidden = checkpoint(lambda _: original(dict(features))["token_embeddings"], anchor, use_reentrant=use_reentrant)
        return {**features, "token_embeddings": hidden}

    transformer.__dict__["forward"] = recomputed
    for name, gradient in gradients(model, TEXTS[:4]):
        torch.testing.assert_close(gradient, plain[name], rtol=1e-6, atol=1e-7, msg=name)


def test_load_best_model_at_end(tmp_path: Path) -> None:
    model = fuse(sparse_encoder())
    train(
        model,
        tmp_path,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    assert "forward" in model[0].__dict__
    best = min(
        (SparseEncoder(str(folder), device="cpu") for folder in sorted(tmp_path.glob("checkpoint-*"))),
        key=lambda saved: (decoder_of(saved).weight - decoder_of(model).weight).abs().max().item(),
    )
    trained = model.encode(TEXTS, convert_to_sparse_tensor=False)
    torch.testing.assert_close(trained, best.encode(TEXTS, convert_to_sparse_tensor=False), rtol=1e-5, atol=1e-6)
    fresh = sparse_encoder().encode(TEXTS, convert_to_sparse_tensor=False)
    assert (trained - fresh).abs().max() > 1e-3


@steps
def test_router_with_a_static_query_side_trains_as_stock(tmp_path: Path, steps: int) -> None:
    def router_model() -> SparseEncoder:
        document = sparse_encoder()
        static = SparseStaticEmbedding(tokenizer=document.tokenizer)
        torch.nn.init.constant_(static.weight, 0.5)
        router = Router.for_query_document(query_modules=[static], document_modules=list(document))
        return SparseEncoder(modules=[router], device="cpu")

    def losses_of(model: SparseEncoder) -> list[float]:
        return train(
            model,
            tmp_path,
            router_mapping={"query": "query", "document": "document"},
            loss_options={"query_regularizer_weight": None},
            max_steps=steps,
        )

    stock = losses_of(router_model())
    assert_learns(stock, steps)
    assert largest_relative_difference(losses_of(fuse(router_model())), stock) <= RELATIVE_LOSS_DIFFERENCE


@pytest.mark.slow
def test_the_trainer_compiles_a_model_that_has_not_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2}
    stock = train(sparse_encoder(), tmp_path, **options)
    torch.compiler.reset()
    compiled = train(
        fuse(sparse_encoder()), tmp_path, torch_compile=True, torch_compile_backend="eager", fused_flops=True, **options
    )
    torch.compiler.reset()
    assert largest_relative_difference(compiled, stock) <= RELATIVE_LOSS_DIFFERENCE
