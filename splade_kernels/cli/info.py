"""``splade-kernels info``."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

PACKAGES = ("torch", "triton", "sentence-transformers", "transformers", "numpy", "pyarrow")
# Sizes for which the configurations of the kernels are shown: those of BERT and DistilBERT.
HIDDEN_SIZE, VOCAB_SIZE = 768, 30522
# Beside the package's own: what changes which code runs.
VARIABLES = ("ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "TRITON_INTERPRET")
PREFIX = "SPLADE_KERNELS_"


def command() -> None:
    """Versions, backends, CPU and GPU: plain text for a report."""
    lines = [*packages(), *backends(), *processor(), *gpus(), *variables()]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:{width}}  {text}")


def packages() -> Iterator[tuple[str, str]]:
    from .. import __version__

    yield "splade-kernels", f"{__version__}, {_commit()}"
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"
    yield "python", f"{platform.python_version()}, {platform.platform()}"


def backends() -> Iterator[tuple[str, str]]:
    from ..backends import available_backends

    names = {"csrc": "compiled operators", "screening": "int8 kernels (CPU)"}
    for name, text in available_backends().items():
        yield names.get(name, f"backend {name}"), text


def processor() -> Iterator[tuple[str, str]]:
    import torch

    yield "CPU", _cpu_name()
    yield "instruction set", f"{torch.backends.cpu.get_cpu_capability()}, which PyTorch uses"
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"


def gpus() -> Iterator[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        yield "GPU", "none that PyTorch can use"
        return
    yield "CUDA", f"{torch.version.cuda or torch.version.hip}, driver {_driver()}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.1f} GiB"
        yield f"GPU {index}", f"{properties.name}, capability {properties.major}.{properties.minor}, {size}"
        yield from _configurations(index, 10 * properties.major + properties.minor)


def variables() -> Iterator[tuple[str, str]]:
    names = [name for name in sorted(os.environ) if name.startswith(PREFIX) or name in VARIABLES]
    for name in names:
        yield name, os.environ[name]
    if not any(name.startswith(PREFIX) for name in names):
        yield f"{PREFIX}*", "not set"


def _configurations(index: int, arch: int) -> Iterator[tuple[str, str]]:
    """What the forward, screening and backward kernels run with at the sizes of BERT, in bfloat16."""
    import torch

    try:
        from ..backends.triton import tuning

        half = torch.bfloat16
        sizes = (arch, HIDDEN_SIZE, VOCAB_SIZE, half, "ieee")
        found: dict[str, object] = {
            "maximum": tuning.matmul_config(*sizes),
            "int8": tuning.matmul_config(*sizes, "int8"),
            "backward-weight": tuning.weight_config(*sizes),
            "backward-hidden": tuning.hidden_config(*sizes),
        }
        tuned = bool(os.environ.get(tuning.ENVIRONMENT_VARIABLE, "").strip() or tuning.shipped_table(arch))
    except (ImportError, ValueError) as error:
        yield f"GPU {index}, kernels", f"none: {error}"
        return
    where = "a table of the tuner where it has an entry" if tuned else "untuned defaults"
    yield f"GPU {index}, kernels", f"sm_{arch}, bfloat16, {HIDDEN_SIZE} × {VOCAB_SIZE}, {where}"
    for kind, config in found.items():
        values = dataclasses.asdict(config)  # type: ignore[call-overload]
        yield f"  {kind}", " ".join(f"{name}={value}" for name, value in values.items())


def _commit() -> str:
    """Of a clone that the package lies in, or that it was installed from."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        found = _output(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"])
        return f"commit {found}" if found else "a clone, whose commit git does not tell"
    try:
        origin = json.loads(distribution("splade-kernels").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    commit = origin.get("vcs_info", {}).get("commit_id")
    return f"commit {commit[:12]}" if commit else "commit not known: installed from a package"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return _output(query) or "not known: no nvidia-smi"


def _output(line: list[str]) -> str | None:
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
