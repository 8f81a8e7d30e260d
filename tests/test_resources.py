"""What the compiler makes of every kernel in every shipped configuration, for six architectures and without a GPU."""

from __future__ import annotations

import os
import re

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing compiles in a process with TRITON_INTERPRET=1"
)
triton = pytest.importorskip("triton")

from bench import resources  # noqa: E402
from splade_kernels.backends.triton import tuning  # noqa: E402


@pytest.fixture(scope="module")
def rows() -> list[resources.Row]:
    return list(resources.report())


def test_every_architecture_and_kernel_is_compiled(rows):
    assert {row.arch for row in rows} == set(tuning.ARCHITECTURES) == {80, 86, 89, 90, 100, 120}
    kernels = {row.kernel for row in rows}
    for arch in tuning.ARCHITECTURES:
        mine = [row for row in rows if row.arch == arch]
        assert {row.kernel for row in mine} == kernels
        ways = {row.config["DESCRIPTORS"] for row in mine if row.kernel == "maximum_kernel"}
        assert ways == ({False, True} if tuning.uses_descriptors(arch) else {False})


def test_nothing_spills_exceeds_shared_memory_or_multiplies_without_tensor_cores(rows):
    problems = [f"{row.kernel} sm_{row.arch} {row.dtype}: {p}" for row in rows for p in row.problems()]
    if triton.__version__.startswith("3.6."):
        # Its assembler does in three forms of one kernel, which waits for memory.
        problems = [p for p in problems if not (p.startswith("exact_kernel") and p.endswith("spills 8 bytes"))]
    assert problems == []


def test_tiles_arrive_asynchronously(rows):
    """``cp.async`` on sm_80 and later, TMA where descriptors are used."""
    for row in rows:
        if row.config.get("DESCRIPTORS"):
            assert row.instructions.get("UTMALDG"), row
        elif row.matmul:
            assert row.instructions.get("LDGSTS"), row


def test_a_problem_would_be_seen():
    row = resources.Row("k", 86, "bfloat16", {"PRECISION": "ieee"}, 255, 8, 120_000, {}, matmul=True)
    assert len(row.problems()) == 3
    exempt = resources.Row("k", 86, "float32", {"PRECISION": "ieee"}, 128, 0, 1000, {}, matmul=True)
    assert exempt.problems() == []


def test_every_kernel_of_the_package_is_in_the_report(rows):
    import importlib
    import pkgutil

    import splade_kernels.backends.triton as package

    launched = set()
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        launched |= {name for name, value in members.items() if isinstance(value, triton.JITFunction)}
    kernels = {name.strip("_") for name in launched if name.endswith("_kernel")}
    assert kernels == {row.kernel for row in rows}


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
def test_warps_of_the_screening_kernel_never_part_over_a_budget(arch):
    """Budgets change while they are read: what one thread read has to reach all warps before any of them branches."""
    kernel = "_screen_kernel"
    case = next(case for case in resources.cases(arch) if case.kernel.__name__ == kernel)
    lines = resources.compile_case(case).asm["ptx"].splitlines()
    budgets = [i for i, line in enumerate(lines) if "ld.global.cg" in line]
    assert len(budgets) == case.constants["BLOCK_T"] // 16
    branch = next(i for i, line in enumerate(lines) if i > budgets[-1] and re.search(r"\bbra\b", line))
    between = "\n".join(lines[budgets[-1] : branch])
    assert re.search(r"st\.shared.*bar\.sync.*ld\.shared", between, re.DOTALL), between
