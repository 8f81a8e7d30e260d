"""``torch._int_mm`` in exact screening: right at every size, or found out and not used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from splade_kernels.backends.tiled import screening, screening_plain
from tests.cpus import forget_answers, int_mm_with_vnni
from tests.oracle import make_case
from tests.screening_cases import assert_within_band, pool


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Tensor, Tensor], Tensor]], None]]:
    """Makes this a CPU with VNNI and without compiled operators, whose ``torch._int_mm`` is the one given."""

    def with_int_mm(int_mm: Callable[[Tensor, Tensor], Tensor]) -> None:
        monkeypatch.setattr(torch, "_int_mm", int_mm)
        forget_answers()

    monkeypatch.setattr(screening, "compiled_kernels", functools.cache(lambda: None))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    yield with_int_mm
    monkeypatch.undo()
    forget_answers()


def exact(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).int()


@pytest.mark.parametrize("hidden_size", [1, 2, 15, 16, 17, 32, 776])
@pytest.mark.parametrize("words", [1, 2, 33])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_every_size_is_right_with_vnni(tokens, words, hidden_size, monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", int_mm_with_vnni)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, hidden_size), generator=generator).to(torch.int8) for n in (tokens, words))
    assert torch.equal(screening_plain.int_mm(a, b), exact(a, b.t()))


def test_one_hidden_dimension_as_it_is_would_be_wrong_with_vnni():
    """Why the hidden dimension is padded: without this the tests below would pass unpadded."""
    ones = torch.ones(3, 1, dtype=torch.int8)
    assert not torch.equal(int_mm_with_vnni(ones, ones.t()), exact(ones, ones.t()))


@pytest.mark.parametrize("hidden_size", [1, 2, 17])
def test_no_active_pair_is_lost_with_vnni(hidden_size, install):
    install(int_mm_with_vnni)
    assert screening_plain.int_mm_is_fast()
    for shape in ((1, 1), (1, 2), (2, 1), (3, 40)):
        for seed in range(5):
            case = make_case((2, shape[0], hidden_size, shape[1]), seed=seed)
            assert_within_band(pool(case, True), case, (shape, seed))


def test_rows_of_whole_multiples_are_not_copied(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.extend([a, b]) or exact(a, b))
    rows = [torch.ones(size, 2 * screening_plain.INT_MM_MULTIPLE, dtype=torch.int8) for size in (3, 5)]
    screening_plain.int_mm(*rows)
    assert [tensor.data_ptr() for tensor in seen] == [tensor.data_ptr() for tensor in rows]


def saturating(a: Tensor, b: Tensor) -> Tensor:
    """What oneDNN computes without VNNI: pairs of products added in int16, unsigned times signed."""
    pairs = (a.int()[:, ::2, None] + 128) * b.int()[None, ::2] + (a.int()[:, 1::2, None] + 128) * b.int()[None, 1::2]
    return pairs.clamp(-(2**15), 2**15 - 1).sum(dim=1) - 128 * b.int().sum(dim=0)


def wrong_where(condition: Callable[[int, int, int], bool]) -> Callable[[Tensor, Tensor], Tensor]:
    """One product is off by one at the sizes (tokens, hidden dimensions, vocabulary entries) named."""

    def int_mm(a: Tensor, b: Tensor) -> Tensor:
        product = exact(a, b)
        if condition(*a.shape, b.shape[1]):
            product[-1, -1] += 1
        return product

    return int_mm


def refuses(a: Tensor, b: Tensor) -> Tensor:
    raise RuntimeError("not implemented")


WRONG = {
    "saturates": saturating,
    "refuses": refuses,
    "one token": wrong_where(lambda tokens, size, words: tokens == 1),
    "one word": wrong_where(lambda tokens, size, words: words == 1),
    "two tokens and words": wrong_where(lambda tokens, size, words: tokens == words == 2),
    "odd numbers of words": wrong_where(lambda tokens, size, words: words > 1 and words % 2 == 1),
    "few hidden dimensions": wrong_where(lambda tokens, size, words: size <= 16),
    "some hidden dimensions": wrong_where(lambda tokens, size, words: 16 < size < 768),
    "many hidden dimensions": wrong_where(lambda tokens, size, words: size >= 768),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_that_is_wrong_is_found_out_and_not_used(name, install):
    install(exact)
    case = make_case((3, 20, 16, 60))
    assert screening_plain.int_mm_is_fast()
    expected = pool(case, True)
    install(WRONG[name])
    assert not screening_plain.int_mm_is_fast()
    assert torch.equal(pool(case, True), expected)
