"""Peak memory of the head, each case in a process of its own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

import splade_kernels as sk
from bench.harness.memory import peak, reset_peak

BATCH, LENGTH, VOCAB = 8, 256, 30522
LOGITS_BYTES = BATCH * LENGTH * VOCAB * 4

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak resident memory is read from Linux's /proc"
)


def _measure(pooling_strategy: str, hidden_size: int, results: multiprocessing.Queue) -> None:
    def run(batch: int, vocab_size: int) -> int:
        hidden = torch.randn(batch, LENGTH, hidden_size, requires_grad=True)
        weight = torch.randn(vocab_size, hidden_size, requires_grad=True)
        bias = torch.zeros(vocab_size, requires_grad=True)
        grad = torch.randn(batch, vocab_size)
        before = reset_peak()
        output = sk.splade_pool(hidden, weight, bias, pooling_strategy=pooling_strategy)
        gradients = torch.autograd.grad(output, (hidden, weight, bias), grad)
        kept = sum(tensor.numel() * tensor.element_size() for tensor in (output, *gradients))
        return peak() - before - kept

    run(2, 2048)  # libraries and their pools, once
    results.put(run(BATCH, VOCAB))


# The larger size also shows a copy of the weight or of its gradient.
@pytest.mark.parametrize("hidden_size", [64, pytest.param(768, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pooling_strategy", ["max", pytest.param("sum", marks=pytest.mark.slow)])
def test_forward_and_backward_stay_far_below_the_logits(pooling_strategy, hidden_size):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measure, args=(pooling_strategy, hidden_size, results))
    process.start()
    extra = results.get(timeout=300)
    process.join()
    assert extra < LOGITS_BYTES / 4
