"""A whole ``encode`` of sentence-transformers, stock and fused: tokenizer, transformer, head, sparse embeddings.

Outputs are held against the unscreened ones within the band that two summation orders span before anything is timed.
A corpus is either unseen passages of SQuAD, for the model of :mod:`bench.screening_model`, or random words, for a model
of a given size with random weights of which about ``ACTIVE_TERMS`` words are active in a text
(:mod:`bench.inputs.encoders`).
"""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import splade_kernels as sk
from bench import screening_model
from bench.harness import truth
from bench.harness.memory import peak, reset_peak, return_free_memory
from bench.harness.rows import Job, Row
from bench.harness.steps import Step, Tensors, cuda_extra_bytes, unweighed
from bench.inputs import encoders
from bench.inputs.cases import PRECISIONS, Precision
from bench.inputs.variants import MODES, OURS
from bench.jobs.screening import hold_in_bands

PRELOAD = ["bench.jobs.encode", "sentence_transformers.sparse_encoder.modules"]
ACTIVE_TERMS = 200
STEPS = {"stock": None, **MODES}


@dataclass(frozen=True)
class Corpus:
    """Texts and how many are encoded at a time; ``size``: of a model with random weights, None for the trained one."""

    name: str
    texts: int
    batch_size: int
    size: encoders.Size | None = None
    length: int = 128

    @property
    def shape(self) -> str:
        if self.size is None:
            return f"{self.texts} texts"
        model = f"{self.size.layers} layers D{self.size.hidden_size} V{self.size.vocab_size}"
        return f"{self.texts} texts of {self.length} tokens, batch {self.batch_size}, {model}"

    def draw(self) -> list[str]:
        if self.size is None:
            return screening_model.passages()[: self.texts]
        return list(encoders.pairs(self.texts, "full", self.length, self.size.vocab_size)["answer"])

    def load(self, device: torch.device) -> Any:
        """The stock model."""
        if self.size is None:
            return screening_model.load(device)
        return encoders.load(str(_built(self.size, self.length)), self.length, str(device), ACTIVE_TERMS)


SQUAD = Corpus("encode-squad", 48, 16)
# Beside a small model the head is nearly all there is to compute; in one of DistilBERT's size it is a part.
CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("encode-small", 64, 64, encoders.Size("distilbert", 2, 128, 30522)),
        Corpus("encode-distilbert", 16, 16, encoders.SIZES["distilbert"]),
    )
}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bench-encode-")


@functools.cache
def _built(size: encoders.Size, length: int) -> Path:
    folder = Path(_folder().name, f"{size.architecture}-{size.layers}-{size.hidden_size}-{size.vocab_size}")
    encoders.build(size, length, folder)
    return folder


class WidestBands:
    """``splade_pool`` that notes the widest band of each word: one for all texts, which ``encode`` sorts."""

    def __init__(self, precision: Precision) -> None:
        self.precision, self.bands = precision, torch.zeros(())

    def __call__(self, hidden: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Tensor:
        longest = hidden.detach().double().norm(dim=-1).amax()
        bands = truth.word_bands(longest, weight.detach(), self.precision)
        self.bands = torch.maximum(self.bands.to(bands), bands)
        return sk.splade_pool(hidden, weight, *arguments, **options)


def jobs(corpus: Corpus, precision: Precision, device: torch.device, names: Sequence[str]) -> list[Job]:
    """Stock and fused, in batches of ``corpus.batch_size``."""
    from splade_kernels.integrations import _hand_off

    texts = corpus.draw()
    row = Row(corpus.name, corpus.shape, precision.name, "encode", "", texts=len(texts))
    vocab_size = corpus.load(device).transformers_model.get_output_embeddings().weight.shape[0]

    def dense(found: Tensors) -> Tensor:
        (rows, words), values = found
        return values.new_zeros(len(texts), vocab_size).index_put((rows, words), values)

    def steps(name: str) -> list[Step]:
        return [encode_step(corpus, texts, precision, device, name)]

    stock = dense(steps("stock")[0]())
    with mock.patch.object(_hand_off, "splade_pool", WidestBands(precision)) as pool:
        unscreened = dense(steps("unscreened")[0]())

    def check(found: Tensors) -> dict[str, float]:
        return {"output": truth.relative_distance(dense(found), stock)}

    def distances(found: Tensors) -> dict[str, float]:
        return {"bands_from_unscreened": truth.in_bands(dense(found), unscreened, pool.bands, precision)}

    made = []
    for name in (name for name in names if name in STEPS):
        mine = replace(row, variant=name, errors={}, active_share=float((stock > 0).double().mean()))
        weigh = weigher(corpus, precision, name, device)
        one = Job(mine, partial(steps, name), check, truth.BOUNDS[precision.name], weigh=weigh)
        made.append(hold_in_bands(one, distances) if name in OURS else one)
    return made


def encode_step(corpus: Corpus, texts: Sequence[str], precision: Precision, device: torch.device, name: str) -> Step:
    """One ``encode`` with the head ``name``; returns indices and values."""
    from splade_kernels.integrations.sentence_transformers import fuse

    model = corpus.load(device).to(precision.dtype)
    screening = STEPS[name]
    if screening is not None:
        fuse(model, screening=screening)

    def step() -> Tensors:
        with precision.forward(device):
            embeddings: Tensor = model.encode(list(texts), batch_size=corpus.batch_size).coalesce()
        return embeddings.indices(), embeddings.values()

    return step


def weigher(corpus: Corpus, precision: Precision, name: str, device: torch.device) -> Callable[[Step], int | None]:
    """How the memory of a variant is measured: on a CPU in a process of its own, without the step at hand."""
    if device.type == "cuda":
        return cuda_extra_bytes
    if corpus.size is None:
        return unweighed

    def in_a_process(step: Step) -> int:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(resident_bytes, corpus, precision.name, name).result()

    return in_a_process


def resident_bytes(corpus: Corpus, precision_name: str, name: str) -> int:
    """Peak resident bytes of one ``encode`` above those of the model, loaded and used; for a fresh process."""
    texts = corpus.draw()
    precision, device = PRECISIONS[precision_name], torch.device("cpu")
    step = encode_step(corpus, texts, precision, device, name)
    encode_step(corpus, texts[:1], precision, device, name)()  # libraries and their pools, once
    return_free_memory()
    before = reset_peak()
    step()
    return max(0, peak() - before)
