"""``FlopsLoss`` takes the place of sentence-transformers' own inside ``SpladeLoss``."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sparse_encoder import losses

import splade_kernels.integrations.sentence_transformers as integration
from splade_kernels.integrations.sentence_transformers import FlopsLoss, fuse
from tests.st_models import PAIRS, sparse_encoder


@pytest.mark.parametrize("threshold", [None, 0, 5, 7])
def test_value_and_gradient_equal_stock(threshold: int | None) -> None:
    model = sparse_encoder()
    values = torch.rand(6, 11, generator=torch.Generator().manual_seed(0))
    for row, active in enumerate((0, 5, 6, 7, 8, 11)):
        values[row, active:] = 0
    results = []
    for loss in (losses.FlopsLoss(model, threshold=threshold), FlopsLoss(model, threshold=threshold)):
        embeddings = values.clone().requires_grad_()
        value = loss.compute_loss_from_embeddings(embeddings)
        value.backward()
        assert embeddings.grad is not None
        results.append((value.detach(), embeddings.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    assert results[0][0] > 0


def test_is_what_splade_loss_and_the_model_card_expect() -> None:
    model = sparse_encoder()
    ranking = losses.SparseMultipleNegativesRankingLoss(model)

    def splade_loss(regularizer: type[losses.FlopsLoss]) -> losses.SpladeLoss:
        return losses.SpladeLoss(
            model,
            ranking,
            document_regularizer_weight=3e-5,
            query_regularizer_weight=5e-5,
            document_regularizer=regularizer(model, threshold=7),
            query_regularizer=regularizer(model),
        )

    ours, stock = splade_loss(FlopsLoss), splade_loss(losses.FlopsLoss)
    assert ours.get_config_dict() == stock.get_config_dict()
    assert ours.get_config_dict()["document_regularizer_threshold"] == 7
    regularizer = FlopsLoss(model, threshold=7)
    assert regularizer.get_config_dict() == {"threshold": 7}
    assert regularizer.citation == losses.FlopsLoss(model).citation
    assert ours.citation == stock.citation
    with pytest.raises(NotImplementedError):
        regularizer([], torch.empty(0))


def test_splade_loss_equals_stock() -> None:
    model = sparse_encoder().eval()
    columns = [[query for query, _ in PAIRS[:6]], [text for _, text in PAIRS[:6]]]
    components = []
    for regularizer in (losses.FlopsLoss, FlopsLoss):
        loss = losses.SpladeLoss(
            model,
            losses.SparseMultipleNegativesRankingLoss(model),
            document_regularizer_weight=3e-2,
            query_regularizer_weight=5e-2,
            document_regularizer=regularizer(model, threshold=40),
            query_regularizer=regularizer(model),
        )
        components.append(loss([model.preprocess(column) for column in columns], torch.empty(0)))
    torch.testing.assert_close(components[1], components[0], rtol=1e-6, atol=1e-7)


def test_process_group_and_threshold_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def record(embeddings: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(options)
        return embeddings.sum()

    monkeypatch.setattr(integration, "flops_loss", record)
    group = object()
    FlopsLoss(sparse_encoder(), 3, group).compute_loss_from_embeddings(torch.ones(1, 2))  # type: ignore[arg-type]
    assert seen == [{"threshold": 3, "process_group": group}]


def test_fuse_does_not_touch_the_loss() -> None:
    model = sparse_encoder()
    loss = losses.SpladeLoss(model, losses.SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=1.0)
    fuse(loss)
    assert type(loss.document_regularizer) is losses.FlopsLoss
    assert "forward" in model[0].__dict__
