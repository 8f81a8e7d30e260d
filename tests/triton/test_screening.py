"""Exact screening on Triton: no active pair is lost, and nothing of how it was found shows in the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import splade_kernels as sk
from tests import oracle
from tests.conftest import ACCELERATOR
from tests.oracle import Case, make_case
from tests.triton.screening_cases import REASON, check, logits, run, sparse_case

pytestmark = [pytest.mark.skipif(REASON != "available", reason=REASON), pytest.mark.usefixtures("on_accelerator")]

if REASON == "available":
    from splade_kernels.backends.triton import launch, pack, tuning
    from splade_kernels.backends.triton.screening import exact
    from splade_kernels.backends.triton.screening import screen as screening


@dataclass
class Seen:
    """What one slice's screening left to the exact kernel and to the unscreened one."""

    entries: int
    tokens: dict[tuple[int, int], int]  # (group, vocabulary entry) -> bits of its tokens
    group_sequence: list[int]
    dense_sequence: list[int]
    dense_groups: int


@pytest.fixture(params=["pointers", "descriptors"])
def tiles(request: pytest.FixtureRequest) -> Callable[..., tuple[Tensor, Tensor]]:
    """:func:`run` with tiles smaller than every case, fetched one way or the other."""
    config = tuning.MatmulConfig(32, 64, 32, 4, 1, group_v=2, tma=request.param == "descriptors")
    return partial(run, tiles={"config": config, "int8_config": config})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """One item a slice."""
    slices: list[Seen] = []

    def look(packed: Any, weight: Any, bias: Any, dense: Any, outcome: Any, queue: Any, count: Any, keys: Any) -> None:
        groups = int(packed.group_offsets[-1])
        tokens = {}
        for entry in queue[: int(count)].tolist():
            pair = (entry >> 16) & ((1 << 27) - 1), entry >> 43
            assert pair not in tokens
            tokens[pair] = entry & 0xFFFF
        sequences = packed.group_sequence[:groups].tolist()
        slices.append(Seen(int(count), tokens, sequences, dense[:groups].tolist(), int(outcome[0])))
        exact.compute_exactly(packed, weight, bias, dense, outcome, queue, count, keys)

    monkeypatch.setattr(screening, "compute_exactly", look)
    return slices


@pytest.fixture
def auto_screens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a checked-in result said that screening pays on the device at hand."""
    here = launch.architecture(torch.device(ACCELERATOR))
    monkeypatch.setattr(tuning, "SCREENING_PAYS", frozenset({here}))


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair may be kept, so no sequence is dense."""
    for mode in ("on", "auto"):
        monkeypatch.setitem(screening.SHARE, mode, 1)


def hostile_rows(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Each of a kind of its own, on the CPU."""
    values = torch.randn(count, size, generator=generator, device="cpu")
    kind = torch.randint(0, 24, (count,), generator=generator, device="cpu")
    values[kind == 0, 0] *= 300  # an outlier dimension
    values[kind == 1, 1:] *= 1e-6
    values[kind == 2] = 0
    values[kind == 3] *= 2.0**-60
    values[kind == 4] *= 2.0**60
    values[kind == 5] *= 1e-42  # denormal
    values[kind == 6] *= 2.0**-40 / values[kind == 6].abs().amax(dim=1, keepdim=True)
    values[kind == 7] *= 2.0**40 / values[kind == 7].abs().amax(dim=1, keepdim=True)
    values[kind == 8] = values[kind == 8].sign()
    # Multiples of a step: nothing is left to the radius but the allowance for rounding.
    step = torch.tensor([1.0, 0.1, 1 / 3, 1 / 127], device="cpu")[kind % 4, None]
    multiples = (values / values.abs().amax(dim=1, keepdim=True) * 127).round() * step
    return torch.where((kind >= 9)[:, None], multiples, values)


def hostile_case(seed: int) -> tuple[Case, Tensor]:
    """Rows of every kind on both sides, and the exact logits; a bias makes one pair of each entry barely positive."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size = int(torch.randint(1, 70, (), generator=generator, device="cpu"))
    hidden, weight = hostile_rows(40, size, generator), hostile_rows(66, size, generator)
    dots = hidden.double() @ weight.double().t()
    token = torch.randint(0, 40, (1, 66), generator=generator, device="cpu")
    chosen = dots.gather(0, token)[0]
    below = chosen.float()
    for _ in range(2):
        below = torch.where(below < chosen, below, below.nextafter(torch.full_like(below, -torch.inf)))
    case = Case(
        *(tensor.to(ACCELERATOR) for tensor in (hidden[None], weight, -below)),
        torch.ones(1, 40, dtype=torch.bool),
        torch.ones(1, 66),
    )
    return case, dots - below.double()


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 25))])
def test_no_pair_that_is_positive_by_a_hair_is_lost(seed, seen, keep_all, arithmetic, monkeypatch):
    monkeypatch.setattr(exact, "compute_exactly", lambda *arguments: None)
    case, exact_logits = hostile_case(seed)
    run(case, "on")
    (slice_seen,) = seen
    token, word = torch.nonzero(exact_logits > 0, as_tuple=True)
    assert len(token) >= 66
    for t, v in zip(token.tolist(), word.tolist(), strict=True):
        assert slice_seen.tokens.get((t // 16, v), 0) >> (t % 16) & 1, (t, v)
    assert slice_seen.dense_groups == 0


def test_most_pairs_of_ordinary_rows_are_screened_away(tiles, seen, keep_all):
    case = sparse_case((2, 40, 96, 70), pattern="full")
    tiles(case, "on")
    (slice_seen,) = seen
    active = logits(case) > 0
    kept = sum(bits.bit_count() for bits in slice_seen.tokens.values())
    assert int(active.sum()) <= kept <= 2 * int(active.sum()) + 10
    assert kept < 0.05 * active.numel()


@pytest.mark.parametrize("need_argmax", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
@pytest.mark.parametrize("shape", [(3, 33, 17, 65), (1, 17, 130, 31), (5, 1, 8, 33)], ids=str)
def test_values_support_and_argmax(tiles, shape, dtype, need_argmax, keep_all):
    case = sparse_case(shape, dtype, pattern="holes")
    output, argmax = tiles(case, "on", need_argmax)
    check(case, output, argmax if need_argmax else None)


@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.parametrize("bias", [-1000.0, 1000.0], ids=["none active", "all active"])
def test_none_and_all_active(tiles, auto_screens, mode, bias, seen):
    case = make_case((2, 40, 16, 70))
    with torch.no_grad():
        case.bias.fill_(bias)
    output, argmax = tiles(case, mode)
    check(case, output, argmax)
    dense = bias > 0
    assert seen[0].dense_groups == (len(seen[0].group_sequence) if dense else 0)
    if dense:
        assert torch.equal(output, tiles(case, "off")[0])


def mixed_case() -> Case:
    """Four sequences of a group or two, all in one tile of tokens; the third one is dense.

    A few vocabulary entries of the first tile are active in it, which are queued, and all of the second tile, which are
    too many.
    """
    case = sparse_case((4, 20, 200, 45), pattern="full")
    case.mask[[0, 2, 3], 16:] = False
    with torch.no_grad():
        case.weight[:, 0] = 0.0
        case.weight[[*range(5), *range(32, 45)], 0] = 1.0
        case.hidden[..., 0] = 0.0
        case.hidden[2, :, 0] = 8.0
    return case


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 1, 3], [0, 1, 3, 2], [0, 2, 3], [2, 2], [0, 2, 0, 2]], ids=str)
def test_dense_sequences_fall_back_alone(tiles, order, seen, monkeypatch):
    monkeypatch.setitem(screening.SHARE, "on", 4)
    whole = mixed_case()
    case = Case(whole.hidden[order], whole.weight, whole.bias, whole.mask[order], whole.grad[order])
    output, argmax = tiles(case, "on")
    check(case, output, argmax)
    (slice_seen,) = seen
    dense = {b for b, original in enumerate(order) if original == 2}
    assert {b for b in slice_seen.dense_sequence if b >= 0} == dense
    if ACCELERATOR == "cpu":  # where the first tile is the first one
        assert slice_seen.entries >= 5 * len(dense)
    unscreened = tiles(case, "off")
    for b in dense:
        assert torch.equal(output[b], unscreened[0][b])
        assert torch.equal(argmax[b], unscreened[1][b])


@pytest.mark.parametrize("active", [5, 6, 7])
def test_a_sequence_is_dense_from_one_pair_too_many_on(tiles, active, seen, monkeypatch):
    monkeypatch.setitem(screening.SHARE, "on", 6)  # 40 // 6 = 6 pairs of a group
    weight = torch.full((40, 8), -1.0)
    weight[7 : 7 + active] = 1.0
    case = Case(torch.ones(1, 10, 8), weight, None, torch.ones(1, 10, dtype=torch.bool), torch.ones(1, 40))
    output, argmax = tiles(case, "on")
    check(case, output, argmax)
    assert seen[0].dense_groups == (1 if active > 6 else 0)
    assert seen[0].entries == len(seen[0].tokens) == (active if active <= 6 else 0)


def test_fewer_words_than_the_share_leave_no_budget(tiles, auto_screens, seen):
    case = make_case((2, 20, 8, 5))
    check(case, *tiles(case, "auto"))
    assert seen[0].tokens == {}


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_rows_are_the_same_bits_however_they_come(mode, auto_screens, monkeypatch):
    case = mixed_case()
    case.mask[1, 3:5] = False
    expected = run(case, mode)
    batch, length, hidden_size = case.hidden.shape
    wider = torch.full((batch, length + 29, hidden_size), torch.nan)
    wider[:, 29:] = case.hidden.detach()
    mask = torch.nn.functional.pad(case.mask, (29, 0))
    padded = run(Case(wider, case.weight, case.bias, mask, case.grad), mode)
    rows, cu_seqlens = case.packed()
    packed = run(case, mode, hidden=rows, attention_mask=None, cu_seqlens=cu_seqlens, max_seqlen=len(rows))
    alone = [
        run(Case(case.hidden[b : b + 1], case.weight, case.bias, case.mask[b : b + 1], case.grad), mode)
        for b in range(batch)
    ]
    monkeypatch.setattr(pack, "SLICE_BYTES", 1)
    sliced = run(case, mode)
    for ours in (padded[0], packed[0], torch.cat([output for output, _ in alone]), sliced[0]):
        assert torch.equal(ours, expected[0])
    assert torch.equal(sliced[1], expected[1])
    active = expected[0] > 0
    assert torch.equal(padded[1], torch.where(active, expected[1] + 29, 0))


def test_the_order_of_the_queue_does_not_show(keep_all, monkeypatch):
    case = sparse_case((3, 40, 24, 70), pattern="full")
    with torch.no_grad():
        case.bias += 0.8
    expected = run(case, "on")
    compute = screening.compute_exactly

    def shuffled(*arguments: Any) -> None:
        *first, queue, count, keys = arguments
        order = torch.randperm(int(count))
        assert len(order) > 20
        queue[: len(order)] = queue[: len(order)][order]
        compute(*first, queue, count, keys)

    monkeypatch.setattr(screening, "compute_exactly", shuffled)
    monkeypatch.setattr(exact, "ENTRIES", 4)
    monkeypatch.setattr(exact, "RESIDENT", 1)
    ours = run(case, "on")
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_ties_go_to_the_lowest_position(tiles, keep_all):
    hidden = torch.full((1, 70, 16), -0.01)
    hidden[0, [23, 24, 41, 69]] = 1.0
    weight = torch.full((70, 16), -1.0)
    weight[::5] = 1.0
    case = Case(hidden, weight, torch.full((70,), -0.5), torch.ones(1, 70, dtype=torch.bool), torch.ones(1, 70))
    output, argmax = tiles(case, "on")
    check(case, output)
    assert argmax[0].tolist() == [23 if v % 5 == 0 else 0 for v in range(70)]


def test_repeats_that_fill_a_group_are_not_computed(tiles, seen, keep_all):
    case = make_case((2, 17, 8, 40), pattern="full")
    case.mask[0, 1:] = False
    with torch.no_grad():
        case.bias.fill_(100.0)
    check(case, *tiles(case, "on"))
    assert seen[0].group_sequence == [0, 1, 1]
    expected = {0: 1, 1: 0xFFFF, 2: 1}
    assert seen[0].tokens == {(group, v): bits for group, bits in expected.items() for v in range(40)}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_not_finite_rows_and_biases_are_as_unscreened(tiles, poison, keep_all, seen):
    case = sparse_case((3, 20, 8, 40), pattern="ragged")
    with torch.no_grad():
        case.hidden[2, 18, 5] = poison
        case.weight[7, 3] = poison
        case.bias[[9, 10]] = torch.tensor([poison, -poison])
    ours, theirs = tiles(case, "on"), tiles(case, "off")
    assert seen[0].dense_groups == 0
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    assert torch.equal(ours[1], theirs[1])
    finite = theirs[0].nan_to_num(nan=-1.0, posinf=-2.0)
    assert oracle.close(ours[0].nan_to_num(nan=-1.0, posinf=-2.0), finite.double())


@pytest.mark.parametrize("layout", ["transposed", "gaps", "no bias"])
def test_any_strides_and_no_bias(layout, keep_all):
    case = sparse_case((2, 20, 23, 50), bias=layout != "no bias")
    weight = case.weight.detach()
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    if layout == "gaps":
        weight = torch.full((100, 46), torch.nan)[::2, ::2].copy_(weight)
    case.weight = weight.requires_grad_()
    check(case, *run(case, "on"))


def test_gradients_through_the_public_function(monkeypatch):
    monkeypatch.setitem(screening.SHARE, "on", 4)
    case = mixed_case()
    output = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, screening=True, backend="triton")
    gradients = torch.autograd.grad(output, case.parameters(), case.grad)
    _, argmax = run(case, "on")
    expected = oracle.expected_gradients(case, output.detach(), argmax, "relu")
    assert all(oracle.close(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))


def test_tiles_of_sequences_known_to_be_dense_are_left_out(tiles, monkeypatch):
    budgets: list[Tensor] = []

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                budgets.extend(x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.int64 and x.ndim == 1)
                kernel[grid](*arguments, **options)

            return launch

    kernel = screening._screen_kernel
    monkeypatch.setattr(screening, "_screen_kernel", Spy())
    monkeypatch.setitem(screening.SHARE, "on", 4)
    case = sparse_case((1, 64, 16, 320), pattern="full")
    with torch.no_grad():
        case.bias.fill_(100)
    check(case, *tiles(case, "on"))
    # 4 groups keep 80 pairs each; of the 10 tiles, with 128 pairs each, the third one finds that it is too many.
    if ACCELERATOR == "cpu":
        assert budgets[0].tolist() == [4 * 80 - 3 * 128]
    else:
        assert budgets[0].tolist() <= [4 * 80 - 3 * 128]


@pytest.mark.parametrize("limit", ["MAX_HIDDEN_SIZE", "MAX_VOCAB_SIZE"])
def test_sizes_beyond_the_integers_are_not_screened(limit, seen, monkeypatch):
    case = sparse_case((2, 20, 16, 16))
    monkeypatch.setattr(screening, limit, 16)
    run(case, "on")
    assert len(seen) == 1
    monkeypatch.setattr(screening, limit, 15)
    assert torch.equal(run(case, "on")[0], run(case, "off")[0])
    assert len(seen) == 1


@pytest.mark.parametrize("arch", [0, 80, 86, 87, 90, 100, 120])
def test_auto_screens_on_the_architectures_alone_that_were_measured(arch, monkeypatch):
    weight = torch.empty(30522, 768, device="meta")

    def screened(mode: str) -> bool:
        return screening.can_screen(oracle.new_call(screening=mode), weight, arch)

    for measured in (frozenset(), frozenset({7, 121}), frozenset({arch})):
        monkeypatch.setattr(tuning, "SCREENING_PAYS", measured)
        assert screened("auto") is (arch in measured)
        assert screened("on")
        assert not screened("off")


def test_auto_is_as_unscreened_where_nothing_was_measured(seen, monkeypatch):
    monkeypatch.setattr(tuning, "SCREENING_PAYS", frozenset())
    case = sparse_case((2, 40, 96, 70))
    ours, theirs = run(case, "auto"), run(case, "off")
    assert seen == []
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    run(case, "on")
    assert len(seen) == 1


def test_no_real_token_and_a_hidden_size_of_zero(keep_all):
    case = sparse_case((3, 20, 8, 40), pattern="full")
    case.mask[1] = False
    output, argmax = run(case, "on")
    check(case, output, argmax)
    assert not output[1].any()
    nothing = Case(torch.empty(2, 3, 0), torch.empty(40, 0), torch.ones(40), torch.ones(2, 3, dtype=torch.bool), output)
    assert torch.equal(run(nothing, "on")[0], torch.ones(2, 40).log1p())
