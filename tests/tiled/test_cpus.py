"""The kinds of CPU that ``pytest --cpu`` simulates are what the package takes them for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import splade_kernels as sk
import splade_kernels.backends.tiled.packed as torch_backend
from splade_kernels.backends import compiled
from splade_kernels.backends.tiled import screening, screening_plain
from tests import cpus
from tests.oracle import new_call
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


def test_bf16_multiplies_bfloat16_and_rounds_its_dots(cpu):
    cpus.simulate("bf16", cpu)
    call = new_call(compute_dtype=torch.bfloat16, out_dtype=torch.bfloat16)
    assert torch_backend._matmul_dtype(call) == torch.bfloat16
    assert torch_backend._rounds_dots(call)
