"""What the interpreter computes is what a GPU computes: conversions, logarithms, and approximations in their place."""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splade_kernels.backends.pooling import ACTIVATION_FUNCTIONS
from tests import oracle
from tests.oracle import ACTIVATIONS, make_case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
common = importlib.import_module("splade_kernels.backends.triton.common")
backend = importlib.import_module("splade_kernels.backends.triton")
narrow, widen, activate = common.narrow, common.widen, common.activate

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = {2: torch.int16, 4: torch.int32}


@triton.jit
def _narrow(source_ptr, target_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + o, narrow(tl.load(source_ptr + o), target_ptr.dtype.element_ty))


@triton.jit
def _widen(source_ptr, target_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + o, widen(tl.load(source_ptr + o)))


@triton.jit
def _plain(source_ptr, target_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + o, tl.load(source_ptr + o).to(target_ptr.dtype.element_ty, fp_downcast_rounding="rtne"))


@triton.jit
def _implicit(source_ptr, target_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + o, tl.load(source_ptr + o))


@triton.jit
def _above_zero(source_ptr, target_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + o, (tl.load(source_ptr + o) > 0).to(tl.int32))


@triton.jit
def _activate(source_ptr, target_ptr, LOGS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + o, activate(tl.load(source_ptr + o), None, None, LOGS))


def every_kind_of_float() -> Tensor:
    """float32 of every sign, exponent and upper half of the mantissa; around what is cut off and around its middle."""
    upper = torch.arange(-(1 << 15), 1 << 15) << 16
    half, tenth = 1 << 15, 1 << 12
    lower = [
        0,
        1,
        half - 1,
        half,
        half + 1,
        (1 << 16) - 1,
        tenth - 1,
        tenth,
        tenth + 1,
        3 * tenth,
        2 * tenth,
        4 * tenth,
    ]
    bits = upper[:, None] + torch.tensor([*lower, 5, 6 * tenth, half + tenth, half - tenth])
    return bits.to(torch.int32).view(torch.float32).flatten().to(DEVICE)


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """But for NaN, of which there are many."""
    integer = INTEGERS[ours.dtype.itemsize]
    return bool(((ours.view(integer) == theirs.view(integer)) | (ours.isnan() & theirs.isnan())).all())


@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_conversions_are_those_of_pytorch(source):
    """To the nearest, ties to even; denormals, infinities and NaN included."""
    values = every_kind_of_float().to(source)
    blocks = (len(values) // 1024,)
    for target in FLOATS:
        ours = torch.empty(len(values), dtype=target, device=DEVICE)
        _narrow[blocks](values, ours, BLOCK=1024) if not INTERPRETED else _narrow[(1,)](values, ours, BLOCK=len(values))
        assert same_bits(ours, values.float().to(target)), target
    wide = torch.empty(len(values), device=DEVICE)
    _widen[blocks](values, wide, BLOCK=1024) if not INTERPRETED else _widen[(1,)](values, wide, BLOCK=len(values))
    assert same_bits(wide, values.float())


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
@pytest.mark.parametrize("kernel", ["_plain", "_implicit", "_above_zero"])
def test_what_the_interpreter_gets_wrong_is_an_error(kernel):
    """In every test, whatever is tested: no kernel can depend on it."""
    values = torch.full((16,), 1.0059)
    bfloat16, integers = torch.empty(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.int32)
    pointers = (values.bfloat16(), integers) if kernel == "_above_zero" else (values, bfloat16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=r"narrow or common\.widen|sees the bits only"):
        globals()[kernel][(1,)](*pointers, BLOCK=16)


def test_every_conversion_to_the_type_of_a_pointer_goes_through_the_helper():
    """float16 as well, which the interpreter rounds as it should, so that no test could tell."""
    folder = Path(backend.__file__).parent
    found = []
    for path in sorted(folder.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or "jit" not in ast.unparse(
                function.decorator_list or [ast.Pass()]
            ):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in ("to", "cast"):
                    found.append((function.name, ast.unparse(call)))
    assert len(found) > 50
    to_pointer = {call for name, call in found if "element_ty" in call}
    # An index, no float.
    assert to_pointer == {"position.to(argmax_ptr.dtype.element_ty)"}
    short = ("float16", "DTYPE", "half", "fp_downcast")
    assert {name for name, call in found if any(word in call for word in short)} == {"narrow"}


@pytest.mark.parametrize("logs", ACTIVATION_FUNCTIONS.values())
def test_logarithms_are_a_few_units_in_the_last_place_off_at_most(logs, arithmetic):
    exponents = torch.linspace(-149, 127, 1 << 14, dtype=torch.float64)
    near_one = torch.linspace(0, 8, 1 << 14, dtype=torch.float64)
    values = torch.cat([exponents.exp2(), near_one]).float().to(DEVICE)
    ours = torch.empty_like(values)
    blocks = 1 if INTERPRETED else len(values) // 1024
    _activate[(blocks,)](values, ours, LOGS=logs, BLOCK=len(values) // blocks)
    exact = values.double()
    for _ in range(logs):
        exact = exact.log1p()
    unit = (exact.float().nextafter(torch.full_like(values, torch.inf)).double() - exact.float().double()).abs()
    assert bool(((ours.double() - exact).abs() <= 3 * logs * unit).all())
    assert bool((ours > 0)[values > 0].all()), "no positive logit is lost, the smallest denormal included"


def test_logarithms_of_what_is_not_positive_and_finite(arithmetic):
    values = torch.tensor([0.0, -0.0, -1.0, -torch.inf, torch.inf, torch.nan, 3.4e38, -1e-45] * 2, device=DEVICE)
    ours = torch.empty_like(values)
    for logs in (0, *ACTIVATION_FUNCTIONS.values()):
        _activate[(1,)](values, ours, LOGS=logs, BLOCK=16)
        assert ours[:4].tolist() == [0.0] * 4
        assert ours[4] == torch.inf
        assert bool(ours[5].isnan())
        assert bool(ours[6].isfinite())
        assert ours[7] == 0
        assert not ours.signbit()[[0, 1, 2, 3, 7]].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outputs_and_gradients_are_rounded_once(dtype, pooling, activation, arithmetic):
    case = make_case((3, 21, 16, 90), dtype, pattern="holes")
    call = oracle.new_call(
        batch_size=3,
        attention_mask=case.mask.to(DEVICE),
        max_seqlen=21,
        pooling_strategy=pooling,
        activation_function=activation,
        compute_dtype=dtype,
        out_dtype=dtype,
        screening="auto" if pooling == "max" else "off",
        need_argmax=pooling == "max",
        need_hidden=True,
        need_weight=True,
        need_bias=True,
    )
    hidden, weight, bias = (tensor.detach().to(DEVICE) for tensor in case.parameters())
    tensors = hidden.flatten(0, 1), weight, bias
    output, argmax = backend.POOLINGS[pooling].forward(call, *tensors)
    exact, expected = oracle.reference_in_double(case, pooling_strategy=pooling, activation_function=activation)
    assert oracle.rounded_once(output.cpu(), exact, oracle.float32_allowance(case, exact, pooling))

    gradients = backend.POOLINGS[pooling].backward(call, case.grad.to(DEVICE), output, argmax, *tensors)
    if pooling == "max":
        given = (case, output.cpu(), argmax.cpu(), activation)
        expected, magnitudes = oracle.expected_gradients(*given), oracle.gradient_magnitudes(*given)
    else:
        magnitudes = oracle.sum_gradient_magnitudes(case, activation)
    for ours, theirs, magnitude in zip(gradients, expected, magnitudes, strict=True):
        allowance = oracle.gradient_allowance(magnitude, 270)
        if pooling == "sum" and dtype != torch.float32 and ours is not gradients[2]:
            allowance += torch.finfo(dtype).eps / 2 * magnitude  # the logits' gradients are kept in 16 bits
        assert oracle.rounded_once(ours.cpu().view(theirs.shape), theirs, allowance)
