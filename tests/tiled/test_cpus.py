"""The kinds of CPU that ``pytest --cpu`` simulates are what the package takes them for."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import splade_kernels as sk
import splade_kernels.backends.tiled.packed as torch_backend
from splade_kernels.backends import compiled
from splade_kernels.backends.tiled import screening, screening_plain
from tests import cpus
from tests.oracle import Case, make_case, new_call, reference_in_double
from tests.screening_cases import assert_within_band, need_compiled, pool, sparse_case


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    cpus.forget_answers()
    yield monkeypatch
    monkeypatch.undo()
    cpus.forget_answers()


def test_what_was_asked_before_the_simulation_began_is_asked_again(pytestconfig):
    """`--cpu vnni` would otherwise run what this CPU has under its own name."""
    kinds = pytestconfig.getoption("cpu")
    if "plain" in kinds:
        assert screening.compiled_kernels() is None
    elif "vnni" in kinds and compiled.serves(torch.device("cpu")):
        assert screening.compiled_kernels().name == "avx512_vnni"
    else:
        pytest.skip("neither --cpu plain, nor --cpu vnni and compiled operators")


def test_vnni_chooses_the_kernels_of_avx512(cpu):
    need_compiled()
    cpus.simulate("vnni", cpu)
    assert screening.compiled_kernels().name == "avx512_vnni"
    case = sparse_case()
    assert_within_band(pool(case, True), case)


def test_vnni_without_compiled_operators_screens_by_int_mm(cpu):
    for kind in ("vnni", "plain"):
        cpus.simulate(kind, cpu)
    assert "was not built" in sk.available_backends()["csrc"]
    assert not compiled.serves(torch.device("cpu"))
    assert screening.compiled_kernels() is None
    assert screening_plain.int_mm_is_fast()
    calls = []
    int_mm = torch._int_mm
    cpu.setattr(torch, "_int_mm", lambda a, b: calls.append(1) or int_mm(a, b))
    case = sparse_case()
    assert_within_band(pool(case, "auto"), case)
    assert calls


def test_bf16_sums_rounded_logits(cpu):
    """A sum of logits is taken of what the CPU multiplies natively, whose error is that of the dense head."""
    case = make_case((3, 20, 64, 100), torch.bfloat16)
    for instructions in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        cpu.setattr(torch.cpu, instructions, lambda: False)
    exact = sums(case)
    cpus.simulate("bf16", cpu)
    call = new_call(compute_dtype=torch.bfloat16, out_dtype=torch.bfloat16, pooling_strategy="sum")
    assert torch_backend._sum_dtype(call) == torch.bfloat16
    rounded = sums(case)
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, rtol=2**-6)


def sums(case: Case) -> Tensor:
    leaves = [leaf.detach() for leaf in case.parameters()]
    return sk.splade_pool(*leaves, case.mask, pooling_strategy="sum", backend="torch")


@functools.cache
def gradients_in_double(dtype: torch.dtype) -> tuple[Case, list[Tensor]]:
    """Random normal hidden states, a weight that gives dots of variance one, and the gradients in float64."""
    case = make_case((8, 128, 768, 2000), dtype, pattern="full")
    return case, reference_in_double(case)[1]


@pytest.mark.parametrize("screen", ["auto", True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", [(), ("bf16",), ("bf16", "plain"), ("vnni", "bf16", "plain")], ids="-".join)
def test_no_cpu_takes_the_maximum_of_rounded_dots(kinds, dtype, screen, cpu):
    """Each gradient is as near to float64 as its own rounding leaves it.

    The maximum of dots that were rounded to bfloat16 is often attained by another token: then the gradients of hidden
    states and weight are many times as far off.
    """
    for kind in kinds:
        cpus.simulate(kind, cpu)
    case, expected = gradients_in_double(dtype)
    found = torch.autograd.grad(pool(case, screen), case.parameters(), case.grad)
    bound = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}[dtype]
    errors = [float((one.double() - exact).norm() / exact.norm()) for one, exact in zip(found, expected, strict=True)]
    assert max(errors) <= bound, errors
