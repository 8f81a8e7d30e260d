"""The table of model families, each as a tiny random model, that ``SpladeEncoder`` is tested with.

docs/transformers.md shows the table (``python -m tests.tf_models --document docs/transformers.md`` writes it there);
tests/integrations/test_tf_families.py holds each of its entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bench.tables.markdown import table
from tests import generated

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- families: python -m tests.tf_models --document docs/transformers.md -->", "<!-- families end -->"
V, D = 60, 32
PAD, BOS, EOS = 0, 2, 3
_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_BERT = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "initializer_range": 0.2,
    **_IDS,
}
_NO_HEADS = {name: value for name, value in _BERT.items() if name != "num_attention_heads"}
_MODERN = {**_BERT, "cls_token_id": BOS, "sep_token_id": EOS}
_LLAMA = {**_BERT, "num_key_value_heads": 1}
_HEADS = {**_LLAMA, "head_dim": 16}
_XLM = {"vocab_size": V, "emb_dim": D, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 80, **_IDS}
_XLM |= {"pad_index": PAD, "bos_index": BOS, "eos_index": EOS}
# PyTorch's grouped product, the default, takes no float64.
_MOE = {"experts_implementation": "eager", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True, eq=False)
class Family:
    """One row of the table.

    ``is_causal``: what ``config.is_causal=False`` does to a causal model: ``"honoured"`` or ``"ignored"``; None for
    models that attend to all tokens anyway. ``refused``: the reason in one sentence, and ``error``, what is raised and
    a pattern of its message. ``change``: what is done to the model before an encoder is made.
    """

    name: str
    model: str
    settings: dict[str, Any] = field(repr=False)
    is_causal: str | None = None
    refused: str = ""
    error: tuple[type[Exception], str] | None = None
    length: int = 9
    note: str = ""
    change: Callable[[Any], None] | None = None

    @property
    def id(self) -> str:
        return self.name.lower().replace(" ", "-").replace("ö", "o")

    @property
    def available(self) -> bool:
        return hasattr(transformers, self.model)

    def build(self, **changes: Any) -> Any:
        """A new model in evaluation mode, the same each time."""
        model_class = getattr(transformers, self.model)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**(self.settings | changes))).eval()
        if self.change is not None:
            self.change(model)
        return model

    def batch(self) -> dict[str, Tensor]:
        """Distinct tokens, so that no two positions have the same logits, in rows of different lengths."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.stack([torch.randperm(V - 5, generator=generator)[: self.length] + 5 for _ in range(3)])
        mask = torch.arange(self.length) < torch.tensor([[self.length], [self.length // 2], [2]])
        return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def _quantise_decoder(model: Any) -> None:
    decoder = torch.ao.nn.quantized.dynamic.Linear(D, V)
    model.set_output_embeddings(decoder)


_ENCODER_DECODER = "its logits belong to the tokens of its decoder, not to those of the text"
_NO_DECODER = "`get_output_embeddings()` is a D × D layer of its head, not the decoder"
_PARTLY = "ignored with sdpa attention where a batch has no padding"

FAMILIES = [
    Family("BERT", "BertForMaskedLM", _BERT),
    Family("DistilBERT", "DistilBertForMaskedLM",
           {"vocab_size": V, "dim": D, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "initializer_range": 0.2}),
    Family("RoBERTa", "RobertaForMaskedLM", _BERT),
    Family("RoBERTa-PreLayerNorm", "RobertaPreLayerNormForMaskedLM", _BERT),
    Family("XLM-RoBERTa", "XLMRobertaForMaskedLM", _BERT),
    Family("XLM-RoBERTa-XL", "XLMRobertaXLForMaskedLM", _BERT),
    Family("X-MOD", "XmodForMaskedLM", {**_BERT, "languages": ["en"], "default_language": "en"}),
    Family("CamemBERT", "CamembertForMaskedLM", _BERT),
    Family("Data2Vec", "Data2VecTextForMaskedLM", _BERT),
    Family("MPNet", "MPNetForMaskedLM", _BERT),
    Family("ELECTRA", "ElectraForMaskedLM", {**_BERT, "embedding_size": 16}, note="D is `embedding_size`"),
    Family("ALBERT", "AlbertForMaskedLM", {**_BERT, "embedding_size": 16}, note="D is `embedding_size`"),
    Family("RemBERT", "RemBertForMaskedLM", {**_BERT, "input_embedding_size": 16, "output_embedding_size": 24},
           note="D is `output_embedding_size`"),
    Family("DeBERTa", "DebertaForMaskedLM", {**_BERT, "relative_attention": True}),
    Family("DeBERTa-v2", "DebertaV2ForMaskedLM", {**_BERT, "relative_attention": True}, note="`legacy=True`"),
    Family("DeBERTa-v2 legacy=False", "DebertaV2ForMaskedLM", {**_BERT, "legacy": False},
           refused=_NO_DECODER, error=(ValueError, r"DebertaV2ForMaskedLM: .*not the last layer.*\[32, 32\]")),
    Family("ModernBERT", "ModernBertForMaskedLM", _MODERN),
    Family("EuroBERT", "EuroBertForMaskedLM", _LLAMA),
    Family("NomicBERT", "NomicBertForMaskedLM", _BERT),
    Family("GTE", "GteForMaskedLM", _BERT),
    Family("Jina embeddings v3", "JinaEmbeddingsV3ForMaskedLM", _BERT),
    Family("BigBird original_full", "BigBirdForMaskedLM", {**_BERT, "attention_type": "original_full"}),
    Family("BigBird block_sparse", "BigBirdForMaskedLM", {**_BERT, "block_size": 4, "num_random_blocks": 1}, length=40),
    Family("Longformer", "LongformerForMaskedLM", {**_BERT, "attention_window": 4}),
    Family("XLM", "XLMWithLMHeadModel", _XLM),
    Family("XLM asm=True", "XLMWithLMHeadModel", {**_XLM, "asm": True, "asm_cutoffs": [10, 20], "asm_div_value": 2.0},
           refused="adaptive softmax is no linear layer", error=(TypeError, "AdaptiveLogSoftmaxWithLoss")),
    Family("FlauBERT", "FlaubertWithLMHeadModel", _XLM),
    Family("FNet", "FNetForMaskedLM", _NO_HEADS, note="mixes padding into all tokens, as without the encoder"),
    Family("ERNIE", "ErnieForMaskedLM", _BERT),
    Family("Megatron-BERT", "MegatronBertForMaskedLM", _BERT),
    Family("RoFormer", "RoFormerForMaskedLM", {**_BERT, "embedding_size": 16}, note="D is `embedding_size`"),
    Family("ConvBERT", "ConvBertForMaskedLM", {**_BERT, "embedding_size": 16}, note="D is `embedding_size`"),
    Family("SqueezeBERT", "SqueezeBertForMaskedLM", {**_BERT, "embedding_size": D}),
    Family("Funnel", "FunnelForMaskedLM",
           {"vocab_size": V, "d_model": D, "block_sizes": [1, 1], "n_head": 2, "d_head": 16, "d_inner": 48, **_IDS}),
    Family("Nyströmformer", "NystromformerForMaskedLM", {**_BERT, "segment_means_seq_len": 8, "num_landmarks": 8}),
    Family("MobileBERT", "MobileBertForMaskedLM", {**_BERT, "embedding_size": 16},
           refused="it never calls its decoder, but multiplies by the weight itself",
           error=(ValueError, "MobileBertForMaskedLM: .*never called")),
    Family("ESM", "EsmForMaskedLM", {**_BERT, "mask_token_id": 1},
           refused="it adds a bias to what its decoder returns",
           error=(ValueError, "EsmForMaskedLM: .*changes its logits.*bias that is still 0")),
    Family("Llama with a quantised decoder", "LlamaForCausalLM", _LLAMA, change=_quantise_decoder,
           refused="the fused head needs a floating-point weight; quantise the other layers only",
           error=(TypeError, "expected exactly torch.nn.Linear.*quantise the layers of the encoder only")),
    Family("T5", "T5ForConditionalGeneration",
           {"vocab_size": V, "d_model": D, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2},
           refused=_ENCODER_DECODER, error=(ValueError, "T5ForConditionalGeneration, an encoder-decoder")),
    Family("BART", "BartForConditionalGeneration",
           {"vocab_size": V, "d_model": D, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **_IDS},
           refused=_ENCODER_DECODER, error=(ValueError, "BartForConditionalGeneration, an encoder-decoder")),
    Family("ModernBERT decoder", "ModernBertDecoderForCausalLM", _MODERN, "honoured"),
    Family("Llama", "LlamaForCausalLM", _LLAMA, "honoured"),
    Family("Qwen2", "Qwen2ForCausalLM", _LLAMA, "honoured"),
    Family("Qwen3", "Qwen3ForCausalLM", _HEADS, "honoured"),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", {**_HEADS, **_MOE}, "honoured"),
    Family("Mistral", "MistralForCausalLM", _LLAMA, "honoured"),
    Family("Mixtral", "MixtralForCausalLM",
           {**_LLAMA, "num_local_experts": 4, "experts_implementation": "eager"}, "honoured"),
    Family("SmolLM3", "SmolLM3ForCausalLM", _LLAMA, "honoured"),
    Family("OLMo2", "Olmo2ForCausalLM", _LLAMA, "honoured"),
    Family("Gemma", "GemmaForCausalLM", _HEADS, "honoured"),
    Family("Gemma 2", "Gemma2ForCausalLM", {**_HEADS, "final_logit_softcapping": 2.0}, "honoured",
           note="with `final_logit_softcapping`"),
    Family("Gemma 3", "Gemma3ForCausalLM", _HEADS, "honoured"),
    Family("Gemma 3 with a soft cap", "Gemma3ForCausalLM", {**_HEADS, "final_logit_softcapping": 2.0}, "honoured",
           note="with `final_logit_softcapping`"),
    Family("Granite", "GraniteForCausalLM", {**_LLAMA, "logits_scaling": 8.0}, "honoured",
           note="with `logits_scaling`"),
    Family("Cohere", "CohereForCausalLM", {**_LLAMA, "logit_scale": 0.0625}, "honoured", note="with `logit_scale`"),
    Family("Phi", "PhiForCausalLM", _LLAMA, "honoured"),
    Family("Phi-3", "Phi3ForCausalLM", _LLAMA, "honoured"),
    Family("OPT", "OPTForCausalLM",
           {"vocab_size": V, "hidden_size": D, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "ffn_dim": 48,
            "num_attention_heads": 2, "max_position_embeddings": 80, "init_std": 0.2, **_IDS}, "honoured",
           note="D is `word_embed_proj_dim`"),
    Family("GPT-2", "GPT2LMHeadModel",
           {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 80, "initializer_range": 0.2,
            **_IDS}, "honoured"),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", _BERT, "honoured"),
    Family("GPT-Neo", "GPTNeoForCausalLM",
           {"vocab_size": V, "hidden_size": D, "num_layers": 2, "num_heads": 2, "window_size": 4,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 80, **_IDS}, "ignored"),
    Family("StarCoder2", "Starcoder2ForCausalLM", _LLAMA, "honoured"),
    Family("StableLM", "StableLmForCausalLM", _LLAMA, _PARTLY),
    Family("Nemotron", "NemotronForCausalLM", _HEADS, _PARTLY),
]  # fmt: skip
WORKING = [family for family in FAMILIES if not family.refused]
CAUSAL = [family for family in WORKING if family.is_causal]


def block() -> str:
    """What stands in docs/transformers.md between the markers."""
    pinned = re.search(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    rows = [["model family", "class", "works, or refused and why", "`config.is_causal=False`"]]
    for family in FAMILIES:
        result = f"refused: {family.refused}" if family.refused else "works" + (family.note and f"; {family.note}")
        rows.append([family.name, f"`{family.model}`", result, _said_of_is_causal(family)])
    said = f"With transformers {pinned[1]}; {len(WORKING)} work, {len(FAMILIES) - len(WORKING)} are refused. D is the "
    said += "width of the hidden states that the decoder is given, `hidden_size` unless the table says otherwise."
    return "\n\n".join([BEGIN, said, table(rows), END])


def _said_of_is_causal(family: Family) -> str:
    if family.is_causal is None:
        return ""
    return family.is_causal if family.is_causal == "honoured" else f"{family.is_causal}; the encoder warns"


main = partial(generated.main, __doc__, block)


if __name__ == "__main__":
    main()
