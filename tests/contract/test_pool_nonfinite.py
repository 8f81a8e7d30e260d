"""NaN and infinities: from real tokens they reach their row, from padding they reach nothing."""

from __future__ import annotations

import math

import pytest
import torch

import splade_kernels as sk
from tests import oracle
from tests.oracle import make_case

POISONS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_never_leaks(poison, pooling, dtype, backend):
    case = make_case((4, 40, 8, 30), dtype, pattern="holes")
    clean = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, pooling_strategy=pooling, backend=backend)
    clean_gradients = torch.autograd.grad(clean, case.parameters(), case.grad)
    hidden = torch.where(case.mask[..., None], case.hidden.detach(), poison).requires_grad_()
    output = sk.splade_pool(hidden, case.weight, case.bias, case.mask, pooling_strategy=pooling, backend=backend)
    gradients = torch.autograd.grad(output, (hidden, case.weight, case.bias), case.grad)
    assert torch.equal(output, clean)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, clean_gradients, strict=True))


@pytest.mark.parametrize("position", [0, 17, 39])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_nan_in_one_real_token_reaches_its_sequence_and_no_other(position, pooling, backend):
    case = make_case((3, 40, 8, 30), pattern="full")
    with torch.no_grad():
        case.hidden[1, position, 3] = math.nan
    output = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, pooling_strategy=pooling, backend=backend)
    assert output[1].isnan().all()
    assert not output[[0, 2]].isnan().any()
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(output, case.parameters(), torch.ones_like(output))
    assert grad_hidden[1, position].isnan().all()
    assert not grad_hidden[[0, 2]].isnan().any()
    if pooling == "max":
        others = [token for token in range(40) if token != position]
        assert not grad_hidden[1, others].isnan().any()
    assert grad_weight[:, 3].isnan().all()
    assert grad_bias.isnan().all()


def test_the_first_of_several_nan_tokens_is_chosen(backend):
    case = make_case((1, 40, 8, 30), pattern="full")
    with torch.no_grad():
        case.hidden[0, [13, 14, 30]] = math.nan
    _, argmax = oracle.forward_with_argmax(case, backend)
    assert bool((argmax == 13).all())


def test_positive_infinity_gives_infinity_and_no_gradient(backend):
    """``log1p`` is flat at infinity: g = exp(-inf) = 0, and entries with g = 0 are dropped, not multiplied."""
    hidden = torch.ones(2, 3, 2)
    hidden[0, 1, 0] = math.inf
    weight = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [2.0, 1.0]], requires_grad=True)
    hidden.requires_grad_()
    output = sk.splade_pool(hidden, weight, backend=backend)
    assert output[0].tolist() == [math.inf, 0.0, math.inf]
    grad_hidden, grad_weight = torch.autograd.grad(output.sum(), (hidden, weight))
    assert grad_hidden.isfinite().all()
    assert grad_weight.isfinite().all()
    assert (grad_hidden[0] == 0).all()


def test_a_row_of_only_minus_infinity_is_inactive(backend):
    hidden = torch.full((1, 20, 1), 1.0, requires_grad=True)
    weight = torch.tensor([[-math.inf], [1.0]], requires_grad=True)
    output = sk.splade_pool(hidden, weight, backend=backend)
    assert output[0, 0] == 0
    grad_hidden, grad_weight = torch.autograd.grad(output.sum(), (hidden, weight))
    assert grad_hidden.isfinite().all()
    assert grad_weight.tolist()[0] == [0.0]


def test_nan_in_the_bias_reaches_every_occupied_row(backend):
    case = make_case((4, 6, 8, 5), pattern="empty")
    with torch.no_grad():
        case.bias[2] = math.nan
    output = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, backend=backend)
    occupied = case.mask.any(dim=1)
    assert output[occupied, 2].isnan().all()
    assert (output[~occupied] == 0).all()
    assert not output[:, [0, 1, 3, 4]].isnan().any()


def test_nan_gradient_of_an_inactive_entry_is_dropped_and_of_an_active_one_arrives(backend):
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    output = sk.splade_pool(hidden, weight, backend=backend)
    dropped = torch.autograd.grad(output, (hidden, weight), torch.tensor([[1.0, math.nan]]), retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in dropped)
    arrived = torch.autograd.grad(output, (hidden, weight), torch.tensor([[math.nan, 1.0]]))
    assert arrived[0][0, 0].isnan().all()
    assert arrived[1][0].isnan().all()
    assert arrived[1][1] == 0
