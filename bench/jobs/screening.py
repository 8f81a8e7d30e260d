"""Exact screening on, "auto" and off, beside stock and the bare matmul: the head alone, inference and training.

Before anything is timed, outputs are compared with the unscreened ones and with the truth, within the band that two
summation orders span. A whole ``encode``: :mod:`bench.jobs.encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.harness import truth
from bench.harness.rows import Job
from bench.harness.steps import Tensors
from bench.inputs.cases import Case, Precision
from bench.inputs.variants import OURS, VARIANTS, padded_call
from bench.jobs.operators import Head
from splade_kernels.backends import int8_bound
from splade_kernels.backends.tiled.screening import new_target, screen

FLOOR = "matmul-real"
# Largest distances from the unscreened output and from the truth, in bands.
BANDS = {"bands_from_unscreened": 1.0, "bands_from_truth": 1.0}


def head(case: Case, precision: Precision, job: str, device: torch.device, names: Sequence[str]) -> list[Job]:
    """``forward`` or ``forward_backward`` of the head. Training quantises the weight in every step."""
    group = Head(case, precision, job, device)
    allowed = truth.band(group.sets[0], precision)
    unscreened = group.steps("unscreened")[0]()[0]

    def distances(found: Tensors) -> dict[str, float]:
        others = dict(zip(BANDS, (unscreened, group.exact.output), strict=True))
        return {name: truth.in_bands(found[0], other, allowed, precision) for name, other in others.items()}

    jobs = []
    for name in (name for name in names if VARIANTS[name].trains or not group.training):
        one = group.variant(name, weighed=not group.training)
        if name == "screened" and device.type == "cpu":  # a GPU does not report it
            hidden, weight, bias = (leaf.detach().to(precision.compute_dtype) for leaf in group.sets[0].leaves)
            computed, pairs = survivors(hidden, weight, bias, group.sets[0].mask)
            one.row.survivors = computed / pairs
        jobs.append(hold_in_bands(one, distances) if name in OURS else one)
    return jobs if group.training else [*jobs, group.floor(FLOOR)]


def hold_in_bands(job: Job, distances: Callable[[Tensors], dict[str, float]]) -> Job:
    """The job, its output compared entry by entry as well, and bit for bit with a second run."""
    norms = job.check or (lambda found: {})
    job.check = lambda found: norms(found) | distances(found)
    job.strict, job.bounds = True, BANDS
    return job


def survivors(hidden: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Tensor) -> tuple[int, int]:
    """Dots that ``screening=True`` computes exactly for ``[B, S, D]`` padded input on a CPU, and dots there are."""
    real = attention_mask != 0
    rows = hidden.detach()[real]
    offsets = torch.nn.functional.pad(real.sum(dim=1).cumsum(0), (1, 0))
    call = padded_call(attention_mask, hidden.dtype, screening="on", need_argmax=True)
    chosen = screen(call, weight.detach(), bias)
    if chosen is None:
        most = int8_bound.MAX_HIDDEN_SIZE
        raise ValueError(f"weight: expected [V, D] with V > 0 and 0 < D <= {most}, got {list(weight.shape)}")
    return chosen.maximise(rows, offsets, new_target(rows, offsets, weight)), len(rows) * len(weight)
