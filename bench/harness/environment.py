"""What every row's provenance holds: machine, versions, commit, command line."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

# Files that measuring writes: changes to them say nothing about the code that is measured.
_WRITTEN = (
    "bench/results", "bench/RESULTS.md", "docs/bench", "docs/numerics.md", "docs/onnx", "docs/onnx.md",
    "docs/long-documents", "docs/long-documents.md", "docs/screening.md", "README.md",
)  # fmt: skip
# The exit status of a command that cannot do here what it is for; automake's tests have the same.
NOT_HERE = 77
_PACKAGES = ("torch", "triton", "numpy", "transformers", "sentence-transformers", "onnxruntime", "onnx")


def describe() -> dict[str, object]:
    """Device, threads, instruction set, package versions and the commit the code was at."""
    device: dict[str, object] = {"device": cpu_name(), "gpu": torch.cuda.is_available()}
    if device["gpu"]:
        properties = torch.cuda.get_device_properties(0)
        device |= {
            "device": properties.name,
            "arch": 10 * properties.major + properties.minor,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]),
        }
    return {
        **device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        # What integer products run on: the vector and matrix instructions of the CPU (Linux on x86).
        "cpu_flags": sorted(flag for flag in _cpuinfo("flags").split() if re.match("avx|amx|fma", flag)),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit() or _hash(),
        # The table of configurations in use, if not the package's own.
        "config": os.environ.get("SPLADE_KERNELS_CONFIG"),
    }


def device_name(environment: dict[str, Any]) -> str:
    """A device as titles have it, and as rows are told apart by."""
    if environment.get("gpu") or "threads" not in environment:
        return str(environment.get("device", ""))
    return f"{environment['device']} ({environment['cpu_capability']}), {environment['threads']} threads"


def not_here(reason: str) -> NoReturn:
    """End a command that lacks what it needs here; the last line of its output says what."""
    print(f"not here: {reason}", flush=True)
    raise SystemExit(NOT_HERE)


def command(module: str) -> str:
    """The command line that is running, without where it writes."""
    line = " ".join(["python -m", module, *sys.argv[1:]])
    return re.sub(r" --(output|document)[ =]\S+| --append", "", line)


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """The first value of a key in ``/proc/cpuinfo``; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit(folder: Path = Path(__file__).parent) -> str | None:
    """Commit of the working tree, marked when anything but results and documents made of them has changes."""
    commit = _output(["git", "describe", "--always", "--abbrev=12"], folder)
    others = [":/", *(f":(top,exclude){path}" for path in _WRITTEN)]
    changes = _output(["git", "status", "--porcelain", "--untracked-files=no", "--", *others], folder)
    return f"{commit}-dirty" if changes else commit


def _hash() -> str:
    """A hash of the sources that measure and are measured: stands for the commit where git has none."""
    root = Path(__file__).parents[2]
    files = sorted(path for folder in ("bench", "csrc", "splade_kernels") for path in (root / folder).rglob("*.*"))
    suffixes = (".py", ".cpp", ".cu", ".cuh", ".h", ".inc")
    contents = b"".join(path.read_bytes() for path in files if path.suffix in suffixes)
    return f"sources {hashlib.sha256(contents).hexdigest()[:12]}"


def _output(command: list[str], folder: Path = Path(__file__).parent) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
