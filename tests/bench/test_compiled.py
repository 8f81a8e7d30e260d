"""Kernels in configurations that do not ship, and single kernels, through the compiler and without a GPU."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing compiles in a process with TRITON_INTERPRET=1"
)
triton = pytest.importorskip("triton")

from bench.jobs import candidates as tune_candidates  # noqa: E402
from bench.jobs import compiled, kernels  # noqa: E402
from bench.jobs.kernels import Case  # noqa: E402
from splade_kernels.backends.triton import tuning  # noqa: E402
from tests.triton import tables  # noqa: E402


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """As if tables shipped for all architectures."""
    tuning.shipped_table.cache_clear()
    monkeypatch.setattr(tuning, "FOLDER", tables.write(tmp_path))
    yield tmp_path
    tuning.shipped_table.cache_clear()


def added(arch: int, folder: Path) -> list[Case]:
    """What is compiled with the tables and not without them."""
    with_tables = list(kernels.cases(arch))
    tuning.shipped_table.cache_clear()
    (folder / f"sm_{arch}.json").unlink()
    without = list(kernels.cases(arch))
    return [case for case in with_tables if case not in without]


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_every_entry_that_ships_is_compiled(arch, shipped):
    found = added(arch, shipped)
    ways = 1 + tuning.uses_descriptors(arch)
    kernels = {"_maximum_kernel": 6 * ways, "_finalise_kernel": 2, "_sum_kernel": 1, "_logit_grad_kernel": 1}
    kernels |= {"_screen_kernel": 1, "_weight_kernel": 1, "_chunk_kernel": 1, "_hidden_kernel": 1}
    assert Counter(case.kernel.__name__ for case in found) == kernels
    assert {case.dtype for case in found} == {"bfloat16"}
    if arch == 86:
        assert [problem for case in found for problem in compiled.measure(case).problems()] == []


def test_an_entry_that_spills_is_seen(shipped):
    spills = tuning.MatmulConfig(128, 256, 32, 4, 3)
    entries = [tuning.entry(tuning.Shape("maximum", 86, "bfloat16", 768, 30522), spills)]
    (shipped / "sm_86.json").write_text(json.dumps({"table": entries}))
    case = added(86, shipped)[0]
    assert any("spills" in problem for problem in compiled.measure(case).problems())


def test_two_programs_of_the_logit_gradient_fit_a_multiprocessor_of_sm_90():
    """65,536 registers, 256 threads a program."""
    mine = [case for case in kernels.cases(90) if case.kernel.__name__ == "_logit_grad_kernel"]
    found = [compiled.measure(case) for case in mine]
    assert [row for row in found if row.registers * row.config["num_warps"] * 32 * 2 > 65536] == []
    assert len(found) == 4


OPTIONS = (
    {"order": "runs"},
    {"epilogue_slices": 4, "partials": True},
    pytest.param({"epilogue_slices": 2}, marks=pytest.mark.slow),
    pytest.param({"partials": True}, marks=pytest.mark.slow),
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.slow), 90])
def test_the_options_of_the_maximum_kernel_neither_spill_nor_drop_anything(arch, options):
    config = replace(tuning.default_config(arch, "bfloat16"), **options)
    if config.order == "runs" and not config.tma:
        pytest.skip("one tile a program")
    question = tuning.Shape("maximum", arch, "bfloat16", 768, 30522)
    rows, problems = tune_candidates.examine(question, config)
    assert problems == []
    written = {row.config["PARTIALS"]: row.instructions for row in rows if row.kernel == "maximum_kernel"}
    atomic = {partials: any(name in found for name in compiled.ATOMIC) for partials, found in written.items()}
    assert atomic == {False: True, True: False} if config.partials else {False: True}
    assert ("finalise_kernel" in {row.kernel for row in rows}) == config.partials


@pytest.mark.parametrize(("arch", "tile"), [(86, (256, 128, 32, 8, 3)), (90, (256, 128, 64, 8, 4))], ids=str)
def test_a_wide_tile_that_wins_for_the_maximum_does_not_spill_in_sum_pooling(arch, tile):
    question = tuning.Shape("sum", arch, "bfloat16", 768, 30522)
    assert tune_candidates.examine(question, tuning.MatmulConfig(*tile, tma=arch == 90))[1] == []


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
def test_warps_of_the_screening_kernel_never_part_over_a_budget(arch):
    """Budgets change while they are read: what one thread read has to reach all warps before any of them branches."""
    case = next(case for case in kernels.cases(arch) if case.kernel.__name__ == "_screen_kernel")
    lines = compiled.compile_case(case).asm["ptx"].splitlines()
    budgets = [i for i, line in enumerate(lines) if "ld.global.cg" in line]
    assert len(budgets) == case.constants["BLOCK_T"] // 16
    branch = next(i for i, line in enumerate(lines) if i > budgets[-1] and re.search(r"\bbra\b", line))
    between = "\n".join(lines[budgets[-1] : branch])
    assert re.search(r"st\.shared.*bar\.sync.*ld\.shared", between, re.DOTALL), between
