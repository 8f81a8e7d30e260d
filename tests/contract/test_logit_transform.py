"""Scale and soft cap of the logits between projection and activation: values and gradients against closed forms in
float64, in which the slope of the soft cap is ``sech²`` and not what is left of 1."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import splade_kernels as sk
from splade_kernels import ops
from splade_kernels.backends import dispatch
from splade_kernels.backends.pooling import ACTIVATION_FUNCTIONS
from tests import oracle
from tests.oracle import ACTIVATIONS, EPSILON, Case, make_case

# Scale and soft cap: Granite's scale, Gemma's soft cap, and both with a cap that half of the logits reach.
TRANSFORMS = {"scale": (0.0625, None), "cap": (1.0, 30.0), "both": (1.7, 0.8)}
POOLINGS = ("max", "sum")
ALL = list(itertools.product(POOLINGS, ACTIVATIONS, TRANSFORMS))


class Exact(NamedTuple):
    """Of every logit, in float64."""

    value: Tensor
    slope: Tensor
    uncapped: Tensor  # the slope without that of the soft cap, which is at most 1
    condition: Tensor  # relative change of the capped logit for one of the value
    saturation: Tensor  # scaled logit over the soft cap


def exactly(logits: Tensor, activation: str, scale: float, softcap: float | None) -> Exact:
    x = logits.double().clamp_min(0)
    z, slope, saturation = scale * x, torch.full_like(x, scale), torch.zeros_like(x)
    if softcap is not None:
        saturation = z / softcap
        e = torch.exp(-2 * saturation)
        z, slope = softcap * torch.tanh(saturation), slope * 4 * e / (1 + e).square()
    uncapped, condition = torch.full_like(x, scale), torch.ones_like(x)
    for _ in range(ACTIVATION_FUNCTIONS[activation]):
        condition = condition * torch.where(z > 0, (1 + z) * z.log1p() / z, 1)
        slope, uncapped, z = slope / (1 + z), uncapped / (1 + z), z.log1p()
    active = logits > 0
    return Exact(z, slope * active, uncapped * active, condition, saturation)


def transform(name: str) -> dict[str, float | None]:
    scale, softcap = TRANSFORMS[name]
    return {"logit_scale": scale, "logit_softcap": softcap}


def of_single_tokens(logits: Tensor, backend: str, pooling: str, **options: object) -> tuple[Tensor, Tensor]:
    """Value and slope of each logit: one token of one dimension, whose products with the vocabulary are exact."""
    shift = torch.zeros_like(logits, requires_grad=True)
    hidden = logits.new_ones(1, 1, 1)
    output = sk.splade_pool(hidden, logits[:, None], shift, pooling_strategy=pooling, backend=backend, **options)
    return output[0].detach(), torch.autograd.grad(output.sum(), shift)[0]


@pytest.mark.parametrize(("pooling", "activation", "name"), ALL)
def test_each_logit_from_tiny_to_saturated(pooling, activation, name, backend, arithmetic, request):
    if backend == "torch" and "as a GPU" in request.node.name:
        pytest.skip("no kernel is interpreted")
    scale, softcap = TRANSFORMS[name]
    unit = (softcap or 30) / scale
    tiny, large = torch.logspace(-30, 1.5, 250, dtype=torch.float64), torch.linspace(0.01, 12, 250, dtype=torch.float64)
    positive = (torch.cat([tiny, large]) * unit).to(torch.get_default_device(), torch.float32)
    logits = torch.cat([positive, -positive[::50], positive[:2] * 0])
    value, slope = of_single_tokens(logits, backend, pooling, activation_function=activation, **transform(name))
    exact = exactly(logits, activation, scale, softcap)
    assert bool(((value.double() - exact.value).abs() <= 12 * EPSILON * exact.value).all())
    error = (slope.double() - exact.slope).abs()
    if softcap is None:
        # The slope exp(-y) has the rounding of y, whose gain is y; twice exp(-expm1(y)).
        assert bool((error <= 12 * EPSILON * (1 + exact.condition + exact.value) * exact.uncapped).all())
        return
    assert exact.slope.min() < 1e-20 * exact.slope.max()
    if pooling == "sum":  # from the recomputed logit
        assert bool((error <= EPSILON * (16 + 12 * exact.saturation) * exact.slope + 1e-37).all())
    else:
        assert bool((error <= EPSILON * 32 * exact.condition * exact.uncapped).all())
        assert bool((slope >= 0).all()), "rounding past the cap turns no gradient around"


@pytest.mark.parametrize(("pooling", "activation", "name"), ALL)
def test_float64_and_the_definition_are_the_closed_form(pooling, activation, name, backend):
    if backend == "triton":
        pytest.skip("Triton's kernels do not compute in float64")
    scale, softcap = TRANSFORMS[name]
    logits = torch.linspace(-1, 6, 200, dtype=torch.float64) * (softcap or 30) / scale
    options = {"activation_function": activation, **transform(name)}
    exact = exactly(logits, activation, scale, softcap)
    found = of_single_tokens(logits, backend, pooling, **options)
    shift = torch.zeros_like(logits, requires_grad=True)
    output = sk.reference.splade_pool(
        logits.new_ones(1, 1, 1), logits[:, None], shift, pooling_strategy=pooling, **options
    )
    defined = output[0].detach(), torch.autograd.grad(output.sum(), shift)[0]
    for value, slope in (found, defined):
        assert bool(((value - exact.value).abs() <= 1e-15 * exact.value).all())
        assert bool(((slope - exact.slope).abs() <= 1e-14 * scale).all())


def expected(case: Case, pooling: str, activation: str, name: str) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Output, the same without signs of the factors, gradients, and what rounding in them is relative to."""
    hidden, weight, bias = (tensor.detach().double() for tensor in (case.hidden, case.weight, case.bias))
    logits = hidden @ weight.t() + bias
    size = hidden.abs() @ weight.abs().t() + bias.abs()
    real = (case.mask != 0)[:, :, None]
    exact = exactly(logits, activation, *TRANSFORMS[name])
    chosen = real.expand_as(logits)
    if pooling == "max":
        largest = logits.masked_fill(~real, -torch.inf)
        winner = largest.argmax(dim=1, keepdim=True)
        chosen = real & (torch.arange(logits.shape[1], device=logits.device)[:, None] == winner)
    output = (exact.value * chosen).sum(dim=1)
    # Rounding of a logit is passed on by the slope, and by the change of the slope, of which 2 scale / cap is a bound.
    scale, softcap = TRANSFORMS[name]
    steep = exact.uncapped * exact.condition * (1 + size * scale * (2 if softcap is None else 2 + 2 / softcap))
    allowed = (size * exact.uncapped * chosen + exact.value * chosen).sum(dim=1)
    grad = case.grad.double()[:, None]

    def gradients(g: Tensor, hidden: Tensor, weight: Tensor) -> list[Tensor]:
        return [g @ weight, torch.einsum("bsv,bsd->vd", g, hidden), g.sum(dim=(0, 1))]

    sums = gradients(grad * exact.slope * chosen, hidden, weight)
    return output, allowed, sums, gradients(grad.abs() * steep * chosen, hidden.abs(), weight.abs())


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pooling", "activation", "name"), ALL)
def test_values_and_gradients_are_those_of_the_definition(
    pooling, activation, name, dtype, packed, backend, monkeypatch
):
    if packed and (activation == "relu") == (dtype in (torch.float32, torch.bfloat16)):
        pytest.skip("padded is tested, and the other half of the cases packed")
    # With bfloat16 instructions the torch backend would round the logits of a sum, which is tested elsewhere.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    case = make_case((3, 12, 16, 40), dtype, pattern="holes" if not packed else "ragged")
    options = {"pooling_strategy": pooling, "activation_function": activation, "backend": backend, **transform(name)}
    if packed:
        rows, cu_seqlens = case.packed()
        rows.requires_grad_()
        ours = sk.splade_pool(rows, case.weight, case.bias, cu_seqlens=cu_seqlens, **options)
        found = list(torch.autograd.grad(ours, (rows, case.weight, case.bias), case.grad))
        found[0] = torch.zeros_like(case.hidden.detach()).masked_scatter((case.mask != 0)[:, :, None], found[0])
    else:
        ours = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, **options)
        found = list(torch.autograd.grad(ours, case.parameters(), case.grad))
    output, allowed, sums, magnitudes = expected(case, pooling, activation, name)
    wide = 2.0**-53 if dtype == torch.float64 else EPSILON
    assert oracle.rounded_once(ours.detach(), output, 32 * wide * allowed)
    for gradient, exact, magnitude in zip(found, sums, magnitudes, strict=True):
        allowance = 32 * wide * magnitude
        if pooling == "sum" and dtype in (torch.bfloat16, torch.float16) and backend == "triton":
            allowance = allowance + torch.finfo(dtype).eps / 2 * magnitude  # logits' gradients are kept in 16 bits
        assert oracle.rounded_once(gradient, exact, allowance)


@pytest.mark.parametrize(("pooling", "activation"), list(itertools.product(POOLINGS, ACTIVATIONS)))
def test_padded_equals_packed_bit_for_bit(pooling, activation, backend, packs):
    case = make_case((3, 20, 16, 70))
    options = {"pooling_strategy": pooling, "activation_function": activation, "backend": backend, **transform("both")}
    padded = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, **options)
    rows, cu_seqlens = case.packed()
    packed = sk.splade_pool(rows, case.weight, case.bias, cu_seqlens=cu_seqlens, **options)
    assert torch.equal(padded, packed) if packs else torch.allclose(padded, packed, rtol=1e-6, atol=1e-6)


def sparse_case(shape: tuple[int, int, int, int] = (4, 40, 64, 300)) -> Case:
    case = make_case(shape, pattern="full")
    with torch.no_grad():
        case.bias.sub_(2.5)
    return case


def assert_screened_alike(case: Case, backend: str, activation: str, name: str) -> None:
    options = {"activation_function": activation, "backend": backend, **transform(name)}
    screened, plain = (
        sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, screening=screening, **options)
        for screening in (True, False)
    )
    assert 0.001 < (plain > 0).double().mean() < 0.5
    assert torch.equal(screened > 0, plain > 0)
    output, allowed, *_ = expected(case, "max", activation, name)
    assert bool(((screened.double() - output).abs() <= 32 * EPSILON * allowed).all())
    ours, theirs = (torch.autograd.grad(some, case.parameters(), case.grad) for some in (screened, plain))
    for gradient, other in zip(ours, theirs, strict=True):
        assert oracle.close(gradient, other.double())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_screened_values_are_transformed(name, activation, backend):
    if backend == "torch" and not dispatch.on_host(torch.empty(0)):
        pytest.skip("screens on a CPU only")
    if backend == "triton" and (name == "scale" or (name, activation) == ("cap", "relu")):
        pytest.skip("slow in the interpreter, and finalise is the same kernel as without screening")
    case = sparse_case((2, 20, 64, 100)) if backend == "triton" else sparse_case()
    assert_screened_alike(case, backend, activation, name)


def test_values_that_pytorch_screened_are_transformed(kernels):
    assert_screened_alike(sparse_case(), "torch", "log1p_relu", "both")


SPECIAL = [torch.inf, torch.nan, -torch.inf, 3e38, -3e38, 0.0, -0.0, 2.0]


@pytest.mark.parametrize(("pooling", "activation", "name"), ALL)
def test_what_is_not_finite_is_as_in_pytorch(pooling, activation, name, backend):
    shift = torch.tensor(SPECIAL, requires_grad=True)
    hidden, weight = torch.ones(1, 1, 1), torch.zeros(len(SPECIAL), 1)
    options = {"pooling_strategy": pooling, "activation_function": activation, **transform(name)}
    results = []
    for pool in (sk.splade_pool, sk.reference.splade_pool):
        chosen = {"backend": backend} if pool is sk.splade_pool else {}
        output = pool(hidden, weight, shift, **chosen, **options)
        results.append((output[0].detach(), torch.autograd.grad(output.sum(), shift)[0]))
    (value, slope), (expected_value, expected_slope) = results
    assert torch.allclose(value, expected_value, rtol=1e-6, atol=0, equal_nan=True)
    # Stock PyTorch multiplies NaN by the slope 0 of relu; here what is inactive has none.
    assert torch.allclose(slope[[0, *range(2, len(SPECIAL))]], expected_slope[[0, *range(2, len(SPECIAL))]], atol=1e-6)
    assert bool(value[1].isnan())
    assert bool(slope[1].isnan())
    if TRANSFORMS[name][1] is not None:
        assert value[0] == value[3]
        assert bool(value[0].isfinite())
        assert slope[0] == slope[3] == 0


def test_no_transform_is_the_plain_head_bit_for_bit(backend):
    case = make_case((3, 12, 16, 40))
    for pooling in POOLINGS:
        options = {"pooling_strategy": pooling, "backend": backend}
        plain, same, changed = (
            sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, **options, **more)
            for more in ({}, {"logit_scale": 1, "logit_softcap": None}, transform("both"))
        )
        assert torch.equal(plain, same)
        assert not torch.equal(plain, changed)
        gradients, others = (torch.autograd.grad(some, case.parameters(), case.grad) for some in (plain, same))
        assert all(torch.equal(gradient, other) for gradient, other in zip(gradients, others, strict=True))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck(pooling, backend):
    if backend == "triton":
        pytest.skip("numerical differentiation needs float64, which Triton's kernels do not compute")
    case = make_case((2, 4, 4, 5), torch.float64)
    options = {
        "pooling_strategy": pooling,
        "activation_function": "log1p_relu",
        "backend": backend,
        **transform("both"),
    }
    assert torch.autograd.gradcheck(
        lambda h, w, c: sk.splade_pool(h, w, c, case.mask, **options), case.parameters(), nondet_tol=0.0
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_opcheck(pooling, backend):
    case = make_case((2, 9, 8, 21))
    tensors = (*(tensor.detach() for tensor in case.parameters()), case.mask, None)
    options = oracle.pool_options(
        max_seqlen=9, pooling_strategy=pooling, screening="off", backend=backend, logit_scale=0.5, logit_softcap=2.0
    )
    opcheck(ops.pool_forward, (*tensors, *options, True))
    output, argmax = ops.pool_forward(*tensors, *options, True)
    opcheck(ops.pool_backward, (case.grad, output, argmax, *tensors, *options, True, True, True))


def test_compiled_without_graph_breaks_equals_eager_bit_for_bit(backend):
    """Also where the numbers are arguments of what is compiled."""
    if backend == "torch" and not dispatch.on_host(torch.empty(0)):
        pytest.skip("the wiring is the same")
    case = make_case((2, 9, 8, 21))

    def loss(h: Tensor, w: Tensor, c: Tensor, scale: float, softcap: float) -> Tensor:
        y = sk.splade_pool(h, w, c, case.mask, backend=backend, logit_scale=scale, logit_softcap=softcap)
        return (y * case.grad).sum()

    torch._dynamo.reset()
    function = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for numbers in ((0.5, 2.0), (0.25, 3.0)):
        compiled, eager = (
            torch.autograd.grad(some(*case.parameters(), *numbers), case.parameters()) for some in (function, loss)
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(compiled, eager, strict=True))


WRONG = [
    ("logit_scale", True, TypeError, "expected a number, got bool"),
    ("logit_scale", None, TypeError, "expected a number, got NoneType"),
    ("logit_softcap", "30", TypeError, "expected a number or None, got str"),
    ("logit_softcap", torch.tensor(30.0), TypeError, "expected a number or None, got Tensor"),
    ("logit_scale", 0, ValueError, "expected a finite number above 0.*, got 0"),
    ("logit_scale", -0.5, ValueError, "expected a finite number above 0.*, got -0.5"),
    ("logit_softcap", 0.0, ValueError, "expected a finite number above 0.*, got 0.0"),
    ("logit_softcap", float("nan"), ValueError, "expected a finite number above 0.*, got nan"),
    ("logit_softcap", float("inf"), ValueError, "expected a finite number above 0.*, got inf"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG, ids=str)
def test_wrong_numbers_are_refused_by_name(name, value, error, message):
    for pool in (sk.splade_pool, sk.reference.splade_pool):
        with pytest.raises(error, match=f"^{name}: {message}"):
            pool(torch.ones(1, 1, 1), torch.ones(2, 1), **{name: value})


def test_numbers_that_float32_does_not_hold_are_refused():
    for value in (1e-300, 1e300, 10**400):
        with pytest.raises(ValueError, match="range of float32"):
            sk.splade_pool(torch.ones(1, 1, 1), torch.ones(2, 1), logit_softcap=value)


def test_integers_and_numpy_numbers_are_numbers():
    hidden, weight = torch.ones(1, 1, 1), torch.ones(2, 1)
    outputs = [
        sk.splade_pool(hidden, weight, logit_scale=s, logit_softcap=c) for s, c in ((2, 30), (2.0, np.float32(30)))
    ]
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], torch.full((1, 2), 2.0).div_(30).tanh_().mul_(30).log1p_())
