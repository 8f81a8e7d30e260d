"""splade_pool against the float64 definition: values, argmax, gradients."""

from __future__ import annotations

import pytest
import torch

import splade_kernels as sk
from splade_kernels.backends.tiled import backward as tiled_backward
from splade_kernels.backends.tiled import packed
from tests import oracle
from tests.oracle import ACTIVATIONS, Case, make_case

PATTERNS = ["ragged", "full", "left", "holes", "one", "empty"]
SHAPES = [(3, 7, 13, 101), (1, 1, 8, 33), (5, 40, 32, 150), (2, 3, 1, 7), (2, 150, 24, 33), (17, 12, 16, 64)]
# Many tiles of the vocabulary, and of long sequences: seconds in the interpreter.
SHAPES += [pytest.param(shape, marks=pytest.mark.slow) for shape in ((5, 40, 32, 500), (4, 150, 24, 77))]
HALF = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)]
DTYPES = [torch.float32, torch.bfloat16, HALF[1], torch.float64]
POOLINGS = ["max", "sum"]
ONE_ACTIVATION = [ACTIVATIONS[0], *(pytest.param(other, marks=pytest.mark.slow) for other in ACTIVATIONS[1:])]


def pool(case: Case, backend: str, **options: object) -> torch.Tensor:
    return sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, backend=backend, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_no_further_from_float64_than_the_dense_head(shape, dtype, pooling, activation, backend):
    case = make_case(shape, dtype)
    exact, _ = oracle.reference_in_double(case, pooling_strategy=pooling, activation_function=activation)
    output = pool(case, backend, pooling_strategy=pooling, activation_function=activation)
    assert output.shape == exact.shape
    assert output.dtype == dtype
    assert output.is_contiguous()
    stock_error = oracle.largest_error(oracle.stock(case, pooling, activation).detach(), exact)
    allowance = 4 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
    assert oracle.largest_error(output.detach(), exact) <= stock_error + allowance
    if backend == "triton":
        assert oracle.rounded_once(output.detach(), exact, oracle.float32_allowance(case, exact, pooling))


@pytest.mark.parametrize("activation", ONE_ACTIVATION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_argmax_attains_the_maximum_and_gradients_follow_it(shape, dtype, activation, backend):
    case = make_case(shape, dtype, pattern="holes")
    output, argmax = oracle.forward_with_argmax(case, backend, activation)
    assert torch.equal(output.to(dtype), pool(case, backend, activation_function=activation))
    dots = case.hidden.detach().double() @ case.weight.detach().double().t()
    best = torch.where(case.mask[..., None], dots, -torch.inf).amax(dim=1)
    attained = oracle.attained_maximum(case, argmax)
    active = output > 0
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    norms = case.hidden.detach().double().norm(dim=-1).amax(dim=1)[:, None] * case.weight.detach().double().norm(dim=-1)
    assert bool(((best - attained)[active] <= (4 * eps * norms)[active]).all())
    assert bool(case.mask.gather(1, argmax.long())[active].all()), "a padded token was chosen"
    assert bool((argmax[~active] == 0).all())

    gradients = torch.autograd.grad(pool(case, backend, activation_function=activation), case.parameters(), case.grad)
    expected = oracle.expected_gradients(case, output, argmax, activation)
    magnitudes = oracle.gradient_magnitudes(case, output, argmax, activation)
    for ours, exact, magnitude, parameter in zip(gradients, expected, magnitudes, case.parameters(), strict=True):
        assert ours.dtype == parameter.dtype
        assert ours.shape == parameter.shape
        scale = max(1.0, exact.abs().max().item())
        assert oracle.largest_error(ours, exact) <= 4 * torch.finfo(dtype).eps * scale
        if backend == "triton":
            assert oracle.rounded_once(ours, exact, oracle.gradient_allowance(magnitude, max(output.shape)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["bias", "no-bias"])
def test_values_and_gradients_equal_the_dense_definition(pattern, pooling, activation, bias, backend, widest):
    case = make_case((6, 37, 9, 50), widest, pattern=pattern, bias=bias)
    options = {"pooling_strategy": pooling, "activation_function": activation}
    exact, expected = oracle.reference_in_double(case, **options)
    output = pool(case, backend, **options)
    assert oracle.close(output.detach(), exact)
    for ours, theirs in zip(torch.autograd.grad(output, case.parameters(), case.grad), expected, strict=True):
        assert oracle.close(ours, theirs)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_whole_numbers_are_exact(pattern, dtype, backend):
    """Dots, sums and argmax are exact here, so the float32 values and every gradient must equal the definition's."""
    case = make_case((5, 35, 12, 60), dtype, pattern=pattern, integers=True)
    output, argmax = oracle.forward_with_argmax(case, backend)
    dots = case.hidden.detach().double() @ case.weight.detach().double().t()
    masked = torch.where(case.mask[..., None], dots, -torch.inf)
    logits = masked.amax(dim=1) + case.bias.detach().double()
    expected = logits.relu().log1p()
    assert torch.equal(output > 0, expected > 0)
    assert bool(((output.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * expected).all())
    if backend == "triton":
        assert oracle.rounded_once(output, expected, 16 * oracle.EPSILON * expected)
    lowest = (masked == masked.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    assert torch.equal(argmax.long(), torch.where(output > 0, lowest, 0)), "ties go to the lowest position"

    case.grad = torch.where(output > 0, 2.0, 3.0).to(dtype)
    gradient = torch.autograd.grad((pool(case, backend).expm1() * case.grad).sum(), case.bias)[0]
    if dtype in (torch.float32, torch.float64):
        counts = 2.0 * (output > 0).sum(dim=0)
        assert torch.allclose(gradient.double(), counts.double(), rtol=1e-6, atol=0)


def test_ties_between_repeated_tokens_go_to_the_first(backend):
    hidden = torch.ones(2, 50, 4, requires_grad=True)
    weight = torch.ones(9, 4)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :3] = False
    sk.splade_pool(hidden, weight, None, mask, backend=backend).sum().backward()
    touched = hidden.grad.abs().sum(dim=-1).nonzero().tolist()
    assert touched == [[0, 0], [1, 3]]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF[0]], ids=str)
def test_padded_packed_and_more_padded_are_the_same_bits(dtype, pooling, backend, packs):
    if not packs:
        pytest.skip("without a host sync nothing is packed: matmuls of other sizes may round differently")
    case = make_case((7, 45, 24, 150), dtype, pattern="empty")
    padded = pool(case, backend, pooling_strategy=pooling)
    padded_gradients = torch.autograd.grad(padded, case.parameters(), case.grad)

    rows, cu_seqlens = case.packed()
    for hidden in (rows, rows[None]):
        hidden = hidden.clone().requires_grad_()
        packed = sk.splade_pool(
            hidden, case.weight, case.bias, cu_seqlens=cu_seqlens.int(), backend=backend, pooling_strategy=pooling
        )
        gradients = torch.autograd.grad(packed, (hidden, case.weight, case.bias), case.grad)
        assert torch.equal(packed, padded)
        assert torch.equal(gradients[0].reshape(-1, 24), padded_gradients[0][case.mask])
        assert torch.equal(gradients[1], padded_gradients[1])
        assert torch.equal(gradients[2], padded_gradients[2])

    wider = torch.full((7, 61, 24), 7.0, dtype=dtype)
    wider[:, 9 : 9 + 45] = case.hidden.detach()
    mask = torch.zeros(7, 61, dtype=torch.int32)
    mask[:, 9 : 9 + 45] = case.mask.int() * -3
    wider.requires_grad_()
    more = sk.splade_pool(wider, case.weight, case.bias, mask, backend=backend, pooling_strategy=pooling)
    gradients = torch.autograd.grad(more, (wider, case.weight, case.bias), case.grad)
    assert torch.equal(more, padded)
    assert torch.equal(gradients[0][:, 9 : 9 + 45], padded_gradients[0])
    assert torch.equal(gradients[1], padded_gradients[1])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_equals_the_definition(pooling, index_dtype, backend, widest):
    case = make_case((6, 33, 10, 40), widest, pattern="empty")
    rows, cu_seqlens = case.packed()
    expected, gradients = oracle.reference_in_double(case, pooling_strategy=pooling)
    rows.requires_grad_()
    output = sk.splade_pool(
        rows,
        case.weight,
        case.bias,
        cu_seqlens=cu_seqlens.to(index_dtype),
        max_seqlen=33,
        pooling_strategy=pooling,
        backend=backend,
    )
    assert oracle.close(output.detach(), expected)
    ours = torch.autograd.grad(output, (rows, case.weight), case.grad)
    assert oracle.close(ours[0], gradients[0][case.mask])
    assert oracle.close(ours[1], gradients[1])


def test_a_sequence_of_more_than_32767_tokens_keeps_its_positions(backend):
    hidden = torch.zeros(1, 40000, 2)
    hidden[0, 39990] = 1.0
    # Few real tokens, each of which costs the interpreter time; their positions are the padded ones.
    case = Case(hidden, torch.ones(3, 2), None, (torch.arange(40000) % 90 == 30)[None], torch.ones(1, 3))
    assert case.mask[0, 39990]
    _, argmax = oracle.forward_with_argmax(case, backend)
    assert argmax.tolist() == [[39990] * 3]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_any_strides_and_offsets(pooling, backend, widest):
    case = make_case((3, 21, 8, 30), widest, pattern="holes")
    expected, gradients = oracle.reference_in_double(case, pooling_strategy=pooling)

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        """The same values in every third element of a transposed, offset buffer."""
        shape = tensor.shape[::-1]
        buffer = torch.full((*shape[:-1], 3 * shape[-1] + 1), 9.0, dtype=tensor.dtype)
        view = buffer[..., 1::3].permute(*reversed(range(tensor.ndim)))
        view.copy_(tensor.detach())
        return view.requires_grad_()

    hidden, weight, bias, grad = map(strided, (case.hidden, case.weight, case.bias, case.grad))
    mask = case.mask.t().contiguous().t()
    output = sk.splade_pool(hidden, weight, bias, mask, pooling_strategy=pooling, backend=backend)
    assert oracle.close(output.detach(), expected)
    for ours, theirs in zip(torch.autograd.grad(output, (hidden, weight, bias), grad.detach()), gradients, strict=True):
        assert oracle.close(ours, theirs)

    row = torch.randn(1, 30, dtype=widest)
    broadcast = torch.autograd.grad(pool(case, backend), case.weight, row.expand(3, -1))[0]
    dense = torch.autograd.grad(pool(case, backend), case.weight, row.repeat(3, 1))[0]
    assert torch.equal(broadcast, dense)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_two_runs_are_bitwise_the_same(pooling, backend):
    case = make_case((5, 60, 64, 150) if backend == "triton" else (16, 60, 64, 3000), pattern="ragged")
    runs = []
    for _ in range(2):
        output = pool(case, backend, pooling_strategy=pooling)
        runs.append((output.detach(), *torch.autograd.grad(output, case.parameters(), case.grad)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_slices_and_tiles_do_not_show(backend, widest, monkeypatch):
    """Many slices, narrow tiles and several backward blocks give the same values as one of each."""
    case = make_case((9, 70, 12, 300), widest, pattern="ragged")
    expected, gradients = oracle.reference_in_double(case)
    if backend == "triton":
        from splade_kernels.backends.triton import grad_hidden as backward
        from splade_kernels.backends.triton import pack

        monkeypatch.setattr(pack, "SLICE_BYTES", 4 * 300 * 8)
        monkeypatch.setattr(backward, "SLICE_ENTRIES", 2 * 300)
    monkeypatch.setattr(packed, "SLICE_ROWS", 80)
    monkeypatch.setattr(packed, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiled_backward, "BACKWARD_ENTRIES", 9 * 64)
    monkeypatch.setattr(tiled_backward, "GRADIENT_ENTRIES", 9 * 64)
    output = pool(case, backend)
    assert oracle.close(output.detach(), expected)
    for ours, theirs in zip(torch.autograd.grad(output, case.parameters(), case.grad), gradients, strict=True):
        assert oracle.close(ours, theirs)


def test_the_definition_keeps_the_graph_of_no_sequences():
    hidden = torch.randn(0, 8, requires_grad=True)
    output = sk.reference.splade_pool(hidden, torch.randn(40, 8), cu_seqlens=torch.tensor([0]))
    (gradient,) = torch.autograd.grad(output.sum(), hidden)
    assert output.shape == (0, 40)
    assert gradient.shape == hidden.shape
