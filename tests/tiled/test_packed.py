"""Packed rows on a CPU: what else is in a batch does not show in the bits of a sequence."""

from __future__ import annotations

import pytest
import torch

import splade_kernels as sk
from tests.oracle import make_case


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_a_short_sequence_has_the_bits_alone_that_it_has_in_a_batch(pooling):
    """A BLAS takes other routines for few rows, so fewer than ``MIN_ROWS`` are padded to as many."""
    case = make_case((24, 15, 64, 300), seed=3)
    lengths = torch.arange(24) % 15 + 1
    case.mask = torch.arange(15) < lengths[:, None]
    arguments = case.weight.detach(), case.bias.detach()
    options = {"pooling_strategy": pooling, "backend": "torch", "screening": False}
    together = sk.splade_pool(case.hidden.detach(), *arguments, case.mask, **options)
    for b in range(24):
        alone = sk.splade_pool(case.hidden.detach()[b : b + 1], *arguments, case.mask[b : b + 1], **options)
        assert torch.equal(alone[0], together[b]), int(lengths[b])
