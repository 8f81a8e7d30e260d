"""Options of the operators: one schema, one table of poolings a backend, one of activations; the rest is refused."""

from __future__ import annotations

import pytest
import torch

import splade_kernels as sk
from splade_kernels import ops
from splade_kernels.backends.pooling import (
    ACTIVATION_FUNCTIONS,
    POOLING_STRATEGIES,
    activate,
    activation_gradient,
    not_at_most,
)
from splade_kernels.backends.selection import select
from tests import oracle
from tests.oracle import make_case


def test_the_schema_is_made_of_the_options():
    """Names and types that ``torch.ops`` is called with elsewhere, by position and by keyword."""
    tensors = "Tensor hidden_states, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? cu_seqlens"
    options = (
        "SymInt max_seqlen, str pooling_strategy, str activation_function, "
        "ScalarType compute_dtype, ScalarType out_dtype, str screening, str backend, "
        "float logit_scale, float logit_softcap"
    )
    assert str(ops.pool_forward._schema) == (
        f"splade_kernels::pool_forward({tensors}, {options}, bool need_argmax) -> (Tensor, Tensor)"
    )
    assert str(ops.pool_backward._schema) == (
        f"splade_kernels::pool_backward(Tensor grad, Tensor output, Tensor argmax, {tensors}, {options}, "
        "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
    )
    assert [argument.name for argument in ops.pool_forward._schema.arguments[5:-1]] == list(ops.PoolOptions._fields)


UNKNOWN = [
    ("pooling_strategy", "mean", "expected one of 'max', 'sum', got 'mean'"),
    ("activation_function", "gelu", "expected one of 'relu', .*'log1p_relu'.*, got 'gelu'"),
]


@pytest.mark.parametrize(("name", "value", "message"), UNKNOWN, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 4, 5)], ids=str)
def test_the_operators_compute_nothing_for_an_unknown_option(name, value, message, shape, backend):
    case = make_case(shape)
    tensors = (*(tensor.detach() for tensor in case.parameters()), case.mask, None)
    options = oracle.pool_options(max_seqlen=3, backend=backend, **{name: value})
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        torch.ops.splade_kernels.pool_forward(*tensors, *options, need_argmax=True)
    argmax = torch.zeros(shape[0], 5, dtype=torch.int16)
    for needs in ((True, True, True), (False, False, True)):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            torch.ops.splade_kernels.pool_backward(case.grad, case.grad, argmax, *tensors, *options, *needs)


def test_every_backend_has_every_pooling_strategy():
    for name in ("torch", "triton"):
        if sk.available_backends()[name] == "available":
            found = select(name, torch.device("cpu"), torch.float32).POOLINGS
            assert tuple(found) == POOLING_STRATEGIES


def test_activation_functions_are_zero_up_to_zero_and_increase():
    """What the maximum over raw dots, the sparse backward and screening rest on."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    for name, logs in ACTIVATION_FUNCTIONS.items():
        call = oracle.new_call(activation_function=name, compute_dtype=torch.float64)
        y = activate(x.clone(), call)
        assert call.logs == logs
        assert bool((y[x <= 0] == 0).all())
        assert bool((y[x > 0].diff() > 0).all())
        dense = x.clone().requires_grad_()
        reference = sk.reference._activate(dense, None, name)
        assert torch.equal(reference.detach(), y)
        (slope,) = torch.autograd.grad(reference.sum(), dense)
        assert torch.allclose(activation_gradient(torch.ones_like(y), y, call), slope, rtol=1e-14, atol=0)


def test_nan_is_not_at_most_anything():
    x = torch.tensor([-1.0, 0.0, 1.0, torch.nan, -torch.inf, torch.inf])
    assert not_at_most(x, 0).tolist() == [False, False, True, True, False, True]
    assert not_at_most(x, torch.tensor(torch.nan)).all()
