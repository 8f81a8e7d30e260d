"""The compiled gradients of the maximum: float64 sums over the active entries, for any dtypes, strides and threads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests import opcheck

from splade_kernels.backends import compiled

pytestmark = pytest.mark.skipif(not compiled.serves(torch.device("cpu")), reason=f"csrc: {compiled.why_not()}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operator(*arguments) -> tuple[Tensor, Tensor]:
    return torch.ops.splade_kernels_csrc.max_pool_gradients(*arguments)


def make_case(lengths, vocab_size, hidden_size, *, whole=False, active=0.5, dtype=torch.float32) -> list[Tensor]:
    """``[gradient, argmax, edges, hidden, weight]``. With ``whole`` numbers every sum is exact."""
    generator = torch.Generator().manual_seed(len(lengths) + vocab_size)

    def draw(*size: int) -> Tensor:
        return (
            torch.randint(-2, 3, size, generator=generator) if whole else torch.randn(size, generator=generator)
        ).float()

    edges = torch.tensor([0, *lengths]).cumsum(0)
    shape = len(lengths), vocab_size
    # One before the sequence and two behind it too: wrong positions are left out.
    argmax = (torch.rand(shape, generator=generator) * (edges.diff()[:, None] + 3)).floor().sub(1).to(torch.int16)
    gradient = draw(*shape)
    gradient[torch.rand(shape, generator=generator) >= active] = 0
    gradient[:, ::7] *= -1  # -0.0
    return [
        gradient,
        argmax,
        edges,
        draw(int(edges[-1]), hidden_size).to(dtype),
        draw(vocab_size, hidden_size).to(dtype),
    ]


def definition(
    gradient: Tensor, argmax: Tensor, edges: Tensor, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """In float64."""
    valid = (argmax >= 0) & (argmax < edges.diff()[:, None])
    sequence, entry = ((gradient != 0) & valid).nonzero(as_tuple=True)
    row, g = edges[sequence] + argmax[sequence, entry], gradient[sequence, entry].double()[:, None]
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float64).index_add_(0, row, g * weight.double()[entry])
    grad_weight = torch.zeros(weight.shape, dtype=torch.float64).index_add_(0, entry, g * hidden.double()[row])
    return grad_hidden, grad_weight


def assert_exact(ours: tuple[Tensor, Tensor], case: list[Tensor]) -> None:
    for gradient, expected, parameter in zip(ours, definition(*case), case[3:], strict=True):
        assert gradient.dtype == parameter.dtype
        assert torch.equal(gradient, expected.to(parameter.dtype))


# A narrow and a whole tile of columns, several with a narrow one at the end; more vocabulary entries than a block, and
# more pairs than are listed at once; more rows than leave room for two tiles in the cache.
SHAPES = [
    ([5, 9, 1, 30], 701, 5),
    ([3, 0, 4], 333, 32),
    ([0, 6, 0], 2500, 100),
    ([7] * 50, 25000, 33),
    ([1500, 3], 99, 70),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"B{len(shape[0])}-V{shape[1]}-D{shape[2]}")
@pytest.mark.parametrize("active", [1.0, 0.02])
def test_sums_of_whole_numbers_are_exact(shape, active):
    case = make_case(*shape, whole=True, active=active * (0.1 if shape[1] > 9999 else 1))
    assert case[0].count_nonzero() > 0
    assert_exact(operator(*case, True, True), case)


@pytest.mark.parametrize(("of_hidden", "of_weight"), [*itertools.product(DTYPES, DTYPES)])
def test_every_dtype(of_hidden, of_weight):
    *case, hidden, weight = make_case([5, 9, 30], 701, 70, whole=True)
    case = [*case, hidden.to(of_hidden), weight.to(of_weight)]
    assert_exact(operator(*case, True, True), case)
    case[1:3] = case[1].to(torch.int32), case[2].to(torch.int32)
    assert_exact(operator(*case, True, True), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_accumulated_in_float32(dtype):
    case = make_case([5, 9, 1, 30], 3000, 100, dtype=dtype)
    gradient, argmax, edges, *parameters = case
    magnitudes = definition(gradient.abs(), argmax, edges, *(parameter.abs() for parameter in parameters))
    ours = operator(*case, True, True)
    for result, expected, magnitude in zip(ours, definition(*case), magnitudes, strict=True):
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        allowed = 16 * 2**-24 * magnitude + rounding * expected.abs() * 1.01 + 1e-7
        assert bool(((result.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype):
    case = make_case([5, 9, 30], 701, 70, whole=True, dtype=dtype)

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous().t()

    def spread(tensor: Tensor) -> Tensor:
        return torch.full((2 * tensor.shape[0], 2 * tensor.shape[1] + 1), 7, dtype=tensor.dtype)[::2, 1::2].copy_(
            tensor
        )

    for strided in (transposed, spread):
        for i in (0, 1, 3, 4):
            changed = [strided(tensor) if j == i else tensor for j, tensor in enumerate(case)]
            assert_exact(operator(*changed, True, True), case)
    case[2] = case[2].repeat_interleave(2)[::2]
    case[0] = torch.ones(1, 1).expand(3, 701)
    assert_exact(operator(*case, True, True), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_what_is_needed_is_computed(dtype):
    case = make_case([5, 9, 30], 701, 70, dtype=dtype)
    both = operator(*case, True, True)
    only_hidden, no_weight = operator(*case, True, False)
    no_hidden, only_weight = operator(*case, False, True)
    assert torch.equal(only_hidden, both[0])
    assert torch.equal(only_weight, both[1])
    assert no_weight.shape == no_hidden.shape == (0, 70)


def test_any_number_of_threads_gives_the_same_bits():
    case = make_case([7] * 50, 25000, 200, active=0.05)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(operator(*case, True, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(ours, first) for result in results for ours, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_no_active_entry_names_is_not_read(poison):
    case = make_case([5, 9, 30], 701, 70, whole=True)
    gradient, argmax, edges, hidden, weight = case
    gradient[:, 100:140] = 0
    argmax[argmax == 2] = 3
    expected = definition(*case)
    weight[100:140] = poison
    hidden[edges[:-1] + 2] = poison
    for ours, theirs in zip(operator(*case, True, True), expected, strict=True):
        assert torch.equal(ours.double(), theirs)


def test_nan_arrives_where_it_belongs_and_nowhere_else():
    case = make_case([5, 9], 64, 70)
    gradient, argmax, edges = case[:3]
    gradient[1, 40], argmax[1, 40] = math.nan, 6
    grad_hidden, grad_weight = operator(*case, True, True)
    assert grad_hidden.isnan().any(dim=1).nonzero().tolist() == [[int(edges[1]) + 6]]
    assert grad_weight.isnan().any(dim=1).nonzero().tolist() == [[40]]
    assert bool(grad_hidden[edges[1] + 6].isnan().all() & grad_weight[40].isnan().all())


@pytest.mark.parametrize(
    ("lengths", "vocab_size", "hidden_size"), [([], 40, 8), ([0, 0], 40, 8), ([3, 4], 0, 8), ([3, 4], 40, 0)]
)
def test_empty_shapes(lengths, vocab_size, hidden_size):
    case = make_case(lengths, vocab_size, hidden_size)
    assert_exact(operator(*case, True, True), case)


def test_a_weight_that_takes_huge_pages():
    case = make_case([3], (64 << 18) // 32 + 5, 32, whole=True, active=0.01)
    assert_exact(operator(*case, True, True), case)


@pytest.mark.parametrize(
    "edges", [[0, 4, 0, 4], [0, 9, 4, 6], [5, -(2**62), 2**62, 3], [-(2**63), 2**63 - 1, 0, 1], [0, 0, 0, 2**40]]
)
def test_wrong_edges_reach_nothing_out_of_bounds(edges):
    argmax = torch.randint(-5, 100, (3, 64), dtype=torch.int32)
    ours = operator(torch.ones(3, 64), argmax, torch.tensor(edges), torch.ones(7, 40), torch.ones(64, 40), True, True)
    assert all(bool((gradient.abs() <= 3 * 64).all()) for gradient in ours)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("argmax: expected Short or Int, got Long", {1: lambda t: t.long()}),
        ("gradient: expected float32", {0: lambda t: t.double()}),
        ("edges: expected Int or Long, got Float", {2: lambda t: t.float()}),
        (r"edges: expected shape \[n \+ 1\]", {2: lambda t: t[:-1]}),
        (r"hidden: expected shape \[N, D\]", {3: lambda t: t[0]}),
        ("hidden: expected float32, bfloat16 or float16, got Double", {3: lambda t: t.double()}),
        ("weight: expected float32, bfloat16 or float16, got Double", {4: lambda t: t.double()}),
        (r"weight: expected shape \[V, D\]", {4: lambda t: t[:-1]}),
        (r"weight: expected shape \[V, D\]", {4: lambda t: t[:, :-1]}),
        ("need_hidden, need_weight: expected at least one", {5: lambda _: False, 6: lambda _: False}),
    ],
)
def test_bad_arguments_are_named(message, change):
    arguments = [*make_case([5, 9, 30], 701, 70), True, True]
    with pytest.raises(RuntimeError, match=message):
        operator(*(change.get(i, lambda t: t)(argument) for i, argument in enumerate(arguments)))


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_the_operator_is_registered_correctly(need):
    opcheck(torch.ops.splade_kernels_csrc.max_pool_gradients.default, (*make_case([2, 3], 40, 8), *need))
