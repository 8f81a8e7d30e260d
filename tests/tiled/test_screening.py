"""Exact screening on a CPU: no active pair lost, values and gradients those of the unscreened head."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import splade_kernels as sk
from bench.jobs.screening import survivors
from splade_kernels import ops
from splade_kernels.backends import dispatch, int8_bound
from splade_kernels.backends.tiled import screening
from tests import oracle
from tests.oracle import Case, make_case
from tests.screening_cases import assert_within_band, logits_and_band, need_compiled, pool, tail


def hostile_case(kind: str, seed: int) -> Case:
    """One small case; what is hostile about it is in a few rows of either side."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    shape = (integer(1, 4), integer(1, 13), integer(1, 25), integer(1, 41))
    case = make_case(shape, pattern="ragged", seed=seed)
    hidden, weight = case.hidden.detach(), case.weight.detach()
    rows = hidden.view(-1, shape[2])
    some = [integer(0, len(rows)), integer(0, len(weight))]
    where = integer(0, shape[2])
    for row, matrix in zip(some, (rows, weight), strict=True):
        if kind == "outlier":
            matrix[:, where] *= 100
        elif kind == "scales":
            matrix *= 10.0 ** torch.randint(-16, 17, (len(matrix), 1), generator=generator)
        elif kind == "denormal":
            matrix[row] = 1e-41
        elif kind == "zero":
            matrix[row] = 0
        elif kind == "equal":
            matrix[:] = matrix[:1]
        elif kind == "extreme":
            matrix[:] = matrix.sign()
        elif kind in ("nan", "inf"):
            matrix[row, where] = float(kind)
    bias = case.bias.detach()
    if kind == "boundary":
        # Logits within rounding of zero, on either side.
        largest, _ = logits_and_band(Case(hidden, weight, None, case.mask, case.grad))
        bias[:] = -largest[integer(0, shape[0])].nan_to_num(neginf=0).float()
        bias *= 1 + torch.randint(-2, 3, bias.shape, generator=generator) * 2.0**-24
    else:
        bias -= integer(0, 3)
    if kind in ("nan", "inf"):
        bias[integer(0, len(bias))] = -torch.inf
    return Case(hidden, weight, bias, case.mask, case.grad)


KINDS = ("normal", "outlier", "scales", "denormal", "zero", "equal", "extreme", "nan", "inf", "boundary")


@pytest.fixture
def one_thread():
    """Where others use the cores too, waiting for a second thread takes longer than a small case."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
def test_no_active_pair_is_lost(kind, kernels, pytestconfig):
    count = pytestconfig.getoption("hostile_cases")
    for seed in range(count if kernels == "compiled" else count * 3 // 10):
        case = hostile_case(kind, seed)
        screened = pool(case, True).double()
        if kind in ("nan", "inf"):
            assert_same_special(screened, pool(case, False).double(), (kind, seed))
            continue
        assert_within_band(screened, case, (kind, seed))


def assert_same_special(screened: Tensor, unscreened: Tensor, name: object) -> None:
    assert torch.equal(screened.isnan(), unscreened.isnan()), name
    assert torch.equal(screened.isinf(), unscreened.isinf()), name
    assert torch.allclose(screened, unscreened, rtol=1e-5, atol=1e-5, equal_nan=True), name


@pytest.mark.parametrize("scale", [1e-50, 1e50], ids=str)
def test_float64_rows_that_float32_cannot_hold(scale):
    case = make_case((2, 9, 12, 40), torch.float64)
    tiny = Case(case.hidden.detach() * scale, case.weight, None, case.mask, case.grad)
    screened, unscreened = pool(tiny, True), pool(tiny, False)
    assert (screened > 0).any()
    assert ((screened - unscreened).abs() <= 1e-12 * unscreened).all()


@pytest.mark.parametrize("pattern", ["ragged", "full", "holes", "empty", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_and_gradients_are_those_of_the_definition(dtype, pattern, kernels):
    case = make_case((5, 70, 96, 333), dtype, pattern=pattern)
    with torch.no_grad():
        case.bias -= 2.5
    parameters = [tensor.detach() for tensor in case.parameters()]
    out_dtype = torch.promote_types(dtype, torch.float32)
    output, argmax = ops.pool_forward(
        *parameters, case.mask, None, 70, "max", "relu", dtype, out_dtype, "on", "torch", 1.0, 0.0, True
    )
    exact, _ = oracle.reference_in_double(case)
    assert 0.001 < (exact > 0).double().mean() < 0.5
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert (output.double() - exact).abs().max() <= tolerance
    winners = oracle.attained_maximum(case, argmax) + case.bias.detach().double()
    assert (winners.clamp_min(0).log1p() - exact).abs()[output > 0].max() <= tolerance

    trained = pool(case, True)
    gradients = torch.autograd.grad(trained, case.parameters(), case.grad)
    expected = oracle.expected_gradients(case, trained.detach(), argmax, "relu")
    rounding = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, gradient in zip(gradients, expected, strict=True):
        assert oracle.largest_error(ours, gradient) <= rounding * max(1.0, gradient.abs().max().item())


def test_ties_go_to_the_lowest_position(kernels):
    case = make_case((3, 300, 16, 50), integers=True)
    parameters = [tensor.detach() for tensor in case.parameters()]
    _, argmax = ops.pool_forward(
        *parameters, case.mask, None, 300, "max", "relu", torch.float32, torch.float32, "on", "torch", 1.0, 0.0, True
    )
    logits = (case.hidden @ case.weight.t()).detach() + case.bias.detach()
    logits = logits.masked_fill((case.mask == 0)[:, :, None], -torch.inf)
    first = (logits == logits.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    assert torch.equal(argmax.long(), torch.where(logits.amax(dim=1) > 0, first, 0))


def test_a_maximum_of_minus_infinity_that_a_bias_makes_count_is_a_real_tokens(kernels):
    hidden = torch.ones(1, 3, 1, requires_grad=True)
    weight = torch.full((1, 1), -torch.inf)
    mask = torch.tensor([[0, 1, 1]])
    for bias in (torch.inf, torch.nan):
        output = sk.splade_pool(hidden, weight, torch.full((1,), bias), mask, screening=True, backend="torch")
        (gradient,) = torch.autograd.grad(output.sum(), hidden)
        assert gradient.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("screen", [True, "auto"])
def test_padded_packed_and_more_padded_give_the_same_bits(screen, kernels, monkeypatch):
    """Sequences of several chunks of 128 tokens, in several slices of the batch."""
    monkeypatch.setattr("splade_kernels.backends.tiled.packed.SLICE_ROWS", 300)
    case = make_case((5, 200, 48, 500))
    with torch.no_grad():
        case.bias -= 3
    padded = pool(case, screen)
    rows, cu_seqlens = case.packed()
    packed = sk.splade_pool(
        rows, case.weight, case.bias, cu_seqlens=cu_seqlens, max_seqlen=200, screening=screen, backend="torch"
    )
    more = Case(F.pad(case.hidden, (0, 0, 0, 23)), case.weight, case.bias, F.pad(case.mask, (0, 23)), case.grad)
    assert torch.equal(padded, packed)
    assert torch.equal(padded, pool(more, screen))
    exact, _ = oracle.reference_in_double(case)
    assert (padded.double() - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("length", [32_767, 33_000])
def test_positions_of_long_sequences(length, kernels):
    case = make_case((1, length, 4, 9), pattern="full", integers=True)
    last = (torch.arange(9) - 9 + length).tolist()
    hidden, weight = case.hidden.detach(), case.weight.detach()
    hidden[0, last] = 20 * weight
    _, argmax = ops.pool_forward(
        hidden,
        weight,
        None,
        None,
        None,
        length,
        "max",
        "relu",
        torch.float32,
        torch.float32,
        "on",
        "torch",
        1.0,
        0.0,
        True,
    )
    logits = hidden[0] @ weight.t()
    assert torch.equal(argmax[0].long(), (logits == logits.amax(dim=0)).int().argmax(dim=0) * (logits > 0).any(dim=0))
    assert argmax.max() > length - 9


@pytest.mark.parametrize("screen", [True, "auto"])
@pytest.mark.parametrize("shape", [(5, 200, 48, 700), (1, 1, 40_000, 1)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, screen, kernels, one_thread):
    case = make_case(shape, pattern="full")
    sign = (case.hidden[0, 0] @ case.weight[0]).detach().sign()
    case = Case(case.hidden.detach(), case.weight.detach() * sign, None, case.mask, case.grad)
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(pool(case, screen))
    assert outputs[0][0, 0] > 0
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("screen", [True, "auto"])
@pytest.mark.parametrize("hidden_size", [24, 1])
def test_a_weight_with_gaps_between_its_rows_or_elements(hidden_size, screen, kernels):
    case = make_case((2, 30, hidden_size, 65))
    expected = pool(case, screen)
    gaps = torch.full((65, 40), torch.nan)
    gaps[:, :hidden_size] = case.weight.detach()
    for weight in (gaps[:, :hidden_size], case.weight.detach().t().contiguous().t()):
        assert torch.equal(pool(Case(case.hidden, weight, *tail(case)), screen), expected)


def test_autocast_screens_the_products_of_rounded_operands(kernels):
    case = make_case((3, 40, 64, 200))
    with torch.autocast("cpu", torch.bfloat16):
        screened = pool(case, True)
    rounded = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.bias, case.mask, case.grad)
    exact, _ = oracle.reference_in_double(rounded)
    assert screened.dtype == torch.float32
    assert (screened.double() - exact).abs().max() <= 2e-6


def test_what_cannot_be_screened_is_refused_by_name():
    case = make_case((1, 3, 4, 5))
    with pytest.raises(ValueError, match="screening: expected 'auto' or False with pooling_strategy='sum'"):
        pool(case, True, pooling_strategy="sum")


def test_csrc_mirrors_the_constants_of_the_bound():
    source = (Path(__file__).parents[2] / "csrc/cpu/screening.h").read_text()
    found = dict(re.findall(r"\b(k[A-Z]\w+) = ([\w.+-]+)", source))
    assert float.fromhex(found["kTiny"].rstrip("f")) == int8_bound.TINY
    assert float.fromhex(found["kHuge"].rstrip("f")) == int8_bound.HUGE
    assert int(found["kMaxHiddenSize"]) == int8_bound.MAX_HIDDEN_SIZE
    assert int(found["kNormSlack"]) == int8_bound.NORM_SLACK
    assert int(found["kDotSlack"]) == int8_bound.DOT_SLACK
    assert re.search(r"unit = (\S+)f;", source)[1] == f"0x1p{math.frexp(int8_bound.UNIT)[1] - 1}"


def test_accelerators_of_the_torch_backend_do_not_screen(monkeypatch):
    monkeypatch.setattr(dispatch, "on_host", lambda tensor: False)
    case = make_case((1, 3, 4, 5))
    with pytest.raises(RuntimeError, match="screening: the torch backend screens on a CPU only"):
        pool(case, True)
    assert torch.allclose(pool(case, "auto"), pool(case, False))


def test_dimensions_beyond_int32_and_empty_inputs_are_left_unscreened(kernels, monkeypatch):
    monkeypatch.setattr(int8_bound, "MAX_HIDDEN_SIZE", 8)
    case = make_case((2, 5, 9, 30))
    assert torch.equal(pool(case, True), pool(case, False))
    for shape in [(0, 5, 4, 6), (2, 0, 4, 6), (2, 5, 0, 6), (2, 5, 4, 0)]:
        empty = make_case(shape)
        assert torch.equal(pool(empty, True), pool(empty, False))


EDGES = [0.0, 2.0**-41, 2.0**-40, 1.0, 2.0**40, 2.0**41, torch.nan, torch.inf]
BOUNDED = [True, False, True, True, True, False, False, False]


def test_rows_outside_the_range_have_no_bound():
    rows = torch.zeros(len(EDGES), 9)
    rows[:, 4] = torch.tensor(EDGES)
    scale = int8_bound.quantise(rows)[1]
    assert (~scale.isnan()).tolist() == BOUNDED


def test_compiled_kernels_bound_the_same_rows():
    need_compiled()
    words = torch.zeros(len(EDGES), 9)
    words[:, 4] = torch.tensor(EDGES)
    case = Case(torch.zeros(1, 1, 9), words, None, torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, len(EDGES)))
    case.hidden[0, 0, 3] = 1.0
    # A dot of zero is ruled out by relu, and so computed only for vocabulary entries without a bound.
    computed, _ = survivors(case.hidden, case.weight, torch.full((len(EDGES),), -(2.0**50)), case.mask)
    assert computed == BOUNDED.count(False)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(default, kernels):
    torch.set_default_dtype(default)
    try:
        assert screening._agrees(screening.compiled_kernels() or screening.PLAIN)
    finally:
        torch.set_default_dtype(torch.float32)
