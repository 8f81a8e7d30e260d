"""Configurations worth measuring, and what the compiler says of them before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bench.jobs.kernels import Case, Maker, hidden_cases, matmuls, weight_case
from bench.resources import Row, measure, shared_limit
from splade_kernels.backends.triton.grad_hidden import HiddenConfig, hidden_config
from splade_kernels.backends.triton.max_backward import WeightConfig, weight_config
from splade_kernels.backends.triton.sum_pool import MAX_BLOCK_T, logit_grad_config, sum_config
from splade_kernels.backends.triton.tuning import (
    ARCHITECTURES,
    ORDERS,
    MatmulConfig,
    default_config,
    matmul_config,
    uses_descriptors,
)

Config = MatmulConfig | WeightConfig | HiddenConfig
KINDS = ("maximum", "sum", "backward-weight", "backward-hidden")
# Name in the table: (Triton's name, dtype, precision of float32 products).
DTYPES = {
    "bfloat16": ("bf16", torch.bfloat16, "ieee"),
    "float16": ("fp16", torch.float16, "ieee"),
    "tf32": ("fp32", torch.float32, "tf32"),
}
# What the compiler's own buffers may add to the tiles of a pipeline.
_SHARED_SLACK = 2048


@dataclass(frozen=True)
class Question:
    """What one configuration is sought for."""

    kind: str
    arch: int
    dtype: str
    hidden_size: int
    vocab_size: int


def shipped(question: Question) -> Config:
    """What the package would use without a tuned entry."""
    if question.kind == "backward-weight":
        return weight_config(question.hidden_size)
    if question.kind == "backward-hidden":
        return hidden_config(question.hidden_size)
    _, dtype, precision = DTYPES[question.dtype]
    if question.arch in ARCHITECTURES:
        return default_config(question.arch, question.dtype)
    return matmul_config(question.arch, question.hidden_size, question.vocab_size, dtype, precision)


def candidates(question: Question) -> list[Config]:
    """The shipped configuration, then all others that can fit."""
    first = shipped(question)
    if question.kind == "backward-weight":
        return list(dict.fromkeys([first, *_weight()]))
    if question.kind == "backward-hidden":
        return list(dict.fromkeys([first, *_hidden()]))
    assert isinstance(first, MatmulConfig)
    if question.kind == "sum":
        # Several are one and the same once sum pooling has cut their tiles.
        distinct: dict[tuple[MatmulConfig, MatmulConfig], MatmulConfig] = {}
        for config in [first, *_fitting(question, _sum(question))]:
            plain = replace(config, tma=False, resident=1)
            distinct.setdefault((sum_config(plain), logit_grad_config(plain)), config)
        return [*distinct.values()]
    makers = _maximum_by_descriptors if uses_descriptors(question.arch) else _maximum_by_pointers
    return list(dict.fromkeys([first, *_fitting(question, makers(question, first))]))


def refinements(best: Config, kind: str = "maximum") -> list[Config]:
    """Second round: the best with other orders of its programs, and for the maximum with the options of its kernel."""
    if not isinstance(best, MatmulConfig):
        return [best]
    found = [best, *(replace(best, group_v=group_v) for group_v in (4, 16, 32))]
    if kind == "maximum":
        orders = ORDERS if best.tma else ("strips",)
        slices = sorted({1, 2, best.epilogue_slices})
        for order, epilogue_slices, partials in itertools.product(orders, slices, (False, True)):
            found.append(replace(best, order=order, epilogue_slices=epilogue_slices, partials=partials))
    return list(dict.fromkeys(found))


def _maximum_by_descriptors(question: Question, first: MatmulConfig) -> Iterator[MatmulConfig]:
    depth = 128 // DTYPES[question.dtype][1].itemsize
    yield from _singles(first)
    yield MatmulConfig(128, 128, depth, 8, 4, tma=True)
    for block_v, block_t in ((128, 256), (256, 128)):
        wide = MatmulConfig(block_v, block_t, depth, 8, 3, tma=True)
        deeper = replace(wide, num_stages=4)
        # Slices of 64 tokens: in one piece the tile of 256 spills.
        yield from (wide, *_singles(wide), deeper, replace(deeper, epilogue_slices=block_t // 64))
    # What a weight without descriptors takes.
    yield MatmulConfig(128, 128, depth, 8, 3)


def _maximum_by_pointers(question: Question, first: MatmulConfig) -> Iterator[MatmulConfig]:
    shallow, deep = (bytes_a_row // DTYPES[question.dtype][1].itemsize for bytes_a_row in (64, 128))
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


def _sum(question: Question) -> Iterator[MatmulConfig]:
    depths = [bytes_a_row // DTYPES[question.dtype][1].itemsize for bytes_a_row in (64, 128)]
    for block_v, depth, warps, stages in itertools.product((64, 128, 256), depths, (4, 8), (2, 3, 4)):
        yield MatmulConfig(block_v, MAX_BLOCK_T, depth, warps, stages)


def _fitting(question: Question, configs: Iterator[MatmulConfig]) -> Iterator[MatmulConfig]:
    """Those whose tiles fit into shared memory."""
    for config in configs:
        buffers = config.num_stages - (0 if config.tma else 1)
        tile_bytes = (config.block_v + config.block_t) * config.block_k * DTYPES[question.dtype][1].itemsize
        if config.resident * (buffers * tile_bytes + _SHARED_SLACK) <= shared_limit(question.arch):
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


_KERNELS = {
    "maximum": ("_maximum_kernel", "_finalise_kernel"),
    "sum": ("_sum_kernel", "_logit_grad_kernel"),
}


def compile_cases(question: Question, config: Config) -> list[Case]:
    """The kernels of the question, with this configuration. They are compiled once for all sizes of D and V."""
    name, dtype, precision = DTYPES[question.dtype]
    make = Maker(question.arch, str(dtype).removeprefix("torch."), name)
    if isinstance(config, WeightConfig):
        return [weight_case(make, config)]
    if isinstance(config, HiddenConfig):
        return list(hidden_cases(make, config))
    return [case for case in matmuls(make, config, precision) if case.kernel.__name__ in _KERNELS[question.kind]]


def examine(question: Question, config: Config) -> tuple[list[Row], list[str]]:
    """What the compiler made of the candidate, and the reasons to drop it: none if it can be measured."""
    try:
        rows = [measure(case) for case in compile_cases(question, config)]
    except Exception as error:  # whatever the compiler raises, the candidate is out
        return [], [f"does not compile: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    problems = [f"{row.kernel} {problem}" for row in rows for problem in row.problems()]
    return rows, problems
