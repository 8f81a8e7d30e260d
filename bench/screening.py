"""Exact screening on, left to itself and off, beside stock and the bare matmul: the head alone, inference and training,
and a whole ``encode``.

Outputs are held against the unscreened ones, and those of the head against the truth, within the band that two
summation orders span, before anything is timed. ``encode`` runs the model of :mod:`bench.screening_model` over unseen
passages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import splade_kernels as sk
from bench import roofline, screening_model, truth, variants
from bench.cases import Case, Inputs, Precision, input_sets
from bench.jobs import head_row
from bench.rows import Job, Row
from bench.steps import Step, Tensors, cuda_extra_bytes, train_or_infer, unweighed, weigher
from bench.variants import MODES, OURS, VARIANTS
from splade_kernels.backends.screening import survivors

FLOOR = "matmul-real"
# Largest distances from the unscreened output and from the truth, in bands.
BANDS = {"bands_from_unscreened": 1.0, "bands_from_truth": 1.0}


@dataclass(frozen=True)
class Corpus:
    """Unseen passages and how many are encoded at a time."""

    texts: int = 48
    batch_size: int = 16


def passes(case: Case) -> Sequence[str]:
    """Points of the curve over the active share are inference alone."""
    return roofline.PASSES[:1] if case.name.startswith("share-") else roofline.PASSES


def head(case: Case, precision: Precision, job: str, device: torch.device, names: Sequence[str]) -> list[Job]:
    """``forward`` or ``forward_backward`` of the head with one case's inputs. Training quantises the weight in every
    step."""
    training = job == "forward_backward"
    sets = input_sets(case, precision, device)
    exact = truth.compute(sets[0], precision)
    row = head_row(case, precision, job, exact)

    def steps(make: Callable[[bool], variants.Head]) -> list[Step]:
        function = make(training)
        return [train_or_infer(function, inputs, precision, training) for inputs in sets]

    allowed = truth.band(sets[0], precision)
    unscreened = steps(VARIANTS["unscreened"].make)[0]()[0]

    def check(found: Tensors) -> dict[str, float]:
        return truth.differences(exact, found[0], found[1:], sets[0])

    def distances(found: Tensors) -> dict[str, float]:
        others = dict(zip(BANDS, (unscreened, exact.output), strict=True))
        return {name: truth.in_bands(found[0], other, allowed, precision) for name, other in others.items()}

    jobs = []
    for name in (name for name in names if VARIANTS[name].trains or not training):
        reason = variants.why_not(name, device, training)
        mine = replace(row, variant=name, errors={}, status=f"not here: {reason}" if reason else "measured")
        weigh = unweighed if training else weigher(case, precision, name, training, device)
        one = Job(mine, partial(steps, VARIANTS[name].make), check, truth.BOUNDS[precision.name], weigh=weigh)
        one.captured = VARIANTS[name].captured(training)
        if name == "screened":
            one.row.survivors = surviving_share(sets[0], precision)
        jobs.append(hold_in_bands(one, distances) if name in OURS else one)
    if not training:
        floor = replace(row, variant=FLOOR, errors={})
        jobs.append(Job(floor, lambda: [variants.matmul(FLOOR, inputs, precision) for inputs in sets]))
    return jobs


def hold_in_bands(job: Job, distances: Callable[[Tensors], dict[str, float]]) -> Job:
    """The job, whose output is also held entry by entry, and to the bit in a second run."""
    norms = job.check or (lambda found: {})
    job.check = lambda found: norms(found) | distances(found)
    job.strict, job.bounds = True, BANDS
    return job


def surviving_share(inputs: Inputs, precision: Precision) -> float | None:
    """Share of the (real token, word) pairs whose dots a CPU computes exactly; None on a GPU, which does not tell."""
    if inputs.hidden.device.type != "cpu":
        return None
    hidden, weight, bias = (leaf.detach().to(precision.compute_dtype) for leaf in inputs.leaves)
    computed, pairs = survivors(hidden, weight, bias, inputs.mask)
    return computed / pairs


class WidestBands:
    """``splade_pool`` that notes the widest band of each word: one for all texts, which ``encode`` sorts."""

    def __init__(self, precision: Precision) -> None:
        self.precision, self.bands = precision, torch.zeros(())

    def __call__(self, hidden: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Tensor:
        longest = hidden.detach().double().norm(dim=-1).amax()
        bands = truth.word_bands(longest, weight.detach(), self.precision)
        self.bands = torch.maximum(self.bands.to(bands), bands)
        return sk.splade_pool(hidden, weight, *arguments, **options)


def encode(corpus: Corpus, precision: Precision, device: torch.device, names: Sequence[str]) -> list[Job]:
    """A whole ``encode`` in batches of ``corpus.batch_size``: tokenizer, transformer, head, sparse embeddings."""
    from splade_kernels.integrations import sentence_transformers as integration

    texts = screening_model.passages()[: corpus.texts]
    row = Row("encode-squad", f"{len(texts)} texts", precision.name, "encode", "", texts=len(texts))
    step = partial(encode_step, texts, corpus.batch_size, precision, device)
    modes = {"stock": None, **MODES}
    vocab_size = screening_model.load().transformers_model.get_output_embeddings().weight.shape[0]

    def dense(found: Tensors) -> Tensor:
        (rows, words), values = found
        return values.new_zeros(len(texts), vocab_size).index_put((rows, words), values)

    def steps(name: str) -> list[Step]:
        return [step(modes[name])]

    stock = dense(steps("stock")[0]())
    with mock.patch.object(integration, "splade_pool", WidestBands(precision)) as pool:
        unscreened = dense(steps("unscreened")[0]())

    def check(found: Tensors) -> dict[str, float]:
        return {"output": truth.relative_distance(dense(found), stock)}

    def distances(found: Tensors) -> dict[str, float]:
        return {"bands_from_unscreened": truth.in_bands(dense(found), unscreened, pool.bands, precision)}

    weigh = cuda_extra_bytes if device.type == "cuda" else unweighed
    jobs = []
    for name in (name for name in names if name in modes):
        mine = replace(row, variant=name, errors={}, active_share=float((stock > 0).double().mean()))
        one = Job(mine, partial(steps, name), check, truth.BOUNDS[precision.name], weigh=weigh)
        jobs.append(hold_in_bands(one, distances) if name in OURS else one)
    return jobs


def encode_step(
    texts: Sequence[str], batch_size: int, precision: Precision, device: torch.device, mode: str | bool | None
) -> Step:
    """With the fused head and this setting of screening, or None: with the stock one. Returns indices and values."""
    from splade_kernels.integrations.sentence_transformers import fuse

    model = screening_model.load(device).to(precision.dtype)
    if mode is not None:
        fuse(model, screening=mode)

    def step() -> Tensors:
        with precision.forward(device):
            embeddings: Tensor = model.encode(list(texts), batch_size=batch_size).coalesce()
        return embeddings.indices(), embeddings.values()

    return step
