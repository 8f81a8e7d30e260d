"""Tiny masked and causal language models of transformers, saved with a tokenizer, and their stock embeddings."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from splade_kernels.integrations.transformers import SpladeEncoder
from tests.st_models import TEXTS, backbone, tokenizer

CAUSAL = ("llama", "gpt2", "qwen3")
# These cap or scale their logits after the decoder, here by enough to matter.
TRANSFORMED = ("gemma2", "granite", "cohere")
HEADS = [(strategy, activation) for strategy in ("max", "sum") for activation in ("relu", "log1p_relu")]
_FOLDER = tempfile.TemporaryDirectory(prefix="tiny-language-models-")


def _build(family: str, vocab_size: int, **config: Any) -> PreTrainedModel:
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "gpt2":
        size: dict[str, Any] = {"n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **size, **ids, **config))
    size = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 80,
        "initializer_range": 0.1,
    }
    size |= ids | config
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**size))
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**size, head_dim=16))
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**{"final_logit_softcapping": 0.5} | size, head_dim=16))
    if family == "granite":
        return GraniteForCausalLM(GraniteConfig(**{"logits_scaling": 8.0} | size))
    if family == "cohere":
        return CohereForCausalLM(CohereConfig(**{"logit_scale": 0.25} | size))
    raise ValueError(family)


@functools.cache
def folder(family: str, **config: Any) -> Path:
    """Of a causal model, with ``config`` added to its configuration, or of one of ``st_models.ARCHITECTURES``."""
    if family not in CAUSAL + TRANSFORMED:
        return backbone(family)
    fast = tokenizer()
    path = Path(_FOLDER.name) / "-".join([family, *(f"{name}={value}" for name, value in config.items())])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _build(family, len(fast), **config)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def language_model(family: str, **config: Any) -> Any:
    kind: Any = AutoModelForCausalLM if family in CAUSAL + TRANSFORMED else AutoModelForMaskedLM
    return kind.from_pretrained(folder(family, **config)).eval()


def batch(texts: list[str] | None = None, side: str = "right", family: str = "bert") -> dict[str, Tensor]:
    fast = tokenizer(("<pad>", "<unk>", "<s>", "</s>", "<mask>")) if family == "xlm-roberta" else tokenizer()
    encoded = fast(TEXTS[:6] if texts is None else texts, padding=True, return_tensors="pt", padding_side=side)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def stock(
    model: nn.Module,
    features: dict[str, Any],
    pooling_strategy: str = "max",
    activation_function: str = "relu",
    mask: Tensor | None = None,
) -> Tensor:
    """The definition, from the logits of the model itself."""
    values = model(**features).logits.relu().log1p()
    if activation_function == "log1p_relu":
        values = values.log1p()
    values = values * (features["attention_mask"] if mask is None else mask).unsqueeze(-1)
    pooled: Tensor = values.amax(dim=1) if pooling_strategy == "max" else values.sum(dim=1)
    return pooled


def decoder_of(model: Any) -> nn.Linear:
    decoder: nn.Linear = model.get_output_embeddings()
    return decoder


def assert_stock(encoder: SpladeEncoder, features: dict[str, Any] | None = None) -> None:
    """The encoder gives what its model's logits give, and not a row of zeros."""
    features = batch() if features is None else features
    with torch.no_grad():
        expected = stock(encoder.model, features, encoder.pooling_strategy, encoder.activation_function)
        actual = encoder(**features)
    assert 0.05 < (expected > 0).double().mean()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
