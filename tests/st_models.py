"""Tiny masked language models with a local vocabulary, as sentence-transformers ``SparseEncoder`` models.

The head starts as the identity and the decoder's bias at -1, so that a fresh model already is a sparse lexical encoder:
its embeddings are neither all zero nor all active, and a few training steps move it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

ARCHITECTURES = ("distilbert", "bert", "modernbert", "xlm-roberta")
HIDDEN_SIZE = 32
_FOLDER = tempfile.TemporaryDirectory(prefix="tiny-sparse-encoders-")

PAIRS = [
    ("why is the sky blue", "air scatters the short blue waves of sunlight more than the long red ones"),
    ("what do bees make", "bees collect nectar from flowers and make honey in their hive"),
    ("how do magnets work", "a magnet has two poles, and equal poles push each other away"),
    ("when does water boil", "at sea level water boils at one hundred degrees and turns into steam"),
    ("what is bread made of", "bread is baked from flour, water, salt and a little yeast"),
    ("why do leaves turn red", "in autumn the green in the leaves breaks down and red and yellow remain"),
    ("how far is the moon", "the moon circles the earth at a distance of thirty earths"),
    ("what causes tides", "the pull of the moon lifts the sea, so the water rises twice a day"),
    ("who built the pyramids", "workers of old egypt built the pyramids as tombs for their kings"),
    ("how do birds fly", "the wings of birds push the air down, and the air lifts the birds up"),
    ("what is rust", "iron that stays wet takes oxygen from the air and slowly becomes rust"),
    ("why is the sea salty", "rivers carry salt from rocks into the sea, where the sun dries only the water"),
    ("how does a clock keep time", "a falling weight or a spring drives the wheels, and the pendulum counts"),
    ("what is glass made of", "sand is melted with soda and lime, and cools down as clear glass"),
    ("why do cats purr", "cats purr when they feel safe, and also when they want food"),
    ("how do plants drink", "roots take up water from the soil, and the leaves pull it up by drying"),
]
TEXTS = [text for pair in PAIRS for text in pair]


def pairs_dataset() -> Dataset:
    return Dataset.from_dict({"query": [query for query, _ in PAIRS], "document": [text for _, text in PAIRS]})


@functools.cache
def _words() -> tuple[str, ...]:
    split = pre_tokenizers.BertPreTokenizer()
    return tuple(sorted({word for text in TEXTS for word, _ in split.pre_tokenize_str(text)}))


def tokenizer(special: tuple[str, str, str, str, str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> Any:
    """A word-level tokenizer over the words of ``TEXTS``; ``special`` are pad, unk, cls, sep and mask, in id order."""
    pad, unk, cls, sep, mask = special
    order = [cls, pad, sep, unk, mask] if cls == "<s>" else list(special)
    vocab = {word: index for index, word in enumerate([*order, *_words()])}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token=unk))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
        model_max_length=64,
    )
    assert len(fast) == len(vocab)
    assert fast.unk_token_id not in {token for ids in fast(TEXTS)["input_ids"] for token in ids}
    return fast


def _build(architecture: str, vocab_size: int) -> tuple[PreTrainedModel, nn.Linear]:
    """The model and the dense layer of its head."""
    size: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 80,
        "initializer_range": 0.1,
    }
    if architecture == "distilbert":
        model: Any = DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=vocab_size,
                dim=HIDDEN_SIZE,
                n_layers=2,
                n_heads=2,
                hidden_dim=48,
                max_position_embeddings=80,
                initializer_range=0.1,
            )
        )
        return model, model.vocab_transform
    if architecture == "bert":
        model = BertForMaskedLM(BertConfig(**size))
        return model, model.cls.predictions.transform.dense
    if architecture == "modernbert":
        ids = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
        model = ModernBertForMaskedLM(ModernBertConfig(**size, **ids, attn_implementation="eager"))
        return model, model.head.dense
    model = XLMRobertaForMaskedLM(XLMRobertaConfig(**size))
    return model, model.lm_head.dense


@functools.cache
def backbone(architecture: str = "distilbert") -> Path:
    """A folder with the saved model and tokenizer."""
    xlm = architecture == "xlm-roberta"
    fast = tokenizer(("<pad>", "<unk>", "<s>", "</s>", "<mask>")) if xlm else tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, dense = _build(architecture, len(fast))
        decoder: Any = model.get_output_embeddings()
        with torch.no_grad():
            dense.weight.copy_(torch.eye(HIDDEN_SIZE))
            if dense.bias is not None:
                dense.bias.zero_()
            decoder.bias.fill_(-1.0)
    folder = Path(_FOLDER.name) / architecture
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def sparse_encoder(
    architecture: str = "distilbert", *, pooling_strategy: Any = "max", activation_function: Any = "relu", **kwargs: Any
) -> SparseEncoder:
    transformer = Transformer(str(backbone(architecture)), transformer_task="fill-mask", **kwargs)
    pooling = SpladePooling(pooling_strategy=pooling_strategy, activation_function=activation_function)
    return SparseEncoder(modules=[transformer, pooling], device="cpu")


def decoder_of(model: SparseEncoder) -> nn.Linear:
    inner: Any = model.transformers_model
    decoder = inner.get_output_embeddings()
    assert isinstance(decoder, nn.Linear)
    return decoder


def replace_decoder(model: SparseEncoder, decoder: nn.Module) -> None:
    inner: Any = model.transformers_model
    inner.set_output_embeddings(decoder)


def gradients(model: SparseEncoder, texts: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Gradient of every parameter for one fixed scalar of the embeddings of ``texts``, with the same dropout each time.

    In training mode, because stock SpladePooling overwrites what its backward needs in evaluation mode.
    """
    model.zero_grad(set_to_none=True)
    model.train()
    torch.manual_seed(0)
    embeddings = model(dict(model.preprocess(texts)))["sentence_embedding"]
    weights = torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)
    (embeddings * weights).sum().backward()
    for name, parameter in model.named_parameters():
        yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
