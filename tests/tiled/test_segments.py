"""Maxima, sums and weighted sums over consecutive rows, against loops over the segments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from splade_kernels.backends.tiled import segments

LENGTHS = [[3], [0, 5, 0], [8, 1, 9, 7], [600, 1, 0, 65, 64, 63], [0, 0, 2], [513, 512]]


def edges_of(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


@pytest.mark.parametrize("slack", [0, 1, 10**6], ids=["tight", "loose", "unknown"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_maximum_position_and_sum_are_those_of_a_loop(lengths, slack):
    """Whole numbers, so that sums are exact and maxima tie; some are NaN."""
    edges, rows = edges_of(lengths), sum(lengths)
    values = torch.randint(-3, 4, (rows, 50), generator=torch.Generator().manual_seed(rows)).float()
    values[::7, :10] = torch.nan
    values[:, 10:12] = -torch.inf
    found = segments.of_edges(edges, rows, max(lengths) + slack)
    largest, position = found.maximum(values, True)
    assert torch.equal(found.maximum(values, False)[0].nan_to_num(99.0), largest.nan_to_num(99.0))
    sums = found.sum(values)
    assert found.occupied.tolist() == [length > 0 for length in lengths]
    assert largest.shape == sums.shape == (len(lengths), 50)
    for number, (first, last) in enumerate(itertools.pairwise(edges.tolist())):
        part = values[first:last]
        assert torch.equal(sums[number].nan_to_num(99.0), part.sum(dim=0).nan_to_num(99.0))
        if first < last:
            assert torch.equal(largest[number].nan_to_num(99.0), part.amax(dim=0).nan_to_num(99.0))
            lowest = ((part == part.amax(dim=0)) | (part.isnan() & part.amax(dim=0).isnan())).int().argmax(dim=0)
            assert torch.equal(position[number].long(), lowest)
        else:
            assert (largest[number] == -torch.inf).all()


def test_uneven_lengths_do_not_fill_memory():
    """One long sequence among short ones: padding each to the longest would make 1000 times as many rows."""
    lengths = [4000] + [1] * 1000
    found = segments.of_edges(edges_of(lengths), sum(lengths), sum(lengths))
    assert found.rows <= sum(lengths) + segments.GROUP * len(lengths)


@pytest.mark.parametrize("block", [1, 10**9], ids=["blocks", "one block"])
@pytest.mark.parametrize("lengths", [*LENGTHS, [0, 0]], ids=str)
def test_bag_sum_is_that_of_embedding_bag(lengths, block, monkeypatch):
    monkeypatch.setattr(segments, "BAG_ELEMENTS", block)
    draw = torch.Generator().manual_seed(sum(lengths))
    table = torch.randint(-4, 5, (40, 6), generator=draw).float()
    index = torch.randint(0, 40, (sum(lengths),), generator=draw).int()
    weights = torch.randint(-4, 5, index.shape, generator=draw).float()
    offsets = edges_of(lengths)
    expected = F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
    assert torch.equal(segments.bag_sum(index, table, offsets, weights), expected)
