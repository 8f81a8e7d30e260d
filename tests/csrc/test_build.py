"""What compilers and sanitizers say about ``csrc/``, and installation where it cannot be built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import setup

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "c++")
TORCH = setup.torch_folder()

cxx = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler: {CXX} was not found")
nvcc = pytest.mark.skipif(setup.find_nvcc() is None, reason="NO NVCC: the CUDA code was compiled for no architecture")


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, timeout=1500)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stdout[-4000:] + done.stderr[-8000:]
    return done


@cxx
@pytest.mark.slow
@pytest.mark.parametrize(("code", "kernels", "sanitizers"), [("cpu", 0, "address,undefined"), ("kernels", 1, "thread")])
def test_algorithms_under_sanitizers(tmp_path, code, kernels, sanitizers):
    """The CPU code for memory errors; the CUDA kernels, a thread of the CPU for each of theirs, for data races."""
    driver = str(tmp_path / "driver")
    flags = ["-std=c++20", "-O1", "-g1", "-pthread", *setup.WARNINGS, "-Werror", f"-DKERNELS={kernels}"]
    flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    run([CXX, *flags, "tests/csrc/driver.cpp", "-o", driver])
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed\n", run([driver]).stdout)


@cxx
@pytest.mark.slow
def test_the_cpu_library_compiles_without_warnings(tmp_path):
    command = setup.cpp_command(setup.CPU.sources, str(tmp_path / "_csrc.so"), TORCH)
    run([*command, "-Werror"])


@pytest.mark.slow
@nvcc
def test_cuda_compiles_for_every_architecture_without_warnings_or_spills(tmp_path):
    """ptxas on every kernel for every default architecture: no stack, no spills, shared memory for two blocks."""
    command = setup.nvcc_command(
        setup.find_nvcc(),
        ["csrc/cuda/ops.cu"],
        str(tmp_path / "_csrc_cuda.so"),
        TORCH,
        *("-Werror", "all-warnings", "-Xptxas", "-v"),
    )
    text = run(command, TORCH_CUDA_ARCH_LIST="").stderr
    kernels = defaultdict(set)
    pattern = r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    pattern += r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    for name, arch, stack, stores, loads, registers, rest in re.findall(pattern, text, re.DOTALL):
        kernel = re.search(r"(count|scan|place|mask|gather)_kernel", name)[1]
        kernels[int(arch)].add(name)
        assert (stack, stores, loads) == ("0", "0", "0"), f"{kernel} sm_{arch}: spills"
        shared = re.search(r"(\d+) bytes smem", rest)
        # Two blocks of 256 threads: 64 Ki registers, and 99 KiB of shared memory on sm_86.
        assert int(registers) <= 128, f"{kernel} sm_{arch}: {registers} registers"
        assert shared is None or int(shared[1]) <= 48 << 10, f"{kernel} sm_{arch}: {shared[1]} bytes"
    assert set(kernels) == {80, 86, 89, 90, 100, 120}
    # 3 bucket kernels for two dtypes each of argmax and edges, a mask kernel a dtype, a gather kernel an element size.
    assert {len(names) for names in kernels.values()} == {3 * 4 + 4 + 3}


@nvcc
def test_device_linkers_of_several_architectures_do_not_share_a_file(tmp_path):
    """nvcc runs them side by side on one temporary file, where they fail now and then: none may run."""
    command = setup.nvcc_command(setup.find_nvcc(), ["csrc/cuda/ops.cu"], str(tmp_path / "_csrc_cuda.so"), TORCH)
    steps = run([*command, "--dryrun"], TORCH_CUDA_ARCH_LIST="").stderr
    assert steps.count("ptxas -arch=") == 6
    assert "nvlink" not in steps


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm was not found")
@pytest.mark.parametrize("name", ["_csrc.so", "_csrc_cuda13.so", "_csrc_cuda12.so"])
def test_a_library_uses_of_pytorch_the_stable_abi_alone(name):
    """One build serves several versions of PyTorch because it binds to the C functions that these keep. A C++ symbol of
    libtorch or libc10, or one of Python, would bind it to one version."""
    library = ROOT / "splade_kernels" / name
    if not library.exists():
        pytest.skip(f"{name} was not built")
    symbols = [line.split()[-1] for line in run(["nm", "-D", "--undefined-only", str(library)]).stdout.splitlines()]
    assert "torch_library_impl" in symbols
    own = re.compile(
        r"(aoti_torch_|torch_|cuda)\w+|(_ITM_|__gmon_start__|__cuda|dl)\w*|\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_\S+"
    )
    assert [symbol for symbol in symbols if not own.fullmatch(symbol)] == []


@cxx
def test_a_build_that_is_killed_leaves_no_library(tmp_path):
    """Whatever a compiler had written when it died must not count as up to date."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo broken > "$2"; kill -9 $PPID\n')
    compiler.chmod(0o755)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "splade_kernels").mkdir()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"CXX": str(compiler)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode != 0
    assert not list(tmp_path.rglob("*.so"))


def test_architectures_are_parsed_and_wrong_ones_named():
    assert setup.gencode("8.6;9.0a 12.0+PTX") == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: expected entries like 8.6 .* got 'Ampere'"):
        setup.gencode("Ampere")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("/bin/false", "could not be built"),
        pytest.param("/no/such/compiler", "no C\\+\\+ compiler", marks=pytest.mark.slow),
    ],
)
def test_a_build_without_a_working_compiler_succeeds_and_says_so(tmp_path, broken, said):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "splade_kernels", tmp_path / "splade_kernels", ignore=shutil.ignore_patterns("*.so"))
    done = subprocess.run(
        [sys.executable, "setup.py", "build"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"CXX": broken},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rf"\*\nsplade-kernels: .*{said}", done.stderr)
    assert list(tmp_path.glob("build/lib*/splade_kernels/ops.py"))
    assert not list(tmp_path.rglob("*.so"))
    # At run time: silent, complete, and the reason where it is asked for.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def python(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )

    imported = python("import splade_kernels")
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, "", "")
    done = python(
        "import torch, splade_kernels as sk; print(sk.sparsify(torch.eye(3)).values().tolist());"
        "print(sk.available_backends()['csrc'])"
    )
    assert done.stdout.startswith("[1.0, 1.0, 1.0]\n_csrc.so was not built; build it in a clone with"), done.stderr
    assert done.stderr == ""
