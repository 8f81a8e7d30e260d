"""Metadata lives in pyproject.toml. Here: the compiled operators of ``csrc/``, which are optional.

    pip install --no-build-isolation .          builds them: torch and a C++20 compiler have to be there already
    python setup.py build_ext --inplace         the same in a clone

``splade_kernels/_csrc.so`` holds the schemas and the CPU code, ``_csrc_cuda<major>.so`` the CUDA code, built where
torch is a CUDA build and nvcc is of the same major version, or with ``FORCE_CUDA=1``. ``TORCH_CUDA_ARCH_LIST`` names
the architectures, ``CXX`` and ``CUDA_HOME`` the compilers. The libraries use PyTorch's stable ABI and nothing of
Python's, so one build serves every PyTorch from 2.10 on and every Python. What cannot be built is left out, with a
message.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
COMMON_FLAGS = ("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020A000000000000ULL")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
CPU_SOURCES = ("schema.cpp", "cpu/ops.cpp", "cpu/gradients.cpp", "cpu/screening.cpp")
CPU = Extension("splade_kernels._csrc", [str(CSRC / name) for name in CPU_SOURCES])


def torch_folder() -> Path | None:
    """The folder of the installed PyTorch, found without importing it; None if there is none."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def cpp_command(sources: list[str], output: str, torch: Path) -> list[str]:
    includes = ["-isystem", str(torch / "include")]
    link = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    return [
        *compiler(),
        *COMMON_FLAGS,
        *WARNINGS,
        "-fPIC",
        "-fvisibility=hidden",
        *includes,
        *sources,
        "-o",
        output,
        *link,
    ]


def nvcc_command(nvcc: str, sources: list[str], output: str, torch: Path, *extra: str) -> list[str]:
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES
    host = ["-Xcompiler", ",".join(("-fPIC", "-fvisibility=hidden", *WARNINGS))]
    host += ["-ccbin", compiler()[-1]] if "CXX" in os.environ else []
    link = ["-shared", "-cudart", "shared", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    includes = ["-isystem", str(torch / "include")]
    return [
        nvcc,
        *COMMON_FLAGS,
        *gencode(architectures),
        *("--threads", "0"),
        # No symbol is shared between device objects, so device linking is not needed. With --threads the device linkers
        # of all architectures use one temporary file, and now and then "nvlink fatal: Could not read ..._dlink.reg.c".
        "--no-device-link",
        *host,
        *includes,
        *extra,
        *sources,
        *("-o", output),
        *link,
    ]


def compiler() -> list[str]:
    """``CXX``, which may name a wrapper before the compiler."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def gencode(architectures: str) -> list[str]:
    """nvcc's flags for a list like ``8.6;9.0a;12.0+PTX``: machine code for each, and PTX where asked for."""
    flags = []
    for name in re.split(r"[;,\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", name)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.6 or 12.0+PTX, got {name!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def cuda_major_of_torch(torch: Path) -> str | None:
    match = re.search(r"^cuda\b[^=]*= '(\d+)\.", (torch / "version.py").read_text(), re.MULTILINE)
    return match[1] if match else None


def cuda_major_of_nvcc(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.", text)
    return match[1] if match else "unknown"


def extensions() -> list[Extension]:
    """What can be built here."""
    torch = torch_folder()
    if torch is None:
        say(
            "PyTorch is not there at build time (pip isolates builds), so the compiled operators are left out. With "
            "them: install torch, setuptools and a C++20 compiler, then `pip install --no-build-isolation .`"
        )
        return []
    if shutil.which(compiler()[0]) is None:
        say("no C++ compiler (CXX, c++) was found: the compiled operators are left out")
        return []
    found = [CPU]
    nvcc, wanted = find_nvcc(), cuda_major_of_torch(torch)
    forced = os.environ.get("FORCE_CUDA") == "1"
    if wanted is None and not forced:
        return found
    if nvcc is None:
        say("no nvcc (CUDA_HOME, PATH) was found: the compiled operators are for CPU tensors only")
    elif (major := cuda_major_of_nvcc(nvcc)) != wanted and not forced:
        say(f"nvcc is of CUDA {major}, PyTorch of CUDA {wanted}: the compiled operators are for CPU tensors only")
    else:
        found.append(Extension(f"splade_kernels._csrc_cuda{major}", [str(CSRC / "cuda/ops.cu")]))
    return found


def say(message: str) -> None:
    print(f"\n{'*' * 80}\nsplade-kernels: {message}\n{'*' * 80}\n", file=sys.stderr, flush=True)


class BuildExtensions(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no suffix of this Python: nothing of it is used

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # A build that is killed while linking leaves this file, not a broken library that counts as up to date.
        linked = output.with_suffix(".partial")
        torch = torch_folder()
        assert torch is not None
        nvcc = find_nvcc() if "cuda" in ext.name else None
        try:
            command = (
                cpp_command(ext.sources, str(linked), torch)
                if nvcc is None
                else nvcc_command(nvcc, ext.sources, str(linked), torch)
            )
        except ValueError as error:
            say(f"{ext.name} is left out: {error}")
            return
        # A library is up to date if it is newer than every source and was built by the same command.
        line, note = " ".join(command), Path(self.build_temp, f"{ext.name}.command")
        newest = max(Path(path).stat().st_mtime for path in (__file__, *ext.depends))
        same = output.exists() and note.exists() and note.read_text() == line
        if same and not self.force and output.stat().st_mtime > newest:
            return
        print(line, file=sys.stderr, flush=True)
        if subprocess.run(command).returncode == 0:
            os.replace(linked, output)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(line)
            return
        for path in (linked, output):
            path.unlink(missing_ok=True)
        if self.inplace:
            Path(*ext.name.split(".")).with_suffix(".so").unlink(missing_ok=True)  # of an earlier build
        say(f"{ext.name} could not be built (above is why) and is left out: PyTorch's operations do its work")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if self.distribution.ext_modules else (python, abi, platform)


if __name__ == "__main__":
    found = extensions()
    for extension in found:
        extension.optional = True
        extension.depends = [str(path) for path in CSRC.rglob("*.*")]
    setup(ext_modules=found, cmdclass={"build_ext": BuildExtensions, "bdist_wheel": Wheel})
