"""Kernel configurations: one table, chosen by architecture, hidden size, vocabulary size and dtype only.

Never by batch or length: a row must not depend on what else is in its batch, and nothing recompiles while training.
Nothing is tuned while training either: ``python -m bench.tune`` measures, and its result enters ``TUNED`` here, or is
read from the file that ``SPLADE_KERNELS_CONFIG`` names (once, at the first launch).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .common import GROUP, LARGEST_BLOCK_T

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
ENVIRONMENT_VARIABLE = "SPLADE_KERNELS_CONFIG"
ORDERS = ("strips", "runs")
EPILOGUE_SLICES = (1, 2, 4)
# "tf32" is float32 whose products may use it. IEEE float32 products have one configuration and are not tuned.
TUNED_DTYPES = ("bfloat16", "float16", "tf32")


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
    # Host-side TMA descriptors and a persistent grid (sm_90 and sm_100).
    tma: bool = False
    # Programs of that grid for each multiprocessor: while one reduces its tile, another one multiplies.
    resident: int = 1
    # Which tiles a program of that grid takes: each a tile of every strip in turn, or one run of tiles, row by row.
    order: str = "strips"
    # Parts of a tile that are reduced one after another by the maximum kernel, so that fewer values are live.
    epilogue_slices: int = 1
    # Whether the maximum of each tile and sequence is stored, instead of all meeting in atomic maxima.
    partials: bool = False


class Shape(NamedTuple):
    """All that a configuration may depend on."""

    architecture: int
    dtype: str
    hidden_size: int
    vocab_size: int


# The lines that `python -m bench.tune` prints. A shape that is not here takes the nearest one of its architecture and
# dtype, and without one the defaults below. Empty: no GPU has measured any yet.
TUNED: dict[Shape, MatmulConfig] = {}

# Architectures on which screening="auto" screens. For each of them bench/results/ has to hold a result of `python -m
# bench.measure screening` from a GPU of that architecture that shows what bench.screening_pays demands; a test checks
# it. Empty: no GPU has measured any yet, so "auto" screens on none.
SCREENING_PAYS: frozenset[int] = frozenset()

_INTERPRETED = MatmulConfig(64, 64, 64, 4, 1, group_v=2)
_IEEE = MatmulConfig(64, 64, 16, 8, 2)
_AMPERE_HALF = MatmulConfig(128, 128, 32, 8, 3)
_AMPERE_TF32 = MatmulConfig(128, 128, 16, 8, 3)
_HOPPER_HALF = MatmulConfig(128, 128, 64, 4, 3, tma=True, resident=2)
_HOPPER_TF32 = MatmulConfig(128, 128, 32, 4, 3, tma=True, resident=2)
_AMPERE_INT8 = MatmulConfig(128, 128, 64, 8, 3)
_HOPPER_INT8 = MatmulConfig(128, 128, 128, 4, 3, tma=True, resident=2)
# Its int8 products are compiled to the instructions of sm_80, which take more registers.
_BLACKWELL_INT8 = MatmulConfig(128, 128, 128, 8, 3, tma=True)
# For a GPU nobody has compiled for: 16 KiB of shared memory in half precision, 32 KiB in float32.
_SAFE = MatmulConfig(64, 64, 32, 4, 2)


def uses_descriptors(arch: int) -> bool:
    """Whether tiles are fetched by TMA descriptors: sm_90 and sm_100, whose shared memory holds deep pipelines."""
    return 90 <= arch < 120


def matmul_config(arch: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, precision: str) -> MatmulConfig:
    """Configuration of the grouped-maximum and sum kernels.

    Raises:
        ValueError: the file named by ``SPLADE_KERNELS_CONFIG`` is not a result of the tuner for this architecture.
    """
    if arch == 0:
        return _INTERPRETED
    name = "tf32" if dtype == torch.float32 and precision == "tf32" else str(dtype).removeprefix("torch.")
    shape = Shape(arch, name, hidden_size, vocab_size)
    chosen = _nearest(_from_environment(arch), shape) or _nearest(TUNED, shape)
    if chosen is not None:
        return chosen
    if arch not in ARCHITECTURES:
        _warn_unknown(arch)
        return _SAFE
    return default_config(arch, name)


def default_config(arch: int, dtype: str) -> MatmulConfig:
    """Untuned configuration of an architecture in ``ARCHITECTURES``."""
    if dtype == "float32":
        return _IEEE
    if uses_descriptors(arch):
        return _HOPPER_TF32 if dtype == "tf32" else _HOPPER_HALF
    return _AMPERE_TF32 if dtype == "tf32" else _AMPERE_HALF


def screening_config(arch: int) -> MatmulConfig:
    """Configuration of the int8 kernel of screening; its ``block_k`` divides ``quantise.WIDTH_MULTIPLE``."""
    if arch == 0:
        return _INTERPRETED
    if arch not in ARCHITECTURES:
        return _SAFE
    if not uses_descriptors(arch):
        return _AMPERE_INT8
    return _HOPPER_INT8 if arch < 100 else _BLACKWELL_INT8


def screening_may_pay(arch: int) -> bool:
    """Whether a checked-in result of this architecture says that screening pays; in the interpreter it never does."""
    return arch in SCREENING_PAYS


def _nearest(table: Mapping[Shape, MatmulConfig], wanted: Shape) -> MatmulConfig | None:
    """Entry whose sizes differ by the smallest factor; of two equally near ones the smaller."""
    found = [shape for shape in table if shape[:2] == wanted[:2]]
    if not found or 0 in wanted:
        return None

    def distance(shape: Shape) -> tuple[float, Shape]:
        ratios = (shape.hidden_size / wanted.hidden_size, shape.vocab_size / wanted.vocab_size)
        return sum(abs(math.log(ratio)) for ratio in ratios), shape

    return table[min(found, key=distance)]


@functools.cache
def _warn_unknown(arch: int) -> None:
    """Cached, so once a process and architecture."""
    warnings.warn(
        f"splade_kernels has no configuration for sm_{arch} and uses a safe, slow one. In a clone of its repository "
        f"`python -m bench.tune --output RESULT.json` measures better ones, and "
        f"{ENVIRONMENT_VARIABLE}=RESULT.json uses them.",
        stacklevel=2,
    )


def _from_environment(arch: int) -> Mapping[Shape, MatmulConfig]:
    path, table = _read_environment()
    if path and not any(shape.architecture == arch for shape in table):
        known = sorted({shape.architecture for shape in table})
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: expected {path} to hold configurations for sm_{arch}, the GPU in use, got those "
            f"for {known}; tune on this GPU, or unset it"
        )
    return table


@functools.cache
def _read_environment() -> tuple[str, Mapping[Shape, MatmulConfig]]:
    path = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not path:
        return "", {}
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: cannot read {path}: {error}") from error
    try:
        return path, parse_table(content)
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: {path}: {error}") from error


def parse_table(content: Any) -> dict[Shape, MatmulConfig]:
    """The entries of ``content["table"]``, each ``{architecture, dtype, hidden_size, vocab_size, config}``.

    Raises:
        ValueError: names the entry and the field, what was expected and what came.
    """
    entries = content.get("table") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"table: expected a list of entries, got {entries!r}")
    table = {}
    for number, entry in enumerate(entries):
        where = f"table[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object, got {entry!r}")
        shape = Shape._make(entry.get(name) for name in Shape._fields)
        for name in ("architecture", "hidden_size", "vocab_size"):
            _check(f"{where}.{name}", getattr(shape, name), "a positive integer", _is_positive(getattr(shape, name)))
        _check(f"{where}.dtype", shape.dtype, f"one of {TUNED_DTYPES}", shape.dtype in TUNED_DTYPES)
        table[shape] = _parse_config(f"{where}.config", entry.get("config"), shape.architecture)
    return table


def _parse_config(where: str, fields: Any, arch: int) -> MatmulConfig:
    _check(where, fields, "an object", isinstance(fields, dict))
    known = {field.name: field for field in dataclasses.fields(MatmulConfig)}
    for name in fields:
        _check(f"{where}.{name}", fields[name], f"one of the fields {sorted(known)}", name in known)
    for name, field in known.items():
        if name not in fields and field.default is not dataclasses.MISSING:
            continue
        value = fields.get(name)
        if str(field.type) == "bool":
            _check(f"{where}.{name}", value, "true or false", isinstance(value, bool))
        elif name.startswith("block_"):
            _check(f"{where}.{name}", value, f"a power of two of at least {GROUP}", _is_power_of_two(value, GROUP))
        elif name == "order":
            _check(f"{where}.{name}", value, f"one of {ORDERS}", value in ORDERS)
        elif name == "epilogue_slices":
            valid = _is_positive(value) and value in EPILOGUE_SLICES
            _check(f"{where}.{name}", value, f"one of {EPILOGUE_SLICES}", valid)
        elif name == "num_warps":
            _check(f"{where}.{name}", value, "a power of two up to 32", _is_power_of_two(value) and value <= 32)
        else:
            _check(f"{where}.{name}", value, "a positive integer", _is_positive(value))
    config = MatmulConfig(**fields)
    _check(f"{where}.block_t", config.block_t, f"at most {LARGEST_BLOCK_T}", config.block_t <= LARGEST_BLOCK_T)
    allowed = uses_descriptors(arch) or not config.tma
    _check(f"{where}.tma", config.tma, f"false, since sm_{arch} does not use TMA descriptors", allowed)
    allowed = config.tma or config.order == "strips"
    _check(f"{where}.order", config.order, "'strips', since without tma a program has one tile", allowed)
    most = config.block_t // GROUP
    expected = f"at most {most}, so that a part of a tile holds a group of {GROUP} tokens"
    _check(f"{where}.epilogue_slices", config.epilogue_slices, expected, config.epilogue_slices <= most)
    return config


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_power_of_two(value: Any, least: int = 1) -> bool:
    return _is_positive(value) and value >= least and value & (value - 1) == 0


def _check(where: str, value: Any, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, got {value!r}")
