"""SpladeHead: nn.Linear's parameters under another forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import parametrizations, prune

import splade_kernels as sk


def test_from_linear_shares_the_parameters_themselves(backend):
    decoder = torch.nn.Linear(8, 30)
    head = sk.SpladeHead.from_linear(decoder, backend=backend, activation_function="log1p_relu")
    assert head.weight is decoder.weight
    assert head.bias is decoder.bias
    hidden, mask = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.long)
    expected = sk.reference.splade_pool(hidden, decoder.weight, decoder.bias, mask, activation_function="log1p_relu")
    assert torch.allclose(head(hidden, mask), expected, atol=1e-6)
    head(hidden, mask).sum().backward()
    assert decoder.weight.grad is not None


def test_from_linear_without_bias_and_frozen():
    decoder = torch.nn.Linear(8, 30, bias=False).requires_grad_(False).eval()
    head = sk.SpladeHead.from_linear(decoder)
    assert head.bias is None
    assert not head.training
    assert not head.weight.requires_grad


class Scaled(torch.nn.Linear):
    def forward(self, input):
        return super().forward(input) / 8


def hooked(decoder):
    decoder.register_forward_hook(lambda module, inputs, output: output / 8)
    return decoder


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.nn.Embedding(3, 4), TypeError, "expected exactly torch.nn.Linear, got torch.nn.*Embedding"),
        (lambda: Scaled(3, 4), TypeError, "expected exactly torch.nn.Linear, got tests.contract.test_modules.Scaled"),
        (lambda: torch.nn.LazyLinear(4), TypeError, "got torch.nn.*LazyLinear"),
        (lambda: parametrizations.weight_norm(torch.nn.Linear(3, 4)), TypeError, "got .*ParametrizedLinear"),
        (lambda: hooked(torch.nn.Linear(3, 4)), ValueError, r"without hooks, got tests\..*test_modules\.hooked"),
        (lambda: prune.l1_unstructured(torch.nn.Linear(3, 4), "weight", 1), ValueError, "without hooks"),
    ],
    ids=["embedding", "subclass", "lazy", "parametrized", "hook", "pruned"],
)
def test_from_linear_refuses_what_computes_more_than_weight_and_bias(make, error, message):
    with pytest.raises(error, match=f"decoder: .*{message}"):
        sk.SpladeHead.from_linear(make())


def test_meta_tensors_have_shapes():
    head = sk.SpladeHead(8, 40, device="meta")
    output = head(torch.empty(2, 5, 8, device="meta"), torch.ones(2, 5, device="meta", dtype=torch.bool))
    assert (output.device.type, output.shape, output.dtype) == ("meta", (2, 40), torch.float32)


def test_initialises_and_saves_as_linear():
    torch.manual_seed(5)
    linear = torch.nn.Linear(6, 20)
    torch.manual_seed(5)
    head = sk.SpladeHead(6, 20)
    assert torch.equal(head.weight, linear.weight)
    assert torch.equal(head.bias, linear.bias)
    assert head.state_dict().keys() == linear.state_dict().keys()
    head.load_state_dict(linear.state_dict())
    assert sk.SpladeHead(6, 20, False, dtype=torch.bfloat16, device="meta").weight.dtype == torch.bfloat16


def test_packed_options_and_copies():
    head = sk.SpladeHead(4, 9, pooling_strategy="sum", screening=False)
    hidden = torch.randn(7, 4)
    cu_seqlens = torch.tensor([0, 3, 7])
    expected = sk.reference.splade_pool(hidden, head.weight, head.bias, cu_seqlens=cu_seqlens, pooling_strategy="sum")
    assert torch.allclose(head(hidden, cu_seqlens=cu_seqlens, max_seqlen=4), expected, atol=1e-6)
    twin = copy.deepcopy(head)
    assert twin.weight is not head.weight
    assert torch.equal(twin(hidden, cu_seqlens=cu_seqlens), head(hidden, cu_seqlens=cu_seqlens))
    assert "hidden_size=4, vocab_size=9, bias=True, pooling_strategy='sum'" in repr(head)
    assert "screening=False, backend='auto'" in repr(head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling_strategy": "mean"}, "pooling_strategy: expected one of 'max', 'sum', got 'mean'"),
        ({"activation_function": "gelu"}, "activation_function: expected one of 'relu', .*'log1p_relu'.*, got 'gelu'"),
        ({"screening": "on"}, "screening: expected 'auto', True or False, got 'on'"),
        ({"screening": True, "pooling_strategy": "sum"}, "screening: expected 'auto' or False with pooling_strategy"),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'torch', 'triton', got 'cuda'"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        sk.SpladeHead(4, 9, **options)


def test_compiles_as_a_module():
    head = sk.SpladeHead(4, 9)
    hidden = torch.randn(2, 3, 4)
    assert torch.equal(torch.compile(head, fullgraph=True)(hidden), head(hidden))
