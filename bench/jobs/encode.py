"""A whole ``encode`` of sentence-transformers: tokenizer, transformer, head, sparse embeddings. Stock, fused, by
``encode_sparse``, by ``splade-kernels encode`` (a part, from the file to the file), and with the transformer in ONNX
Runtime, its decoder inside or the exact head in its place.

Before anything is timed, outputs are compared with the unscreened ones within the band that two summation orders span.
A corpus is either unseen passages of SQuAD, for the model of :mod:`bench.inputs.text_model`, or random words or
passages, for a model with random weights of which about ``ACTIVE_TERMS`` vocabulary entries are active in a text
(:mod:`bench.inputs.encoders`).
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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
# In ONNX Runtime: the model with its decoder in float32 and in int8, and the encoder in int8 with the exact head.
INT8 = ("onnx-int8", "onnx-encoder")
ONNX = ("onnx", *INT8)
SPARSE = "encode_sparse"
COMMAND = "command"
HEADS: dict[str, str | bool] = {**MODES, SPARSE: "auto"}
VARIANTS = ("stock", *HEADS, COMMAND, *ONNX)
# Largest relative error of an encoder in int8, of which 0.1 is usual: it must be an approximation, not another model.
INT8_BOUND = 0.3


@dataclass(frozen=True)
class Corpus:
    """Texts and how many are encoded at a time; ``size``: of a model with random weights, None for the trained one.
    ``reads_data``: they are passages of SQuAD of up to ``length`` tokens; otherwise random words, that many tokens."""

    name: str
    texts: int
    batch_size: int
    size: encoders.Size | None = None
    length: int = 128
    reads_data: bool = False

    @property
    def from_text(self) -> bool:
        return self.size is None

    @property
    def shape(self) -> str:
        if self.size is None:
            return f"{self.texts} texts"
        model = f"{self.size.layers} layers D{self.size.hidden_size} V{self.size.vocab_size}"
        length = f"up to {self.length}" if self.reads_data else f"{self.length}"
        return f"{self.texts} texts of {length} tokens, batch {self.batch_size}, {model}"

    def draw(self) -> list[str]:
        if self.size is None:
            return text_model.passages()[: self.texts]
        if self.reads_data:
            return text_model.squad_passages()[: self.texts]
        return list(encoders.pairs(self.texts, "full", self.length, self.size.vocab_size)["answer"])

    def load(self, device: torch.device, precision: Precision = PRECISIONS["float32"], name: str = "stock") -> Any:
        """The model with the head ``name``."""
        from splade_kernels.integrations.sentence_transformers import fuse

        if self.size is None:
            model = text_model.load(device)
        else:
            words = text_model.VOCABULARY if self.reads_data else None
            sample = self.draw()[: encoders.CALIBRATION_TEXTS] if self.reads_data else None
            folder = encoders.build(self.size, self.length, words)
            model = encoders.load(folder, self.length, str(device), ACTIVE_TERMS, sample)
        if name in ONNX:
            return _in_onnx(model, name)
        if name == COMMAND:
            return _of_the_command(model, precision)
        model.to(precision.dtype)
        return fuse(model, screening=HEADS[name]) if name in HEADS else model

    def step(self, texts: Sequence[str], precision: Precision, model: Any, name: str = "stock") -> Step:
        """One ``encode``; returns indices and values."""
        from splade_kernels import csr
        from splade_kernels.integrations.sentence_transformers import encode_sparse

        def encode() -> Tensor:
            embeddings: Tensor
            if name == COMMAND:
                return _one_part(model, texts)
            if name == SPARSE:
                embeddings = csr.join(encode_sparse(model, texts, batch_size=self.batch_size)).to_sparse_coo()
            else:
                embeddings = model.encode(list(texts), batch_size=self.batch_size)
            return embeddings.coalesce()

        def step() -> Tensors:
            with precision.settings(), precision.forward(torch.device(model.device)):
                embeddings = encode()
            return embeddings.indices(), embeddings.values()

        return step


def _of_the_command(model: Any, precision: Precision) -> Any:
    """The model as ``splade-kernels encode`` loads it from a folder."""
    from splade_kernels.encoding.encoder import TextEncoder
    from splade_kernels.encoding.options import EncoderOptions

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, create_model_card=False)
        dtype = str(precision.dtype).removeprefix("torch.")
        return TextEncoder(EncoderOptions(folder, dtype=dtype, device=model.device.type))


def _one_part(encoder: Any, texts: Sequence[str]) -> Tensor:
    """What the command does with a part, from the file to the file, and the embeddings that it has written."""
    from splade_kernels.encoding.corpus import open_corpus
    from splade_kernels.encoding.duplicates import id_hashes
    from splade_kernels.encoding.parts import IDS, cut, write_part

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / IDS).mkdir()
        lines = (json.dumps({"_id": number, "text": text}) for number, text in enumerate(texts))
        (folder / "corpus.jsonl").write_text("\n".join(lines))
        (rows,) = cut(open_corpus(str(folder / "corpus.jsonl")), len(texts))
        found = encoder([row.text for row in rows])
        write_part(folder, 0, rows, id_hashes(row.id for row in rows), found, "")
    row = torch.repeat_interleave(torch.from_numpy(found.offsets).diff())
    indices = torch.stack([row, torch.from_numpy(found.indices).long()])
    size = len(texts), encoder.vocabulary_size
    return torch.sparse_coo_tensor(indices, torch.from_numpy(found.values), size, is_coalesced=True)


def _in_onnx(model: Any, name: str) -> Any:
    """The model with ONNX Runtime in place of its transformer (``examples/onnx_encoder.py``)."""
    from examples import onnx_encoder

    inside = name != "onnx-encoder"
    with tempfile.TemporaryDirectory() as folder:
        path, quantised = (Path(folder) / file for file in ("model.onnx", "int8.onnx"))
        onnx_encoder.export(model, path, decoder=inside)
        if name in INT8:
            onnx_encoder.quantise(path, quantised)
            path = quantised
        return onnx_encoder.serve(model, path, decoder=inside)


SQUAD = Corpus("encode-squad", 48, 16)
# Beside a small model nearly all the work is the head's; in one of DistilBERT's size it is a part.
CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("encode-small", 64, 64, encoders.Size("distilbert", 2, 128, 30522)),
        Corpus("encode-distilbert", 16, 16, encoders.SIZES["distilbert"]),
        # Texts of many lengths, which batches differ in.
        Corpus("encode-passages", 192, 16, encoders.SIZES["distilbert"], length=256, reads_data=True),
    )
}


def together(corpus: Corpus, precisions: Sequence[Precision], device: torch.device, names: Sequence[str]) -> list[Job]:
    """The jobs of several precisions, to be timed in the same rounds."""
    return [job for precision in precisions for job in jobs(corpus, precision, device, names)]


def why_not(name: str, device: torch.device) -> str | None:
    """Why a variant cannot be measured here, or None."""
    if name in ONNX and device.type != "cpu":
        return "for CPUs only"
    missing = [package for package in ("onnxruntime", "onnx") if importlib.util.find_spec(package) is None]
    return f"the package {missing[0]} is not installed" if name in ONNX and missing else None


def jobs(corpus: Corpus, precision: Precision, device: torch.device, names: Sequence[str]) -> list[Job]:
    """Stock and others, in batches of ``corpus.batch_size``. What runs in ONNX Runtime belongs to float32."""
    texts = corpus.draw()
    model = corpus.load(device, precision)
    decoder = model.transformers_model.get_output_embeddings()
    vocab_size = len(decoder.weight)

    def steps(name: str) -> list[Step]:
        return [corpus.step(texts, precision, corpus.load(device, precision, name), name)]

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
    for name in (name for name in names if name in VARIANTS):
        if name in ONNX and precision.name != "float32":
            continue
        absent, weigh = why_not(name, device), weigher(corpus, precision, name, device)
        mine = replace(row, variant=name, errors={}, status=f"not here: {absent}" if absent else "measured")
        bound = INT8_BOUND if name in INT8 else truth.BOUNDS[precision.name]
        one = Job(mine, partial(steps, name), check, bound, weigh=weigh)
        # The batches of encode_sparse are others, whose encoder rounds otherwise: the band is that of the head alone.
        made.append(hold_in_bands(one, distances) if name in OURS else one)
    return made


def weigher(corpus: Corpus, precision: Precision, name: str, device: torch.device) -> Weigh:
    """How the memory of a variant is measured: on a CPU in a process of its own, which makes its own step."""
    if device.type == "cuda" or corpus.size is None or name in ONNX:
        return weigh_on_gpu(device)
    return lambda step: memory.in_a_process(resident_bytes, corpus, precision.name, name)


def resident_bytes(corpus: Corpus, precision_name: str, name: str) -> int:
    """Peak resident bytes of one ``encode`` above those of the model, loaded and used; for a fresh process."""
    texts = corpus.draw()
    precision = PRECISIONS[precision_name]
    step, short = (
        corpus.step(some, precision, corpus.load(torch.device("cpu"), precision, name), name)
        for some in (texts, texts[:1])
    )
    short()  # libraries and their thread pools, once

    def work() -> int:
        step()
        return 0

    return memory.host_extra_bytes(work)
