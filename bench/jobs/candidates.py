"""Configurations worth measuring, and what the compiler says of them before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.jobs.compiled import Row, measure, shared_limit
from bench.jobs.kernels import Maker, kind_cases
from splade_kernels.backends.triton import tuning
from splade_kernels.backends.triton.common import INT8_WIDTH
from splade_kernels.backends.triton.sum_pool import MAX_BLOCK_T, logit_grad_config, sum_config
from splade_kernels.backends.triton.tuning import Config, HiddenConfig, MatmulConfig, Shape, WeightConfig

# Name in the table: (Triton's name, dtype, precision of float32 products).
DTYPES = {
    "bfloat16": ("bf16", torch.bfloat16, "ieee"),
    "float16": ("fp16", torch.float16, "ieee"),
    "tf32": ("fp32", torch.float32, "tf32"),
}
# What the compiler's own buffers may add to the tiles of a pipeline.
_SHARED_SLACK = 2048


def shipped(shape: Shape) -> Config:
    """What the package would use without a tuned entry."""
    if shape.kind == "backward-weight":
        return tuning.default_weight_config(shape.hidden_size)
    if shape.kind == "backward-hidden":
        return tuning.default_hidden_config(shape.hidden_size)
    if shape.architecture in tuning.ARCHITECTURES:
        return tuning.default_config(shape.architecture, shape.dtype, shape.kind)
    _, dtype, precision = DTYPES[shape.dtype]
    return tuning.matmul_config(shape.architecture, shape.hidden_size, shape.vocab_size, dtype, precision, shape.kind)


def candidates(shape: Shape) -> list[Config]:
    """The shipped configuration, then all others that can fit."""
    first = shipped(shape)
    if not isinstance(first, MatmulConfig):
        return list(dict.fromkeys([first, *(_weight() if shape.kind == "backward-weight" else _hidden())]))
    if shape.kind == "sum":
        # Several are one and the same once sum pooling has cut their tiles.
        distinct: dict[tuple[MatmulConfig, MatmulConfig], Config] = {}
        for config in [first, *_fitting(shape, _sum(shape))]:
            distinct.setdefault((sum_config(config), logit_grad_config(config)), config)
        return [*distinct.values()]
    if shape.kind == "int8":
        found = _int8(tuning.uses_descriptors(shape.architecture))
    else:
        found = (_by_descriptors if tuning.uses_descriptors(shape.architecture) else _by_pointers)(shape, first)
    return list(dict.fromkeys([first, *_fitting(shape, found)]))


def refinements(best: Config, kind: str = "maximum") -> list[Config]:
    """Second round: the best with other orders of its programs, and for the maximum with the options of its kernel."""
    if not isinstance(best, MatmulConfig):
        return [best]
    found = [best, *(replace(best, group_v=group_v) for group_v in (4, 16, 32))]
    if kind == "maximum":
        orders = tuning.ORDERS if best.tma else ("strips",)
        slices = sorted({1, 2, best.epilogue_slices})
        for order, epilogue_slices, partials in itertools.product(orders, slices, (False, True)):
            found.append(replace(best, order=order, epilogue_slices=epilogue_slices, partials=partials))
    return list(dict.fromkeys(found))


def _by_descriptors(shape: Shape, first: MatmulConfig) -> Iterator[MatmulConfig]:
    _, depth = _depths(shape)
    yield from _singles(first)
    yield MatmulConfig(128, 128, depth, 8, 4, tma=True)
    for block_v, block_t in ((128, 256), (256, 128)):
        wide = MatmulConfig(block_v, block_t, depth, 8, 3, tma=True)
        deeper = replace(wide, num_stages=4)
        # Slices of 64 tokens: in one piece the tile of 256 spills.
        yield from (wide, *_singles(wide), deeper, replace(deeper, epilogue_slices=block_t // 64))
    # What a weight that no descriptor describes takes.
    yield MatmulConfig(128, 128, depth, 8, 3)


def _by_pointers(shape: Shape, first: MatmulConfig) -> Iterator[MatmulConfig]:
    shallow, deep = _depths(shape)
    for num_stages, num_warps, depth in itertools.product((3, 2, 4), (8, 4), (shallow, deep)):
        yield MatmulConfig(128, 128, depth, num_warps, num_stages)
    yield MatmulConfig(256, 128, shallow, 8, 3)
    yield MatmulConfig(128, 256, shallow, 8, 3)
    # In slices of 64 tokens: on sm_86 the tile in one piece spills.
    yield MatmulConfig(128, 256, shallow, 8, 3, epilogue_slices=4)
    for (block_v, block_t), depth in itertools.product(((64, 128), (128, 64)), (shallow, deep)):
        yield MatmulConfig(block_v, block_t, depth, 4, 3)
    yield from _singles(first)


def _singles(config: MatmulConfig) -> Iterator[MatmulConfig]:
    """One option at a time, so that each is measured alone."""
    if config.tma:
        yield replace(config, order="runs")
    yield replace(config, epilogue_slices=2)
    yield replace(config, partials=True)


def _sum(shape: Shape) -> Iterator[MatmulConfig]:
    for block_v, depth, warps, stages in itertools.product((64, 128, 256), _depths(shape), (4, 8), (2, 3, 4)):
        yield MatmulConfig(block_v, MAX_BLOCK_T, depth, warps, stages)


def _int8(descriptors: bool) -> Iterator[MatmulConfig]:
    tiles, depths = ((128, 128), (128, 64), (64, 128)), (INT8_WIDTH // 2, INT8_WIDTH)
    for (block_v, block_t), depth, warps, stages in itertools.product(tiles, depths, (4, 8), (2, 3, 4)):
        resident = 2 if descriptors and warps == 4 else 1
        yield MatmulConfig(block_v, block_t, depth, warps, stages, tma=descriptors, resident=resident)


def _depths(shape: Shape) -> tuple[int, int]:
    """Elements of 64 and of 128 bytes of a row."""
    size = DTYPES[shape.dtype][1].itemsize
    return 64 // size, 128 // size


def _fitting(shape: Shape, configs: Iterator[MatmulConfig]) -> Iterator[MatmulConfig]:
    """Those whose tiles fit into shared memory."""
    size = 1 if shape.kind == "int8" else DTYPES[shape.dtype][1].itemsize
    for config in configs:
        buffers = config.num_stages - (0 if config.tma else 1)
        tile_bytes = (config.block_v + config.block_t) * config.block_k * size
        if config.resident * (buffers * tile_bytes + _SHARED_SLACK) <= shared_limit(shape.architecture):
            yield config


def _weight() -> Iterator[WeightConfig]:
    for block_v, block_d, warps in itertools.product((8, 16, 32), (64, 128, 256), (1, 2, 4, 8)):
        if 8 <= block_v * block_d // (32 * warps) <= 64:
            yield WeightConfig(block_v, block_d, warps)


def _hidden() -> Iterator[HiddenConfig]:
    for rows, entries, block_d, warps in itertools.product((2, 4, 8), (4, 8, 16), (256, 512, 1024), (1, 2, 4, 8)):
        # Every thread needs a column of its own, and no more than 64 values of a tile.
        if 32 * warps <= block_d and entries * block_d // (32 * warps) <= 64:
            yield HiddenConfig(rows, entries, block_d, warps)


def examine(shape: Shape, config: Config) -> tuple[list[Row], list[str]]:
    """What the compiler made of the candidate, and the reasons to drop it: none if it can be measured."""
    name, dtype, precision = DTYPES[shape.dtype]
    make = Maker(shape.architecture, str(dtype).removeprefix("torch."), name)
    try:
        rows = [measure(case) for case in kind_cases(shape.kind, make, config, precision)]
    except Exception as error:  # whatever the compiler raises, the candidate is out
        return [], [f"does not compile: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    problems = [f"{row.kernel} {problem}" for row in rows for problem in row.problems()]
    return rows, problems
