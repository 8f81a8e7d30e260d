"""A whole ``encode`` of sentence-transformers, stock and fused: tokenizer, transformer, head, sparse embeddings.

Before anything is timed, outputs are compared with the unscreened ones within the band that two summation orders span.
A corpus is either unseen passages of SQuAD, for the model of :mod:`bench.inputs.text_model`, or random text, for a
model with random weights of which about ``ACTIVE_TERMS`` vocabulary entries are active in a text
(:mod:`bench.inputs.encoders`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import memory, truth
from bench.harness.rows import Job, Row
from bench.harness.steps import Step, Tensors, Weigh, weigh_on_gpu
from bench.inputs import encoders, text_model
from bench.inputs.cases import PRECISIONS, Precision
from bench.inputs.variants import MODES, OURS
from bench.jobs.screening import hold_in_bands

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
    def from_text(self) -> bool:
        return self.size is None

    @property
    def shape(self) -> str:
        if self.size is None:
            return f"{self.texts} texts"
        model = f"{self.size.layers} layers D{self.size.hidden_size} V{self.size.vocab_size}"
        return f"{self.texts} texts of {self.length} tokens, batch {self.batch_size}, {model}"

    def draw(self) -> list[str]:
        if self.size is None:
            return text_model.passages()[: self.texts]
        return list(encoders.pairs(self.texts, "full", self.length, self.size.vocab_size)["answer"])

    def load(self, device: torch.device, precision: Precision = PRECISIONS["float32"], name: str = "stock") -> Any:
        """The model with the head ``name``."""
        from splade_kernels.integrations.sentence_transformers import fuse

        if self.size is None:
            model = text_model.load(device)
        else:
            model = encoders.load(encoders.build(self.size, self.length), self.length, str(device), ACTIVE_TERMS)
        model.to(precision.dtype)
        screening = STEPS[name]
        return model if screening is None else fuse(model, screening=screening)

    def step(self, texts: Sequence[str], precision: Precision, model: Any) -> Step:
        """One ``encode``; returns indices and values."""

        def step() -> Tensors:
            with precision.forward(model.device):
                embeddings: Tensor = model.encode(list(texts), batch_size=self.batch_size).coalesce()
            return embeddings.indices(), embeddings.values()

        return step


SQUAD = Corpus("encode-squad", 48, 16)
# Beside a small model nearly all the work is the head's; in one of DistilBERT's size it is a part.
CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("encode-small", 64, 64, encoders.Size("distilbert", 2, 128, 30522)),
        Corpus("encode-distilbert", 16, 16, encoders.SIZES["distilbert"]),
    )
}


def jobs(corpus: Corpus, precision: Precision, device: torch.device, names: Sequence[str]) -> list[Job]:
    """Stock and fused, in batches of ``corpus.batch_size``."""
    texts = corpus.draw()
    model = corpus.load(device, precision)
    decoder = model.transformers_model.get_output_embeddings()
    vocab_size = len(decoder.weight)

    def steps(name: str) -> list[Step]:
        return [corpus.step(texts, precision, corpus.load(device, precision, name))]

    def dense(found: Tensors) -> Tensor:
        (rows, columns), values = found
        return values.new_zeros(len(texts), vocab_size).index_put((rows, columns), values)

    # One band for all texts, because `encode` sorts them: that of the longest token that reaches the decoder.
    norms: list[Tensor] = []
    handle = decoder.register_forward_pre_hook(lambda _, inputs: norms.append(inputs[0].double().norm(dim=-1).amax()))
    stock = dense(corpus.step(texts, precision, model)())
    handle.remove()
    band = truth.band_of(torch.stack(norms).amax(), decoder.weight.detach(), precision)
    unscreened = dense(steps("unscreened")[0]())
    row = Row(corpus.name, corpus.shape, precision.name, "encode", "", texts=len(texts))
    row = replace(row, active_share=float((stock > 0).double().mean()))

    def check(found: Tensors) -> dict[str, float]:
        return {"output": truth.relative_distance(dense(found), stock)}

    def distances(found: Tensors) -> dict[str, float]:
        return {"bands_from_unscreened": truth.in_bands(dense(found), unscreened, band, precision)}

    made = []
    for name in (name for name in names if name in STEPS):
        mine, weigh = replace(row, variant=name, errors={}), weigher(corpus, precision, name, device)
        one = Job(mine, partial(steps, name), check, truth.BOUNDS[precision.name], weigh=weigh)
        made.append(hold_in_bands(one, distances) if name in OURS else one)
    return made


def weigher(corpus: Corpus, precision: Precision, name: str, device: torch.device) -> Weigh:
    """How the memory of a variant is measured: on a CPU in a process of its own, which makes its own step."""
    if device.type == "cuda" or corpus.size is None:
        return weigh_on_gpu(device)
    return lambda step: memory.in_a_process(resident_bytes, corpus, precision.name, name)


def resident_bytes(corpus: Corpus, precision_name: str, name: str) -> int:
    """Peak resident bytes of one ``encode`` above those of the model, loaded and used; for a fresh process."""
    texts = corpus.draw()
    precision = PRECISIONS[precision_name]
    step, short = (
        corpus.step(some, precision, corpus.load(torch.device("cpu"), precision, name)) for some in (texts, texts[:1])
    )
    short()  # libraries and their thread pools, once

    def work() -> int:
        step()
        return 0

    return memory.host_extra_bytes(work)
