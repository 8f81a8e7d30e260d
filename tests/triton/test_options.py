"""Options of the maximum kernel that are there to be measured: each has to give the bits of the shipped kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import splade_kernels as sk
from tests import oracle
from tests.oracle import Case, make_case
from tests.triton import screening_cases

REASON = sk.available_backends()["triton"]
pytestmark = [pytest.mark.skipif(REASON != "available", reason=REASON), pytest.mark.usefixtures("on_accelerator")]

if REASON == "available":
    from splade_kernels.backends.triton import max_backward, pack, tuning
    from splade_kernels.backends.triton import max_forward as forward

    BASE = tuning.MatmulConfig(32, 64, 16, 4, 1, group_v=2)

OPTIONS: tuple[dict[str, Any], ...] = (
    {"tma": True, "order": "runs"},
    {"epilogue_slices": 2},
    {"tma": True, "epilogue_slices": 4},
    {"partials": True},
    {"tma": True, "partials": True},
    {"partials": True, "epilogue_slices": 4},
    {"tma": True, "order": "runs", "epilogue_slices": 2, "partials": True},
)


def ragged() -> Case:
    """Sequences of whole tiles, of a part of one, and of no token: first, last, and two between others in a tile."""
    case = make_case((8, 130, 16, 40), seed=1)
    case.mask = torch.arange(130) < torch.tensor([0, 130, 3, 0, 0, 20, 33, 0])[:, None]
    return case


def not_finite() -> Case:
    case = ragged()
    with torch.no_grad():
        case.hidden[5, 18, 5] = torch.nan
        case.hidden[6, 32, 3] = torch.inf
        case.hidden[6, :, 4] = 0
        case.weight[7] = -torch.inf
        case.bias[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    return case


def ties() -> Case:
    """Small integers, and zeros of both signs."""
    case = make_case((2, 70, 8, 20), torch.float16, pattern="holes", integers=True, bias=False)
    with torch.no_grad():
        case.hidden[0, 20:] = -0.0
    return case


CASES: dict[str, Callable[[], Case]] = {
    "ragged": ragged,
    "not finite": not_finite,
    "ties, no bias": ties,
    "shorter than a group": lambda: make_case((5, 5, 16, 33), torch.bfloat16),
}


def run(case: Case, need_argmax: bool, packed: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """With the options of the kernel."""
    hidden, call = case.hidden.detach().flatten(0, 1), oracle.call_of(case, need_argmax=need_argmax)
    if packed:
        hidden, cu_seqlens = case.packed()
        # A bound that says nothing.
        call = replace(call, attention_mask=None, cu_seqlens=cu_seqlens.int(), max_seqlen=len(hidden))
    bias = None if case.bias is None else case.bias.detach()
    return forward.max_pool_forward(call, hidden, case.weight.detach(), bias, replace(BASE, **options))


@functools.cache
def shipped(name: str, need_argmax: bool) -> tuple[Tensor, Tensor]:
    return run(CASES[name](), need_argmax)


def assert_same_bits(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], name: object) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()))
@pytest.mark.parametrize(
    "need_argmax", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["training", "inference"]
)
def test_the_bits_of_the_shipped_kernel(need_argmax, options):
    for name, make in CASES.items():
        expected = shipped(name, need_argmax)
        assert bool((expected[0] > 0).any())
        assert_same_bits(run(make(), need_argmax, **options), expected, name)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("slice_bytes", [1, 5_000])
def test_slices_of_partial_maxima(slice_bytes, packed, monkeypatch):
    monkeypatch.setattr(pack, "SLICE_BYTES", slice_bytes)
    found = run(ragged(), True, packed, partials=True, epilogue_slices=2)
    assert_same_bits(found, shipped("ragged", True), None)


def test_partial_maxima_of_no_token():
    case = make_case((3, 20, 16, 40))
    case.mask = torch.zeros_like(case.mask)
    output, argmax = run(case, True, partials=True)
    assert not output.any()
    assert not argmax.any()


@pytest.mark.parametrize("options", OPTIONS[-1:], ids=str)
def test_the_gradients(options):
    def results(**options: Any) -> tuple[Tensor, ...]:
        case = ragged()
        output, argmax = run(case, True, **options)
        call = oracle.call_of(case, need_argmax=True, need_hidden=True, need_weight=True, need_bias=True)
        tensors = [tensor.detach() for tensor in (case.hidden.flatten(0, 1), case.weight, case.bias)]
        return output, *max_backward.max_pool_backward(call, case.grad, output, argmax, *tensors)

    assert_same_bits(results(**options), results(), options)


def test_where_calls_are_screened_partial_maxima_give_way_to_keys():
    case = screening_cases.sparse_case((3, 40, 32, 70))
    expected, found = (
        screening_cases.run(case, "on", tiles={"config": config}) for config in (BASE, replace(BASE, **OPTIONS[-1]))
    )
    assert_same_bits(found, expected, None)


@pytest.mark.parametrize("key_bytes", [4, 8])
@pytest.mark.parametrize("partial_rows", [64, 128, 256])
@pytest.mark.parametrize("length", [14, 60, 512])
def test_partial_maxima_of_a_slice_stay_below_its_bytes(length, partial_rows, key_bytes):
    hidden = torch.empty(320 * length, 768, device="meta")
    call = oracle.new_call(
        batch_size=320,
        max_seqlen=length,
        compute_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )
    parts = list(pack.slices(call, 30522, hidden, key_bytes, 0, partial_rows))
    assert [parts[0].start, parts[-1].stop] == [0, 320]

    def needed(sequences: int) -> int:
        rows = pack.group_capacity(call, sequences, len(hidden)) * pack.GROUP
        return max((sequences - 1 + -(-rows // partial_rows)) * 30522 * key_bytes, rows * 768 * 2)

    sequences = parts[0].stop
    assert needed(sequences) <= pack.SLICE_BYTES
    assert sequences == 320 or needed(sequences + 2) > pack.SLICE_BYTES
