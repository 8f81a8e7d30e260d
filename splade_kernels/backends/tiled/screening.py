"""Exact screening on a CPU: int8 bounds tell which dots can be the maximum, and only those are computed.

``|h · w - ĥ · ŵ| <= B`` for rows quantised to int8 (Cauchy-Schwarz; derived with its rounding in docs/screening.md).
Token t can win word v only if its upper bound exceeds ``-c[v]``, below which relu gives zero, and reaches the largest
lower bound of its sequence. The dots of those tokens are computed from the unquantised rows.

The compiled kernels of ``csrc/`` multiply, bound and evaluate a block of words at a time, most promising token first.
Without them :mod:`~splade_kernels.backends.tiled.screening_plain` does the same in PyTorch.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import compiled, int8_bound, weight_cache
from ..pooling import PoolingCall
from . import screening_plain
from .screening_plain import Target

# "auto": words that are screened first, in so many runs spread over the vocabulary, and the share of their dots up to
# which it pays to go on: with AVX2 an exact dot takes about seven times as long as one in a matmul, an int8 dot three
# tenths (bench/results/screening-cpu.json: time over `computed`).
PROBE_WORDS, PROBE_RUNS = 256, 8
PAYING_SHARE = 1 / 12


@dataclass(frozen=True)
class Kernels:
    """``maximise(rows, offsets, weight, bias, target, *prepared)`` returns how many dots it computed. It takes packed
    rows ``[R, D]`` and ``[n + 1]`` where each sequence begins; ``prepare(weight)`` quantises the weight beforehand,
    which may be left out."""

    name: str
    prepare: Callable[[Tensor], tuple[Tensor, ...]]
    maximise: Callable[..., int]


PLAIN = Kernels("plain", int8_bound.quantise, screening_plain.maximise)


class Screen:
    """Screening for one call: asks whether it pays, and keeps the quantised weight for the next one."""

    def __init__(self, call: PoolingCall, kernels: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        self._call, self._kernels, self._original = call, kernels, weight
        self._bias = None if bias is None else bias.to(call.accumulation_dtype).contiguous()

    def pays(self, rows: Tensor, offsets: Tensor) -> bool:
        """Whether to screen these packed rows: decided by the rows, the weight and the bias alone, the same in training
        and inference."""
        if self._call.screening == "on":
            return True
        words = _probe(len(self._original), rows.device)
        weight = self._original.index_select(0, words).to(self._call.compute_dtype)
        bias = None if self._bias is None else self._bias.index_select(0, words)
        evaluated = self._kernels.maximise(rows, offsets, weight, bias, _scratch(rows, offsets, weight))
        return evaluated <= PAYING_SHARE * len(rows) * len(words)

    def maximise(self, rows: Tensor, offsets: Tensor, target: Target) -> int:
        """How many dots were computed."""
        prepared: tuple[Tensor, ...] = ()
        # Training changes the weight at every step; then it is quantised where it is used.
        if not self._call.need_argmax and not self._original.is_inference():
            kind = f"{self._kernels.name}, {self._call.compute_dtype}"
            prepared = weight_cache.cached(self._original, kind, lambda: self._kernels.prepare(self._weight))
        return self._kernels.maximise(rows, offsets, self._weight, self._bias, target, *prepared)

    @functools.cached_property
    def _weight(self) -> Tensor:
        """In the compute dtype, its rows without gaps: for most calls the weight itself."""
        weight = self._original.to(self._call.compute_dtype)
        return weight if weight.stride(1) == 1 else weight.contiguous()


def screen(call: PoolingCall, weight: Tensor, bias: Tensor | None, native_half: bool) -> Screen | None:
    """How to screen a call, None for not at all. ``native_half``: unscreened, this CPU would multiply half precision,
    about as fast as int8."""
    if call.need_argmax:
        weight_cache.forget(weight)
    vocab_size, hidden_size = weight.shape
    if call.screening == "off" or not 0 < hidden_size <= int8_bound.MAX_HIDDEN_SIZE or vocab_size == 0:
        return None
    has_kernels = call.accumulation_dtype == torch.float32 and _isa() > 0
    fast = has_kernels or (call.accumulation_dtype == torch.float32 and screening_plain.int_mm_is_fast())
    if call.screening == "auto" and (native_half or not fast):
        return None
    if not fast:
        _warn_slow()
    return Screen(call, _compiled_for(_isa()) if has_kernels else PLAIN, weight, bias)


@functools.cache
def _warn_slow() -> None:
    """Cached, so once a process."""
    warnings.warn(
        "splade_kernels: screening=True takes several times longer than screening=False here: it multiplies int8 rows "
        "in float64. Fast int8 products need the compiled operators, `pip install --no-build-isolation .` in a clone, "
        "and AVX2, or a CPU with VNNI or AMX, and are not there for float64 inputs; 'auto' leaves screening off.",
        stacklevel=2,
    )


def survivors(hidden: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Tensor) -> tuple[int, int]:
    """Dots that ``screening=True`` computes exactly for ``[B, S, D]`` padded input, and dots there are."""
    real = attention_mask != 0
    rows = hidden.detach()[real]
    offsets = torch.nn.functional.pad(real.sum(dim=1).cumsum(0), (1, 0))
    batch_size, length = real.shape
    call = PoolingCall(
        batch_size, attention_mask, None, length, "max", "relu", hidden.dtype, hidden.dtype, "on", need_argmax=True
    )
    chosen = screen(call, weight.detach(), bias, native_half=False)
    if chosen is None:
        most = int8_bound.MAX_HIDDEN_SIZE
        raise ValueError(f"weight: expected 1 to {most} hidden dimensions and a word, got {tuple(weight.shape)}")
    return chosen.maximise(rows, offsets, _scratch(rows, offsets, weight)), len(rows) * len(weight)


def _scratch(rows: Tensor, offsets: Tensor, weight: Tensor) -> Target:
    sequences = torch.arange(len(offsets) - 1, device=rows.device)
    positions = torch.arange(len(rows), device=rows.device)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return Target(sequences, positions, rows.new_empty(len(sequences), len(weight), dtype=dtype), None)


def _probe(vocab_size: int, device: torch.device) -> Tensor:
    """Ids of the words that are screened first."""
    if vocab_size <= PROBE_WORDS:
        return torch.arange(vocab_size, device=device)
    width = PROBE_WORDS // PROBE_RUNS
    first = torch.arange(PROBE_RUNS, device=device) * (vocab_size - width) // (PROBE_RUNS - 1)
    return (first[:, None] + torch.arange(width, device=device)).view(-1)


@functools.cache
def _isa() -> int:
    """Instruction set of the compiled kernels; 0: there are none, or they are wrong.

    PyTorch's own limit (``ATEN_CPU_CAPABILITY``) holds for them too.
    """
    if not compiled.serves(torch.device("cpu")):
        return 0
    capability = torch.backends.cpu.get_cpu_capability()
    isa = min(_best_isa(), 2 if capability.startswith("AVX512") else 1 if capability.startswith("AVX2") else 0)
    if isa > 0 and not _agrees(_compiled_for(isa)):
        warnings.warn(
            f"splade_kernels: the screening kernels for this CPU (number {isa}) fail their self-test and are not used, "
            "which costs speed; please report it with the name of the CPU",
            stacklevel=2,
        )
        return 0
    return isa


def _best_isa() -> int:
    """Of the compiled kernels, the instruction set that this CPU has, whatever PyTorch is limited to."""
    best: int = torch.ops.splade_kernels_csrc.screening_isa()
    return best


def _compiled_for(isa: int) -> Kernels:
    def prepare(weight: Tensor) -> tuple[Tensor, ...]:
        prepared: tuple[Tensor, ...] = torch.ops.splade_kernels_csrc.quantise_words(weight, isa)
        return prepared

    def maximise(
        rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, target: Target, *prepared: Tensor
    ) -> int:
        rows = rows.to(torch.float32).contiguous()
        words = prepared or (None, None, None)
        evaluated: int = torch.ops.splade_kernels_csrc.screened_maximum(
            rows, offsets, weight, bias, *words, *target, isa
        )
        return evaluated

    return Kernels(f"compiled {isa}", prepare, maximise)


def _agrees(kernels: Kernels) -> bool:
    """Whether kernels give the maxima of small products in float64: run once, before they are trusted."""
    return all(_agrees_for(kernels, hidden_size) for hidden_size in (1, 30, 333))


def _agrees_for(kernels: Kernels, hidden_size: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, hidden_size, generator=generator, dtype=torch.float32) for size in (37, 101))
    rows[:9] = rows[:9].sign()  # every element at the last level
    weight[::7] = weight[::7].abs().ceil()
    offsets = torch.tensor([0, 9, 10, 37])
    target = _scratch(rows, offsets, weight)
    kernels.maximise(rows, offsets, weight, torch.full((101,), 1e3, dtype=torch.float32), target)
    dots = rows.double() @ weight.double().t()
    exact = torch.stack([dots[first:last].amax(dim=0) for first, last in itertools.pairwise(offsets)])
    return torch.allclose(target.largest.double(), exact, rtol=1e-5, atol=1e-3)
