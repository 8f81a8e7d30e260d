"""Exact screening on a CPU: int8 bounds tell which dots can be the maximum, and only those are computed.

``|h · w - ĥ · ŵ| <= B`` for rows quantised to int8 (Cauchy-Schwarz; docs/screening.md derives it with its rounding).
A token can attain the maximum of vocabulary entry v only if its upper bound exceeds ``-c[v]``, below which relu gives
zero, and reaches the largest lower bound of its sequence. Only those tokens' dots are computed, from the exact rows.

The compiled kernels of ``csrc/`` multiply, bound and evaluate a block of entries at a time, the token with the largest
upper bound first. Without them :mod:`.screening_plain` does the same in PyTorch.
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

# "auto" first screens this many vocabulary entries, in so many runs spread over the vocabulary.
PROBE_ENTRIES, PROBE_RUNS = 256, 8
# Share of computed dots up to which screening pays. An exact dot takes seven (AVX2) or eight times (AVX-512 VNNI) as
# long as one in a matmul, an int8 dot three or one and a half tenths (bench/results/screening-cpu*.json: time over
# `computed`), which breaks even at a tenth. No other instruction sets have been timed.
PAYING_SHARE = 1 / 12


@dataclass(frozen=True)
class Kernels:
    """``maximise(rows, offsets, weight, bias, target, *prepared)`` returns how many dots it computed.

    It takes packed rows ``[R, D]`` and the first row of each sequence, ``offsets [n + 1]``. ``prepare(weight)``
    quantises the weight beforehand; without that, ``maximise`` does.
    """

    name: str
    prepare: Callable[[Tensor], tuple[Tensor, ...]]
    maximise: Callable[..., int]
    paying_share: float = PAYING_SHARE


@dataclass(frozen=True)
class InstructionSet:
    """One that csrc has kernels for (``instruction_sets()`` in csrc/cpu/instruction_sets.h says which this CPU has)."""

    allowed_by: tuple[str, ...]  # how PyTorch's CPU capability begins where ATEN_CPU_CAPABILITY does not forbid it
    paying_share: float = PAYING_SHARE


# Of each architecture, fastest first. On Arm any capability allows them: its lowest, DEFAULT, is NEON. On x86 DEFAULT
# is SSE.
INSTRUCTION_SETS = {
    "avx512_vnni": InstructionSet(("AVX512",)),
    "avx_vnni": InstructionSet(("AVX2", "AVX512")),
    "avx2": InstructionSet(("AVX2", "AVX512")),
    "neon_i8mm": InstructionSet(("",)),
    "neon_dotprod": InstructionSet(("",)),
}
PLAIN = Kernels("plain", int8_bound.quantise, screening_plain.maximise)


class Screen:
    """Screening of one call: decides whether it pays, and keeps the quantised weight for the next call."""

    def __init__(self, call: PoolingCall, kernels: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        self._call, self._kernels, self._original = call, kernels, weight
        self._bias = None if bias is None else bias.to(call.accumulation_dtype).contiguous()

    def pays(self, rows: Tensor, offsets: Tensor) -> bool:
        """Whether to screen these packed rows.

        Rows, weight and bias alone decide, so that training and inference decide alike.
        """
        if self._call.screening == "on":
            return True
        ids = _probe(len(self._original))
        weight = self._original.index_select(0, ids).to(self._call.compute_dtype)
        bias = None if self._bias is None else self._bias.index_select(0, ids)
        computed = self._kernels.maximise(rows, offsets, weight, bias, new_target(rows, offsets, weight))
        return computed <= self._kernels.paying_share * len(rows) * len(ids)

    def maximise(self, rows: Tensor, offsets: Tensor, target: Target) -> int:
        """Write the maxima to ``target``; returns how many dots were computed."""
        prepared: tuple[Tensor, ...] = ()
        # Training changes the weight at every step, and quantises it where it is used.
        if not self._call.need_argmax and not self._original.is_inference():
            kind = f"{self._kernels.name}, {self._call.compute_dtype}"
            prepared = weight_cache.cached(self._original, kind, lambda: self._kernels.prepare(self._weight))
        return self._kernels.maximise(rows, offsets, self._weight, self._bias, target, *prepared)

    @functools.cached_property
    def _weight(self) -> Tensor:
        """In the compute dtype, with contiguous rows: for most calls the weight itself."""
        weight = self._original.to(self._call.compute_dtype)
        return weight if weight.stride(1) == 1 else weight.contiguous()


def screen(call: PoolingCall, weight: Tensor, bias: Tensor | None) -> Screen | None:
    """How to screen a call, None for not at all."""
    if call.need_argmax:
        weight_cache.forget(weight)
    vocab_size, hidden_size = weight.shape
    if call.screening == "off" or not 0 < hidden_size <= int8_bound.MAX_HIDDEN_SIZE or vocab_size == 0:
        return None
    single = call.accumulation_dtype == torch.float32
    kernels = compiled_kernels() if single else None
    fast = kernels is not None or (single and screening_plain.int_mm_is_fast())
    if call.screening == "auto" and not fast:
        return None
    if not fast:
        _warn_slow()
    return Screen(call, kernels or PLAIN, weight, bias)


@functools.cache
def _warn_slow() -> None:
    """Cached, so that it warns once per process."""
    warnings.warn(
        "splade_kernels: screening=True takes several times longer than screening=False here: it multiplies int8 rows "
        "in float64. Fast int8 products need the compiled operators, `pip install --no-build-isolation .` in a clone, "
        "and AVX2 or NEON's dot products, or a CPU with VNNI or AMX, and are not there for float64 inputs; 'auto' "
        "leaves screening off.",
        stacklevel=2,
    )


def new_target(rows: Tensor, offsets: Tensor, weight: Tensor) -> Target:
    """Room for the maxima of these rows alone, without positions."""
    sequences, positions = torch.arange(len(offsets) - 1), torch.arange(len(rows))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return Target(sequences, positions, rows.new_empty(len(sequences), len(weight), dtype=dtype), None)


def _probe(vocab_size: int) -> Tensor:
    """Ids of the vocabulary entries that are screened first."""
    if vocab_size <= PROBE_ENTRIES:
        return torch.arange(vocab_size)
    width = PROBE_ENTRIES // PROBE_RUNS
    first = torch.arange(PROBE_RUNS) * (vocab_size - width) // (PROBE_RUNS - 1)
    return (first[:, None] + torch.arange(width)).view(-1)


def compiled_kernels() -> Kernels | None:
    """The fastest compiled kernels for this CPU, within PyTorch's own limit; None if there are none, or wrong ones."""
    return chosen_kernels()[0]


@functools.cache
def chosen_kernels() -> tuple[Kernels | None, str]:
    """The compiled kernels that are used, and why these; or None, and why none are."""
    if not compiled.serves(torch.device("cpu")):
        return None, str(compiled.why_not())
    capability = torch.backends.cpu.get_cpu_capability()
    there = _names()
    names = [name for name in there if capability.startswith(INSTRUCTION_SETS[name].allowed_by)]
    forbidden = [name for name in there if name not in names]
    limit = f"{', '.join(forbidden)} is there, but PyTorch's limit (ATEN_CPU_CAPABILITY) is {capability}"
    if not names:
        return None, limit if forbidden else f"this CPU has none of {', '.join(INSTRUCTION_SETS)}"
    kernels = _kernels_for(names[0])
    if not _agrees(kernels):
        warnings.warn(
            f"splade_kernels: the screening kernels for this CPU ({names[0]}) fail their self-test and are not used, "
            "which costs speed; please report it with the name of the CPU",
            stacklevel=2,
        )
        return None, f"the compiled kernels for {names[0]} fail their self-test on this CPU"
    reason = "the fastest instruction set with compiled kernels that this CPU has"
    return kernels, f"{reason} and PyTorch allows; {limit}" if forbidden else reason


def in_use() -> str:
    """What screens float32 rows on this CPU, and why that; also for :func:`splade_kernels.available_backends`."""
    with torch.device("cpu"):  # of the self-tests' tensors, whatever the default is
        kernels, reason = chosen_kernels()
        if kernels is not None:
            return f"{kernels.name}: {reason}"
        if screening_plain.int_mm_is_fast():
            return f"torch._int_mm, which is fast on this CPU: {reason}"
    return f"off unless screening=True, which is slow here: {reason}"


def _names() -> list[str]:
    """Instruction sets of the compiled kernels that this CPU has, fastest first."""
    names: list[str] = torch.ops.splade_kernels_csrc.instruction_sets()
    return names


def _kernels_for(name: str) -> Kernels:
    csrc = torch.ops.splade_kernels_csrc

    def prepare(weight: Tensor) -> tuple[Tensor, ...]:
        prepared: tuple[Tensor, ...] = csrc.quantise_words(weight, name)
        return prepared

    def maximise(
        rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, target: Target, *prepared: Tensor
    ) -> int:
        rows = rows.to(torch.float32).contiguous()
        quantised = prepared or (None, None, None)
        computed: int = csrc.screened_maximum(rows, offsets, weight, bias, *quantised, *target, name)
        return computed

    return Kernels(name, prepare, maximise, INSTRUCTION_SETS[name].paying_share)


def _agrees(kernels: Kernels) -> bool:
    """Whether kernels find the maxima of small products in float64: asked once, before they are trusted."""
    return all(_agrees_for(kernels, hidden_size) for hidden_size in (1, 30, 333))


def _agrees_for(kernels: Kernels, hidden_size: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, hidden_size, generator=generator, dtype=torch.float32) for size in (37, 101))
    rows[:9] = rows[:9].sign()  # every element at the last level
    weight[::7] = weight[::7].abs().ceil()
    offsets = torch.tensor([0, 9, 10, 37])
    target = new_target(rows, offsets, weight)
    kernels.maximise(rows, offsets, weight, torch.full((101,), 1e3, dtype=torch.float32), target)
    dots = rows.double() @ weight.double().t()
    exact = torch.stack([dots[first:last].amax(dim=0) for first, last in itertools.pairwise(offsets)])
    return torch.allclose(target.largest.double(), exact, rtol=1e-5, atol=1e-3)
