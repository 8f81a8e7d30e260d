"""What the compiler makes of every kernel in every shipped configuration, for six architectures and without a GPU."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing compiles in a process with TRITON_INTERPRET=1"
)
triton = pytest.importorskip("triton")

from bench import resources  # noqa: E402
from bench.jobs import compiled, kernels  # noqa: E402
from splade_kernels.backends.triton import tuning  # noqa: E402
from tests.bench import synthetic  # noqa: E402

# About a hundred kernels for each: the first target in every run, the others in `make test-all`.
OTHERS = [arch for arch in tuning.ARCHITECTURES if arch != 86]


@pytest.fixture(scope="module", params=[86, *(pytest.param(arch, marks=pytest.mark.slow) for arch in OTHERS)])
def rows(request: pytest.FixtureRequest) -> list[compiled.Row]:
    """What ships for one architecture."""
    found = list(resources.report((request.param,)))
    assert {row.arch for row in found} == {request.param}
    return found


def test_tiles_are_fetched_by_descriptors_where_an_architecture_has_them(rows):
    assert tuning.ARCHITECTURES == (80, 86, 89, 90, 100, 120)
    ways = {row.config["DESCRIPTORS"] for row in rows if row.kernel == "maximum_kernel"}
    assert ways == ({False, True} if tuning.uses_descriptors(rows[0].arch) else {False})


def test_nothing_spills_exceeds_shared_memory_or_multiplies_without_tensor_cores(rows):
    problems = [f"{row.kernel} sm_{row.arch} {row.dtype}: {p}" for row in rows for p in row.problems()]
    if triton.__version__.startswith("3.6."):
        # Its assembler does in three forms of one kernel, which waits for memory.
        problems = [p for p in problems if not (p.startswith("exact_kernel") and p.endswith("spills 8 bytes"))]
    assert problems == []


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float16", "float32"))]
)
@pytest.mark.parametrize("arch", [86, 90])
def test_kernels_that_scale_and_cap_logits_do_not_spill(arch, dtype):
    cases = kernels.transformed_cases(arch, logit_scale="fp32", logit_softcap="fp32")
    cases = [case for case in cases if case.dtype == dtype]
    assert {case.kernel.__name__ for case in cases} == {
        "_finalise_kernel", "_gradient_kernel", "_logit_grad_kernel", "_sum_kernel", "_weight_kernel",
    }  # fmt: skip
    found = [compiled.measure(case) for case in cases]
    assert [f"{row.kernel}: {problem}" for row in found for problem in row.problems()] == []


def test_tiles_arrive_asynchronously(rows):
    """``cp.async`` on sm_80 and later, TMA where descriptors are used."""
    for row in rows:
        if row.config.get("DESCRIPTORS"):
            assert row.instructions.get("UTMALDG"), row
        elif row.matmul:
            assert row.instructions.get("LDGSTS"), row


WHOLE = compiled.Row(
    "k", 86, "bfloat16", {}, 128, 0, 1000, {"HMMA": 4, "STG": 1}, matmul=True, ptx={"multiply": 4, "write": 1}
)


@pytest.mark.parametrize(("change", "problem"), [
    ({"spill_bytes": 8}, "spills 8 bytes"),
    ({"shared_bytes": 120_000}, "needs 120000 bytes of shared memory"),
    ({"ptx": {"write": 1}}, "has no matrix instruction"),
    ({"instructions": {"STG": 1}}, "multiplies without tensor cores"),
    ({"ptx": {"multiply": 4}}, "writes no result"),
    ({"instructions": {"HMMA": 4}}, "writes no result"),
], ids=str)  # fmt: skip
def test_a_problem_would_be_seen(change, problem):
    assert WHOLE.problems() == []
    (found,) = replace(WHOLE, **change).problems()
    assert problem in found
    exempt = {"dtype": "float32", "config": {"PRECISION": "ieee"}, "instructions": {"STG": 1}, "ptx": {"write": 1}}
    assert replace(WHOLE, **exempt).problems() == []


def test_what_counts_as_a_product_and_as_a_write():
    products = """
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 };
        wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 { %f1 }, %rd1, %rd2, p, 1, 1;
        wgmma.fence.sync.aligned;
        tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
    """
    writes = """
        atom.global.gpu.relaxed.max.s64 %rd1, [ %rd2 + 0 ], %rd3;
        red.relaxed.gpu.global.max.s32 [ %rd2 + 0 ], %r3;
        st.global.b32 [ %rd1 + 0 ], { %r1 };
        ld.global.b32 { %r1 }, [ %rd1 + 0 ];
        st.shared.b32 [ %r1 ], %r2;
    """
    counts = [[len(re.findall(pattern, code)) for pattern in compiled.PTX.values()] for code in (products, writes)]
    assert counts == [[3, 0], [0, 3]]


def test_no_device_function_has_a_plain_string_for_a_default():
    """Which Triton 3.6 does not take, though later ones do."""
    folder = Path(tuning.__file__).parent
    functions = [
        function
        for path in folder.glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in function.decorator_list)
    ]
    defaults = [default for function in functions for default in function.args.defaults]
    assert len(functions) > 30
    assert [ast.unparse(default) for default in defaults if isinstance(default, ast.Constant)] == []


def test_every_kernel_of_the_package_is_in_the_report(rows):
    assert {name.strip("_") for name in synthetic.kernels(triton.JITFunction)} == {row.kernel for row in rows}
