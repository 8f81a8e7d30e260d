"""Exact screening on, left to itself and off, beside stock and the bare matmul: the head alone, and a whole ``encode``.

The head's outputs are held against the truth and against the unscreened ones, both within the band that two summation
orders span, before anything is timed. ``encode`` runs the model of :mod:`bench.screening_model` over unseen passages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

import splade_kernels as sk
from bench import roofline, screening_model, truth, variants
from bench.cases import Case, Inputs, Precision, input_sets
from bench.rows import Job, Row
from bench.steps import Step, Tensors, cuda_extra_bytes, train_or_infer, unweighed, weigher
from splade_kernels.backends.screening import survivors

FLOOR = "matmul-real"
# How each variant of ours is asked for.
MODES: dict[str, str | bool] = {"unscreened": False, "ours": "auto", "screened": True}


@dataclass(frozen=True)
class Corpus:
    """Unseen passages, encoded in batches as sentence-transformers makes them."""

    texts: int = 96
    batch_size: int = 16


def head(case: Case, precision: Precision, device: torch.device, names: Sequence[str]) -> list[Job]:
    """Inference of the head with one case's inputs."""
    sets = input_sets(case, precision, device)
    exact = truth.compute(sets[0], precision)
    real = variants.tokens(case, padded=False)
    work = roofline.forward(case, precision, real)
    share = float((exact.output > 0).double().mean())
    row = Row(case.name, case.shape, precision.name, "forward", "", scaled_from=case.scaled_from, real_tokens=real)
    row = replace(row, operations=work.operations, bytes=work.bytes, active_share=share)

    def steps(make: Callable[[bool], variants.Head]) -> list[Step]:
        function = make(False)
        return [train_or_infer(function, inputs, precision, False) for inputs in sets]

    allowed = truth.band(sets[0], precision)
    (unscreened,) = steps(variants.VARIANTS["unscreened"].make)[0]()

    def check(found: Tensors) -> dict[str, float]:
        return truth.differences(exact, found[0], (), sets[0])

    def check_band(found: Tensors) -> dict[str, float]:
        pairs = {"bands_from_truth": exact.output, "bands_from_unscreened": unscreened}
        bands = {name: truth.in_bands(found[0], other, allowed, precision) for name, other in pairs.items()}
        return check(found) | bands

    jobs = []
    for name in names:
        reason = variants.why_not(name, device, training=False)
        mine = replace(row, variant=name, errors={}, status=f"not here: {reason}" if reason else "measured")
        weigh = weigher(case, precision, name, False, device)
        job = Job(mine, partial(steps, variants.VARIANTS[name].make), check, truth.BOUNDS[precision.name], weigh=weigh)
        if name in variants.OURS:
            job.check, job.strict = check_band, True
            job.bounds = {"bands_from_truth": 1.0, "bands_from_unscreened": 1.0}
        if name == "screened":
            job.row.survivors = surviving_share(sets[0], precision)
        jobs.append(job)
    floor = replace(row, variant=FLOOR, errors={})
    return [*jobs, Job(floor, lambda: [variants.matmul(FLOOR, inputs, precision) for inputs in sets])]


def surviving_share(inputs: Inputs, precision: Precision) -> float | None:
    """Share of the (real token, word) pairs whose dots a CPU computes exactly; None on a GPU, which does not tell."""
    if inputs.hidden.device.type != "cpu":
        return None
    hidden, weight, bias = (leaf.detach().to(precision.compute_dtype) for leaf in inputs.leaves)
    computed, pairs = survivors(hidden, weight, bias, inputs.mask)
    return computed / pairs


def encode(corpus: Corpus, precision: Precision, device: torch.device, names: Sequence[str]) -> list[Job]:
    """A whole ``encode`` with its defaults: tokenizer, transformer, head, sparse embeddings."""
    from splade_kernels.integrations import sentence_transformers as integration

    texts = screening_model.passages()[: corpus.texts]
    row = Row("encode-squad", f"{len(texts)} texts", precision.name, "encode", "", texts=len(texts))

    def steps(name: str) -> list[Step]:
        model = screening_model.load(device).to(precision.dtype)
        if name == "stock":
            pool = sk.splade_pool
        else:
            integration.fuse(model)
            pool = partial(sk.splade_pool, screening=MODES[name])

        def step() -> Tensors:
            # The drop-in has no setting of its own for this.
            with mock.patch.object(integration, "splade_pool", pool), precision.forward(device):
                embeddings: Tensor = model.encode(texts, batch_size=corpus.batch_size).coalesce()
            return embeddings.indices(), embeddings.values()

        return [step]

    def dense(found: Tensors) -> Tensor:
        (rows, words), values = found
        return values.new_zeros(len(texts), vocab_size).index_put((rows, words), values)

    vocab_size = screening_model.load().transformers_model.get_output_embeddings().weight.shape[0]
    expected = dense(steps("stock")[0]())

    def check(found: Tensors) -> dict[str, float]:
        return {"output": truth.relative_distance(dense(found), expected)}

    share = float((expected > 0).double().mean())
    weigh = cuda_extra_bytes if device.type == "cuda" else unweighed
    return [
        Job(
            replace(row, variant=name, errors={}, active_share=share),
            partial(steps, name),
            check,
            truth.BOUNDS[precision.name],
            name in variants.OURS,
            weigh,
        )
        for name in names
        if name == "stock" or name in MODES
    ]
