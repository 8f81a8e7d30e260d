"""sparsify: exact CSR, all non-zeros or each row's largest."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

import splade_kernels as sk
from tests.contract.test_flops import make_embeddings


def dense_of_largest(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """Row by row with Python's sort: by value descending (NaN first), then by vocabulary id."""
    result = torch.zeros_like(embeddings)
    for row, values in enumerate(embeddings.tolist()):
        ranked = sorted(range(len(values)), key=lambda i: (-math.inf if math.isnan(values[i]) else -values[i], i))
        nan_first = sorted(ranked, key=lambda i: not math.isnan(values[i]))
        kept = nan_first[:count]
        result[row, kept] = embeddings[row, kept]
    return result


def assert_same_csr(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.layout == torch.sparse_csr
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    assert torch.equal(ours.crow_indices(), expected.crow_indices())
    assert torch.equal(ours.col_indices(), expected.col_indices())
    assert torch.equal(ours.values().nan_to_num(-7), expected.values().nan_to_num(-7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_all_non_zeros(dtype):
    embeddings = make_embeddings(20, 700, dtype)
    expected = embeddings.to_sparse_csr()
    assert expected.values().numel() > 0
    assert_same_csr(sk.sparsify(embeddings), expected)
    assert_same_csr(sk.reference.sparsify(embeddings), expected)
    assert torch.equal(sk.sparsify(embeddings).to_dense(), embeddings)


@pytest.mark.parametrize("count", [1, 7, 60, 699, 700, 5000])
@pytest.mark.parametrize("implementation", [sk.sparsify, sk.reference.sparsify], ids=["fused", "reference"])
def test_the_largest_of_each_row(implementation, count):
    embeddings = make_embeddings(20, 700)
    embeddings = (embeddings * 8).round() / 8  # many ties
    assert_same_csr(
        implementation(embeddings, max_active_dims=count), dense_of_largest(embeddings, count).to_sparse_csr()
    )


@pytest.mark.parametrize("implementation", [sk.sparsify, sk.reference.sparsify], ids=["fused", "reference"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_nan_infinity_and_negative_values(implementation, count):
    embeddings = torch.tensor([[0.0, -1.0, math.nan, math.inf, 2.0], [-3.0, -2.0, -math.inf, -2.0, -5.0]])
    expected = dense_of_largest(embeddings, count)
    assert_same_csr(implementation(embeddings, max_active_dims=count), expected.to_sparse_csr())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 4)])
def test_empty(shape):
    sparse = sk.sparsify(torch.zeros(shape))
    assert sparse.shape == shape
    assert sparse.values().numel() == 0


def test_any_strides_and_detached():
    embeddings = make_embeddings(10, 90)
    assert_same_csr(sk.sparsify(embeddings.t().contiguous().t()), embeddings.to_sparse_csr())
    assert_same_csr(sk.sparsify(embeddings[:, ::3]), embeddings[:, ::3].contiguous().to_sparse_csr())
    assert not sk.sparsify(embeddings.requires_grad_()).requires_grad


def test_the_result_is_where_the_embeddings_are():
    embeddings = make_embeddings(3, 20)
    with torch.device("meta"):
        ours = sk.sparsify(embeddings)
    assert_same_csr(ours, embeddings.to_sparse_csr())


@pytest.mark.parametrize("count", [numpy.int64(2), 2**70], ids=["NumPy's", "huge"])
def test_counts_of_any_kind_and_size(count):
    embeddings = make_embeddings(3, 20)
    expected = sk.reference.sparsify(embeddings, max_active_dims=int(min(count, 20)))
    assert_same_csr(sk.sparsify(embeddings, max_active_dims=count), expected)


@pytest.mark.parametrize(
    ("error", "message", "embeddings", "count"),
    [
        (TypeError, "embeddings: expected a tensor", [[1.0]], None),
        (ValueError, r"embeddings: expected shape \[B, V\], got \[2, 3, 4\]", torch.zeros(2, 3, 4), None),
        (TypeError, "max_active_dims: expected an int or None, got float", torch.zeros(2, 3), 2.0),
        (TypeError, "max_active_dims: expected an int or None, got bool", torch.zeros(2, 3), True),
        (ValueError, "max_active_dims: expected at least 1, got 0", torch.zeros(2, 3), 0),
    ],
)
def test_bad_input_is_named(error, message, embeddings, count):
    with pytest.raises(error, match=message):
        sk.sparsify(embeddings, max_active_dims=count)
