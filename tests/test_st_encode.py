"""``encode_sparse`` gives what the model's own methods give, as CSR."""

from __future__ import annotations

import pytest
import torch

from splade_kernels.integrations import _encode
from splade_kernels.integrations.sentence_transformers import encode_sparse, fuse
from tests.st_models import TEXTS, sparse_encoder


@pytest.fixture(scope="module")
def model():
    encoder = fuse(sparse_encoder("distilbert"))
    encoder.prompts = {"query": "what is ", "document": "the sea "}
    return encoder


def dense_of(batches) -> torch.Tensor:
    batches = list(batches)
    assert {batch.layout for batch in batches} == {torch.sparse_csr}
    return torch.cat([batch.to_dense() for batch in batches])


@pytest.mark.parametrize("task", ["query", "document", None])
def test_embeddings_are_those_of_the_models_method(model, task):
    method = {"query": model.encode_query, "document": model.encode_document, None: model.encode}[task]
    stock = method(TEXTS, batch_size=5, convert_to_sparse_tensor=False)
    assert (stock != 0).any(dim=1).all()
    assert torch.equal(dense_of(encode_sparse(model, TEXTS, task=task, batch_size=5)), stock)


def test_prompts_reach_the_model(model):
    stock = model.encode(TEXTS, prompt="why ", convert_to_sparse_tensor=False)
    assert torch.equal(dense_of(encode_sparse(model, TEXTS, prompt="why ")), stock)
    assert not torch.equal(dense_of(encode_sparse(model, TEXTS)), stock)


def test_long_input_comes_in_several_results_in_order(model, monkeypatch):
    monkeypatch.setattr(_encode, "BATCHES", 2)
    batches = list(encode_sparse(model, TEXTS, batch_size=3))
    assert [len(batch) for batch in batches] == [6] * (len(TEXTS) // 6) + [len(TEXTS) % 6]
    stock = model.encode(TEXTS, convert_to_sparse_tensor=False)
    assert torch.allclose(dense_of(batches), stock, atol=1e-5)


def test_max_active_dims(model, monkeypatch):
    stock = model.encode(TEXTS, convert_to_sparse_tensor=False)
    counts = (dense_of(encode_sparse(model, TEXTS, max_active_dims=4)) != 0).sum(dim=1)
    assert torch.equal(counts, (stock != 0).sum(dim=1).clamp(max=4))
    monkeypatch.setattr(model, "max_active_dims", 3)
    assert (dense_of(encode_sparse(model, TEXTS)) != 0).sum(dim=1).max() == 3
    assert (dense_of(encode_sparse(model, TEXTS, max_active_dims=5)) != 0).sum(dim=1).max() == 5


def test_nothing_to_encode(model):
    assert list(encode_sparse(model, [])) == []


def test_bad_arguments_are_named_at_the_call(model):
    with pytest.raises(ValueError, match="task: expected 'query', 'document' or None, got 'passage'"):
        encode_sparse(model, TEXTS, task="passage")
    with pytest.raises(TypeError, match="texts: expected a sequence of texts, got str"):
        encode_sparse(model, "one text")
    with pytest.raises(ValueError, match="max_active_dims: expected at least 1, got 0"):
        encode_sparse(model, ["a"], max_active_dims=0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        encode_sparse(model, TEXTS, batch_size=0)
    for wrong in ("3", None, 1.5):
        with pytest.raises(TypeError, match=f"batch_size: expected an int, got {type(wrong).__name__}"):
            encode_sparse(model, TEXTS, batch_size=wrong)
    with pytest.raises(ValueError, match=r"task: expected .*, got \['query'\]"):
        encode_sparse(model, TEXTS, task=["query"])
    with pytest.raises(TypeError, match="texts: expected a sequence of texts, got NoneType"):
        encode_sparse(model, None)
    with pytest.raises(TypeError, match="convert_to_tensor: expected it left out"):
        encode_sparse(model, TEXTS, convert_to_tensor=False)
