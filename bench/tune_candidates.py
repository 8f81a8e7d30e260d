"""Configurations worth measuring, and what the compiler says of them before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch

from bench.kernel_cases import Case, _Maker, _matmuls
from bench.resources import SHARED_LIMIT, Row, compile_case
from splade_kernels.backends.triton import pool_backward
from splade_kernels.backends.triton.pool_backward import BackwardConfig, backward_config
from splade_kernels.backends.triton.tuning import (
    ARCHITECTURES,
    MatmulConfig,
    default_config,
    matmul_config,
    uses_descriptors,
)

Config = MatmulConfig | BackwardConfig
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
    if question.kind.startswith("backward"):
        return backward_config(question.hidden_size)
    _, dtype, precision = DTYPES[question.dtype]
    if question.arch in ARCHITECTURES:
        return default_config(question.arch, question.dtype)
    return matmul_config(question.arch, question.hidden_size, question.vocab_size, dtype, precision)


def candidates(question: Question) -> list[Config]:
    """The shipped configuration, then all others that can fit."""
    first = shipped(question)
    others: Iterator[Config] = _matmul(question)
    if question.kind.startswith("backward"):
        others = _backward(question, backward_config(question.hidden_size))
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
            if needed + _SHARED_SLACK <= SHARED_LIMIT.get(question.arch, 48 << 10) and sums <= 128:
                yield MatmulConfig(block_v, block_t, block_k, num_warps, num_stages, tma=tma)


def _backward(question: Question, first: BackwardConfig) -> Iterator[BackwardConfig]:
    if question.kind == "backward-weight":
        for block_v, block_d, warps in itertools.product((8, 16, 32), (64, 128, 256), (1, 2, 4, 8)):
            if 8 <= block_v * block_d // (32 * warps) <= 64:
                yield replace(first, weight_block_v=block_v, weight_block_d=block_d, weight_warps=warps)
        return
    for rows, entries, block_d, warps in itertools.product((2, 4, 8), (4, 8, 16), (256, 512, 1024), (1, 2, 4, 8)):
        # Every thread needs a column of its own, and no more than 64 values of a tile.
        if 32 * warps <= block_d and entries * block_d // (32 * warps) <= 64:
            yield replace(first, hidden_rows=rows, hidden_entries=entries, hidden_block_d=block_d, hidden_warps=warps)


_KERNELS = {
    "maximum": ("_maximum_kernel", "_maximum_descriptor_kernel"),
    "sum": ("_sum_kernel", "_logit_grad_kernel"),
    "backward-weight": ("_weight_kernel",),
    "backward-hidden": ("_chunk_kernel", "_hidden_kernel"),
}


def compile_cases(question: Question, config: Config) -> list[Case]:
    """The kernels of the question, with this configuration. They are compiled once for all sizes of D and V."""
    name, dtype, precision = DTYPES[question.dtype]
    make = _Maker(question.arch, str(dtype).removeprefix("torch."), name)
    if isinstance(config, MatmulConfig):
        cases = list(_matmuls(make, config, precision))
    else:
        with mock.patch.object(pool_backward, "backward_config", lambda *args, **kwargs: config):
            made = pool_backward.compile_cases(question.hidden_size)
        cases = [make(kernel, types, constants, warps) for kernel, types, constants, warps in made]
    return [case for case in cases if case.kernel.__name__ in _KERNELS[question.kind]]


def examine(question: Question, config: Config) -> tuple[list[Row], list[str]]:
    """What the compiler made of the candidate, and the reasons to drop it: none if it can be measured."""
    try:
        rows = [compile_case(case) for case in compile_cases(question, config)]
    except Exception as error:  # whatever the compiler raises, the candidate is out
        return [], [f"does not compile: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    problems = [f"{row.kernel} {problem}" for row in rows for problem in row.problems()]
    return rows, problems
