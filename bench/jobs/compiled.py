"""What the compiler makes of one kernel: registers, spills, shared memory and instructions; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.jobs.kernels import Case

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Shared memory one program may have: CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "QMMA", "OMMA")
ASYNCHRONOUS_COPY = ("LDGSTS", "UTMALDG")
ATOMIC = ("RED", "REDG", "ATOM", "ATOMG")
STORE = ("STG",)
# In PTX, before the assembler: what multiplies matrices, and what leaves a result in global memory.
PTX = {"multiply": r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma)\.", "write": r"\b(?:atom|red|st)(?:\.\w+)*?\.global\b"}


def shared_limit(arch: int) -> int:
    """Bytes of shared memory of one program; of an architecture that is not listed, what every one since sm_80 has."""
    return SHARED_LIMIT.get(arch, min(SHARED_LIMIT.values()))


@dataclass
class Row:
    """What one kernel in one configuration needs on one architecture; memory in bytes."""

    kernel: str
    arch: int
    dtype: str
    config: dict[str, Any]
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int] = field(default_factory=dict)
    matmul: bool = False
    ptx: dict[str, int] = field(default_factory=dict)  # instructions of each kind in ``PTX``

    def problems(self) -> list[str]:
        limit = shared_limit(self.arch)
        multiplies = self.matmul and not (self.config.get("PRECISION") == "ieee" and self.dtype == "float32")
        written = self.ptx.get("write") and self.has((*ATOMIC, *STORE))
        problems = {
            f"spills {self.spill_bytes} bytes": self.spill_bytes > 0,
            f"needs {self.shared_bytes} bytes of shared memory, {self.arch} has {limit}": self.shared_bytes > limit,
            "has no matrix instruction in its PTX": multiplies and not self.ptx.get("multiply"),
            "multiplies without tensor cores": multiplies and not self.has(TENSOR_CORE),
            # A compiler that cannot pipeline a product may drop it together with what depends on it.
            "writes no result to global memory": self.matmul and not written,
        }
        return [problem for problem, there in problems.items() if there]

    def has(self, names: tuple[str, ...]) -> bool:
        return any(self.instructions.get(name) for name in names)


def compile_case(case: Case) -> Any:
    """What Triton makes of one case: ``asm["ptx"]``, ``asm["cubin"]``, ``metadata``."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, signature, case.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=case.launch)


def measure(case: Case) -> Row:
    """Compile one case and read its machine code."""
    compiled = compile_case(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: expected REG, STACK and SHARED, got {usage!r}")
    registers, stack, static_shared = map(int, found.groups())
    names = (*TENSOR_CORE, *ASYNCHRONOUS_COPY, *ATOMIC, *STORE)
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in names}
    counts["total"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, re.MULTILINE))
    constants = case.constants.items()
    return Row(
        kernel=case.kernel.__name__.strip("_"),
        arch=case.arch,
        dtype=case.dtype,
        config={name: value for name, value in constants if name.isupper() and isinstance(value, (int, str))}
        | case.launch,
        registers=registers,
        spill_bytes=stack,
        shared_bytes=compiled.metadata.shared + static_shared,
        instructions={name: count for name, count in counts.items() if count},
        matmul=case.matmul,
        ptx={name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in PTX.items()},
    )
