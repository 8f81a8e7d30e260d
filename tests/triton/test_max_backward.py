"""Kernels of the backward of maximum pooling, a few tiles at a time, through the interpreter or on a GPU."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from splade_kernels.backends.pooling import PoolingCall
from tests import oracle
from tests.oracle import ACTIVATIONS, Case, make_case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

max_backward = pytest.importorskip("splade_kernels.backends.triton.max_backward")
tuning = pytest.importorskip("splade_kernels.backends.triton.tuning")
grad_hidden_module = pytest.importorskip("splade_kernels.backends.triton.grad_hidden")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERYTHING = (True, True, True)
# Tails of every block; more sequences than are looked up at once; several blocks of the hidden size.
SHAPES = [(3, 7, 13, 101), (1, 1, 1, 1), (19, 5, 40, 33), (2, 9, 300, 20), (1, 3, 1030, 9)]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def make_call(case: Case, need: tuple[bool, bool, bool] = EVERYTHING, **changes: Any) -> PoolingCall:
    options: dict[str, Any] = {
        "attention_mask": case.mask.to(DEVICE),
        "pooling_strategy": "max",
        "need_hidden": need[0],
        "need_weight": need[1],
        "need_bias": need[2],
    }
    return oracle.call_of(case, **(options | changes))


def backward(
    call: PoolingCall,
    case: Case,
    output: Tensor,
    argmax: Tensor,
    hidden: Tensor | None = None,
    grad: Tensor | None = None,
) -> Gradients:
    hidden = case.hidden.detach().flatten(0, -2) if hidden is None else hidden
    bias = None if case.bias is None else case.bias.detach().to(DEVICE)
    gradients: Gradients = max_backward.max_pool_backward(
        call,
        (case.grad if grad is None else grad).to(DEVICE),
        output.to(DEVICE),
        argmax.to(DEVICE),
        hidden.to(DEVICE),
        case.weight.detach().to(DEVICE),
        bias,
    )
    return gradients


def assert_follows(case: Case, gradients: Gradients, output: Tensor, argmax: Tensor, activation: str = "relu") -> None:
    """The gradients that follow the given argmax, summed in float32 and rounded to the dtype of the parameter."""
    expected = oracle.expected_gradients(case, output, argmax, activation)
    magnitudes = oracle.gradient_magnitudes(case, output, argmax, activation)
    parameters = case.hidden, case.weight, case.bias
    for ours, exact, magnitude, parameter in zip(gradients, expected, magnitudes, parameters, strict=True):
        assert (ours is None) == (parameter is None)
        if ours is not None and parameter is not None:
            assert ours.dtype == parameter.dtype
            allowance = oracle.gradient_allowance(magnitude, max(output.shape))
            assert oracle.rounded_once(ours.cpu().view(exact.shape), exact, allowance)


def assert_same_bits(first: Gradients, second: Gradients) -> None:
    for ours, theirs in zip(first, second, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.equal(ours, theirs)


def hot_token(entries: int, length: int = 5, batch: int = 2) -> tuple[Case, Tensor, Tensor]:
    """All of a vocabulary of ``entries`` entries at one token of each sequence, the last one at another token."""
    case = make_case((batch, length, 24, entries + 1), pattern="full")
    argmax = torch.full(case.grad.shape, 3, dtype=torch.int16)
    argmax[:, -1] = 1
    return case, torch.rand(case.grad.shape) + 0.1, argmax


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_follow_the_argmax(shape, dtype, activation):
    case = make_case(shape, dtype, pattern="holes")
    output, argmax = oracle.forward_with_argmax(case, "torch", activation)
    call = make_call(case, activation_function=activation)
    assert_follows(case, backward(call, case, output, argmax), output, argmax, activation)


@pytest.mark.parametrize("pattern", ["left", "holes", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_packed_and_more_padded_are_the_same_bits(dtype, pattern, monkeypatch):
    monkeypatch.setattr(grad_hidden_module, "CHUNK", 8)
    case = make_case((4, 6, 20, 80), dtype, pattern=pattern)
    output, argmax = oracle.forward_with_argmax(case, "torch")
    padded = backward(make_call(case), case, output, argmax)
    assert_follows(case, padded, output, argmax)
    grad_hidden = padded[0].view(case.hidden.shape)

    rows, cu_seqlens = case.packed()
    rank = (case.mask.int().cumsum(dim=1) - 1).clamp_min(0).gather(1, argmax.long()).to(argmax.dtype)
    for bound, index_dtype in ((6, torch.int32), (len(rows), torch.int64)):
        call = make_call(case, attention_mask=None, cu_seqlens=cu_seqlens.to(DEVICE, index_dtype), max_seqlen=bound)
        packed = backward(call, case, output, rank, hidden=rows)
        assert_same_bits(packed, (grad_hidden[case.mask.to(DEVICE)], *padded[1:]))

    wider = torch.full((4, 21, 20), math.nan, dtype=dtype)
    wider[:, 9 : 9 + 6] = case.hidden.detach()
    call = make_call(case, max_seqlen=21)
    shifted = (argmax + 9 * (output > 0)).to(argmax.dtype)
    more = backward(call, case, output, shifted, hidden=wider.flatten(0, 1))
    kept = more[0].view(wider.shape)
    assert_same_bits((kept[:, 9 : 9 + 6], *more[1:]), (grad_hidden, *padded[1:]))
    assert (kept[:, :9] == 0).all()
    assert (kept[:, 9 + 6 :] == 0).all()


@pytest.mark.parametrize("entries", [15, 16, 17, 32, 33, 200])
def test_runs_around_and_beyond_a_chunk(entries, monkeypatch):
    monkeypatch.setattr(grad_hidden_module, "CHUNK", 16)
    case, output, argmax = hot_token(entries)
    assert_follows(case, backward(make_call(case), case, output, argmax), output, argmax)


def test_a_run_longer_than_the_real_chunk():
    entries = 3 * grad_hidden_module.CHUNK + 5
    case, output, argmax = hot_token(entries, batch=1)
    assert_follows(case, backward(make_call(case), case, output, argmax), output, argmax)


def test_every_row_may_be_a_long_run(monkeypatch):
    """The chunks of all rows together fill the capacity that the host reserved for them."""
    monkeypatch.setattr(grad_hidden_module, "CHUNK", 4)
    case = make_case((2, 3, 8, 15), pattern="full")
    argmax = (torch.arange(15) % 3).expand(2, 15).to(torch.int16)
    output = torch.ones(2, 15)
    assert_follows(case, backward(make_call(case), case, output, argmax), output, argmax)
    argmax = torch.zeros_like(argmax)
    assert_follows(case, backward(make_call(case), case, output, argmax), output, argmax)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_slices_do_not_show(packed, monkeypatch):
    monkeypatch.setattr(grad_hidden_module, "CHUNK", 8)
    case = make_case((7, 9, 20, 60), pattern="empty")
    output, argmax = oracle.forward_with_argmax(case, "torch")
    call, hidden = make_call(case), None
    if packed:
        hidden, cu_seqlens = case.packed()
        call = make_call(case, attention_mask=None, cu_seqlens=cu_seqlens.to(DEVICE), max_seqlen=len(hidden))
    whole = backward(call, case, output, argmax, hidden)
    for entries in (1, 120, 200):
        monkeypatch.setattr(grad_hidden_module, "SLICE_ENTRIES", entries)
        assert_same_bits(backward(call, case, output, argmax, hidden), whole)


def test_one_long_sequence_among_short_ones_takes_several_turns(monkeypatch):
    """Its slice has more rows than an even share of the tokens, for which programs were launched."""
    monkeypatch.setattr(grad_hidden_module, "SLICE_ENTRIES", 1)
    case = make_case((4, 300, 8, 40), pattern="full")
    case.mask[[0, 2, 3], 1:] = False
    rows, cu_seqlens = case.packed()
    argmax = torch.zeros(4, 40, dtype=torch.int16)
    argmax[1] = torch.arange(40) * 7 + 20
    output = torch.ones(4, 40)
    call = make_call(case, attention_mask=None, cu_seqlens=cu_seqlens.to(DEVICE), max_seqlen=len(rows))
    grad_hidden, *others = backward(call, case, output, argmax, hidden=rows)
    padded = torch.zeros(4, 300, 8)
    padded[case.mask] = grad_hidden.cpu()
    assert_follows(case, (padded, *others), output, argmax)


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_nothing_active_gives_zeros_whatever_comes_in(value):
    case = make_case((3, 4, 20, 18))
    output = torch.full(case.grad.shape, value)
    grad = torch.full(case.grad.shape, math.nan)
    hidden = torch.full((12, 20), math.inf)
    gradients = backward(make_call(case), case, output, torch.zeros(3, 18, dtype=torch.int16), hidden, grad)
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_everything_active():
    case = make_case((18, 4, 20, 35), pattern="full")
    generator = torch.Generator().manual_seed(1)
    output = torch.rand(18, 35, generator=generator) + 0.01
    argmax = torch.randint(0, 4, (18, 35), generator=generator, dtype=torch.int16)
    assert_follows(case, backward(make_call(case), case, output, argmax), output, argmax)


def test_a_zero_gradient_drops_the_entry():
    """Infinite tokens and vocabulary entries that nothing with a gradient chose touch nothing."""
    case = make_case((2, 4, 20, 18), pattern="full")
    with torch.no_grad():
        case.hidden[0, 2] = math.inf
        case.weight[5] = math.nan
    output = torch.ones(2, 18)
    argmax = torch.zeros(2, 18, dtype=torch.int16)
    argmax[0, 7] = 2
    grad = case.grad.clone()
    grad[:, 5] = 0
    grad[0, 7] = 0
    output[1, 9] = math.inf
    grad_hidden, grad_weight, grad_bias = backward(make_call(case), case, output, argmax, grad=grad)
    assert grad_hidden.isfinite().all()
    assert grad_weight.isfinite().all()
    assert grad_bias.isfinite().all()
    assert (grad_weight[5] == 0).all()
    assert (grad_hidden.view(2, 4, 20)[0, 2] == 0).all()


@pytest.mark.parametrize("where", ["hidden", "weight", "grad", "output"])
def test_nan_of_an_active_entry_arrives_where_it_belongs(where):
    case = make_case((2, 4, 20, 18), pattern="full")
    output = torch.ones(2, 18)
    argmax = torch.zeros(2, 18, dtype=torch.int16)
    argmax[0, 7] = 2
    with torch.no_grad():
        if where == "hidden":
            case.hidden[0, 2] = math.nan
        elif where == "weight":
            case.weight[7] = math.nan
        elif where == "grad":
            case.grad[0, 7] = math.nan
        else:
            output[0, 7] = math.nan
    grad_hidden, grad_weight, grad_bias = (
        gradient.cpu().isnan() for gradient in backward(make_call(case), case, output, argmax)
    )
    tokens = torch.zeros(2, 4, dtype=torch.bool)
    words = torch.zeros(18, dtype=torch.bool)
    tokens[0, 2] = where != "hidden"
    # Word 7 of the other sequence is on its token 0.
    tokens[1, 0] = where == "weight"
    words[7] = where != "weight"
    assert torch.equal(grad_hidden.view(2, 4, 20), tokens[..., None].expand(2, 4, 20))
    assert torch.equal(grad_weight, words[:, None].expand(18, 20))
    assert torch.equal(grad_bias, words & (where in ("grad", "output")))


def test_only_what_is_asked_for():
    case = make_case((3, 5, 20, 40), pattern="ragged")
    output, argmax = oracle.forward_with_argmax(case, "torch")
    everything = backward(make_call(case), case, output, argmax)
    for number in range(8):
        need = (number & 1 > 0, number & 2 > 0, number & 4 > 0)
        expected = tuple(gradient if needed else None for gradient, needed in zip(everything, need, strict=True))
        assert_same_bits(backward(make_call(case, need), case, output, argmax), expected)
    case.bias = None
    assert_same_bits(backward(make_call(case), case, output, argmax), (*everything[:2], None))


@pytest.mark.parametrize("shape", [(0, 4, 8, 5), (3, 0, 8, 5), (3, 4, 8, 0), (3, 4, 0, 5)], ids=str)
def test_empty_dimensions(shape):
    batch, length, hidden_size, vocab_size = shape
    case = make_case(shape, pattern="full")
    output = torch.ones(batch, vocab_size) if length else torch.zeros(batch, vocab_size)
    argmax = torch.zeros(batch, vocab_size, dtype=torch.int16)
    grad_hidden, grad_weight, grad_bias = backward(make_call(case), case, output, argmax)
    assert grad_hidden.shape == (batch * length, hidden_size)
    assert grad_weight.shape == (vocab_size, hidden_size)
    assert (grad_hidden == 0).all()
    assert (grad_weight == 0).all()
    expected = torch.where(output > 0, case.grad.double() * math.exp(-1), 0).sum(dim=0)
    assert oracle.largest_error(grad_bias.cpu(), expected) <= 1e-6


def test_rows_of_no_sequence_are_zero():
    case = make_case((0, 0, 8, 5))
    call = make_call(case, cu_seqlens=torch.zeros(1, dtype=torch.int32, device=DEVICE), max_seqlen=3)
    empty = torch.zeros(0, 5, dtype=torch.int16)
    grad_hidden, grad_weight, _ = backward(call, case, empty.float(), empty, hidden=torch.ones(3, 8))
    assert (grad_hidden == 0).all()
    assert grad_hidden.shape == (3, 8)
    assert (grad_weight == 0).all()


@pytest.mark.parametrize(
    ("cu_seqlens", "bound"),
    [
        ([0, 8, 4, 12], 12),
        ([-5, 4, 8, 12], 12),
        ([2, 4, 8, 11], 12),
        ([0, 4, 8, 1 << 40], 12),
        ([0, 4, 8, 12], 2),
        ([0, 4, 8, 12], 0),
        ([12, 12, 12, 12], 12),
        ([0, 0, 0, 0], 12),
    ],
    ids=str,
)
def test_wrong_lengths_on_a_device_read_nothing_outside_and_leave_nothing_unwritten(cu_seqlens, bound, monkeypatch):
    """They cannot be checked there; rows outside h are NaN here, and so is every row that no kernel writes."""
    monkeypatch.setattr(grad_hidden_module, "SLICE_ENTRIES", 40)
    case = make_case((3, 12, 20, 40), pattern="full")
    call = make_call(case, cu_seqlens=torch.tensor(cu_seqlens, device=DEVICE), max_seqlen=bound)
    surrounded = torch.full((36, 20), math.nan)
    surrounded[12:24] = 1
    for position in (0, 3, 11, -1, 20000):
        argmax = torch.full((3, 40), position, dtype=torch.int16)
        hidden = surrounded.to(DEVICE)[12:24]
        gradients = backward(call, case, torch.ones(3, 40), argmax, hidden=hidden)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        if position in (-1, 20000):
            assert (gradients[0] == 0).all()
            assert (gradients[1] == 0).all()


def test_any_strides(monkeypatch):
    monkeypatch.setattr(grad_hidden_module, "CHUNK", 8)
    case = make_case((3, 7, 20, 45), pattern="holes")
    output, argmax = oracle.forward_with_argmax(case, "torch")
    expected = backward(make_call(case), case, output, argmax)

    def strided(tensor: Tensor) -> Tensor:
        """The same values in every third element of a transposed, offset buffer."""
        buffer = torch.full((tensor.shape[1], 3 * tensor.shape[0] + 1), 9.0)
        view = buffer[:, 1::3].t()
        return view.copy_(tensor)

    gradients = max_backward.max_pool_backward(
        make_call(case),
        strided(case.grad).to(DEVICE),
        strided(output).to(DEVICE),
        argmax.t().contiguous().t().to(DEVICE),
        strided(case.hidden.detach().flatten(0, 1)).to(DEVICE),
        strided(case.weight.detach()).to(DEVICE),
        case.bias.detach().to(DEVICE),
    )
    assert_follows(case, gradients, output, argmax)
    if INTERPRETED:
        assert_same_bits(gradients, expected)


def test_one_row_for_the_whole_batch_and_scattered_alignment():
    """The gradient of FLOPS arrives with strides (0, 1); that of a concatenation begins anywhere."""
    case = make_case((3, 7, 20, 45), pattern="ragged")
    output, argmax = oracle.forward_with_argmax(case, "torch")
    row = torch.randn(1, 45, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    dense = backward(make_call(case), case, output, argmax, grad=row.repeat(3, 1))
    assert_same_bits(backward(make_call(case), case, output, argmax, grad=row.expand(3, -1)), dense)
    shifted = torch.cat([row[0, :1], row.repeat(3, 1).flatten()])[1:].view(3, 45)
    assert_same_bits(backward(make_call(case), case, output, argmax, grad=shifted), dense)


def test_two_runs_are_bitwise_the_same():
    case = make_case((4, 12, 70, 150), pattern="ragged")
    output, argmax = oracle.forward_with_argmax(case, "torch")
    first = backward(make_call(case), case, output, argmax)
    assert_same_bits(backward(make_call(case), case, output, argmax), first)


def test_each_gradient_has_the_dtype_of_its_parameter():
    """Under autocast h may be bfloat16 and the parameters, y and dy float32; sums are float32 in any case."""
    case = make_case((3, 7, 20, 45), pattern="ragged")
    output, argmax = oracle.forward_with_argmax(case, "torch")
    case.hidden = case.hidden.detach().to(torch.bfloat16)
    call = make_call(case, compute_dtype=torch.bfloat16, out_dtype=torch.float32)
    gradients = backward(call, case, output, argmax)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    # dh sums rows of what the forward multiplied with.
    assert_follows(replace(case, weight=case.weight.detach().bfloat16().float()), gradients, output, argmax)


def test_positions_of_four_bytes():
    case = make_case((1, 33000, 2, 3), pattern="full")
    argmax = torch.tensor([[32990, 0, 32990]], dtype=torch.int32)
    output = torch.ones(1, 3)
    assert_follows(case, backward(make_call(case), case, output, argmax), output, argmax)


@pytest.mark.parametrize(
    ("hidden_size", "block"), [(1, 16), (20, 32), (100, 128), (312, 64), (384, 128), (768, 256), (4096, 256)]
)
def test_blocks_of_dw_leave_few_lanes_idle(hidden_size, block):
    assert tuning.default_weight_config(hidden_size).block_d == block
