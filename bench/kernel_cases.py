"""Every Triton kernel with the arguments it is launched with: what :mod:`bench.resources` compiles.

Types follow the names of the arguments; a kernel that is missing here, or an argument without a type, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from splade_kernels.backends.triton import flops, pack, pool_backward, pool_sum
from splade_kernels.backends.triton.common import GROUP
from splade_kernels.backends.triton.pool_forward import _finalise_kernel, _maximum_descriptor_kernel, _maximum_kernel
from splade_kernels.backends.triton.tuning import MatmulConfig, matmul_config

# (name for the report, Triton's name, dtype, precision of float32 products)
DTYPES = (
    ("bfloat16", "bf16", torch.bfloat16, "ieee"),
    ("float16", "fp16", torch.float16, "ieee"),
    ("float32", "fp32", torch.float32, "tf32"),
    ("float32", "fp32", torch.float32, "ieee"),
)
# The shapes that decide nothing but the choice of a configuration.
HIDDEN_SIZE, VOCAB_SIZE = 768, 30522
# Pointers that are slices of something, and so may be aligned to an element only.
UNALIGNED = {
    "group_count_ptr",
    "start_ptr",
    "length_ptr",
    "listed_ptr",
    "offset_ptr",
    "output_ptr",
    "argmax_ptr",
    "mask_ptr",
}


@dataclass(frozen=True)
class Case:
    """One kernel to compile: Triton types of its run-time arguments, values of its constants, launch options."""

    kernel: Any
    arch: int
    dtype: str
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    matmul: bool = False


def cases(arch: int) -> Iterator[Case]:
    """All kernels in all shipped configurations of one architecture."""
    for name, triton_name, dtype, precision in DTYPES:
        config = matmul_config(arch, HIDDEN_SIZE, VOCAB_SIZE, dtype, precision)
        make = _Maker(arch, name, triton_name)
        yield from _matmuls(make, config, precision)
        if precision == "ieee":
            yield from _others(make)


@dataclass(frozen=True)
class _Maker:
    arch: int
    dtype: str
    element: str

    def __call__(
        self, kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int = 4, num_stages: int = 3
    ) -> Case:
        names = [name for name in kernel.arg_names if name not in constants]
        chosen = {name: types.get(name) or _default_type(name, self.element) for name in names}
        aligned = [name for name in names if name.endswith("_ptr") and name not in UNALIGNED]
        aligned += [name for name in names if name in ("hidden_size", "stride_wv", "stride_hn")]
        matmul = "PRECISION" in constants
        return Case(kernel, self.arch, self.dtype, chosen, constants, tuple(aligned), num_warps, num_stages, matmul)


def _default_type(name: str, element: str) -> str:
    """Activations, parameters and their gradients have the dtype of the case; everything else is an index."""
    if not name.endswith("_ptr"):
        return "i32"
    return "*" + ("i32" if name in _INDICES else element)


_INDICES = {
    "argmax_ptr",
    "group_count_ptr",
    "group_sequence_ptr",
    "length_ptr",
    "listed_ptr",
    "offset_ptr",
    "position_ptr",
    "sequence_ptr",
}


def _matmuls(make: _Maker, config: MatmulConfig, precision: str) -> Iterator[Case]:
    def constants(chosen: MatmulConfig, **more: Any) -> dict[str, Any]:
        return {
            "HAS_BIAS": True,
            "BLOCK_V": chosen.block_v,
            "BLOCK_T": chosen.block_t,
            "BLOCK_K": chosen.block_k,
            "GROUP_V": chosen.group_v,
            "PRECISION": precision,
            "UPCAST": False,
            **more,
        }

    launch = (config.num_warps, config.num_stages)
    for training in (True, False):
        keys = {"key_ptr": "*i64" if training else "*i32"}
        maximum = constants(config, GROUP=GROUP, NEED_ARGMAX=training)
        yield make(_maximum_kernel, keys, maximum | {"stride_wd": 1}, *launch)
        if config.tma:
            tiles = {
                "weight_tiles": f"tensordesc<{make.element}[{config.block_v}, {config.block_k}]>",
                "row_tiles": f"tensordesc<{make.element}[{config.block_t}, {config.block_k}]>",
            }
            yield make(_maximum_descriptor_kernel, keys | tiles, maximum, *launch)
    for kernel, chosen, types, more in (
        (pool_sum._sum_kernel, pool_sum.sum_config(config), {}, {}),
        (
            pool_sum._logit_grad_kernel,
            pool_sum.logit_grad_config(config),
            {"partial_ptr": "*fp32"},
            {"ROWS": pool_sum.CHUNK_ROWS},
        ),
    ):
        summed = constants(chosen, DOUBLE_LOG=True, **more)
        del summed["HAS_BIAS"]
        yield make(kernel, types, summed, *launch)


def _others(make: _Maker) -> Iterator[Case]:
    yield make(pack._list_kernel, {"mask_ptr": "*i64"}, {"BLOCK_S": 1024, "stride_ms": 1})
    packed = {"row_ptr": "*" + make.element, "start_ptr": "*i64"}
    for has_list in (True, False):
        constants: dict[str, Any] = {"HAS_LIST": has_list, "GROUP": GROUP, "BLOCK_D": 256, "stride_hd": 1}
        if not has_list:
            constants["listed_ptr"] = None
        yield make(pack._pack_kernel, packed, constants)
    for training in (True, False):
        constants = {"HAS_BIAS": True, "NEED_ARGMAX": training, "DOUBLE_LOG": True, "BLOCK_V": 1024}
        keys = {"key_ptr": "*i64" if training else "*i32", "argmax_ptr": "*i16"}
        yield make(_finalise_kernel, keys, constants)
    rows = {"row_ptr": "*fp32", "source_ptr": "*i64"}
    yield make(pool_sum._scatter_kernel, rows, {"BLOCK_D": 256})
    yield make(flops._count_kernel, {"kept_ptr": "*u8"}, {"BLOCK_V": 2048, "stride_ev": 1})
    for kept in (True, False):
        sums: dict[str, Any] = {"HAS_KEPT": kept, "BLOCK_B": flops.BLOCK_B, "BLOCK_V": flops.BLOCK_V, "stride_ev": 1}
        if not kept:
            sums["kept_ptr"] = None
        yield make(flops._sums_kernel, {"kept_ptr": "*u8", "sum_ptr": "*fp32"}, sums)
    yield from _backward(make)


def _backward(make: _Maker) -> Iterator[Case]:
    for kernel, types, constants, num_warps in pool_backward.compile_cases(HIDDEN_SIZE):
        yield make(kernel, types, constants, num_warps)
