"""Masked and causal language models of a given size with random weights, and batches of random tokens for them.

The libraries are imported where they are used: machines that measure the head alone may not have all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The ids below belong to special tokens.
FIRST_ID = 8
# Of each text of a padded batch but the first, tokens that are padding.
PADDING = 1 / 8


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a language model, and the batch it is given.

    ``dropout``: None for what the configuration class has; ``attention``: None for what transformers chooses.
    """

    family: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    vocab_size: int
    batch_size: int
    length: int
    attention: str | None = None
    dropout: float | None = None
    padded: bool = False


def config(shape: Shape) -> Any:
    """The configuration of transformers for a shape: ``bert``, ``distilbert``, ``modernbert`` or ``llama``."""
    from transformers import AutoConfig

    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    common: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max(shape.length, 512),
        "attn_implementation": shape.attention,
        **special,
    }
    if shape.family == "distilbert":
        common["hidden_dim"] = common.pop("intermediate_size")
    if shape.family == "llama":  # attends to all tokens, as a retrieval model made of a decoder does
        common |= {"is_causal": False, "num_key_value_heads": shape.heads // 2 or 1, "tie_word_embeddings": True}
    if shape.dropout is not None:
        names = {
            "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
            "distilbert": ("dropout", "attention_dropout"),
        }
        common |= dict.fromkeys(names.get(shape.family, ()), shape.dropout)
    return AutoConfig.for_model(shape.family, **common)


def model(shape: Shape, *, seed: int = 0) -> Any:
    """A ``…ForMaskedLM`` or ``…ForCausalLM`` in float32 with random weights."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(seed)
    chosen: Any = AutoModelForCausalLM if shape.family == "llama" else AutoModelForMaskedLM
    return chosen.from_config(config(shape))


def batch(shape: Shape, device: torch.device, *, seed: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, both ``[B, S]``."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch_size, shape.length)
    ids = torch.randint(FIRST_ID, shape.vocab_size, size, generator=generator)
    mask = torch.ones(size, dtype=torch.int64)
    if shape.padded:
        mask[1:, shape.length - int(PADDING * shape.length) :] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
