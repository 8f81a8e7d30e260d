"""The grouped-maximum kernels, a few tiles each: tails, group boundaries, slices, and both ways of fetching tiles."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable

import pytest
import torch

import splade_kernels as sk
from tests import oracle
from tests.conftest import ACCELERATOR
from tests.oracle import Case, make_case

REASON = sk.available_backends()["triton"]
pytestmark = [pytest.mark.skipif(REASON != "available", reason=REASON), pytest.mark.usefixtures("on_accelerator")]

if REASON == "available":
    from splade_kernels.backends.triton import max_forward as forward
    from splade_kernels.backends.triton import pack, tuning


class Tiles:
    """Tile sizes smaller than every case, fetched one way or the other; lists how each launch fetched them."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.config = tuning.MatmulConfig(32, 32, 16, 4, 1, group_v=2, tma=way == "descriptors")
        self.launched: list[str] = []

    def run(self, case: Case, need_argmax: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        call = oracle.new_call(
            batch_size=len(case.hidden),
            attention_mask=case.mask,
            max_seqlen=case.hidden.shape[1],
            compute_dtype=case.hidden.dtype,
            out_dtype=case.hidden.dtype,
            need_argmax=need_argmax,
        )
        bias = None if case.bias is None else case.bias.detach()
        hidden = case.hidden.detach().flatten(0, 1)
        return forward.max_pool_forward(call, hidden, case.weight.detach(), bias, self.config)


@pytest.fixture(params=["pointers", "descriptors"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tiles:
    tiles = Tiles(request.param)
    kernel = forward._maximum_kernel

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            def launch(*arguments: object, **options: object) -> None:
                tiles.launched.append("descriptors" if options["DESCRIPTORS"] else "pointers")
                kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(forward, "_maximum_kernel", Recorder())
    return tiles


if REASON == "available":
    import triton
    import triton.language as tl

    canonical, training_key, key_dot, key_row = (
        forward.canonical, forward.training_key, forward.key_dot, forward.key_row,
    )  # fmt: skip

    @triton.jit
    def _key_round_trip(value_ptr, row_ptr, key_ptr, back_ptr, row_back_ptr, count, BLOCK: tl.constexpr):
        o = tl.arange(0, BLOCK)
        m = o < count
        key = training_key(canonical(tl.load(value_ptr + o, mask=m, other=0.0)), tl.load(row_ptr + o, mask=m, other=0))
        tl.store(key_ptr + o, key, mask=m)
        tl.store(back_ptr + o, key_dot(key), mask=m)
        tl.store(row_back_ptr + o, key_row(key), mask=m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 33, 16, 65), (2, 16, 40, 32), (1, 17, 24, 31), (5, 1, 8, 33)], ids=str)
def test_every_tail_on_both_kernels(tiles, shape, dtype):
    case = make_case(shape, dtype, pattern="holes", integers=True)
    output, argmax = tiles.run(case)
    inferred, _ = tiles.run(case, need_argmax=False)
    dots = torch.where(case.mask[..., None], case.hidden.double() @ case.weight.double().t(), -torch.inf)
    expected = (dots.amax(dim=1) + case.bias.double()).relu().log1p()
    assert torch.equal(output, inferred)
    assert torch.equal(output > 0, expected > 0)
    assert oracle.rounded_once(output, expected.detach(), 16 * oracle.EPSILON * expected.detach())
    lowest = (dots == dots.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    assert torch.equal(argmax.long(), torch.where(output > 0, lowest, 0))
    # Rows of 8, 16, 24 and 40 elements are whole multiples of 16 bytes in every dtype: all fit a descriptor.
    assert set(tiles.launched) == {tiles.way}


def test_rows_that_no_descriptor_can_describe_are_fetched_by_pointers(tiles):
    case = make_case((2, 20, 7, 40))
    expected, _ = oracle.reference_in_double(case)
    output, _ = tiles.run(case)
    assert oracle.close(output, expected)
    assert set(tiles.launched) == {"pointers"}


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 48])
def test_lengths_around_a_group_boundary(tiles, length):
    case = make_case((3, 50, 16, 40))
    case.mask = torch.arange(50).expand(3, -1) < torch.tensor([[length], [1], [length]])
    expected, _ = oracle.reference_in_double(case)
    assert oracle.close(tiles.run(case)[0], expected)


@pytest.mark.parametrize("bias", [-1000.0, 1000.0], ids=["none active", "all active"])
def test_none_and_all_active(tiles, bias):
    case = make_case((2, 40, 16, 40))
    with torch.no_grad():
        case.bias.fill_(bias)
    output, argmax = tiles.run(case)
    expected, _ = oracle.reference_in_double(case)
    assert oracle.close(output, expected)
    assert bool((output > 0).all()) == (bias > 0)
    if bias < 0:
        assert not argmax.any()


def test_ties_across_groups_tiles_and_zeros_of_both_signs(tiles):
    hidden = torch.zeros(1, 70, 16)
    hidden[0, 20:] = -0.0
    hidden[0, [23, 41, 69], 0] = 1.0
    weight = torch.zeros(33, 16)
    weight[:20, 0] = 1.0
    case = Case(hidden, weight, torch.ones(33), torch.ones(1, 70, dtype=torch.bool), torch.ones(1, 33))
    _, argmax = tiles.run(case)
    assert argmax[0].tolist() == [23] * 20 + [0] * 13


def test_one_hot_token_wins_everything(tiles):
    hidden = torch.randn(2, 40, 16) * 0.01
    hidden[:, 33] = 5.0
    weight = torch.rand(64, 16)
    case = Case(hidden, weight, None, torch.ones(2, 40, dtype=torch.bool), torch.ones(2, 64))
    assert bool((tiles.run(case)[1] == 33).all())


def test_nan_in_one_token_of_one_group(tiles):
    case = make_case((2, 40, 16, 40), pattern="full")
    with torch.no_grad():
        case.hidden[1, 18, 5] = torch.nan
    output, argmax = tiles.run(case)
    assert output[1].isnan().all()
    assert not output[0].isnan().any()
    assert bool((argmax[1] == 18).all())


def test_slices_of_one_sequence_are_the_same_bits(tiles, monkeypatch):
    case = make_case((5, 40, 16, 40), pattern="ragged")
    whole = tiles.run(case)
    monkeypatch.setattr(pack, "SLICE_BYTES", 1)
    sliced = tiles.run(case)
    assert torch.equal(whole[0], sliced[0])
    assert torch.equal(whole[1], sliced[1])
    assert len(tiles.launched) == 1 + 5


def test_a_row_does_not_depend_on_the_rest_of_the_batch(tiles):
    case = make_case((6, 40, 16, 40), pattern="ragged")
    together = tiles.run(case)[0]
    for b in range(6):
        alone = Case(case.hidden[b : b + 1], case.weight, case.bias, case.mask[b : b + 1], case.grad[b : b + 1])
        assert torch.equal(tiles.run(alone)[0], together[b : b + 1])


@pytest.mark.parametrize("strides", [(1 << 30, 1), (1, 1 << 29)], ids=["rows", "elements"])
@pytest.mark.parametrize("need_argmax", [True, False], ids=["training", "inference"])
def test_strides_beyond_two_to_the_31_elements(tiles, need_argmax, strides):
    """Rows 2^30 or elements 2^29 apart; on a CPU in memory of which only the pages that are written exist."""
    case = make_case((1, 4, 8, 4), torch.float16, pattern="full", integers=True)
    expected = tiles.run(case, need_argmax)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        extent = 3 * strides[0] + 7 * strides[1] + 1
        if ACCELERATOR == "cpu":
            pages = mmap.mmap(-1, extent * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory = torch.frombuffer(pages, dtype=torch.float16)
        else:
            memory = torch.empty(extent, dtype=torch.float16)
        return memory.as_strided((4, 8), strides).copy_(tensor)

    call = oracle.new_call(
        attention_mask=case.mask,
        max_seqlen=4,
        compute_dtype=torch.float16,
        out_dtype=torch.float16,
        need_argmax=need_argmax,
    )
    hidden, weight = spread(case.hidden.detach()[0]), spread(case.weight.detach())
    output, argmax = forward.max_pool_forward(call, hidden, weight, case.bias.detach())
    assert torch.equal(output, expected[0])
    assert torch.equal(argmax, expected[1])


@pytest.mark.parametrize("row", [0, 1, 15, 1 << 16, 2**31 - 17, 2**31 - 2, 2**31 - 1])
def test_keys_order_by_dot_then_by_the_lower_row_up_to_the_last_one(row):
    """Rows up to 2^31 - 1 leave the dot's bits alone, and every key is above 0, which means nothing was written."""
    dots = [-torch.inf, -3.4e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 1.0000001, 3.4e38, torch.inf, torch.nan]
    values = torch.tensor(dots)
    rows = torch.full((len(dots),), row, dtype=torch.int32)
    keys, back, rows_back = (torch.empty(16, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.int32))
    _key_round_trip[(1,)](values, rows, keys, back, rows_back, len(dots), BLOCK=16)
    keys = keys[: len(dots)]
    assert bool((keys > 0).all())
    assert bool((keys.diff() > 0).all())
    assert torch.equal(back[: len(dots) - 1], values[:-1])
    assert bool(back[len(dots) - 1].isnan())
    assert torch.equal(rows_back[: len(dots)], rows)
    if row > 0:
        others = torch.empty(16, dtype=torch.int64)
        _key_round_trip[(1,)](values, rows - 1, others, back, rows_back, len(dots), BLOCK=16)
        assert bool((others[: len(dots)] == keys + 1).all()), "the lower row of equal dots has the larger key"


@pytest.mark.parametrize(
    ("total", "batch", "bound", "expected"),
    [
        (40_000, 320, None, 2),  # one launch for all tokens: a tight bound is not known
        (43_600, 320, None, 2),
        (400_000, 3200, None, 12),
        (40_000, 320, 128, 2),  # a tight one: everything fits, as far as keys go
        (163_840, 320, 512, 4),
        (9_000, 80, None, 1),
    ],
)
def test_packed_tokens_are_cut_into_few_slices_whatever_bound_on_a_length_is_known(total, batch, bound, expected):
    """A slice packs as many rows as its sequences may have; a bound that says nothing must not multiply that."""
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
    call = oracle.new_call(
        batch_size=batch,
        cu_seqlens=cu_seqlens,
        max_seqlen=bound or total,
        compute_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
        need_argmax=True,
    )
    parts = list(pack.slices(call, 30522, torch.empty(total, 768, device="meta"), 8))
    assert len(parts) == expected
    assert [parts[0].start, parts[-1].stop] == [0, batch]
    assert all(one.stop == two.start for one, two in itertools.pairwise(parts))
