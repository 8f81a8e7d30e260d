"""Other kinds of CPU than this one, for ``pytest --cpu KIND``: what the package asks of a CPU gets that kind's answers.

Programs that a test starts see the machine as it is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from splade_kernels.backends import compiled
from splade_kernels.backends.tiled import screening, screening_plain

# Kinds add up: `--cpu vnni --cpu bf16 --cpu plain` is a Zen 4 without a compiler.
KINDS = {
    "vnni": "AVX-512 VNNI: torch._int_mm multiplies int8 rows, and the compiled kernels are asked for AVX-512",
    "bf16": "AVX-512 BF16: sum pooling multiplies bfloat16 rows as they are, which rounds the logits",
    "plain": "no compiled operators",
}


def simulate(kind: str, patch: pytest.MonkeyPatch) -> None:
    if kind == "vnni":
        patch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
        patch.setattr(torch, "_int_mm", int_mm_with_vnni)
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        if compiled.serves(torch.device("cpu")):
            _ask_for_avx512(patch)
    elif kind == "bf16":
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    elif kind == "plain":
        patch.setattr(compiled, "_load", lambda name: f"{name}.so was not built, says --cpu plain")


def forget_answers() -> None:
    """What the package asks once a process is asked again."""
    for answer in (screening.chosen_kernels, screening_plain.int_mm_is_right, screening_plain.int_mm_is_fast):
        answer.cache_clear()


def int_mm_with_vnni(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm`` on a CPU with VNNI: exact, and unwritten where oneDNN refuses a leading dimension."""
    # Sums of 1024 products, 1024 · 128² = 2^24, are exact in float32, which takes less memory.
    dtype = torch.float32 if a.shape[1] <= 1024 else torch.float64
    product = (a.to(dtype) @ b.to(dtype)).to(torch.int32)
    for matrix in (a, b):
        rows_follow = matrix.stride(1) == 1
        leading, least = (matrix.stride(0), matrix.shape[1]) if rows_follow else (matrix.stride(1), matrix.shape[0])
        if leading < least:
            return product.fill_(torch.iinfo(torch.int32).max)
    return product


def _ask_for_avx512(patch: pytest.MonkeyPatch) -> None:
    """AVX-512 VNNI is chosen; the kernels that run are the fastest that this CPU has."""
    names, kernels_for = screening._names(), screening._kernels_for
    if names:
        patch.setattr(screening, "_names", lambda: ["avx512_vnni", "avx2"])
        patch.setattr(screening, "_kernels_for", lambda name: replace(kernels_for(names[0]), name=name))
