"""What docs/kernels.md says of a GPU's arithmetic, read from the PTX that every kernel is compiled to."""

from __future__ import annotations

import os
import re

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing compiles in a process with TRITON_INTERPRET=1"
)
pytest.importorskip("triton")

from bench.jobs import compiled, kernels  # noqa: E402

KERNELS = (
    "chunk", "count", "exact", "finalise", "gradient", "hidden", "logit_grad", "maximum", "pack", "quantise", "screen",
    "sum", "sums", "weight",
)  # fmt: skip


@pytest.fixture(scope="module", params=[86, 90])
def ptx(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of every kernel that computes with floats, in bfloat16."""
    found: dict[str, str] = {}
    for case in kernels.cases(request.param):
        name = case.kernel.__name__.strip("_").removesuffix("_kernel")
        if name in KERNELS and name not in found and case.dtype == "bfloat16":
            found[name] = compiled.compile_case(case).asm["ptx"]
    assert set(found) == set(KERNELS)
    return found


def instructions(text: str, pattern: str) -> set[str]:
    return set(re.findall(rf"(?<![\w.]){pattern}(?=\s)", text))


DIVIDES = dict.fromkeys(("finalise", "sum", "logit_grad"), "div.full.f32")
EXPONENTIAL = dict.fromkeys(("gradient", "weight"), "ex2.approx.f32")
LOGARITHM = dict.fromkeys(("finalise", "sum", "logit_grad"), "fma.rn.ftz.f32")


@pytest.mark.parametrize(("pattern", "expected"), [
    # Approximations: those that the bounds were made for.
    (r"(?:div|sqrt|rsqrt|rcp|lg2|ex2|sin|cos|tanh)\.[\w.]*f32",
     DIVIDES | EXPONENTIAL | {"quantise": "div.full.f32 sqrt.rn.f32"}),
    # Denormals are flushed in the logarithm, whose arguments are at least 1, and in floor; both are from libdevice.
    (r"[\w.]*\.ftz[\w.]*", LOGARITHM | {"quantise": "cvt.rmi.ftz.f32.f32"}),
    (r"cvt\.r\w+\.[su]\d+\.f32", {"quantise": "cvt.rzi.s16.f32"}),
], ids=["approximate", "flushing", "to integers"])  # fmt: skip
def test_instructions_of_a_kind_are_the_known_ones(pattern, expected, ptx):
    found = {name: instructions(text, pattern) for name, text in ptx.items()}
    assert {name: " ".join(sorted(some)) for name, some in found.items() if some} == expected


def test_floats_are_narrowed_to_the_nearest(ptx):
    narrowing = {name: instructions(text, r"cvt\.[\w.]*(?:bf16|f16)(?:x2)?\.f32") for name, text in ptx.items()}
    for name in ("finalise", "sum", "logit_grad", "hidden", "weight"):
        assert narrowing[name]
        assert narrowing[name] <= {"cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32"}


def test_maxima_keep_nan_and_zeros_are_made_one(ptx):
    text = ptx["maximum"]
    assert instructions(text, r"max\.[\w.]*f32") == {"max.NaN.f32"}
    assert re.search(r"add\.f32\s+%\w+, %\w+, 0f00000000;", text)
    assert instructions(text, r"atom\.[\w.]*") == {"atom.global.gpu.relaxed.max.s64"}
    assert instructions(ptx["quantise"], r"max\.[\w.]*f32") <= {"max.f32"}


def test_the_answer_of_an_atomic_reaches_every_thread(ptx):
    """One thread has it; all that hold a copy of its element need it."""
    screen = ptx["screen"]
    answers = re.findall(r"atom\.global\.gpu\.relaxed\.add\.u64 (%rd\d+),", screen)
    assert len(answers) == 2
    for answer in answers:
        assert re.search(
            rf"st\.shared\.b64 \[ %\w+ \+ 0 \], {answer};.*?bar\.sync.*?ld\.shared\.b64", screen, re.DOTALL
        )
