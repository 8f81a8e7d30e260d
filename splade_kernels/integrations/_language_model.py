"""Language models of transformers: the decoder of one that can be fused, and what it does beside calling it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..modules import qualified_name
from ._hand_off import (
    DecoderForward,
    LogitTransform,
    around,
    check_decoder,
    check_free,
    own_forward,
    read_by_hooks,
    temporary_forward,
)
from ._probe import isolated, needs_autocast, probe_model, probe_token, why_no_probe


def language_model(model: Any) -> Any:
    """The model of transformers: ``model``, or the one in a ``PeftModel`` or ``PeftMixedModel``."""
    if not type(model).__module__.startswith("peft."):
        return model
    return model.get_base_model() if hasattr(model, "active_peft_config") else model.base_model.model


def check_model(model: Any, inner: Any) -> nn.Linear:
    """The decoder of a model whose hidden states can be pooled."""
    if not isinstance(inner, transformers.PreTrainedModel):
        raise TypeError(
            f"model: expected a …ForMaskedLM or …ForCausalLM of transformers, got {qualified_name(type(inner))}"
        )
    if model is not inner and getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        kind = qualified_name(type(model.active_peft_config))
        raise ValueError(f"model: expected adapters on layers, got {kind}, which adds tokens that no mask knows of")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected an encoder or a decoder, got {qualified_name(type(inner))}, an encoder-decoder: its "
            "logits belong to the decoder's tokens, not to those of the text"
        )
    found = inner.get_output_embeddings()  # type: ignore[no-untyped-call]
    if found is None:
        raise TypeError(
            f"model: expected a …ForMaskedLM or …ForCausalLM, got {qualified_name(type(inner))}, which has no decoder"
        )
    try:
        decoder = check_decoder(found)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{type(inner).__name__}: {error}") from None
    if not isinstance(own_forward(decoder), DecoderForward):
        check_free(decoder)
    if reason := read_by_hooks({"the model": model, **around(model, decoder)}):
        raise ValueError(reason)
    return decoder


def probe(inner: Any, decoder: nn.Linear) -> LogitTransform:
    """What the model does to its logits, by :func:`probe_model`; warns where it is causal and configured not to be."""

    def run(input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = inner(input_ids=input_ids, attention_mask=attention_mask)
        return output[0] if isinstance(output, tuple) else output.logits

    try:
        transform = probe_model(inner, inner.config, decoder, run)
    except ValueError as error:
        rows, width = decoder.weight.shape
        raise ValueError(
            f"{type(inner).__name__}: {error} (the weight of get_output_embeddings() is [{rows}, {width}], "
            f"config.vocab_size {getattr(inner.config.get_text_config(), 'vocab_size', None)})"
        ) from error
    if why_no_probe([inner]):
        return transform
    for name, asked in (("use_bidirectional_attention", (True, "all")), ("is_causal", (False,))):
        value = getattr(inner.config, name, None)
        where = _where_causal(inner, decoder) if isinstance(value, (bool, str)) and value in asked else None
        if where is not None:
            warnings.warn(
                f"config.{name} is {value!r}, but {type(inner).__name__} ignores it{where}: tokens attend to earlier "
                "ones only",
                stacklevel=3,
            )
    return transform


@contextmanager
def attention_is_given(name: str, inner: nn.Module) -> Iterator[None]:
    """Raise ``ValueError`` unless every attention module that runs meanwhile gets the argument of this name.

    Some models take any argument and leave it out on the way to their attention (Nemotron, StableLM, GPT-Neo).
    """
    without: list[nn.Module] = []

    def look(module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get(name) is None:
            without.append(module)

    attentions = [module for module in inner.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if without:
        raise ValueError(
            f"{name}: {type(inner).__name__} does not give it to its attention, {qualified_name(type(without[0]))}, so "
            "that tokens would attend across sequences: pad them"
        )


def _where_causal(inner: Any, decoder: nn.Linear) -> str | None:
    """In which batches a token's hidden state ignores later tokens, as the end of a sentence; None: in none.

    Some models take ``is_causal`` of sdpa for batches without padding, and a mask made elsewhere for others.
    """
    collector = DecoderForward(decoder, LogitTransform.of(inner.config))
    device = decoder.weight.device
    token = probe_token(inner.config)
    ids = torch.full((2, 4), token, device=device)
    other = ids.clone()
    other[0, -1] = token + 2
    padded = torch.ones_like(ids)
    padded[1, -1] = 0
    causal = []
    autocast = needs_autocast(inner.config, decoder)
    with isolated(inner, inner.parameters(), device, autocast), temporary_forward(decoder, collector):
        try:
            for mask in (None, padded):
                first, second = (
                    collector.collect(inner, input_ids=tokens, attention_mask=mask)[1][0, 0] for tokens in (ids, other)
                )
                causal.append(torch.equal(first, second))
        except Exception as error:
            raise ValueError(
                f"{type(inner).__name__}: the model cannot run a batch {'with' if causal else 'without'} padding as it "
                f"is configured, with attn_implementation={inner.config._attn_implementation!r}: {error}"
            ) from error
    whole, ragged = causal
    if whole != ragged:
        return f" in batches {'without' if whole else 'with'} padding"
    return "" if whole else None
