"""Peak memory: what a stretch of code needed above what was there before, on a CPU or a CUDA device.

Run as a module it measures one SPLADE head, forward and backward, over growing sequence lengths:
``python -m examples.demo.memory job.json``, a process of its own for every head.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

import splade_kernels as sk

__all__ = ["HeadJob", "PeakMemory", "measure_head"]

MIB = 2**20


class PeakMemory:
    """Peak bytes since construction, above the level at construction.

    On CUDA: what the allocator handed out. On a CPU: resident memory. Linux keeps a high-water mark per program image
    and can start it afresh; ``getrusage`` is the fallback only, for a child process inherits its parent's mark.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        _return_free_memory()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._baseline = torch.cuda.memory_allocated(device)
        else:
            _reset_resident_peak()
            self._baseline = psutil.Process().memory_info().rss

    def mib(self) -> float:
        """The peak so far, in MiB."""
        if self._device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self._device) - self._baseline) / MIB
        return max(0, _resident_peak() - self._baseline) / MIB


@dataclass(frozen=True)
class HeadJob:
    """What one process measures: a head (``"stock"`` or ``"fused"``) over growing lengths."""

    head: str
    batch_size: int
    hidden_size: int
    vocab_size: int
    lengths: list[int]
    device: str
    record: str


def measure_head(job: HeadJob) -> list[float]:
    """Peak MiB of one forward and backward of the head alone, per length, on random hidden states."""
    device = torch.device(job.device)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(job.vocab_size, job.hidden_size, generator=generator).mul_(0.02).to(device).requires_grad_()
    bias = torch.full((job.vocab_size,), -1.0, device=device, requires_grad=True)
    head = {"stock": _stock_head, "fused": sk.splade_pool}[job.head]

    # The libraries' own workspaces and thread pools come with the first call, whatever the length.
    _forward_backward(head, torch.zeros(job.batch_size, 1, job.hidden_size, device=device), weight, bias)
    peaks = []
    for length in sorted(job.lengths):
        hidden_states = torch.randn(job.batch_size, length, job.hidden_size, generator=generator).to(device)
        peak = PeakMemory(device)
        _forward_backward(head, hidden_states, weight, bias)
        peaks.append(peak.mib())
    return peaks


def _forward_backward(head: Callable[..., Tensor], hidden_states: Tensor, weight: Tensor, bias: Tensor) -> None:
    mask = torch.ones(hidden_states.shape[:2], dtype=torch.int64, device=hidden_states.device)
    embeddings = head(hidden_states.requires_grad_(), weight, bias, mask)
    embeddings.sum().backward()
    weight.grad = bias.grad = None


def _stock_head(hidden_states: Tensor, weight: Tensor, bias: Tensor, attention_mask: Tensor) -> Tensor:
    """The decoder and sentence-transformers' ``SpladePooling``."""
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    logits = torch.nn.functional.linear(hidden_states, weight, bias)
    features = {"token_embeddings": logits, "attention_mask": attention_mask}
    embeddings: Tensor = SpladePooling("max").train()(features)["sentence_embedding"]
    return embeddings


def _return_free_memory() -> None:
    """Freed memory that glibc keeps would sit in the baseline and hide as much of the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    job = HeadJob(**json.loads(Path(sys.argv[1]).read_text()))
    Path(job.record).write_text(json.dumps({**asdict(job), "peak_mib": measure_head(job)}))
