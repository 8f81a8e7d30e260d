"""One forward, or one forward and backward, as something to call, and the memory that one call takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.harness import memory, timing
from bench.inputs.cases import PRECISIONS, Case, Inputs, Precision, make_inputs
from bench.inputs.variants import MODES, VARIANTS, Head

# Variants whose memory is measured on a CPU, each in a process of its own; points of curves are only timed.
WEIGHED_ON_CPU = ("stock", *MODES)
UNWEIGHED = ("curve-", "share-")

Tensors = tuple[Tensor, ...]
Step = Callable[[], Tensors]
Weigh = Callable[[Step], int | None]


def input_sets(case: Case, precision: Precision, device: torch.device) -> list[Inputs]:
    """As many sets of inputs as one sample walks through (:func:`.timing.rotation`)."""
    size = case.hidden_size * (case.batch_size * case.length + case.vocab_size) * precision.dtype.itemsize
    return [make_inputs(case, precision, device, seed) for seed in range(timing.rotation(size, device))]


def train_or_infer(function: Head, inputs: Inputs, precision: Precision, training: bool) -> Step:
    """One forward, or one forward and backward that returns the output and the gradients of all three leaves."""
    device = inputs.hidden.device

    def inference() -> Tensors:
        with torch.no_grad(), precision.forward(device):
            return (function(*inputs.leaves, inputs.mask),)

    def train() -> Tensors:
        with precision.forward(device):
            output = function(*inputs.leaves, inputs.mask)
        return output.detach(), *torch.autograd.grad(output, inputs.leaves, inputs.grad.to(output.dtype))

    return train if training else inference


def unweighed(step: Step) -> None:
    return None


def weigh_on_gpu(device: torch.device) -> Weigh:
    """Extra memory of a step where the device counts it; a CPU's process has more in it than the step."""
    return memory.cuda_extra_bytes if device.type == "cuda" else unweighed


def weigher(case: Case, precision: Precision, name: str, training: bool, device: torch.device) -> Weigh:
    """How the extra memory of a variant is measured: on a CPU in a process of its own, which makes its own step."""
    if device.type == "cuda" or name not in WEIGHED_ON_CPU or case.name.startswith(UNWEIGHED):
        return weigh_on_gpu(device)
    return lambda step: memory.in_a_process(host_extra_bytes, case, precision.name, name, training)


def host_extra_bytes(case: Case, precision_name: str, name: str, training: bool) -> int:
    """Peak resident bytes of one step beyond inputs and results; for a fresh process."""
    precision = PRECISIONS[precision_name]
    function = VARIANTS[name].make(training)

    def one(chosen: Case) -> int:
        inputs = make_inputs(chosen, precision, torch.device("cpu"))
        step = train_or_infer(function, inputs, precision, training)
        return memory.host_extra_bytes(lambda: memory.size_of(step()))

    one(replace(case, batch_size=2, length=16, vocab_size=512))  # libraries and their thread pools, once
    return one(case)
