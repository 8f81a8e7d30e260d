"""Which configuration a kernel runs with: chosen by kernel, architecture, dtype, hidden and vocabulary size only.

Never by batch or length: a row must not depend on what else is in its batch, and no training step may recompile.
Nothing is tuned while training either. ``python -m bench.tune`` measures and writes a table. The package reads the file
that ``SPLADE_KERNELS_CONFIG`` names first, then ``configs/sm_XX*.json``, each once, at the first launch; a kernel that
neither has an entry for takes the default below.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .common import GROUP, INT8_WIDTH, INTERPRETED, LARGEST_BLOCK_T

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
ENVIRONMENT_VARIABLE = "SPLADE_KERNELS_CONFIG"
# The tables that ship: results of the tuner, sm_XX.json and sm_XX-*.json, of which no two have the same entry.
FOLDER = Path(__file__).parent / "configs"
ORDERS = ("strips", "runs")
EPILOGUE_SLICES = (1, 2, 4)
# "tf32" is float32 whose products may use it. IEEE float32 products have one configuration and are not tuned.
TUNED_DTYPES = ("bfloat16", "float16", "tf32")

# Architectures on which screening="auto" screens: bench/results/ has to hold a result of `python -m bench.measure
# screening` from a GPU of each that shows what bench.screening_pays demands; a test checks it.
SCREENING_PAYS: frozenset[int] = frozenset()


@dataclass(frozen=True)
class MatmulConfig:
    """Tiles of the vocabulary projection: ``[block_v, block_k] x [block_k, block_t]``."""

    block_v: int
    block_t: int
    block_k: int
    num_warps: int
    num_stages: int
    # Vocabulary tiles of a strip, whose programs run together so that its rows of W stay in L2.
    group_v: int = 8
    # Host-side TMA descriptors and a persistent grid (sm_90 and sm_100).
    tma: bool = False
    # Programs of that grid on each multiprocessor: while one reduces its tile, another one multiplies.
    resident: int = 1
    # Programs of that grid in all, where it is not to follow the GPU: a small grid walks many tiles of a small case.
    programs: int = 0
    # The tiles of one program of that grid: every n-th tile of the strips, or one run of consecutive tiles, row by row.
    order: str = "strips"
    # Parts of a tile that the maximum kernel reduces one after another, so that fewer values are live.
    epilogue_slices: int = 1
    # Whether each tile stores its maximum for each sequence, instead of an atomic maximum into the keys.
    partials: bool = False


@dataclass(frozen=True)
class WeightConfig:
    """Tile of dW that one program owns."""

    block_v: int
    block_d: int
    num_warps: int


@dataclass(frozen=True)
class HiddenConfig:
    """A program takes ``rows`` of dh at a time and sums ``entries`` rows of W at once, ``block_d`` columns of each."""

    rows: int
    entries: int
    block_d: int
    num_warps: int


Config = MatmulConfig | WeightConfig | HiddenConfig
KINDS: dict[str, type[Config]] = {
    "maximum": MatmulConfig,
    "sum": MatmulConfig,
    "int8": MatmulConfig,
    "backward-weight": WeightConfig,
    "backward-hidden": HiddenConfig,
}


class Shape(NamedTuple):
    """All that a configuration may depend on."""

    kind: str
    architecture: int
    dtype: str
    hidden_size: int
    vocab_size: int


_INTERPRETED = MatmulConfig(64, 64, 64, 4, 1, group_v=2)
_IEEE = MatmulConfig(64, 64, 16, 8, 2)
_AMPERE_HALF = MatmulConfig(128, 128, 32, 8, 3)
_AMPERE_TF32 = MatmulConfig(128, 128, 16, 8, 3)
_HOPPER_HALF = MatmulConfig(128, 128, 64, 4, 3, tma=True, resident=2)
_HOPPER_TF32 = MatmulConfig(128, 128, 32, 4, 3, tma=True, resident=2)
_AMPERE_INT8 = MatmulConfig(128, 128, 64, 8, 3)
_HOPPER_INT8 = MatmulConfig(128, 128, 128, 4, 3, tma=True, resident=2)
# sm_100 compiles int8 products to the instructions of sm_80, which take more registers.
_BLACKWELL_INT8 = MatmulConfig(128, 128, 128, 8, 3, tma=True)
# For an architecture that nobody has compiled for: 16 KiB of shared memory in half precision, 32 KiB in float32.
_SAFE = MatmulConfig(64, 64, 32, 4, 2)


def uses_descriptors(arch: int) -> bool:
    """Whether tiles are fetched by TMA descriptors: sm_90 and sm_100, whose shared memory holds deep pipelines."""
    return 90 <= arch < 120


def screening_may_pay(arch: int) -> bool:
    """Whether a checked-in result of this architecture says that screening pays; never in the interpreter."""
    return arch in SCREENING_PAYS


def dtype_name(dtype: torch.dtype, precision: str) -> str:
    """The dtype of a :class:`Shape`."""
    return "tf32" if dtype == torch.float32 and precision == "tf32" else str(dtype).removeprefix("torch.")


def matmul_config(
    arch: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, precision: str, kind: str = "maximum"
) -> MatmulConfig:
    """Configuration of the grouped-maximum kernel, the kernels of sum pooling, or the int8 kernel of screening.

    Raises:
        ValueError: a table that applies here is not a result of the tuner for this architecture.
    """
    if arch == 0:
        return _INTERPRETED
    shape = Shape(kind, arch, dtype_name(dtype, precision), hidden_size, vocab_size)
    found: MatmulConfig | None = _tuned(shape)
    if found is None and arch not in ARCHITECTURES:
        _warn_unknown(arch)
        return _SAFE
    return found or default_config(arch, shape.dtype, kind)


def weight_config(arch: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, precision: str) -> WeightConfig:
    """Configuration of the kernel of dW, by the dtype of the forward's products."""
    shape = Shape("backward-weight", arch, dtype_name(dtype, precision), hidden_size, vocab_size)
    found: WeightConfig | None = _tuned(shape)
    return found or default_weight_config(hidden_size)


def hidden_config(arch: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, precision: str) -> HiddenConfig:
    """Configuration of the kernels of dh, by the dtype of the forward's products."""
    shape = Shape("backward-hidden", arch, dtype_name(dtype, precision), hidden_size, vocab_size)
    found: HiddenConfig | None = _tuned(shape)
    return found or default_hidden_config(hidden_size)


def default_config(arch: int, dtype: str, kind: str = "maximum") -> MatmulConfig:
    """Untuned configuration of an architecture in ``ARCHITECTURES``."""
    if kind == "int8":
        return (_HOPPER_INT8 if arch < 100 else _BLACKWELL_INT8) if uses_descriptors(arch) else _AMPERE_INT8
    if dtype == "float32":
        return _IEEE
    if uses_descriptors(arch):
        config = _HOPPER_TF32 if dtype == "tf32" else _HOPPER_HALF
    else:
        config = _AMPERE_TF32 if dtype == "tf32" else _AMPERE_HALF
    # The kernels of sum pooling fetch tiles by pointers on every architecture.
    return replace(config, tma=False, resident=1) if kind == "sum" else config


def default_weight_config(hidden_size: int) -> WeightConfig:
    """16 float32 sums a thread, and rows as wide as fits, since whole rows are gathered."""
    block_d = min(256, triton.next_power_of_2(max(hidden_size, 16)))
    # Half as wide where that leaves fewer lanes idle: 128 for D = 384.
    while block_d > 64 and -hidden_size % (block_d // 2) < -hidden_size % block_d:
        block_d //= 2
    return WeightConfig(16, block_d, max(1, block_d // 32))


def default_hidden_config(hidden_size: int) -> HiddenConfig:
    """Tiles so wide that one thread holds all entries of a column, so that summing them takes no shuffles."""
    block_d = min(1024, triton.next_power_of_2(max(hidden_size, 16)))
    # A program costs the interpreter milliseconds.
    return HiddenConfig(64 if INTERPRETED else 4, 8, block_d, max(1, block_d // 256))


@functools.cache
def _warn_unknown(arch: int) -> None:
    """Cached, so once a process and architecture."""
    warnings.warn(
        f"splade_kernels has no configuration for sm_{arch} and uses a safe, slow one. In a clone of its repository "
        f"`python -m bench.tune --output RESULT.json` measures better ones, and "
        f"{ENVIRONMENT_VARIABLE}=RESULT.json uses them.",
        stacklevel=2,
    )


def _tuned(shape: Shape) -> Any:
    """The entry of the nearest sizes in the user's table, else in the shipped one; None if neither has one."""
    if shape.architecture == 0 or 0 in shape:
        return None
    user = _user_table(shape.architecture)
    return _nearest(user, shape) or _nearest(shipped_table(shape.architecture), shape)


def _nearest(table: Mapping[Shape, Config], wanted: Shape) -> Config | None:
    """Entry whose sizes differ by the smallest factor; of two equally near ones the smaller."""

    def distance(shape: Shape) -> tuple[float, Shape]:
        ratios = (shape.hidden_size / wanted.hidden_size, shape.vocab_size / wanted.vocab_size)
        return sum(abs(math.log(ratio)) for ratio in ratios), shape

    found = [shape for shape in table if shape[:3] == wanted[:3]]
    return table[min(found, key=distance)] if found else None


@functools.cache
def shipped_table(arch: int) -> Mapping[Shape, Config]:
    """What ships for an architecture, in one file or several; empty where nothing was tuned."""
    paths = [*FOLDER.glob(f"sm_{arch}.json"), *FOLDER.glob(f"sm_{arch}-*.json")]
    return {shape: config for path in paths for shape, config in _read(path).items()}


def _user_table(arch: int) -> Mapping[Shape, Config]:
    path, table = _read_environment()
    if path and not any(shape.architecture == arch for shape in table):
        known = sorted({shape.architecture for shape in table})
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: expected {path} to hold configurations for sm_{arch}, the GPU in use, got those "
            f"for {known}; tune on this GPU, or unset it"
        )
    return table


@functools.cache
def _read_environment() -> tuple[str, Mapping[Shape, Config]]:
    path = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    try:
        return path, _read(Path(path)) if path else {}
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: {error}") from error


def _read(path: Path) -> dict[Shape, Config]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    try:
        return parse_table(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def entry(shape: Shape, config: Config) -> dict[str, Any]:
    """What :func:`parse_table` reads: one item of the list ``table`` in a result of the tuner."""
    return {**shape._asdict(), "config": dataclasses.asdict(config)}


def parse_table(content: Any) -> dict[Shape, Config]:
    """The entries of ``content["table"]``, each ``{kind, architecture, dtype, hidden_size, vocab_size, config}``.

    Raises:
        ValueError: names the entry and the field, what was expected and what came.
    """
    entries = content.get("table") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"table: expected a list of entries, got {entries!r}")
    table = {}
    for number, fields in enumerate(entries):
        where = f"table[{number}]"
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: expected an object, got {fields!r}")
        shape = Shape._make(fields.get(name) for name in Shape._fields)
        for name in ("architecture", "hidden_size", "vocab_size"):
            _check(f"{where}.{name}", getattr(shape, name), "a positive integer", _is_positive(getattr(shape, name)))
        _check(f"{where}.kind", shape.kind, f"one of {(*KINDS,)}", shape.kind in (*KINDS,))
        _check(f"{where}.dtype", shape.dtype, f"one of {TUNED_DTYPES}", shape.dtype in TUNED_DTYPES)
        table[shape] = _parse_config(f"{where}.config", fields.get("config"), shape)
    return table


def _parse_config(where: str, fields: Any, shape: Shape) -> Config:
    _check(where, fields, "an object", isinstance(fields, dict))
    made = KINDS[shape.kind]
    known = {field.name: field for field in dataclasses.fields(made)}
    for name in fields:
        _check(f"{where}.{name}", fields[name], f"one of the fields {sorted(known)}", name in known)
    least = GROUP if made is MatmulConfig else 1
    power = (f"a power of two of at least {least}", lambda value: _is_power_of_two(value, least))
    for name, field in known.items():
        if name in fields or field.default is dataclasses.MISSING:
            value = fields.get(name)
            expected, holds = _RULES.get(name, power)
            _check(f"{where}.{name}", value, expected, holds(value))
    config = made(**fields)
    if isinstance(config, MatmulConfig):
        _check_matmul(where, config, shape)
    return config


def _check_matmul(where: str, config: MatmulConfig, shape: Shape) -> None:
    def check(name: str, expected: str, holds: bool) -> None:
        _check(f"{where}.{name}", getattr(config, name), expected, holds)

    check("block_t", f"at most {LARGEST_BLOCK_T}", config.block_t <= LARGEST_BLOCK_T)
    descriptors = uses_descriptors(shape.architecture)
    check("tma", f"false, since sm_{shape.architecture} does not use TMA descriptors", descriptors or not config.tma)
    check("order", "'strips', since without tma a program has one tile", config.tma or config.order == "strips")
    most = config.block_t // GROUP
    expected = f"at most {most}, so that a part of a tile holds a group of {GROUP} tokens"
    check("epilogue_slices", expected, config.epilogue_slices <= most)
    if shape.kind == "int8":
        expected = f"32, the least of an int8 product, to {INT8_WIDTH}, what int8 rows are padded to"
        check("block_k", expected, 32 <= config.block_k <= INT8_WIDTH)
    default = MatmulConfig(0, 0, 0, 0, 0)
    for name in _UNUSED.get(shape.kind, ()):
        value = getattr(default, name)
        check(name, f"{value!r}, since {shape.kind} kernels have no such option", getattr(config, name) == value)


# What a field of a configuration has to be; all others are powers of two.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_warps": ("a power of two up to 32", lambda value: _is_power_of_two(value) and value <= 32),
    **dict.fromkeys(("num_stages", "group_v", "resident"), ("a positive integer", lambda value: _is_positive(value))),
    **dict.fromkeys(("tma", "partials"), ("true or false", lambda value: isinstance(value, bool))),
    "programs": ("0, since the grid follows the GPU", lambda value: type(value) is int and value == 0),
    "order": (f"one of {ORDERS}", lambda value: value in ORDERS),
    "epilogue_slices": (f"one of {EPILOGUE_SLICES}", lambda value: _is_positive(value) and value in EPILOGUE_SLICES),
}
_UNUSED = {
    "sum": ("tma", "resident", "order", "epilogue_slices", "partials"),
    "int8": ("order", "epilogue_slices", "partials"),
}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_power_of_two(value: Any, least: int = 1) -> bool:
    return _is_positive(value) and value >= least and value & (value - 1) == 0


def _check(where: str, value: Any, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, got {value!r}")
