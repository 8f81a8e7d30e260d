"""Kernels of sum pooling, a few tiles at a time, through the interpreter or on a GPU."""

from __future__ import annotations

import os
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

pack = pytest.importorskip("splade_kernels.backends.triton.pack")
sum_pool = pytest.importorskip("splade_kernels.backends.triton.sum_pool")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERYTHING = (True, True, True)


def make_call(case: Case, need: tuple[bool, bool, bool] = EVERYTHING, **changes: Any) -> PoolingCall:
    options: dict[str, Any] = {
        "attention_mask": case.mask.to(DEVICE),
        "pooling_strategy": "sum",
        "need_hidden": need[0],
        "need_weight": need[1],
        "need_bias": need[2] and case.bias is not None,
    }
    return oracle.call_of(case, **(options | changes))


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden, weight = case.hidden.detach().to(DEVICE), case.weight.detach().to(DEVICE)
    return hidden.flatten(0, -2), weight, None if case.bias is None else case.bias.detach().to(DEVICE)


def run(call: PoolingCall, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Output and the gradients that were asked for."""
    output, argmax = sum_pool.sum_pool_forward(call, hidden, weight, bias)
    assert argmax.numel() == 0
    gradients = sum_pool.sum_pool_backward(call, grad.to(DEVICE), output, argmax, hidden, weight, bias)
    needed = (call.need_hidden, call.need_weight, call.need_bias)
    assert [gradient is not None for gradient in gradients] == list(needed)
    return [output, *(gradient for gradient in gradients if gradient is not None)]


def compare(case: Case, results: list[Tensor], activation: str = "relu") -> None:
    """Against float64: sums of float32, rounded once, of which those of 16-bit logit gradients have two roundings."""
    output, gradients = oracle.reference_in_double(case, pooling_strategy="sum", activation_function=activation)
    dtype = case.hidden.dtype
    batch, length, hidden_size = case.hidden.shape
    terms = max(case.grad.shape[1], batch * length) + 2 * hidden_size
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    magnitudes = oracle.sum_gradient_magnitudes(case, activation)
    allowances = [oracle.float32_allowance(case, output, "sum")]
    allowances += [oracle.gradient_allowance(m, terms) + (rounding if m.ndim > 1 else 0) * m for m in magnitudes]
    for ours, exact, allowance in zip(results, [output, *gradients], allowances[: len(results)], strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert oracle.rounded_once(ours.cpu().view(exact.shape), exact, allowance)


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 37, 13, 101), (2, 16, 16, 16), (1, 1, 1, 1), (2, 33, 33, 17)], ids=str)
def test_values_and_gradients_at_every_tail(shape, dtype, activation):
    case = make_case(shape, dtype, pattern="ragged")
    compare(case, run(make_call(case, activation_function=activation), case.grad, *inputs(case)), activation)


@pytest.mark.parametrize("pattern", ["full", "left", "holes", "one", "empty"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_mask_patterns(pattern, bias):
    case = make_case((4, 35, 12, 40), pattern=pattern, bias=bias)
    results = run(make_call(case), case.grad, *inputs(case))
    compare(case, results)
    assert (results[1].cpu().view(case.hidden.shape)[~case.mask] == 0).all(), "padding has no gradient"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence or two a slice, four groups of rows and a fraction of the vocabulary a chunk."""
    monkeypatch.setattr(pack, "SLICE_BYTES", 1 << 12)
    monkeypatch.setattr(sum_pool, "CHUNK_ROWS", 64 if INTERPRETED else 128)
    monkeypatch.setattr(sum_pool, "CHUNK_VOCAB", 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_and_chunks_do_not_show(dtype, small_pieces):
    case = make_case((6, 50, 12, 100), dtype, pattern="holes")
    assert len(list(pack.slices(make_call(case), 100, torch.empty(300, 12), 0))) > 1
    compare(case, run(make_call(case), case.grad, *inputs(case)))


@pytest.mark.parametrize("pieces", ["whole", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_packed_and_more_padded_are_the_same_bits(dtype, pieces, request):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    case = make_case((5, 45, 12, 70), dtype, pattern="empty")
    hidden, weight, bias = inputs(case)
    padded = run(make_call(case), case.grad, hidden, weight, bias)
    assert same_bits(padded, run(make_call(case), case.grad, hidden, weight, bias)), "two runs"

    rows, cu_seqlens = case.packed()
    for max_seqlen in (45, len(rows)):
        call = make_call(case, attention_mask=None, cu_seqlens=cu_seqlens.int().to(DEVICE), max_seqlen=max_seqlen)
        packed = run(call, case.grad, rows.to(DEVICE), weight, bias)
        packed[1], expected = packed[1].cpu(), padded[1].cpu().view(case.hidden.shape)[case.mask]
        assert same_bits(packed, [padded[0], expected, *padded[2:]])

    wider = torch.full((5, 70, 12), torch.nan, dtype=dtype)
    wider[:, 9 : 9 + 45] = torch.where(case.mask[..., None], case.hidden.detach(), torch.nan)
    mask = torch.zeros(5, 70, dtype=torch.int64)
    mask[:, 9 : 9 + 45] = case.mask * 3
    call = make_call(case, attention_mask=mask.to(DEVICE), max_seqlen=70)
    more = run(call, case.grad, wider.to(DEVICE).flatten(0, 1), weight, bias)
    more[1] = more[1].view(5, 70, 12)[:, 9 : 9 + 45].flatten(0, 1)
    assert same_bits(more, padded)


@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)], ids=str)
def test_only_what_is_needed(need, monkeypatch):
    case = make_case((3, 20, 12, 40), pattern="holes")
    hidden, weight, bias = inputs(case)
    _, *full = run(make_call(case), case.grad, hidden, weight, bias)
    products = []
    real = sum_pool._add_product
    monkeypatch.setattr(sum_pool, "_add_product", lambda *operands: products.append(0) or real(*operands))
    _, *some = run(make_call(case, tuple(map(bool, need))), case.grad, hidden, weight, bias)
    assert same_bits(some, [gradient for gradient, needed in zip(full, need, strict=True) if needed])
    assert len(products) == need[0] + need[1]


@pytest.mark.parametrize("position", [0, 17, 18])
def test_nan_in_one_real_token_reaches_its_sequence_and_no_other(position):
    case = make_case((3, 19, 8, 30), pattern="full")
    with torch.no_grad():
        case.hidden[1, position, 3] = torch.nan
    output, grad_hidden, grad_weight, grad_bias = run(make_call(case), case.grad, *inputs(case))
    assert output[1].isnan().all()
    assert not output[[0, 2]].isnan().any()
    rows = grad_hidden.view(3, 19, 8)
    assert rows[1, position].isnan().all()
    assert rows.isnan().any(dim=-1).sum() == 1
    assert grad_weight.isnan().all()
    assert grad_bias.isnan().all()


def test_a_gradient_of_an_inactive_logit_is_dropped():
    """One vocabulary entry is inactive at every token: whatever its incoming gradient is, nothing comes of it."""
    case = make_case((2, 5, 4, 6), pattern="full")
    with torch.no_grad():
        case.bias[2] = -1e4
    expected = run(make_call(case), case.grad, *inputs(case))
    assert (expected[0][:, 2] == 0).all()
    for poison in (torch.nan, torch.inf):
        case.grad[:, 2] = poison
        assert same_bits(run(make_call(case), case.grad, *inputs(case)), expected)


@pytest.mark.parametrize("shape", [(0, 4, 8, 9), (2, 0, 8, 9), (2, 4, 8, 0), (0, 0, 8, 9)], ids=str)
def test_empty_inputs(shape):
    batch, length, hidden_size, vocab_size = shape
    case = Case(
        torch.ones(batch, length, hidden_size),
        torch.ones(vocab_size, hidden_size),
        torch.ones(vocab_size),
        torch.ones(batch, length, dtype=torch.bool),
        torch.ones(batch, vocab_size),
    )
    output, grad_hidden, grad_weight, grad_bias = run(make_call(case), case.grad, *inputs(case))
    assert output.shape == (batch, vocab_size)
    assert grad_hidden.shape == (batch * length, hidden_size)
    assert grad_weight.shape == (vocab_size, hidden_size)
    assert all((result == 0).all() for result in (output, grad_hidden, grad_weight, grad_bias))


def test_any_strides_and_offsets():
    case = make_case((3, 21, 8, 30), pattern="holes")
    hidden, weight, bias = inputs(case)
    expected = run(make_call(case), case.grad, hidden, weight, bias)

    def strided(tensor: Tensor) -> Tensor:
        """The same values in every third element of a transposed, offset buffer."""
        shape = tensor.shape[::-1]
        buffer = torch.full((*shape[:-1], 3 * shape[-1] + 1), torch.nan, device=DEVICE)
        view = buffer[..., 1::3].permute(*reversed(range(tensor.ndim)))
        return view.copy_(tensor)

    call = make_call(case, attention_mask=case.mask.t().contiguous().t().to(DEVICE))
    results = run(call, strided(case.grad), strided(hidden), strided(weight), strided(bias))
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())

    row = torch.randn(1, 30)
    broadcast = run(make_call(case), row.to(DEVICE).expand(3, -1), hidden, weight, bias)
    assert same_bits(broadcast, run(make_call(case), row.repeat(3, 1), hidden, weight, bias))


def test_parameters_wider_than_the_products_keep_their_dtype():
    """As under autocast: float32 parameters, bfloat16 products, float32 output."""
    case = make_case((3, 20, 16, 40), torch.bfloat16, pattern="holes")
    exact = oracle.reference_in_double(case, pooling_strategy="sum")
    hidden, weight, bias = (tensor.float() for tensor in inputs(case))
    call = make_call(case, compute_dtype=torch.bfloat16, out_dtype=torch.float32)
    results = run(call, case.grad.float(), hidden, weight, bias)
    magnitudes = oracle.sum_gradient_magnitudes(case, "relu")
    allowances = [oracle.float32_allowance(case, exact[0], "sum")]
    allowances += [oracle.gradient_allowance(m, 100) + (2.0**-8 if m.ndim > 1 else 0) * m for m in magnitudes]
    for ours, theirs, allowance in zip(results, [exact[0], *exact[1]], allowances, strict=True):
        assert ours.dtype == torch.float32
        assert oracle.rounded_once(ours.cpu().view(theirs.shape), theirs, allowance)


def test_a_row_does_not_depend_on_its_batch():
    case = make_case((4, 40, 12, 50), pattern="ragged")
    hidden, weight, bias = inputs(case)
    output, *_ = run(make_call(case), case.grad, hidden, weight, bias)
    for b in range(4):
        length = int(case.mask[b].sum())
        rows = case.hidden.detach()[b, :length].to(DEVICE)
        alone = make_call(case, batch_size=1, attention_mask=None, max_seqlen=length)
        assert torch.equal(sum_pool.sum_pool_forward(alone, rows, weight, bias)[0][0], output[b])


def test_cu_seqlens_that_cannot_be_checked_reads_nothing_out_of_bounds():
    """On a device its values are clamped: rows past the end of the hidden states do not exist."""
    case = make_case((2, 10, 8, 20), pattern="full")
    rows, weight, bias = inputs(case)
    wrong, right = (torch.tensor(bounds, device=DEVICE) for bounds in ([0, 12, 1000], [0, 12, 20]))
    options = {"attention_mask": None, "max_seqlen": 20}
    ours = run(make_call(case, cu_seqlens=wrong, **options), case.grad, rows, weight, bias)
    assert same_bits(ours, run(make_call(case, cu_seqlens=right, **options), case.grad, rows, weight, bias))
