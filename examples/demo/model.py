"""A small BERT masked language model from scratch, as a plain sentence-transformers ``SparseEncoder``."""

from __future__ import annotations

import tempfile

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

__all__ = ["build_model"]

LAYERS = 2
HEADS = 4
DECODER_BIAS = -1.0
# A token's own logit at the start is about hidden_size times the standard deviation of the weights (BERT's 0.02 at a
# width of 128). If it were smaller, the bias would make every activation zero, and the gradient with it.
OWN_LOGIT = 2.56


def build_model(tokenizer: BertTokenizerFast, hidden_size: int, max_length: int, seed: int) -> SparseEncoder:
    """A masked language model whose random start already favours the words of its input.

    The head's transform starts as the identity and the decoder, tied to the input embeddings, at a negative bias. So a
    token's own logit is its largest and most other logits are negative: the first embeddings are sparse bags of words
    and training has a gradient to follow. From BERT's default start a run this short learns nothing.

    Args:
        tokenizer: its length is the vocabulary size.
        hidden_size: width of the model; a multiple of the number of attention heads.
        max_length: longest input in tokens.
        seed: seed of the random start.

    Returns:
        The stock encoder on the CPU: ``Transformer`` (fill-mask) and ``SpladePooling`` (max).
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=max_length,
        initializer_range=OWN_LOGIT / hidden_size,
        # Without dropout the stock and the fused run compute the same function at every step.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    language_model = BertForMaskedLM(config)
    with torch.no_grad():
        language_model.cls.predictions.transform.dense.weight.copy_(torch.eye(hidden_size))
        language_model.cls.predictions.transform.dense.bias.zero_()
        language_model.cls.predictions.decoder.bias.fill_(DECODER_BIAS)
    with tempfile.TemporaryDirectory() as folder:
        language_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, transformer_task="fill-mask")
    return SparseEncoder(modules=[transformer, SpladePooling(pooling_strategy="max")], device="cpu")
