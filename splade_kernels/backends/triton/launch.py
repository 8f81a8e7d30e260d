"""What a launch depends on: architecture, multiprocessors, TMA descriptors, and what configurations are chosen by."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..pooling import PoolingCall
from .common import INTERPRETED, dot_precision
from .tuning import MatmulConfig


def architecture(device: torch.device) -> int:
    """Compute capability as an integer, 90 for 9.0; 0 in the interpreter."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; a few in the interpreter, so that a persistent program walks several tiles."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def problem(call: PoolingCall, weight: Tensor) -> tuple[int, int, int, torch.dtype, str]:
    """All that a configuration may depend on, as the functions of :mod:`.tuning` take it."""
    vocab_size, hidden_size = weight.shape
    precision = dot_precision(call.compute_dtype)
    return architecture(weight.device), hidden_size, vocab_size, call.compute_dtype, precision


def activation_options(call: PoolingCall) -> dict[str, Any]:
    """What kernels are told of the activation. For None, a scale of 1 or no soft cap, no code is compiled."""
    scale = None if call.logit_scale == 1 else call.logit_scale
    return {"logit_scale": scale, "logit_softcap": call.logit_softcap or None, "LOGS": call.logs}


def fits_descriptor(matrix: Tensor) -> bool:
    """Whether a TMA descriptor can describe it: dense rows, 16-byte aligned base address and row stride."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    dense = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] and matrix.numel() > 0
    return dense and row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0


def tiled_launch(
    config: MatmulConfig, weight: Tensor, rows: Tensor
) -> tuple[int, tuple[Tensor | TensorDescriptor, ...], dict[str, Any]]:
    """Number of programs, the matrices as pointers or descriptors, and the kernel's constants and launch options."""
    programs = -(-weight.shape[0] // config.block_v) * -(-rows.shape[0] // config.block_t)
    matrices: tuple[Tensor | TensorDescriptor, ...] = (weight, rows)
    descriptors = config.tma and fits_descriptor(weight) and fits_descriptor(rows)
    if descriptors:
        programs = min(programs, config.programs or config.resident * multiprocessors(weight.device))
        matrices = (
            TensorDescriptor.from_tensor(weight, [config.block_v, config.block_k]),
            TensorDescriptor.from_tensor(rows, [config.block_t, config.block_k]),
        )
    return programs, matrices, {"DESCRIPTORS": descriptors, **tile_options(config)}


def tile_options(config: MatmulConfig) -> dict[str, int]:
    """The constants and launch options of every kernel of tiles ``[block_v, block_t]``."""
    return {
        "BLOCK_V": config.block_v,
        "BLOCK_T": config.block_t,
        "BLOCK_K": config.block_k,
        "GROUP_V": config.group_v,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
