"""int8 rows on Triton: bounds that hold, and what is kept of a weight from one call to the next."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import splade_kernels as sk
from tests import oracle
from tests.conftest import ACCELERATOR
from tests.triton.screening_cases import REASON, check, run, sparse_case

pytestmark = [pytest.mark.skipif(REASON != "available", reason=REASON), pytest.mark.usefixtures("on_accelerator")]

if REASON == "available":
    from splade_kernels.backends.triton import pack
    from splade_kernels.backends.triton.screening import quantise
    from splade_kernels.backends.triton.screening import screen as screening


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtypes of the weights that were quantised."""
    dtypes: list[torch.dtype] = []
    make = screening.quantise_weight
    monkeypatch.setattr(screening, "quantise_weight", lambda weight: dtypes.append(weight.dtype) or make(weight))
    return dtypes


def quantised_rows(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result = quantise.quantise_weight(values)
    scale, radius, norm = result.statistics.view(3, -1)
    return result.rows, scale, radius, norm


@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (19, 300), (5, 129)], ids=str)
def test_scale_radius_and_norm_bound_what_they_say(shape, arithmetic):
    torch.manual_seed(0)
    values = torch.randn(shape) * torch.logspace(-10, 10, shape[0])[:, None]
    rows, scale, radius, norm = quantised_rows(values)
    exact_values, size = values.double(), shape[1]
    assert rows.shape == (shape[0], -(-size // 128) * 128)
    assert not rows[:, size:].any()
    assert rows.abs().amax(dim=1).eq(127).all()
    exact_norm = exact_values.norm(dim=1)
    residual = (exact_values - scale.double()[:, None] * rows[:, :size].double()).norm(dim=1)
    # Twice what the rounding of a dot takes: the other half is for the residual's own.
    slack = (size + 128) * 2.0**-23
    assert bool((norm.double() >= exact_norm).all())
    assert bool((norm.double() <= exact_norm * (1 + slack)).all())
    assert bool((radius.double() >= residual + 0.9 * slack * exact_norm).all())
    evaluated = residual + 3 * 2.0**-24 * exact_norm  # an element's difference is rounded too
    assert bool((radius.double() <= (evaluated + slack * norm.double()) * (1 + 2 * slack)).all())
    assert bool((residual <= 0.5001 * scale.double() * math.sqrt(size)).all())


@pytest.mark.parametrize(
    ("value", "plain"),
    [(0.0, True), (-0.0, True), (2.0**-40, True), (2.0**40, True), (2.0**-41, False), (2.0**41, False), (1e-42, False),
     (math.inf, False), (-math.inf, False), (math.nan, False)],
)  # fmt: skip
def test_rows_that_cannot_be_quantised_have_no_bound(value, plain):
    rows, scale, _, _ = quantised_rows(torch.tensor([[value, 0.0, value], [1.0, 2.0, 3.0]]))
    assert bool(scale[0].isnan()) is not plain
    assert rows[1, :3].tolist() == [42, 85, 127]
    assert rows[0].abs().max() == (127 if plain and value else 0)


def test_what_the_last_tile_still_reads_is_quantised_too():
    """Tiles are whole: behind the last group they hold zeros, not what memory happens to hold."""
    case = sparse_case((40, 32, 16, 4), pattern="full")
    case.mask[5:] = False
    call = oracle.new_call(batch_size=40, attention_mask=case.mask, max_seqlen=32, screening="on")
    hidden = case.hidden.detach().flatten(0, 1)
    packed = pack.pack_sequences(call, pack.find_tokens(call, hidden), hidden, slice(0, 40))
    assert packed.group_offsets[-1] == 10
    assert len(packed.group_sequence) == 80
    quantised = quantise.quantise_packed(packed)
    scales, radii, norms = quantised.statistics.split([80 * 16, 80, 80])
    groups = slice(10, 10 + pack.TAIL_GROUPS)
    rows = slice(16 * groups.start, 16 * groups.stop)
    assert bool((scales[: rows.start] > 0).all())
    assert not any(values.any() for values in (quantised.rows[rows], scales[rows], radii[groups], norms[groups]))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_quantised_weight_is_kept_between_inference_calls_only(autocast, calls):
    case = sparse_case((2, 20, 16, 40))

    def infer() -> Tensor:
        with torch.no_grad(), torch.autocast(ACCELERATOR, torch.bfloat16, enabled=autocast):
            return sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, screening=True, backend="triton")

    first = infer()
    assert torch.equal(infer(), first)
    assert calls == [torch.bfloat16 if autocast else torch.float32]
    with torch.no_grad():
        case.weight.neg_()
    assert not torch.equal(infer(), first)
    assert len(calls) == 2
    sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, screening=True, backend="triton")
    assert len(calls) == 3
    # A write that no version counts, after a step of training.
    case.weight.data.neg_()
    assert torch.equal(infer(), first)
    assert len(calls) == 4
    # A step that is not screened forgets the weight as well.
    sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, screening=False, backend="triton")
    assert len(calls) == 4
    infer()
    assert len(calls) == 5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_weight_written_behind_the_cache_is_quantised_again(mode, monkeypatch):
    """On a GPU the cache itself does not look at the contents: the device does."""
    kept: list[Any] = []

    def cached(weight: Tensor, kind: str, make: Any) -> Any:
        kept.append(kept[0] if kept else make())
        return kept[-1]

    monkeypatch.setattr(screening.weight_cache, "cached", cached)
    case = sparse_case((3, 20, 16, 200))
    with mode():
        check(case, run(case, "on", need_argmax=False)[0])
    for scale in (-1, 2):
        case.weight.data.mul_(scale)
        expected = screening.quantise_weight(case.weight.detach())
        check(case, run(case, "on", need_argmax=False)[0])
        assert torch.equal(kept[0][0].rows, expected.rows)
        assert torch.equal(kept[0][0].statistics, expected.statistics)
    with mode():
        kept[0][0].rows.zero_()
    run(case, "on", need_argmax=False)  # nothing was written, so nothing is quantised
    assert not kept[0][0].rows.any()


def test_a_weight_used_in_two_dtypes_is_kept_for_each(calls):
    case = sparse_case((2, 20, 16, 40))
    for autocast in (True, False, True, False):
        with torch.no_grad(), torch.autocast(ACCELERATOR, torch.bfloat16, enabled=autocast):
            sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, screening=True, backend="triton")
    assert calls == [torch.bfloat16, torch.float32]


def test_slices_share_one_quantised_weight(calls, monkeypatch):
    monkeypatch.setattr(pack, "SLICE_BYTES", 1)
    run(sparse_case((4, 20, 16, 40)), "on")
    assert len(calls) == 1
