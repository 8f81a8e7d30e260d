"""Every Triton kernel with the arguments it is launched with: what :mod:`bench.resources` compiles.

Types follow the names of the arguments; a kernel that is missing here, or an argument without a type, is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from splade_kernels.backends.triton import flops, grad_hidden, pack
from splade_kernels.backends.triton import max_backward as pool_backward
from splade_kernels.backends.triton import sum_pool as pool_sum
from splade_kernels.backends.triton.max_forward import (
    FINALISE_BLOCK,
    PARTIAL_FINALISE_BLOCK,
    _finalise_kernel,
    _maximum_kernel,
)
from splade_kernels.backends.triton.screening import exact, quantise
from splade_kernels.backends.triton.screening import screen as screening
from splade_kernels.backends.triton.tuning import MatmulConfig, matmul_config, screening_config

# (name for the report, Triton's name, dtype, precision of float32 products)
DTYPES = (
    ("bfloat16", "bf16", torch.bfloat16, "ieee"),
    ("float16", "fp16", torch.float16, "ieee"),
    ("float32", "fp32", torch.float32, "tf32"),
    ("float32", "fp32", torch.float32, "ieee"),
)
# The shapes that decide nothing but the choice of a configuration.
HIDDEN_SIZE, VOCAB_SIZE = 768, 30522
# The backward's tiles follow the hidden size: usual ones, and one whose rows are aligned to nothing.
HIDDEN_SIZES = (128, 768, 1000)
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
    "entry_count_ptr",
    "wanted_ptr",
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
    maxnreg: int | None = None


def cases(arch: int) -> Iterator[Case]:
    """All kernels in all shipped configurations of one architecture."""
    for name, triton_name, dtype, precision in DTYPES:
        config = matmul_config(arch, HIDDEN_SIZE, VOCAB_SIZE, dtype, precision)
        make = Maker(arch, name, triton_name)
        yield from matmuls(make, config, precision)
        if precision == "ieee":
            yield from _others(make)


@dataclass(frozen=True)
class Maker:
    arch: int
    dtype: str
    element: str

    def __call__(
        self,
        kernel: Any,
        types: dict[str, str],
        constants: dict[str, Any],
        num_warps: int = 4,
        num_stages: int = 3,
        aligned_rows: bool = True,
        maxnreg: int | None = None,
    ) -> Case:
        names = [name for name in kernel.arg_names if name not in constants]
        chosen = {name: types.get(name) or _default_type(name, self.element) for name in names}
        aligned = [name for name in names if chosen[name].startswith("*") and name not in UNALIGNED]
        if aligned_rows:
            aligned += [name for name in names if name in ("hidden_size", "stride_wv", "stride_hn", "stride_n")]
        aligned += [name for name in names if name == "width"]
        matmul = "BLOCK_K" in constants
        launch = (num_warps, num_stages, matmul, maxnreg)
        return Case(kernel, self.arch, self.dtype, chosen, constants, tuple(aligned), *launch)


def _default_type(name: str, element: str) -> str:
    """Activations, parameters and their gradients have the dtype of the case; everything else is an index."""
    if not name.endswith("_ptr"):
        return "i32"
    return "*" + ("i32" if name in _INDICES else element)


_INDICES = {
    "chunk_offset_ptr",
    "chunk_row_ptr",
    "dense_sequence_ptr",
    "edge_ptr",
    "group_count_ptr",
    "group_offset_ptr",
    "group_sequence_ptr",
    "length_ptr",
    "listed_ptr",
    "offset_ptr",
    "outcome_ptr",
    "position_ptr",
    "sequence_ptr",
    "start_ptr",
    "word_ptr",
}


def matmuls(make: Maker, config: MatmulConfig, precision: str) -> Iterator[Case]:
    def constants(chosen: MatmulConfig, **more: Any) -> dict[str, Any]:
        tile = {"BLOCK_V": chosen.block_v, "BLOCK_T": chosen.block_t, "BLOCK_K": chosen.block_k}
        return {**tile, "GROUP_V": chosen.group_v, "PRECISION": precision, **more}

    launch = (config.num_warps, config.num_stages)
    pointers = {"weight": "*" + make.element, "row": "*" + make.element}
    descriptors = {
        "weight": f"tensordesc<{make.element}[{config.block_v}, {config.block_k}]>",
        "row": f"tensordesc<{make.element}[{config.block_t}, {config.block_k}]>",
    }
    ways = (pointers, descriptors) if config.tma else (pointers,)
    # Where calls are screened, partial maxima give way to atomic ones.
    partials = (False, True) if config.partials else (False,)
    for training, tiles, partial in itertools.product((True, False), ways, partials):
        maximum = constants(config, DESCRIPTORS=tiles is descriptors, stride_wd=1)
        maximum["ORDER"] = config.order if tiles is descriptors else "strips"
        maximum |= {"SLICES": config.epilogue_slices, "PARTIALS": partial}
        yield make(_maximum_kernel, {"key_ptr": "*i64" if training else "*i32"} | tiles, maximum, *launch)
    if config.partials:
        yield from finalisers(make, config.block_t // config.epilogue_slices)
    chosen = pool_sum.sum_config(config)
    summed = constants(chosen, LOGS=2, stride_wd=1)
    yield make(pool_sum._sum_kernel, {}, summed, chosen.num_warps, chosen.num_stages)
    chosen = pool_sum.logit_grad_config(config)
    gradient = constants(chosen, LOGS=2, ROWS=pool_sum.CHUNK_ROWS, stride_wd=1, stride_gv=1)
    yield make(pool_sum._logit_grad_kernel, {"partial_ptr": "*fp32"}, gradient, chosen.num_warps, chosen.num_stages)


def finalisers(make: Maker, partial_rows: int = 0) -> Iterator[Case]:
    """For training and for inference; of partial maxima if ``partial_rows`` is not 0."""
    block_v = PARTIAL_FINALISE_BLOCK if partial_rows else FINALISE_BLOCK
    constants: dict[str, Any] = {"LOGS": 2, "PARTIAL_ROWS": partial_rows, "BLOCK_V": block_v}
    if not partial_rows:
        constants["offset_ptr"] = None
    yield make(_finalise_kernel, {"key_ptr": "*i64", "argmax_ptr": "*i16"}, constants)
    yield make(_finalise_kernel, {"key_ptr": "*i32"}, constants | {"argmax_ptr": None})


def _others(make: Maker) -> Iterator[Case]:
    yield make(pack._list_kernel, {"mask_ptr": "*i64"}, {"BLOCK_S": 1024, "stride_ms": 1})
    for absent in ({}, {"edge_ptr": None}):
        yield make(pack._offset_kernel, {}, {"BLOCK_B": 1024, **absent})
    for absent in ({}, {"listed_ptr": None}):
        yield make(pack._pack_kernel, {}, {"BLOCK_D": 256, "stride_hd": 1, **absent})
    yield from finalisers(make)
    yield make(flops._count_kernel, {"kept_ptr": "*u8"}, {"BLOCK_V": 2048, "stride_ev": 1})
    for absent in ({}, {"kept_ptr": None}):
        sums = {"BLOCK_B": flops.BLOCK_B, "BLOCK_V": flops.BLOCK_V, "stride_ev": 1, **absent}
        yield make(flops._sums_kernel, {"kept_ptr": "*u8", "sum_ptr": "*fp32"}, sums)
    yield from _screening(make)
    yield from _backward(make)


def _screening(make: Maker) -> Iterator[Case]:
    counts = {"budget_ptr": "*i64", "queue_ptr": "*i64", "entry_count_ptr": "*i64"}
    int8 = {"quantised_ptr": "*i8", "statistics_ptr": "*fp32", "wanted_ptr": "*i1"}
    for aligned, absent in (
        (True, ["wanted_ptr"]),
        (True, ["group_count_ptr"]),
        (False, ["group_count_ptr", "wanted_ptr"]),
    ):
        constants = {"BLOCK_D": quantise.BLOCK_D, "stride_d": 1, **dict.fromkeys(absent)}
        yield make(quantise._quantise_kernel, int8, constants, aligned_rows=aligned)
    config = screening_config(make.arch)
    tiles = {"weight": "*i8", "row": "*i8"}
    if config.tma:
        tiles = {
            "weight": f"tensordesc<i8[{config.block_v}, {config.block_k}]>",
            "row": f"tensordesc<i8[{config.block_t}, {config.block_k}]>",
        }
    statistics = {"weight_statistics_ptr": "*fp32", "row_statistics_ptr": "*fp32"}
    constants = {"BLOCK_V": config.block_v, "BLOCK_T": config.block_t, "BLOCK_K": config.block_k}
    constants |= {"GROUP_V": config.group_v, "DESCRIPTORS": config.tma}
    launch = (config.num_warps, config.num_stages)
    yield make(screening._budget_kernel, counts, {"BLOCK_B": screening.BLOCK})
    yield make(screening._screen_kernel, tiles | statistics | counts, constants, *launch)
    yield make(screening._divide_kernel, counts, {"BLOCK_G": screening.BLOCK})
    for keys in ("*i64", "*i32"):
        constants = {"ENTRIES": exact.ENTRIES, "BLOCK_D": exact.BLOCK_D, "stride_wd": 1}
        yield make(exact._exact_kernel, counts | {"key_ptr": keys}, constants, exact.WARPS)


def _backward(make: Maker) -> Iterator[Case]:
    for hidden_size in HIDDEN_SIZES:
        aligned = hidden_size % 16 == 0
        yield weight_case(make, pool_backward.weight_config(hidden_size), aligned)
        yield from hidden_cases(make, grad_hidden.hidden_config(hidden_size), aligned)
    gradient = {"LOGS": 2, "stride_gv": 1, "BLOCK_V": grad_hidden.GRADIENT_BLOCK}
    yield make(grad_hidden._gradient_kernel, {"value_ptr": "*fp32"}, gradient)


def weight_case(make: Maker, config: pool_backward.WeightConfig, aligned: bool = True) -> Case:
    tile = {"BLOCK_B": pool_backward.BLOCK_B, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
    constants = {"LOGS": 2, "stride_gv": 1, "stride_hd": 1, **tile}
    limit = pool_backward.MAX_REGISTERS
    return make(pool_backward._weight_kernel, {"argmax_ptr": "*i16"}, constants, config.num_warps, 3, aligned, limit)


def hidden_cases(make: Maker, config: grad_hidden.HiddenConfig, aligned: bool = True) -> Iterator[Case]:
    types = {"bound_ptr": "*i64", "value_ptr": "*fp32", "partial_ptr": "*fp32"}
    sums = {"CHUNK": grad_hidden.CHUNK, "ENTRIES": config.entries, "BLOCK_D": config.block_d, "stride_wd": 1}
    yield make(grad_hidden._chunk_kernel, types, sums, config.num_warps, 3, aligned)
    yield make(grad_hidden._hidden_kernel, types, sums | {"ROWS": config.rows}, config.num_warps, 3, aligned)
