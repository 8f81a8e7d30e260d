"""Configurations worth measuring, and what the compiler says of them before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from bench.kernel_cases import Case, Maker, hidden_cases, matmuls, weight_case
from bench.resources import SHARED_LIMIT, Row, measure
from splade_kernels.backends.triton.grad_hidden import HiddenConfig, hidden_config
from splade_kernels.backends.triton.pool_backward import WeightConfig, weight_config
from splade_kernels.backends.triton.tuning import (
    ARCHITECTURES,
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
_TILES = ((64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
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
    makers: dict[str, Callable[[], Iterator[Config]]] = {"backward-weight": _weight, "backward-hidden": _hidden}
    others = makers[question.kind]() if question.kind in makers else _matmul(question)
    return list(dict.fromkeys([first, *others]))


def refinements(best: Config) -> list[Config]:
    """Second round: the best with other orders of its programs, which only the caches feel."""
    if isinstance(best, MatmulConfig):
        return [best, *(replace(best, group_v=group_v) for group_v in (4, 16, 32) if group_v != best.group_v)]
    return [best]


def _matmul(question: Question) -> Iterator[MatmulConfig]:
    size = DTYPES[question.dtype][1].itemsize
    descriptors = uses_descriptors(question.arch) and question.kind == "maximum"
    for tma in (False, True) if descriptors else (False,):
        # Rows of a tile of 64 and 128 bytes, and of 256 where TMA fetches them.
        depths = [bytes_a_row // size for bytes_a_row in ((128, 256) if tma else (64, 128))]
        tiles = itertools.product(_TILES, depths, (4, 8), (3, 4, 5) if tma else (2, 3, 4))
        for (block_v, block_t), block_k, num_warps, num_stages in tiles:
            needed = (block_v + block_t) * block_k * size * (num_stages - (0 if tma else 1))
            # A float32 accumulator of more than 128 registers a thread leaves too few for the rest.
            sums = block_v * block_t // (32 * num_warps)
            limit = SHARED_LIMIT.get(question.arch, 48 << 10)
            for resident in (1, 2) if tma else (1,):
                if resident * (needed + _SHARED_SLACK) <= limit and sums <= 128:
                    yield MatmulConfig(block_v, block_t, block_k, num_warps, num_stages, tma=tma, resident=resident)


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
    "maximum": ("_maximum_kernel",),
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
