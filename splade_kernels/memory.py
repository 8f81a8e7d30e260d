"""How much memory a step of a SPLADE model takes, and the largest batch that fits, stock and fused: by formula.

    for row in sk.estimate(AutoConfig.from_pretrained("answerdotai/ModernBERT-base"), "24GiB"): ...

Nothing here is measured. docs/long-documents.md holds the formula against measurements on a CPU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .backends.pooling import check_choice
from .functional import check_count
from .memory_terms import HEADS, RESERVE, Setup, step_terms
from .model_sizes import ModelSizes

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_UNITS = {"": 1, "b": 1, **{f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}


class Estimate(NamedTuple):
    """One row: the largest ``batch`` of texts of ``length`` tokens that fits, and the ``bytes`` that it takes.

    ``batch`` is 0 where not even one text fits; ``bytes`` is then what one would take.
    """

    length: int
    head: str
    checkpointing: bool
    batch: int
    bytes: int


def estimate(
    model: Any,
    memory: int | str,
    *,
    lengths: Sequence[int] = LENGTHS,
    heads: Sequence[str] = HEADS,
    checkpointing: Sequence[bool] = (False, True),
    dtype: str | torch.dtype = "float32",
    autocast: str | torch.dtype | None = None,
    training: bool = True,
    optimizer: str | None = "adamw",
    attention: str = "sdpa",
    padded: bool = True,
    device: str = "cuda",
    reserve: int | str | None = None,
) -> list[Estimate]:
    """The largest batch for each length, by the formula of :func:`.memory_terms.step_terms`: computed, not measured.

    Args:
        model: a configuration of transformers, or a mapping of sizes, or :class:`~.model_sizes.ModelSizes`.
        memory: of the device, in bytes or as ``"24GiB"``, ``"80GB"``.
        lengths: tokens of every text of the batch, padding included.
        heads: ``"stock"``, ``"fused"`` or both.
        checkpointing: with gradient checkpointing of every layer, without, or both; inference has none.
        dtype: of the parameters, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        autocast: the dtype of autocast; None: there is none.
        training: forward and backward, of all texts at once; queries and documents of a loss count together.
        optimizer: ``"adamw"``, which keeps two float32 numbers a parameter (in the parameters' dtype if that is
            smaller), or None.
        attention: ``"sdpa"``, ``"eager"`` or ``"flash_attention_2"``, as in ``model.config._attn_implementation``.
        padded: whether batches hold padding: sdpa then reads a mask of ``S × S``.
        device: ``"cuda"`` or ``"cpu"``, whose heads need different buffers.
        reserve: what of ``memory`` the step cannot have, in bytes or as ``"1GiB"``. None: 1 GiB on a GPU, for the CUDA
            context and loaded kernels; 0.5 GiB on a CPU, for Python and libraries.

    Returns:
        A row for each length, head and choice of checkpointing, in that order. :func:`table` prints them.

    Raises:
        TypeError, ValueError: an argument is not one of these.
    """
    sizes = ModelSizes.of(model)
    setup = Setup(
        dtype=_dtype_name(dtype),
        autocast=None if autocast is None else _dtype_name(autocast),
        training=training,
        optimizer=optimizer,
        attention=attention,
        padded=padded,
        device=device,
    )
    room = parse_bytes("memory", memory) - (RESERVE[device] if reserve is None else parse_bytes("reserve", reserve))
    for head in heads:
        check_choice("heads", HEADS, head)
    for length in lengths:
        check_count("lengths", length, 1)
    return [
        _largest(sizes, setup, room, length, head, checkpointed)
        for length in lengths
        for head in heads
        for checkpointed in (checkpointing if training else (False,))
    ]


def table(rows: Sequence[Estimate]) -> str:
    """Rows as a Markdown table of batches: a line for each length, a column for each head and checkpointing."""
    columns = list(dict.fromkeys((row.head, row.checkpointing) for row in rows))
    found = {(row.length, (row.head, row.checkpointing)): row.batch for row in rows}
    cells = [["length", *(f"{head}, checkpointing" if checkpointed else head for head, checkpointed in columns)]]
    for length in dict.fromkeys(row.length for row in rows):
        cells.append([f"{length:,}", *(f"{found[length, column]:,}" for column in columns)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))} |" for line in cells]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 1) + ':' for width in widths)}|", *lines[1:]])


def parse_bytes(name: str, value: int | str) -> int:
    """``value`` in bytes, from a number or from a text such as ``"24GiB"`` or ``"80 GB"``; ``name`` is the argument."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
        if match and match[2] in _UNITS:
            return int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"{name}: expected bytes, or a text such as '24GiB', got {value!r}")


def _largest(sizes: ModelSizes, setup: Setup, room: int, length: int, head: str, checkpointing: bool) -> Estimate:
    """By doubling and bisection: the peak grows with the batch."""

    def needed(batch: int) -> int:
        return int(step_terms(sizes, batch, length, head, setup, checkpointing=checkpointing).peak)

    fits, fails = 0, 1
    while needed(fails) <= room:
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if needed(middle) <= room else (fits, middle)
    return Estimate(length, head, checkpointing, fits, needed(max(fits, 1)))


def _dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
