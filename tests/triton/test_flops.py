"""Kernels of the FLOPS statistics, through the interpreter or on a GPU."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

flops = pytest.importorskip("splade_kernels.backends.triton.flops")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One row; a tail of rows and of vocabulary entries; several partial sums and blocks of entries.
SHAPES = [(1, 1), (9, 400), (130, 700), (64, 256)]


def make_embeddings(rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows with growing numbers of non-zeros, the first one empty if there are several."""
    generator = torch.Generator().manual_seed(rows)
    values = torch.rand(rows, vocab_size, generator=generator)
    share = torch.linspace(0, 0.6, rows)[:, None] if rows > 1 else torch.ones(1, 1)
    kept = torch.rand(rows, vocab_size, generator=generator) < share
    return torch.where(kept, values, 0).to(dtype).to(DEVICE)


def expected_sums(embeddings: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    counts = (embeddings != 0).sum(dim=1)
    kept = torch.ones_like(counts, dtype=torch.bool) if threshold is None else counts > threshold
    return torch.where(kept[:, None], embeddings.double(), 0).sum(dim=0), kept


@pytest.mark.parametrize("threshold", [None, 0.0, 30.0, 30.5, 1e9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_in_double(shape, dtype, threshold):
    embeddings = make_embeddings(*shape, dtype)
    exact, rows = expected_sums(embeddings, threshold)
    sums, kept = flops.flops_sums(embeddings, threshold)
    assert sums.dtype == torch.float32
    assert sums.shape == exact.shape
    assert ((sums - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact).all()
    assert kept.dtype == torch.bool
    assert torch.equal(kept, rows) if threshold is not None else kept.numel() == 0


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf, -1.0, -0.5, 3 - 1e-12, 3.0, 3 + 1e-12])
def test_the_threshold_is_compared_exactly(threshold):
    embeddings = torch.zeros(5, 4, device=DEVICE)
    for row in range(5):
        embeddings[row, :row] = -1.0
    embeddings[0, 0] = -0.0
    sums, kept = flops.flops_sums(embeddings, threshold)
    assert kept.tolist() == [count > threshold for count in range(5)]
    assert torch.equal(sums, embeddings[kept].sum(dim=0))


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_dropped_rows_are_skipped_and_nan_counts_as_a_non_zero(poison):
    embeddings = make_embeddings(20, 300)
    embeddings[7] = 0
    embeddings[7, 5:9] = poison
    exact, _ = expected_sums(embeddings, 4)
    dropped, kept = flops.flops_sums(embeddings, 4.0)
    assert not kept[7]
    assert dropped.isfinite().all()
    assert torch.allclose(dropped.double(), exact, rtol=1e-6, atol=0)
    sums, kept = flops.flops_sums(embeddings, 3.0)
    assert kept[7]
    assert (~sums.isfinite()).nonzero().flatten().tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("threshold", [None, 30.0])
def test_any_strides(threshold):
    """A GPU adds in another order where another kernel is compiled for the strides."""
    embeddings = make_embeddings(70, 300)
    wide = torch.full((301, 211), math.nan, device=DEVICE)
    for strided in (wide[1:, 1::3].t().copy_(embeddings), embeddings[-1:].expand(70, -1)):
        exact, rows = expected_sums(strided, threshold)
        sums, kept = flops.flops_sums(strided, threshold)
        assert ((sums - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact).all()
        assert torch.equal(kept, rows) if threshold is not None else kept.numel() == 0


@pytest.mark.parametrize("threshold", [None, 1.0])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty_inputs(shape, threshold):
    sums, kept = flops.flops_sums(torch.zeros(shape, device=DEVICE), threshold)
    assert torch.equal(sums, torch.zeros(shape[1], device=DEVICE))
    assert kept.shape == (0 if threshold is None else shape[0],)
    assert not kept.any()


def test_bitwise_repeatable():
    embeddings = make_embeddings(200, 300)
    first, second = (flops.flops_sums(embeddings, 30.0) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
