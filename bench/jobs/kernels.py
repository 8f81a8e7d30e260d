"""Every Triton kernel with the arguments it is launched with: what :mod:`bench.resources` compiles.

Types follow the names of the arguments; a kernel that is missing here, or an argument without a type, is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from splade_kernels.backends.pooling import ACTIVATION_FUNCTIONS
from splade_kernels.backends.triton import flops, grad_hidden, max_backward, pack, sum_pool, tuning
from splade_kernels.backends.triton.launch import tile_options
from splade_kernels.backends.triton.max_forward import (
    FINALISE_BLOCK,
    PARTIAL_FINALISE_BLOCK,
    _finalise_kernel,
    _maximum_kernel,
)
from splade_kernels.backends.triton.screening import exact, quantise, screen
from splade_kernels.backends.triton.tuning import Config, HiddenConfig, MatmulConfig, WeightConfig

# (name for the report, Triton's name, dtype, precision of float32 products)
DTYPES = (
    ("bfloat16", "bf16", torch.bfloat16, "ieee"),
    ("float16", "fp16", torch.float16, "ieee"),
    ("float32", "fp32", torch.float32, "tf32"),
    ("float32", "fp32", torch.float32, "ieee"),
)
# The backward's tiles follow the hidden size: usual ones, and one whose rows are aligned to nothing.
HIDDEN_SIZES = (128, 768, 1000)
# The activation function that takes most registers.
LOGS = max(ACTIVATION_FUNCTIONS.values())
# No scale and no soft cap of the logits.
ACTIVATION: dict[str, Any] = {"LOGS": LOGS, "logit_scale": None, "logit_softcap": None}
# Pointers that are slices of something, and so may be aligned to an element only.
UNALIGNED = frozenset(
    "group_count_ptr start_ptr length_ptr listed_ptr offset_ptr output_ptr argmax_ptr mask_ptr entry_count_ptr "
    "wanted_ptr".split()
)
_INDICES = frozenset(
    "chunk_offset_ptr chunk_row_ptr dense_sequence_ptr edge_ptr group_count_ptr group_offset_ptr group_sequence_ptr "
    "length_ptr listed_ptr offset_ptr outcome_ptr position_ptr sequence_ptr start_ptr word_ptr".split()
)
_QUEUE = {"budget_ptr": "*i64", "queue_ptr": "*i64", "entry_count_ptr": "*i64"}


@dataclass(frozen=True)
class Case:
    """One kernel to compile: Triton types of its run-time arguments, values of its constants, launch options."""

    kernel: Any
    arch: int
    dtype: str
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    launch: dict[str, int]

    @property
    def matmul(self) -> bool:
        return "BLOCK_K" in self.constants


def cases(arch: int) -> Iterator[Case]:
    """All kernels of one architecture, in the default configurations and in those of the table that ships."""
    for name, triton_name, dtype, precision in DTYPES:
        make = Maker(arch, name, triton_name)
        tuned = tuning.dtype_name(dtype, precision)
        for kind in ("maximum", "sum"):
            yield from kind_cases(kind, make, tuning.default_config(arch, tuned, kind), precision)
        # What multiplies no floats is the same for TF32 and float32.
        if precision == "ieee":
            yield from kind_cases("int8", make, tuning.default_config(arch, tuned, "int8"), precision)
            for hidden_size in HIDDEN_SIZES:
                aligned = hidden_size % 16 == 0
                yield weight_case(make, tuning.default_weight_config(hidden_size), aligned)
                yield from hidden_cases(make, tuning.default_hidden_config(hidden_size), aligned)
            yield from _others(make)
        entries = ((shape.kind, config) for shape, config in tuning.shipped_table(arch).items() if shape.dtype == tuned)
        for kind, config in dict.fromkeys(entries):
            yield from kind_cases(kind, make, config, precision)


def transformed_cases(arch: int, **transform: str) -> Iterator[Case]:
    """The kernels that compute the activation, for models that scale or cap their logits; in default configurations.

    Args:
        transform: Triton's types of ``logit_scale`` and ``logit_softcap``, where there are any.
    """
    for name, triton_name, dtype, precision in DTYPES:
        tuned = tuning.dtype_name(dtype, precision)
        make = Maker(arch, name, triton_name, transform)
        yield from sum_cases(make, tuning.default_config(arch, tuned, "sum"), precision)
        if precision == "ieee":
            yield weight_case(make, tuning.default_weight_config(768))
            yield from finalisers(make)
            yield gradient_case(make)


def kind_cases(kind: str, make: Maker, config: Config, precision: str) -> Iterator[Case]:
    """The kernels that run with a configuration of this kind. They are compiled once for all sizes of D and V."""
    if isinstance(config, WeightConfig):
        yield weight_case(make, config)
    elif isinstance(config, HiddenConfig):
        yield from hidden_cases(make, config)
    elif kind == "int8":
        yield int8_case(make, config)
    else:
        yield from (maximum_cases if kind == "maximum" else sum_cases)(make, config, precision)


@dataclass(frozen=True)
class Maker:
    """Makes the cases of one architecture and dtype; ``element`` is Triton's name of the dtype.

    ``transform``: see :func:`transformed_cases`.
    """

    arch: int
    dtype: str
    element: str
    transform: Mapping[str, str] = field(default_factory=dict)

    def __call__(
        self,
        kernel: Any,
        types: dict[str, str],
        constants: dict[str, Any],
        num_warps: int = 4,
        num_stages: int = 3,
        aligned_rows: bool = True,
        **more: int,
    ) -> Case:
        constants = {name: value for name, value in constants.items() if name not in self.transform}
        types = {**types, **self.transform}
        names = [name for name in kernel.arg_names if name not in constants]
        chosen = {name: types.get(name) or _default_type(name, self.element) for name in names}
        aligned = [name for name in names if chosen[name].startswith("*") and name not in UNALIGNED]
        if aligned_rows:
            aligned += [name for name in names if name in ("hidden_size", "stride_wv", "stride_hn", "stride_n")]
        aligned += [name for name in names if name == "width"]
        launch = {"num_warps": num_warps, "num_stages": num_stages, **more}
        return Case(kernel, self.arch, self.dtype, chosen, constants, tuple(aligned), launch)


def _default_type(name: str, element: str) -> str:
    """Activations, parameters and their gradients have the dtype of the case; everything else is an index."""
    if not name.endswith("_ptr"):
        return "i32"
    return "*" + ("i32" if name in _INDICES else element)


def maximum_cases(make: Maker, config: MatmulConfig, precision: str) -> Iterator[Case]:
    constants = {**_tile(config), "PRECISION": precision, "stride_wd": 1, "SLICES": config.epilogue_slices}
    # A weight that no descriptor describes is fetched by pointers. Where calls are screened, partial maxima give way to
    # atomic ones.
    ways = (False, True) if config.tma else (False,)
    partials = (False, True) if config.partials else (False,)
    for keys, descriptors, partial in itertools.product(("*i64", "*i32"), ways, partials):
        constants |= {"ORDER": config.order if descriptors else "strips", "PARTIALS": partial}
        types = {"key_ptr": keys, **_matrices(make.element, config, descriptors)}
        yield make(_maximum_kernel, types, constants | {"DESCRIPTORS": descriptors}, *_launch(config))
    if config.partials:
        yield from finalisers(make, config.block_t // config.epilogue_slices)


def sum_cases(make: Maker, config: MatmulConfig, precision: str) -> Iterator[Case]:
    constants = {"PRECISION": precision, **ACTIVATION, "stride_wd": 1}
    chosen = sum_pool.sum_config(config)
    yield make(sum_pool._sum_kernel, {}, _tile(chosen) | constants, *_launch(chosen))
    chosen = sum_pool.logit_grad_config(config)
    constants |= {"ROWS": sum_pool.CHUNK_ROWS, "stride_gv": 1}
    yield make(sum_pool._logit_grad_kernel, {"partial_ptr": "*fp32"}, _tile(chosen) | constants, *_launch(chosen))


def int8_case(make: Maker, config: MatmulConfig) -> Case:
    types = {"weight_statistics_ptr": "*fp32", "row_statistics_ptr": "*fp32", **_QUEUE}
    types |= _matrices("i8", config, config.tma)
    return make(screen._screen_kernel, types, {**_tile(config), "DESCRIPTORS": config.tma}, *_launch(config))


def _tile(config: MatmulConfig) -> dict[str, Any]:
    return {name: value for name, value in tile_options(config).items() if name.isupper()}


def _launch(config: MatmulConfig) -> tuple[int, int]:
    return config.num_warps, config.num_stages


def _matrices(element: str, config: MatmulConfig, descriptors: bool) -> dict[str, str]:
    if not descriptors:
        return {"weight": f"*{element}", "row": f"*{element}"}
    tiles = {"weight": config.block_v, "row": config.block_t}
    return {name: f"tensordesc<{element}[{height}, {config.block_k}]>" for name, height in tiles.items()}


def finalisers(make: Maker, partial_rows: int = 0) -> Iterator[Case]:
    """For training and for inference; of partial maxima if ``partial_rows`` is not 0."""
    block_v = PARTIAL_FINALISE_BLOCK if partial_rows else FINALISE_BLOCK
    constants: dict[str, Any] = {**ACTIVATION, "PARTIAL_ROWS": partial_rows, "BLOCK_V": block_v}
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
    yield gradient_case(make)


def gradient_case(make: Maker) -> Case:
    constants = {**ACTIVATION, "stride_gv": 1, "BLOCK_V": grad_hidden.GRADIENT_BLOCK}
    return make(grad_hidden._gradient_kernel, {"value_ptr": "*fp32"}, constants)


def _screening(make: Maker) -> Iterator[Case]:
    int8 = {"quantised_ptr": "*i8", "statistics_ptr": "*fp32", "wanted_ptr": "*i1"}
    for aligned, absent in (
        (True, ["wanted_ptr"]),
        (True, ["group_count_ptr"]),
        (False, ["group_count_ptr", "wanted_ptr"]),
    ):
        constants = {"BLOCK_D": quantise.BLOCK_D, "stride_d": 1, **dict.fromkeys(absent)}
        yield make(quantise._quantise_kernel, int8, constants, aligned_rows=aligned)
    yield make(screen._budget_kernel, _QUEUE, {"BLOCK_B": screen.BLOCK})
    yield make(screen._divide_kernel, _QUEUE, {"BLOCK_G": screen.BLOCK})
    for keys in ("*i64", "*i32"):
        constants = {"ENTRIES": exact.ENTRIES, "BLOCK_D": exact.BLOCK_D, "stride_wd": 1}
        yield make(exact._exact_kernel, _QUEUE | {"key_ptr": keys}, constants, exact.WARPS)


def weight_case(make: Maker, config: WeightConfig, aligned: bool = True) -> Case:
    tile = {"BLOCK_B": max_backward.BLOCK_B, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
    constants = {**ACTIVATION, "stride_gv": 1, "stride_hd": 1, **tile}
    launch = config.num_warps, 3, aligned
    limit = max_backward.MAX_REGISTERS
    return make(max_backward._weight_kernel, {"argmax_ptr": "*i16"}, constants, *launch, maxnreg=limit)


def hidden_cases(make: Maker, config: HiddenConfig, aligned: bool = True) -> Iterator[Case]:
    types = {"bound_ptr": "*i64", "value_ptr": "*fp32", "partial_ptr": "*fp32"}
    sums = {"CHUNK": grad_hidden.CHUNK, "ENTRIES": config.entries, "BLOCK_D": config.block_d, "stride_wd": 1}
    yield make(grad_hidden._chunk_kernel, types, sums, config.num_warps, 3, aligned)
    yield make(grad_hidden._hidden_kernel, types, sums | {"ROWS": config.rows}, config.num_warps, 3, aligned)
