"""Sparse encoders of a given size with random weights, and texts for them, without a network.

The libraries are imported where they are used: machines that measure the head alone may not have all of them.

The vocabulary is the words ``w5``, ``w6``, …, one id each, so a text of n words is a sequence of n + 2 tokens, and the
ids of random texts spread over the whole vocabulary.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.inputs.cases import GOOAQ_LENGTHS, gamma_lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SparseEncoder

ATTENTION = "sdpa"
# In the order of their ids; XLM-R counts its positions from the padding id, so that comes second.
_SPECIAL = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
_SPECIAL_PER_TEXT = 2
CALIBRATION_TEXTS = 8


@dataclass(frozen=True)
class Size:
    """What decides the cost of a model; heads are 64 wide and the feed-forward is four times as wide as the model."""

    architecture: str
    layers: int
    hidden_size: int
    vocab_size: int


SIZES = {"distilbert": Size("distilbert", 6, 768, 30522), "xlm-roberta": Size("xlm-roberta", 12, 768, 250002)}


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bench-encoders-")


@functools.cache
def build(size: Size, max_length: int, vocabulary: Path | None = None) -> str:
    """The folder of a masked language model with random weights and its tokenizer; this process removes it.

    ``vocabulary``: a file of WordPiece entries, for a tokenizer of text instead of that of the words ``w5``, ``w6``, ….
    """
    from transformers import AutoConfig, AutoModelForMaskedLM

    tokenizer = _tokenizer(size.vocab_size, max_length) if vocabulary is None else _wordpiece(vocabulary, max_length)
    width = 4 * size.hidden_size
    # XLM-R counts its positions from the padding id. The architectures name the feed-forward's width differently.
    first = tokenizer.pad_token_id + 1 if size.architecture == "xlm-roberta" else 0
    names = {"intermediate_size": width, "type_vocab_size": 1} if first else {"hidden_dim": width}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        size.architecture,
        vocab_size=size.vocab_size,
        max_position_embeddings=max_length + first,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.hidden_size // 64),
        hidden_size=size.hidden_size,
        pad_token_id=tokenizer.pad_token_id,
        **names,
    )
    make: Any = AutoModelForMaskedLM.from_config
    folder = tempfile.mkdtemp(dir=_root().name)
    make(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(
    folder: str, max_length: int, device: str, active_terms: int | None, sample: list[str] | None = None
) -> SparseEncoder:
    """The stock encoder in ``folder``.

    Args:
        active_terms: None: nearly every term is active in every text, as at the start of training. A number: about so
            many terms are active in an answer, as late in training.
        sample: the texts that this is arranged on; None: answers of random words.
    """
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer

    transformer = Transformer(folder, transformer_task="fill-mask", model_kwargs={"attn_implementation": ATTENTION})
    model = SparseEncoder(modules=[transformer, SpladePooling(pooling_strategy="max")], device=device)
    model.max_seq_length = max_length
    inner: Any = model.transformers_model
    decoder = inner.get_output_embeddings()
    vocab_size = decoder.weight.shape[0]
    if len(model.tokenizer) != vocab_size:
        raise RuntimeError(f"tokenizer: expected {vocab_size} entries, got {len(model.tokenizer)}")
    pairs_of_words = pairs(CALIBRATION_TEXTS, "gooaq", max_length, vocab_size, seed=1)
    if active_terms is None:
        _moderate_similarities(model, pairs_of_words)
    else:
        # The bias is still zero, so an activated entry is log1p of its largest dot.
        dots = _embed(model, sample or pairs_of_words["answer"]).expm1()
        with torch.no_grad():
            decoder.bias.fill_(-dots.topk(active_terms, dim=1).values[:, -1].mean())
    return model


def _moderate_similarities(model: SparseEncoder, sample: Dataset) -> None:
    """Scale the logits until a question's similarities to the answers differ by about 1.

    With every term active, dot products otherwise differ by hundreds. The softmax of the loss saturates, and its
    gradients are subnormal, with which a CPU computes an order of magnitude more slowly.
    """
    similarities = _embed(model, sample["question"]) @ _embed(model, sample["answer"]).t()
    norm = [module for module in model.modules() if isinstance(module, nn.LayerNorm)][-1]
    with torch.no_grad():
        norm.weight.div_(similarities.std(dim=1).mean().clamp(min=1).sqrt())


def mean_active_terms(model: SparseEncoder, texts: list[str]) -> float:
    return (_embed(model, texts[:CALIBRATION_TEXTS]) > 0).sum(dim=1).float().mean().item()


def pairs(count: int, lengths: str, max_length: int, vocab_size: int, seed: int = 0) -> Dataset:
    """``count`` pairs of random words. ``lengths``: "gooaq", or "full" for ``max_length`` tokens in every text."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    columns = {}
    for name, (mean, deviation) in GOOAQ_LENGTHS.items():
        if lengths == "full":
            tokens = torch.full((count,), max_length)
        else:
            tokens = gamma_lengths(mean, deviation, count, max_length, generator).clamp(min=_SPECIAL_PER_TEXT + 1)
        sizes = (tokens - _SPECIAL_PER_TEXT).tolist()
        words = [torch.randint(len(_SPECIAL), vocab_size, (n,), generator=generator).tolist() for n in sizes]
        columns[name] = [" ".join(f"w{word}" for word in text) for text in words]
    return Dataset.from_dict(columns)


def _embed(model: SparseEncoder, texts: list[str]) -> Tensor:
    embeddings: Tensor = model.encode(list(texts), convert_to_sparse_tensor=False, show_progress_bar=False)
    return embeddings


def _wordpiece(vocabulary: Path, max_length: int) -> Any:
    from examples.demo.vocabulary import build_tokenizer

    words = vocabulary.read_text(encoding="utf-8").splitlines()
    return build_tokenizer({word: i for i, word in enumerate(words)}, max_length)


def _tokenizer(vocab_size: int, max_length: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(_SPECIAL.values())
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(len(special), vocab_size))])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=_SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first, last = _SPECIAL["cls_token"], _SPECIAL["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])]
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=backend, model_max_length=max_length, **_SPECIAL)
