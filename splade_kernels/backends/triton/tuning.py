"""Kernel configurations: one table, chosen by architecture, hidden size, vocabulary size and dtype only.

Never by batch or length: a row must not depend on what else is in its batch, and nothing recompiles while training.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .common import interpreted

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class MatmulConfig:
    """Tiles of the vocabulary projection: ``[block_v, block_k] x [block_k, block_t]``."""

    block_v: int
    block_t: int
    block_k: int
    num_warps: int
    num_stages: int
    # Programs that share a strip of the vocabulary run together, so that its rows of W stay in L2.
    group_v: int = 8
    # Host-side TMA descriptors and a persistent grid (sm_90 and later).
    tma: bool = False
    # Programs of that grid for each multiprocessor: while one reduces its tile, another one multiplies.
    resident: int = 1


_INTERPRETED = MatmulConfig(64, 64, 64, 4, 1, group_v=2)
_IEEE = MatmulConfig(64, 64, 16, 8, 2)
_AMPERE_HALF = MatmulConfig(128, 128, 32, 8, 3)
_AMPERE_TF32 = MatmulConfig(128, 128, 16, 8, 3)
_HOPPER_HALF = MatmulConfig(128, 128, 64, 4, 3, tma=True, resident=2)
_HOPPER_TF32 = MatmulConfig(128, 128, 32, 4, 3, tma=True, resident=2)


def architecture(device: torch.device) -> int:
    """Compute capability as an integer, 90 for 9.0; 0 in the interpreter."""
    if interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent grid: one per multiprocessor; a few in the interpreter, so that its loop is run."""
    return 3 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def fits_descriptor(matrix: Tensor) -> bool:
    """Whether a TMA descriptor can describe it: unit column stride, base and row stride in multiples of 16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0 and matrix.numel() > 0


def uses_descriptors(arch: int) -> bool:
    """Whether tiles are fetched by TMA descriptors: sm_90 and sm_100, whose shared memory holds deep pipelines."""
    return 90 <= arch < 120


def matmul_config(arch: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, precision: str) -> MatmulConfig:
    """Configuration of the grouped-maximum and sum kernels."""
    if arch == 0:
        return _INTERPRETED
    if dtype == torch.float32 and precision == "ieee":
        return _IEEE
    half = dtype != torch.float32
    if uses_descriptors(arch):
        return _HOPPER_HALF if half else _HOPPER_TF32
    return _AMPERE_HALF if half else _AMPERE_TF32
