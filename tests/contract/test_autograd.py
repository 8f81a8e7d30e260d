"""The wiring: gradcheck, opcheck, torch.compile, autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

import splade_kernels as sk
from splade_kernels import ops
from tests import oracle
from tests.oracle import ACTIVATIONS, make_case

OPTIONS = [(p, a) for p in ("max", "sum") for a in ACTIVATIONS]


@pytest.mark.parametrize(("pooling", "activation"), OPTIONS)
def test_gradcheck(pooling, activation, backend):
    if backend == "triton":
        pytest.skip("numerical differentiation needs float64, which Triton's kernels do not compute")
    case = make_case((3, 5, 4, 7), torch.float64, pattern="empty")
    # Repeatable on every backend: what gradcheck runs twice must agree to the bit.
    assert torch.autograd.gradcheck(
        lambda h, w, c: sk.splade_pool(
            h, w, c, case.mask, pooling_strategy=pooling, activation_function=activation, backend=backend
        ),
        case.parameters(),
        nondet_tol=0.0,
    )


@pytest.mark.parametrize("threshold", [None, 3])
def test_gradcheck_of_flops(threshold):
    embeddings = torch.rand(4, 6, dtype=torch.float64)
    embeddings[0, 2:] = 0
    zeros = embeddings == 0
    embeddings.requires_grad_()

    def loss(y: torch.Tensor) -> torch.Tensor:
        # Numerical differentiation moves the zeros of the first row, and with them the count of its non-zeros.
        return sk.flops_loss(torch.where(zeros, 0, y), threshold=threshold)

    assert torch.autograd.gradcheck(loss, embeddings, nondet_tol=0.0)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("pooling", "activation"), [pytest.param(*o, marks=[pytest.mark.slow] * ("relu" not in o)) for o in OPTIONS]
)
def test_opcheck(pooling, activation, packed, backend):
    dtype = torch.bfloat16
    case = make_case((3, 20, 8, 33), dtype, pattern="ragged")
    hidden, mask, cu_seqlens = case.hidden.detach(), case.mask, None
    if packed:
        hidden, cu_seqlens = case.packed()
        mask = None
    tensors = (hidden, case.weight.detach(), case.bias.detach(), mask, cu_seqlens)
    options = ops.PoolOptions(20, pooling, activation, dtype, dtype, "off", backend)
    for need_argmax in (True, False):
        opcheck(ops.pool_forward, (*tensors, *options, need_argmax))
    output, argmax = ops.pool_forward(*tensors, *options, True)
    for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        opcheck(ops.pool_backward, (case.grad, output, argmax, *tensors, *options, *need))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_flops(dtype):
    embeddings = torch.rand(5, 9).to(dtype)
    for threshold in (None, 4.0):
        opcheck(ops.flops_sums, (embeddings, threshold))
    opcheck(ops.flops_value, (torch.rand(10).to(torch.promote_types(dtype, torch.float32)),))


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("packed", "autocast"),
    [(False, True), *(pytest.param(*o, marks=pytest.mark.slow) for o in ((True, False), (False, False), (True, True)))],
    ids=["padded-autocast", "packed-plain", "padded-plain", "packed-autocast"],
)
def test_compiled_without_graph_breaks_equals_eager_bit_for_bit(packed, autocast, dynamic, backend):
    case = make_case((4, 21, 16, 200), pattern="ragged")
    hidden, mask, cu_seqlens, bound = case.hidden, case.mask, None, None
    if packed:
        rows, cu_seqlens = case.packed()
        hidden, mask, bound = rows.requires_grad_(), None, 21

    def loss(h: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        y = sk.splade_pool(h * 1.5, w, c, mask, cu_seqlens=cu_seqlens, max_seqlen=bound, backend=backend)
        return (y * case.grad).sum() + sk.flops_loss(y) + sk.flops_loss(y, threshold=20)

    def run(function: object) -> list[torch.Tensor]:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
            value = function(hidden, case.weight, case.bias)  # type: ignore[operator]
        return [value.detach(), *torch.autograd.grad(value, (hidden, case.weight, case.bias))]

    torch._dynamo.reset()
    compiled = run(torch.compile(loss, fullgraph=True, dynamic=dynamic))
    for ours, theirs in zip(compiled[1:], run(loss)[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.allclose(compiled[0], run(loss)[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_compiled_converts_the_output_only_where_its_dtype_changes(dtype):
    """PyTorch 2.11 compiles a conversion of the saved output to its own dtype to gradients of zero."""
    conversions = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        conversions.extend(node for module in modules for node in module.graph.nodes if node.target == "to")
        return graph

    leaves = [torch.randn(*size, dtype=dtype, requires_grad=True) for size in ((2, 3, 4), (7, 4))]
    torch._dynamo.reset()
    torch.compile(lambda h, w: sk.splade_pool(h, w, backend="torch"), fullgraph=True, backend=count)(*leaves)
    assert len(conversions) == (0 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_autocast_computes_in_its_dtype_and_returns_float32(pooling, backend):
    case = make_case((4, 30, 64, 200))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        output = sk.splade_pool(
            case.hidden, case.weight, case.bias, case.mask, pooling_strategy=pooling, backend=backend
        )
        inside = torch.autograd.grad(output, case.parameters(), case.grad, retain_graph=True)
    outside = torch.autograd.grad(output, case.parameters(), case.grad)
    assert output.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in inside)
    assert all(torch.equal(first, second) for first, second in zip(inside, outside, strict=True))

    exact, _ = oracle.reference_in_double(case, pooling_strategy=pooling)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        stock = oracle.stock(case, pooling, "relu").detach()
    plain = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, pooling_strategy=pooling, backend=backend)
    assert not torch.equal(output, plain), "the products were not computed in bfloat16"
    assert oracle.largest_error(output.detach(), exact) <= 1.2 * oracle.largest_error(stock, exact)


def test_autocast_leaves_the_accumulation_of_gradients_in_float32(backend):
    """Given the argmax of the bfloat16 products, dh and dW are float32 sums, not bfloat16 ones.

    On Triton dh sums rows of the rounded W that was multiplied with: half the bytes to gather.
    """
    case = make_case((4, 30, 64, 200))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        output, argmax = ops.pool_forward(
            *(tensor.detach() for tensor in case.parameters()),
            case.mask,
            None,
            *ops.PoolOptions(30, "max", "relu", torch.bfloat16, torch.float32, "off", backend),
            True,
        )
        trained = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, backend=backend)
        gradients = torch.autograd.grad(trained, case.parameters(), case.grad)
    expected = oracle.expected_gradients(case, output, argmax, "relu")
    if backend == "triton":
        rounded = replace(case, weight=case.weight.detach().bfloat16())
        expected = (oracle.expected_gradients(rounded, output, argmax, "relu")[0], *expected[1:])
    for ours, exact in zip(gradients, expected, strict=True):
        assert oracle.largest_error(ours, exact) <= 1e-5 * exact.abs().max().item()


def test_autocast_takes_mixed_dtypes_and_leaves_float64_alone(backend):
    case = make_case((2, 5, 4, 6))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        mixed = sk.splade_pool(case.hidden.bfloat16(), case.weight, case.bias, case.mask, backend=backend)
        assert mixed.dtype == torch.float32
        double = sk.splade_pool(case.hidden.double(), case.weight.double(), backend="torch")
        assert double.dtype == torch.float64
        with pytest.raises(TypeError, match="weight: expected no float64 under autocast"):
            sk.splade_pool(case.hidden, case.weight.double(), backend=backend)
    assert torch.equal(double, sk.splade_pool(case.hidden.double(), case.weight.double(), backend="torch"))
