"""Joining, searching and handing over sparse CSR embeddings, against dense float64."""

from __future__ import annotations

import math
import re
import sys

import numpy
import pytest
import torch
from torch import Tensor

from splade_kernels import csr


def sparse(rows: int, width: int, dtype: torch.dtype = torch.float32, *, active: float = 0.2, seed: int = 0) -> Tensor:
    """Whole numbers, so that every sum is exact and many scores are equal; some rows are empty."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(1, 4, (rows, width), generator=generator) * (
        torch.rand(rows, width, generator=generator) < active
    )
    dense[::5] = 0
    return dense.to(dtype).to_sparse_csr()


def ranked(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Row by row with Python's sort: NaN first, then by score descending, then by id."""
    order = [
        sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), 0 if math.isnan(row[i]) else -row[i], i))[:k]
        for row in scores.tolist()
    ]
    ids = torch.tensor(order, dtype=torch.int64).reshape(len(scores), min(k, scores.shape[1]))
    return scores.gather(1, ids), ids


def assert_found(found: tuple[Tensor, Tensor], scores: Tensor, k: int, dtype: torch.dtype = torch.float32) -> None:
    expected, ids = ranked(scores, k)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.int64
    assert torch.equal(found[1], ids)
    assert torch.equal(found[0].double().nan_to_num(-7), expected.double().nan_to_num(-7))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(csr, "QUERIES", 4)
    monkeypatch.setattr(csr, "DOCUMENTS", 16)


# join


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_join(dtype):
    parts = [sparse(rows, 30, dtype, seed=rows) for rows in (7, 0, 1, 12)]
    joined = csr.join(iter(parts))
    assert joined.layout == torch.sparse_csr
    assert joined.dtype == dtype
    assert joined.crow_indices().dtype == joined.col_indices().dtype == torch.int64
    dense = torch.cat([part.to_dense() for part in parts])
    assert torch.equal(joined.to_dense(), dense)
    expected = dense.to_sparse_csr()
    assert torch.equal(joined.crow_indices(), expected.crow_indices())
    assert torch.equal(joined.col_indices(), expected.col_indices())


def test_join_of_one_batch_is_a_copy_with_int64_indices():
    one = sparse(6, 9)
    one = torch.sparse_csr_tensor(one.crow_indices().int(), one.col_indices().int(), one.values(), size=one.shape)
    joined = csr.join([one])
    assert joined.crow_indices().dtype == joined.col_indices().dtype == torch.int64
    joined.values().zero_()
    assert one.values().any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 4)])
def test_join_of_nothing_stored(shape):
    joined = csr.join([torch.zeros(shape).to_sparse_csr()] * 2)
    assert joined.shape == (2 * shape[0], shape[1])
    assert joined.values().numel() == 0


def test_more_non_zeros_than_int32_counts():
    most = 2**31 - 1
    crow = csr._join_crow([torch.tensor([0, most], dtype=torch.int32)] * 3, [most] * 3)
    assert crow.tolist() == [0, most, 2 * most, 3 * most]


def test_join_is_detached():
    assert not csr.join([sparse(4, 6).requires_grad_()]).requires_grad


def test_join_refuses_a_wrong_batch_before_it_asks_for_the_next():
    def batches():
        yield sparse(2, 5)
        yield sparse(2, 6)
        raise AssertionError("asked for more")

    with pytest.raises(ValueError, match=re.escape("batches[1]: expected width 5 like batches[0], got 6")):
        csr.join(batches())


@pytest.mark.parametrize(
    ("error", "message", "batches"),
    [
        (ValueError, "batches: expected at least one batch, which says how wide the result is, got none", []),
        (TypeError, "batches: expected an iterable of sparse CSR tensors, got Tensor", sparse(2, 5)),
        (TypeError, "batches: expected an iterable of sparse CSR tensors, got int", 3),
        (TypeError, "batches[0]: expected a tensor, got list", [[1.0]]),
        (
            TypeError,
            "batches[1]: expected sparse CSR, got layout torch.sparse_coo: .to_sparse_csr() converts it",
            [sparse(2, 5), sparse(2, 5).to_sparse_coo()],
        ),
        (TypeError, "batches[0]: expected sparse CSR, got layout torch.strided", [torch.zeros(2, 5)]),
        (
            TypeError,
            "batches[0]: expected sparse CSR, got layout torch.sparse_bsr",
            [torch.ones(2, 4).to_sparse_bsr(2)],
        ),
        (ValueError, "batches[0]: expected 2 dimensions, got 3", [torch.ones(2, 3, 4).to_sparse_csr()]),
        (TypeError, "batches[0]: expected one of torch.float32, ", [sparse(2, 5, torch.int64)]),
        (
            TypeError,
            "batches[1]: expected dtype torch.float32 like batches[0], got torch.float64",
            [sparse(2, 5), sparse(2, 5, torch.float64)],
        ),
        (
            ValueError,
            "batches[1]: expected device cpu like batches[0], got meta",
            [sparse(2, 5), sparse(2, 5).to("meta")],
        ),
    ],
)
def test_join_names_what_is_wrong(error, message, batches):
    with pytest.raises(error, match=re.escape(message)):
        csr.join(batches)


# search


@pytest.mark.parametrize("k", [1, 3, 50, 63, 64, 65, 2**70])
@pytest.mark.parametrize("queries", [0, 1, 4, 9])
def test_search_in_blocks(small_blocks, queries, k):
    documents, asked = sparse(64, 40), sparse(queries, 40, seed=1)
    scores = asked.to_dense() @ documents.to_dense().t()
    assert_found(csr.search(asked, documents, k), scores, k)
    assert_found(csr.search(asked.to_dense(), documents, k), scores, k)


@pytest.mark.parametrize("sizes", [[1] * 64, [64], [15, 1, 16, 0, 17, 15], [0, 0, 33, 31, 0], [5] * 12 + [4]])
def test_documents_may_come_in_any_batches(small_blocks, sizes):
    documents, queries = sparse(64, 40), sparse(9, 40, seed=1)
    batches = (part.to_sparse_csr() for part in documents.to_dense().split(sizes))
    assert_found(csr.search(queries, batches, 7), queries.to_dense() @ documents.to_dense().t(), 7)


def test_nothing_larger_than_a_block_is_dense(small_blocks, monkeypatch):
    sizes, embedding_bag = [], torch.nn.functional.embedding_bag

    def watch(col, dense, crow, **options):
        sizes.append((dense.shape[1], len(crow) - 1))
        return embedding_bag(col, dense, crow, **options)

    monkeypatch.setattr(torch.nn.functional, "embedding_bag", watch)
    csr.search(sparse(9, 40), (sparse(rows, 40) for rows in (7, 9, 40, 5)), 3)
    assert sizes == [(q, n) for n in (16, 16, 16, 13) for q in (4, 4, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_search_in_every_dtype(dtype):
    """Against float64 products of the same values. 16-bit ones are multiplied in float32."""
    generator = torch.Generator().manual_seed(0)
    documents = (sparse(300, 200).to_dense() * torch.rand(300, 200, generator=generator)).to(dtype).to_sparse_csr()
    queries = (sparse(70, 200, seed=1).to_dense() * torch.rand(70, 200, generator=generator)).to(dtype).to_sparse_csr()
    exact = queries.to_dense().double() @ documents.to_dense().double().t()
    scores, ids = csr.search(queries, documents, 20)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    assert torch.allclose(scores.double(), exact.gather(1, ids), rtol=tolerance, atol=0)
    assert torch.allclose(scores.double(), exact.topk(20).values, rtol=tolerance, atol=0)
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("wide", ["queries", "documents"])
@pytest.mark.parametrize("count", [0, 5])
def test_float64_on_either_side(wide, count):
    queries, documents = sparse(count, 20), sparse(6, 20, seed=1)
    queries = queries.double() if wide == "queries" else queries
    documents = documents.double() if wide == "documents" else documents
    scores = queries.to_dense().double() @ documents.to_dense().double().t()
    assert_found(csr.search(queries, documents, 4), scores, 4, torch.float64)


def test_the_same_bits_from_run_to_run_wherever_the_values_lie():
    generator = torch.Generator().manual_seed(0)
    documents = (sparse(500, 300).to_dense() * torch.rand(500, 300, generator=generator)).to_sparse_csr()
    queries = (sparse(80, 300, seed=1).to_dense() * torch.rand(80, 300, generator=generator)).to_sparse_csr()
    first = csr.search(queries, documents, 100)
    for offset in range(5):
        values = torch.cat([torch.zeros(offset), documents.values()])[offset:]  # another alignment
        moved = torch.sparse_csr_tensor(documents.crow_indices(), documents.col_indices(), values, size=documents.shape)
        again = csr.search(queries, moved, 100)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("block", [2, 3, 100])
def test_nan_and_infinity(monkeypatch, k, block):
    monkeypatch.setattr(csr, "DOCUMENTS", block)
    documents = torch.tensor(
        [[1.0, 0, 0], [math.nan, 0, 0], [math.inf, 0, 0], [0, 1, 0], [-math.inf, 0, 0], [math.nan, 1, 0]]
    )
    queries = torch.tensor([[1.0, 0, 0], [1, 1, 0], [-1, 0, 0], [0, 0, 1], [0, math.nan, 0], [0, 0, math.nan]])
    scores = queries @ documents.t()
    # A term that a document lacks is not stored, and so not multiplied by the query's NaN.
    scores[4] = torch.tensor([0, math.nan, math.nan, math.nan, math.nan, math.nan])
    scores[5] = torch.tensor([0, math.nan, math.nan, 0, math.nan, math.nan])
    assert_found(csr.search(queries.to_sparse_csr(), documents.to_sparse_csr(), k), scores, k)
    assert_found(csr.search(queries, documents.to_sparse_csr(), k), scores, k)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("queries", [0, 3])
@pytest.mark.parametrize("width", [0, 5])
def test_search_with_nothing_stored(rows, queries, width):
    found = csr.search(torch.zeros(queries, width).to_sparse_csr(), torch.zeros(rows, width).to_sparse_csr(), 4)
    assert_found(found, torch.zeros(queries, rows), 4)
    assert found[0].shape == found[1].shape == (queries, min(rows, 4))


def test_search_in_no_batches():
    scores, ids = csr.search(sparse(3, 5), [], 4)
    assert scores.shape == ids.shape == (3, 0)


def test_indices_of_32_bits_and_gradients():
    documents, queries = sparse(30, 20), sparse(5, 20, seed=1)
    scores = queries.to_dense() @ documents.to_dense().t()

    def narrow(tensor):
        indices = tensor.crow_indices().int(), tensor.col_indices().int()
        return torch.sparse_csr_tensor(*indices, tensor.values(), size=tensor.shape).requires_grad_()

    found = csr.search(narrow(queries), [narrow(documents), documents.clone().requires_grad_()], 60)
    assert_found(found, torch.cat([scores, scores], dim=1), 60)
    assert not found[0].requires_grad
    assert not csr.search(queries.to_dense().requires_grad_(), documents, 3)[0].requires_grad


@pytest.mark.parametrize(
    ("error", "message", "queries", "documents", "k"),
    [
        (TypeError, "k: expected an int, got float", sparse(2, 5), sparse(3, 5), 2.0),
        (ValueError, "k: expected at least 1, got 0", sparse(2, 5), sparse(3, 5), 0),
        (TypeError, "queries: expected sparse CSR or dense, got layout", sparse(2, 5).to_sparse_coo(), sparse(3, 5), 1),
        (TypeError, "queries: expected one of torch.float32, ", torch.ones(2, 5, dtype=torch.int32), sparse(3, 5), 1),
        (ValueError, "queries: expected 2 dimensions, got 1", torch.ones(5), sparse(3, 5), 1),
        (TypeError, "documents: expected sparse CSR, got layout torch.strided", sparse(2, 5), torch.ones(3, 5), 1),
        (TypeError, "documents[0]: expected sparse CSR, got", sparse(2, 5), [torch.ones(3, 5)], 1),
        (ValueError, "documents: expected width 5 like queries, got 6", sparse(2, 5), sparse(3, 6), 1),
        (ValueError, "documents: expected on cpu like queries, got meta", sparse(2, 5), sparse(3, 5).to("meta"), 1),
        (ValueError, "documents[1]: expected width 5 like documents[0]", sparse(2, 5), [sparse(3, 5), sparse(3, 6)], 1),
        (TypeError, "documents: expected an iterable of sparse CSR tensors, got int", sparse(2, 5), 7, 1),
    ],
)
def test_search_names_what_is_wrong(error, message, queries, documents, k):
    with pytest.raises(error, match=re.escape(message)):
        csr.search(queries, documents, k)


# to_scipy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_to_scipy_shares_memory(dtype, index):
    ours = sparse(20, 30, dtype)
    ours = torch.sparse_csr_tensor(
        ours.crow_indices().to(index), ours.col_indices().to(index), ours.values(), size=ours.shape
    )
    array = csr.to_scipy(ours)
    assert type(array).__name__ == "csr_array"
    array.check_format(full_check=True)
    assert array.shape == ours.shape
    for theirs, tensor in (
        (array.data, ours.values()),
        (array.indices, ours.col_indices()),
        (array.indptr, ours.crow_indices()),
    ):
        assert numpy.shares_memory(theirs, tensor.numpy())
    assert numpy.array_equal(array.toarray(), ours.to_dense().numpy())
    assert numpy.array_equal(array[3:7].toarray(), ours.to_dense()[3:7].numpy())
    assert numpy.array_equal((array @ array.T).toarray(), (ours.to_dense() @ ours.to_dense().t()).numpy())


def test_to_scipy_without_entries_or_with_gradients():
    assert csr.to_scipy(torch.zeros(0, 3).to_sparse_csr()).shape == (0, 3)
    assert csr.to_scipy(torch.zeros(3, 0).to_sparse_csr()).nnz == 0
    assert csr.to_scipy(sparse(4, 6).requires_grad_()).nnz > 0


@pytest.mark.parametrize(
    ("error", "message", "embeddings"),
    [
        (
            TypeError,
            "embeddings: expected one of torch.float32, torch.float64, got torch.b",
            sparse(2, 3, torch.bfloat16),
        ),
        (
            TypeError,
            "embeddings: expected one of torch.float32, torch.float64, got torch.f",
            sparse(2, 3, torch.float16),
        ),
        (TypeError, "embeddings: expected sparse CSR, got layout torch.sparse_coo", sparse(2, 3).to_sparse_coo()),
        (ValueError, "embeddings: expected on the CPU, got meta", sparse(2, 3).to("meta")),
    ],
)
def test_to_scipy_names_what_is_wrong(error, message, embeddings):
    with pytest.raises(error, match=re.escape(message)):
        csr.to_scipy(embeddings)


def test_to_scipy_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match="to_scipy needs SciPy: pip install scipy"):
        csr.to_scipy(sparse(2, 3))


def test_many_small_batches_are_each_looked_at_once(monkeypatch):
    """The rows that wait for a block to fill up are counted as they come, not again for each batch."""
    asked = []
    length = torch.Tensor.__len__
    monkeypatch.setattr(torch.Tensor, "__len__", lambda tensor: asked.append(1) or length(tensor))

    def asked_for(batches: int) -> int:
        asked.clear()
        csr.search(torch.ones(1, 4), (torch.eye(1, 4).to_sparse_csr() for _ in range(batches)), 1)
        return len(asked)

    assert asked_for(80) <= 8 * asked_for(10) + 8
