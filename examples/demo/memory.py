"""Peak memory of one SPLADE head, forward and backward, over growing sequence lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor

import splade_kernels as sk
from bench.harness import memory
from examples.demo.settings import Settings

__all__ = ["PeakMemory", "measure_head"]


class PeakMemory:
    """Peak memory since construction, above the level at construction: allocated by CUDA, or resident (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        memory.return_free_memory()
        self._baseline = memory.reset_peak(self._cuda)

    def mib(self) -> float:
        """The peak so far, in MiB."""
        return max(0, memory.peak(self._cuda) - self._baseline) / 2**20


def measure_head(settings: Settings, head: str) -> list[float]:
    """Peak MiB of one forward and backward of the stock or the fused head alone, for each of ``memory_lengths``."""
    device, width = torch.device(settings.device), settings.memory_hidden_size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(settings.vocab_size, width, generator=generator).mul_(0.02).to(device).requires_grad_()
    bias = torch.full((settings.vocab_size,), -1.0, device=device, requires_grad=True)
    function = {"stock": _stock_head, "fused": sk.splade_pool}[head]

    # The first call, of any length, allocates the workspaces and thread pools of libraries.
    _forward_backward(function, torch.zeros(settings.memory_batch_size, 1, width, device=device), weight, bias)
    peaks = []
    for length in settings.memory_lengths:
        hidden_states = torch.randn(settings.memory_batch_size, length, width, generator=generator).to(device)
        peak = PeakMemory(device)
        _forward_backward(function, hidden_states, weight, bias)
        peaks.append(peak.mib())
    return peaks


def _forward_backward(head: Callable[..., Tensor], hidden_states: Tensor, weight: Tensor, bias: Tensor) -> None:
    mask = torch.ones(hidden_states.shape[:2], dtype=torch.int64, device=hidden_states.device)
    embeddings = head(hidden_states.requires_grad_(), weight, bias, mask)
    embeddings.sum().backward()
    weight.grad = bias.grad = None


def _stock_head(hidden_states: Tensor, weight: Tensor, bias: Tensor, attention_mask: Tensor) -> Tensor:
    """The decoder and sentence-transformers' ``SpladePooling``."""
    logits = torch.nn.functional.linear(hidden_states, weight, bias)
    features = {"token_embeddings": logits, "attention_mask": attention_mask}
    embeddings: Tensor = SpladePooling("max").train()(features)["sentence_embedding"]
    return embeddings
