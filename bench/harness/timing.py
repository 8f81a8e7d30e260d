"""Clocks: interleaved rounds, rotated inputs, device events or CUDA graphs.

Every variant is timed once in every round, so that drift (clock rates, temperature, other programs) affects all of them
alike. On a GPU one sample walks through several sets of inputs, together larger than the L2 cache, so that no step
finds its operands there. Short steps are captured into a CUDA graph, because launching them takes longer than running
them. Steps that cannot be captured are launched while the device waits, so that the host stays ahead of it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from bench.inputs.cases import Precision

Step = Callable[[], object]
# Fewest and most rounds: quartiles need the former, and more than the latter add nothing.
ROUNDS = (9, 20)
_STAT = Path("/proc/stat")
# Steps shorter than this are captured.
GRAPH_SECONDS = 2e-3
MAX_ROTATION = 8
# Cycles, a few milliseconds, that the device waits for the launches of steps that are not captured.
HEAD_START = 8_000_000


@dataclass
class Timed:
    """Samples in seconds a step, in the order of the rounds."""

    samples: list[float]
    clock: str
    # Processors that other programs, on this machine or on its host, kept busy meanwhile. With many, times on a CPU
    # mean little.
    others: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def rotation(bytes_a_set: int, device: torch.device) -> int:
    """Sets of inputs that together exceed twice the L2 cache; one on a CPU, whose cache the other variants evict."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_ROTATION, 1 + 2 * cache // max(bytes_a_set, 1)))


class Sampler:
    """One variant's steps, one for each set of inputs, as something that can be timed."""

    def __init__(self, steps: Sequence[Step], device: torch.device, captured: bool = True):
        self.steps = steps
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._run()  # allocates, chooses algorithms
            if captured and self.sample() < GRAPH_SECONDS:
                self.graph = self._capture()

    @property
    def clock(self) -> str:
        if self.device.type == "cpu":
            return "perf_counter"
        return "events" if self.graph is None else "graph"

    def sample(self) -> float:
        """Seconds a step."""
        if self.device.type == "cpu":
            begin = time.perf_counter()
            self._run()
            return (time.perf_counter() - begin) / len(self.steps)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if self.graph is None:
            torch.cuda._sleep(HEAD_START)
        start.record()
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / len(self.steps)

    def _run(self) -> None:
        for step in self.steps:
            step()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """None where a step cannot be captured (it syncs, or allocates outside of PyTorch): then events time it."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                self._run()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
            graph.replay()
            torch.cuda.synchronize(self.device)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return None
        return graph


Key = TypeVar("Key")


def interleave(samplers: dict[Key, Sampler], seconds: float, rounds: tuple[int, int] = ROUNDS) -> dict[Key, Timed]:
    """Rounds over all samplers until ``seconds`` have passed, within the bounds of ``rounds``. There is no warm-up:
    every step has already run when it was checked."""
    samples: dict[Key, list[float]] = {name: [] for name in samplers}
    begin, everybody, own = time.perf_counter(), _processor_seconds(), time.process_time()
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() - begin > seconds:
            break
        for name, sampler in samplers.items():
            samples[name].append(sampler.sample())
    busy = _processor_seconds() - everybody - (time.process_time() - own)
    others = max(0.0, busy / (time.perf_counter() - begin))
    return {name: Timed(samples[name], samplers[name].clock, others) for name in samplers}


def _processor_seconds() -> float:
    """Processor seconds of all programs so far (Linux; elsewhere those of this process): user, nice, system, and
    stolen, which the host of a virtual machine gave to another."""
    try:
        fields = _STAT.read_text().split(maxsplit=9)
    except OSError:
        return time.process_time()
    return sum(int(fields[field]) for field in (1, 2, 3, 8)) / os.sysconf("SC_CLK_TCK")


def machine(device: torch.device, precisions: Sequence[Precision]) -> dict[str, dict[str, float]]:
    """How fast this device copies and, in each precision, multiplies."""
    found = {}
    for precision in precisions:
        with precision.settings():
            rate = matmul_rate(device, precision.compute_dtype)
        found[precision.name] = {"bytes_per_second": copy_rate(device), "operations_per_second": rate}
    return found


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Bytes a second, read and written, of a large copy on this device."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of a large square matmul on this device, in the settings in force."""
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(left)
    return 2 * size**3 / _seconds(lambda: torch.mm(left, right, out=result), device)


def _seconds(step: Step, device: torch.device) -> float:
    sampler = Sampler([step], device)
    sampler.sample()
    return statistics.median(sampler.sample() for _ in range(5))
