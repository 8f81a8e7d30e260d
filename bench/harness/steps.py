"""One forward, or one forward and backward, as something to call, and the memory that one call takes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from bench.harness.memory import peak, reset_peak, return_free_memory
from bench.inputs.cases import PRECISIONS, Case, Inputs, Precision, make_inputs
from bench.inputs.variants import MODES, VARIANTS, Head

# Weighed on a CPU, each in a process of its own, forked from one that has imported everything and computed nothing.
WEIGHED_ON_CPU = ("stock", *MODES)
PRELOAD = ["bench.harness.steps", "sentence_transformers.sparse_encoder.modules"]

# Points of curves of the time.
UNWEIGHED = ("curve-", "share-")

Tensors = tuple[Tensor, ...]
Step = Callable[[], Tensors]


def train_or_infer(function: Head, inputs: Inputs, precision: Precision, training: bool) -> Step:
    """One forward, or one forward and backward, that returns the output and the gradients of all three leaves."""
    device = inputs.hidden.device

    def inference() -> Tensors:
        with torch.no_grad(), precision.forward(device):
            return (function(*inputs.leaves, inputs.mask),)

    def train() -> Tensors:
        with precision.forward(device):
            output = function(*inputs.leaves, inputs.mask)
        return output.detach(), *torch.autograd.grad(output, inputs.leaves, inputs.grad.to(output.dtype))

    return train if training else inference


def weigher(
    case: Case, precision: Precision, name: str, training: bool, device: torch.device
) -> Callable[[Step], int | None]:
    """How the extra memory of a variant is measured: on a CPU in a process of its own, without the step at hand."""
    if device.type == "cuda":
        return cuda_extra_bytes
    if name not in WEIGHED_ON_CPU or case.name.startswith(UNWEIGHED):
        return unweighed

    def in_a_process(step: Step) -> int:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(host_extra_bytes, case, precision.name, name, training).result()

    return in_a_process


def unweighed(step: Step) -> None:
    return None


def cuda_extra_bytes(step: Step) -> int:
    """Peak allocated bytes of one step above what was there before and what it returned."""
    step()  # libraries' workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = _bytes(step())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - kept


def host_extra_bytes(case: Case, precision_name: str, name: str, training: bool) -> int:
    """Peak resident bytes of one step above what was there before and what it returned, or 0; for a fresh process."""

    def one(chosen: Case) -> int:
        inputs = make_inputs(chosen, precision, torch.device("cpu"))
        step = train_or_infer(function, inputs, precision, training)
        return_free_memory()
        before = reset_peak()
        kept = _bytes(step())
        # Pages of what was freed since, the step may take again.
        return max(0, peak() - before - kept)

    precision = PRECISIONS[precision_name]
    function = VARIANTS[name].make(training)
    one(replace(case, batch_size=2, length=16, vocab_size=512))  # libraries and their pools, once
    return one(case)


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
