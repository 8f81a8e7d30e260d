"""The screening kernels of every instruction set against dots in double (screening.cpp).

As they are shipped where this CPU has the instructions, otherwise on emulated intrinsics; for Arm on an emulated CPU.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch

import setup
from splade_kernels.backends import compiled
from splade_kernels.backends.tiled.screening import INSTRUCTION_SETS
from tests.csrc.test_build import CXX, TORCH, cxx, run

ARM_CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
ARM_SETS = [name for name in INSTRUCTION_SETS if name.startswith("neon_")]
X86_SETS = [name for name in INSTRUCTION_SETS if name.startswith("avx")]
AVX2 = ("-mavx2", "-mfma", "-mf16c")
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason=f"for x86 alone, this is {platform.machine()}")
cross = pytest.mark.skipif(
    shutil.which(ARM_CXX) is None,
    reason="NO CROSS COMPILER: the code for Arm was not compiled; Debian's g++-aarch64-linux-gnu has it",
)
emulated = pytest.mark.skipif(
    shutil.which(QEMU) is None,
    reason="NO EMULATOR: the kernels for Arm were not run; Debian's qemu-user-static has it",
)


def build(folder: Path, *flags: str, compiler: str = CXX) -> str:
    driver = str(folder / "screening")
    run([compiler, "-std=c++20", *flags, *setup.WARNINGS, "-Werror", "tests/csrc/screening.cpp", "-o", driver])
    return driver


def passed(output: str) -> list[str]:
    """The instruction sets that were tested."""
    tested = re.findall(r"(\w+): [1-9]\d* passed\n", output)
    assert "".join(tested) and len(tested) == output.count("\n"), output
    return tested


def cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    line = re.search(r"^flags\s*:(.*)", path.read_text(), re.MULTILINE) if path.exists() else None
    return set(line[1].split()) if line else set()


@cxx
def test_what_this_cpu_has_as_it_is_shipped(tmp_path):
    """The instruction sets of the library are those that the kernel of the operating system sees."""
    driver = build(tmp_path, "-O2")
    names = run([driver, "names"]).stdout.split()
    if (flags := cpu_flags()) and "avx2" in flags:
        expected = {"avx512_vnni": {"avx512f", "avx512_vnni"}, "avx_vnni": {"avx_vnni"}, "avx2": {"avx2"}}
        assert names == [name for name in X86_SETS if expected[name] <= flags]
    if compiled.serves(torch.device("cpu")):
        assert torch.ops.splade_kernels_csrc.instruction_sets() == names
    if not names:
        pytest.skip("NOT RUN: this CPU has none of " + ", ".join(INSTRUCTION_SETS))
    assert passed(run([driver, "300000"]).stdout) == names


@cxx
@x86
@pytest.mark.slow
@pytest.mark.skipif("avx2" not in cpu_flags(), reason="no AVX2, on which the other instruction sets are emulated")
def test_every_instruction_set_of_x86_under_sanitizers(tmp_path):
    """What is beyond AVX2 on emulated intrinsics, so that it is tested on any machine."""
    driver = build(tmp_path, *SANITIZERS, "-DEMULATED", *AVX2)
    assert passed(run([driver]).stdout) == X86_SETS


@cxx
@x86
@pytest.mark.slow
def test_avx_vnni_in_the_spelling_of_avx512(tmp_path):
    """The same kernels with vpdpbusd in its EVEX encoding run where the CPU has AVX-512 VL and VNNI, natively."""
    driver = build(tmp_path, "-O2", "-DEVEX", *AVX2, "-mavx512f", "-mavx512vl", "-mavx512vnni")
    if missing := {"avx2", "avx512vl", "avx512_vnni"} - cpu_flags():
        pytest.skip(f"COMPILED, NOT RUN: this CPU has no {', '.join(sorted(missing))}")
    assert passed(run([driver]).stdout) == X86_SETS


@pytest.fixture(scope="module")
def arm_driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("arm"), "-O2", "-static", compiler=ARM_CXX)


@cross
@emulated
@pytest.mark.parametrize(
    ("cpu", "expected"),
    [("cortex-a57", []), ("neoverse-n1", ["neon_dotprod"]), ("max", ["neon_i8mm", "neon_dotprod"])],
)
def test_arm_cpus_are_asked_what_they_have(arm_driver, cpu, expected):
    assert run([QEMU, "-cpu", cpu, arm_driver, "names"]).stdout.split() == expected


@cross
@emulated
@pytest.mark.parametrize(
    ("cpu", "products", "expected"),
    [
        ("neoverse-n1", 20_000, ARM_SETS[1:]),
        ("max", 20_000, ARM_SETS),
        pytest.param("max", 1_000_000, ARM_SETS, marks=pytest.mark.slow),
    ],
)
def test_every_instruction_set_of_arm_on_an_emulated_cpu(arm_driver, cpu, products, expected):
    """As it is shipped. The emulator is slow, hence the limit of products of a case."""
    assert passed(run([QEMU, "-cpu", cpu, arm_driver, str(products)]).stdout) == expected


@cross
@emulated
@pytest.mark.slow
def test_every_instruction_set_of_arm_under_sanitizers(tmp_path):
    """Dynamically linked, which the address sanitizer needs, and without its search for leaks, which needs ptrace."""
    driver = build(tmp_path, *SANITIZERS, compiler=ARM_CXX)
    command = [QEMU, "-L", "/usr/aarch64-linux-gnu", "-cpu", "max", driver, "100000"]
    assert passed(run(command, ASAN_OPTIONS="detect_leaks=0").stdout) == ARM_SETS


@cross
@pytest.mark.slow
@pytest.mark.skipif(TORCH is None, reason="no PyTorch, whose headers are needed")
@pytest.mark.parametrize("source", setup.CPU.sources)
def test_the_cpu_library_compiles_for_arm_without_warnings(tmp_path, source):
    """To an object: there is no libtorch for Arm here to link with."""
    command = [ARM_CXX, *setup.COMMON_FLAGS, *setup.WARNINGS, "-Werror", "-fPIC", "-isystem", str(TORCH / "include")]
    run([*command, "-c", source, "-o", os.devnull])
