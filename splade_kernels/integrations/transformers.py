"""SPLADE embeddings of a plain transformers model, masked or causal, without its logits.

    encoder = SpladeEncoder(AutoModelForMaskedLM.from_pretrained("answerdotai/ModernBERT-base"))
    embeddings = encoder(**tokenizer(texts, padding=True, return_tensors="pt"))      # [batch, vocabulary]

``encoder.model`` is the model itself. Called otherwise, it computes logits as before. docs/transformers.md.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.hub import cached_file

from ..functional import check_options
from ..modules import qualified_name
from ._hand_off import (
    UNFUSE_FIRST,
    DecoderForward,
    LogitTransform,
    around,
    check_decoder,
    check_device,
    check_free,
    check_in_place,
    join,
    own_forward,
    places,
    read_by_hooks,
)
from ._probe import assume_transform, isolated, needs_autocast, probe_model, probe_token, why_no_probe

__all__ = ["SpladeEncoder"]

_FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_POOLING_FOLDER = "1_SpladePooling"
_POOLING_CONFIG = f"{_POOLING_FOLDER}/config.json"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")


class SpladeEncoder(nn.Module):
    """A masked or causal language model as a SPLADE encoder: a batch of tokens to ``[B, V]`` embeddings.

    ``y[b, v] = act(max_s logits[b, s, v])`` over the real tokens ``s``, or the sum of ``act(logits)``: see
    :func:`splade_kernels.splade_pool`, which computes them from what the model gives to its decoder. A final soft cap
    of the logits (Gemma) and a scale (Granite, Cohere) are applied before the activation.

    The model is not copied or changed, except for the ``forward`` of its decoder on the instance, which knows whether
    an encoder is running in the thread that calls it. The keys of the ``state_dict`` are ``"model."`` and those of the
    model, ties stay ties, and :meth:`release`, or the end of the last encoder on a decoder, takes the ``forward`` away.

    Making an encoder runs the model twice on a few tokens, on one thread, to see that it hands its hidden states to
    the decoder and what it does to the logits. Make it before ``torch.compile``.

    Args:
        model: ``…ForMaskedLM`` or ``…ForCausalLM`` of transformers, or a ``PeftModel`` around one. A causal model
            attends to earlier tokens only, unless its configuration says ``is_causal=False``: see docs/transformers.md.
        pooling_strategy, activation_function, screening, backend: as in :func:`splade_kernels.splade_pool`.

    Raises:
        TypeError: ``model`` is none of these, or its decoder is no plain ``nn.Linear`` (quantised, with an adapter).
        ValueError: an option has no such value; the model is an encoder-decoder, does more to its logits, or hooks
            read them.
    """

    # Trainer then divides a loss by the number of accumulated batches, also where these have labels.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        *,
        pooling_strategy: str = "max",
        activation_function: str = "relu",
        screening: str | bool = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(pooling_strategy, activation_function, screening, backend)
        self.model = model
        self.pooling_strategy = pooling_strategy
        self.activation_function = activation_function
        self.screening = screening
        self.backend = backend
        inner = _language_model(model)
        decoder = _check(model, inner)
        self._transform = _probe(inner, decoder)
        self._hand_off: DecoderForward | None = None
        self._takes_cache = "use_cache" in inspect.signature(type(inner).forward).parameters
        self._join()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        pooling_strategy: str | None = None,
        activation_function: str | None = None,
        screening: str | bool = "auto",
        backend: str = "auto",
        **model_kwargs: Any,
    ) -> SpladeEncoder:
        """An encoder with a model from the hub or a folder, of the class that its ``config.architectures`` names.

        Args:
            name_or_path: as in ``AutoModelForMaskedLM.from_pretrained``.
            pooling_strategy, activation_function: None for what ``1_SpladePooling/config.json`` says, which
                sentence-transformers writes, or else ``"max"`` and ``"relu"``.
            screening, backend: as in :func:`splade_kernels.splade_pool`.
            model_kwargs: further arguments of the model's ``from_pretrained``, such as ``dtype``.

        Raises:
            ValueError: ``config.architectures`` names no masked or causal language model.
        """
        hub = {name: model_kwargs[name] for name in _HUB_ARGUMENTS if name in model_kwargs}
        config = model_kwargs.get("config")
        if config is None:
            trust = (
                {"trust_remote_code": model_kwargs["trust_remote_code"]} if "trust_remote_code" in model_kwargs else {}
            )
            config = transformers.AutoConfig.from_pretrained(name_or_path, **hub, **trust)
        model_class = _auto_class(config)
        saved = {"pooling_strategy": "max", "activation_function": "relu"}
        if file := cached_file(str(name_or_path), _POOLING_CONFIG, _raise_exceptions_for_missing_entries=False, **hub):
            saved |= json.loads(Path(file).read_text())
        return cls(
            model_class.from_pretrained(name_or_path, **model_kwargs),
            pooling_strategy=saved["pooling_strategy"] if pooling_strategy is None else pooling_strategy,
            activation_function=saved["activation_function"] if activation_function is None else activation_function,
            screening=screening,
            backend=backend,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        *,
        pooling_mask: Tensor | None = None,
        **batch: Any,
    ) -> Tensor:
        """Embeddings of a batch.

        Args:
            input_ids: ``[B, S]`` token ids; or ``inputs_embeds`` ``[B, S, E]`` instead.
            attention_mask: ``[B, S]`` bool or integer, non-zero for real tokens, in any pattern; None: all are real. A
                mask of another shape, which only the model understands, needs a ``pooling_mask``.
            pooling_mask: ``[B, S]`` bool or integer, non-zero for the tokens to pool; None: ``attention_mask``.
            batch: what else the model takes: ``position_ids``, ``token_type_ids``, ... ``cu_seq_lens_q`` and
                ``max_length_q``, transformers' names for sequences that follow one another in one row, need one of
                its flash attentions, because others attend across sequences.

        Returns:
            ``[B, V]``, ``V`` the rows of the decoder; of the dtype of the hidden states, float32 under autocast.

        Raises:
            TypeError: ``labels`` were given, or a mask is not bool or integer.
            ValueError: a mask has the wrong shape, or sequences are flattened without flash attention.
            RuntimeError: the model was changed since the encoder was made, or the encoder was released.
        """
        if self._hand_off is None:
            raise RuntimeError("this encoder was released: make a new one, SpladeEncoder(model)")
        if "labels" in batch:
            raise TypeError("labels: expected none, since the encoder returns embeddings and no loss")
        if batch.get("logits_to_keep") not in (None, 0):
            raise ValueError(f"logits_to_keep: expected 0, for all tokens, got {batch['logits_to_keep']!r}")
        options: dict[str, Any] = {
            "pooling_strategy": self.pooling_strategy,
            "activation_function": self.activation_function,
            "screening": self.screening,
            "backend": self.backend,
        }
        if any(batch.get(name) is not None for name in _FLATTENED):
            self._check_flattened(batch, attention_mask, pooling_mask)
            options |= {"cu_seqlens": batch["cu_seq_lens_q"], "max_seqlen": batch.get("max_length_q")}
        elif pooling_mask is not None:
            options["attention_mask"] = _check_mask("pooling_mask", pooling_mask)
        elif attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
                raise ValueError(
                    f"attention_mask: expected [B, S], or a pooling_mask [B, S] beside it, got {_kind(attention_mask)}"
                )
            options["attention_mask"] = _check_mask("attention_mask", attention_mask)
        hand_off, decoder = self._hand_off, self._hand_off.decoder
        self._check_unchanged(decoder)
        check_device("input_ids", input_ids, decoder)
        if input_ids is not None:
            batch["input_ids"] = input_ids
        if attention_mask is not None:
            batch["attention_mask"] = attention_mask
        if self._takes_cache:
            batch.setdefault("use_cache", False)  # keys and values that nobody would read
        _, hidden_states = hand_off.collect(self.model, **batch)
        mask = options.get("attention_mask")
        if mask is not None and mask.shape != hidden_states.shape[:-1]:
            name = "attention_mask" if pooling_mask is None else "pooling_mask"
            raise ValueError(f"{name}: expected {list(hidden_states.shape[:-1])}, got {list(mask.shape)}")
        embeddings: Tensor = decoder(hidden_states, pooling=options)
        return embeddings

    def release(self) -> None:
        """Leave the model: without other encoders on it, it is as it was. This encoder can compute nothing then."""
        if self._hand_off is not None:
            self._hand_off.leave(self)
            self._hand_off = None

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Save the model for transformers, and with its tokenizer for sentence-transformers too.

        ``SparseEncoder(folder)`` then gives the same embeddings. Neither needs this package.

        Args:
            folder: where to; it is made if need be.
            tokenizer: None: that of ``model.name_or_path``, or one that is in ``folder``. Without any there is a
                warning, and the folder is for transformers alone: sentence-transformers would load it with a tokenizer
                of a few tokens and without an error.
        """
        folder = Path(folder)
        self.model.save_pretrained(folder)  # type: ignore[operator]
        inner = _language_model(self.model)
        if tokenizer is None:
            tokenizer = _find_tokenizer(str(inner.name_or_path)) or _find_tokenizer(str(folder))
        if tokenizer is None:
            warnings.warn(
                f"{folder} was saved without a tokenizer, for transformers alone: for sentence-transformers, call "
                "save_pretrained(folder, tokenizer)",
                stacklevel=2,
            )
            return
        tokenizer.save_pretrained(folder)
        for name, content in _sentence_transformers_files(inner, self).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """That of the model; trainers look for it."""
        _language_model(self.model).activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The earlier name, whose options have other names."""
        _language_model(self.model).gradient_checkpointing_enable(**options)

    def extra_repr(self) -> str:
        names = ("pooling_strategy", "activation_function", "screening", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._hand_off is not None:  # a copied decoder is the stock one
            self._join()

    def _join(self) -> None:
        # Not as attributes: as a module's attribute the decoder would be in the state_dict twice.
        decoder = _language_model(self.model).get_output_embeddings()
        self._hand_off = join(decoder, self._transform, self)
        self._around = {"the model": self.model, **around(self.model, decoder)}
        self._places = places(self.model, decoder)

    def _check_unchanged(self, decoder: nn.Linear) -> None:
        check_in_place(self._places, decoder)
        if reason := read_by_hooks(self._around):
            raise RuntimeError(f"{reason}. They were added after the encoder was made: {UNFUSE_FIRST}")

    def _check_flattened(self, batch: Mapping[str, Any], attention_mask: Any, pooling_mask: Any) -> None:
        if not is_flash_attention_requested(self.config):
            name = self.config._attn_implementation
            raise ValueError(
                "cu_seq_lens_q: expected an attention that keeps flattened sequences apart, such as "
                f"attn_implementation='flash_attention_2', got {name!r}, with which tokens attend across sequences"
            )
        if batch.get("cu_seq_lens_q") is None:
            raise ValueError("cu_seq_lens_q: expected the cumulative lengths [B + 1], got None")
        if attention_mask is not None or pooling_mask is not None:
            raise ValueError("attention_mask: expected none, and no pooling_mask, beside cu_seq_lens_q")


def _language_model(model: Any) -> Any:
    """The model of transformers: ``model``, or the one in a ``PeftModel``."""
    return model.get_base_model() if type(model).__module__.startswith("peft.") else model


def _check(model: Any, inner: Any) -> nn.Linear:
    """The decoder of a model whose hidden states can be pooled."""
    if not isinstance(inner, transformers.PreTrainedModel):
        raise TypeError(
            f"model: expected a …ForMaskedLM or …ForCausalLM of transformers, got {qualified_name(type(inner))}"
        )
    if model is not inner and getattr(model.active_peft_config, "is_prompt_learning", False):
        kind = qualified_name(type(model.active_peft_config))
        raise ValueError(f"model: expected adapters on layers, got {kind}, which adds tokens that no mask knows of")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected an encoder or a decoder, got {qualified_name(type(inner))}, an encoder-decoder: its "
            "logits belong to the decoder's tokens, not to those of the text"
        )
    decoder: Any = inner.get_output_embeddings()  # type: ignore[no-untyped-call]
    if decoder is None:
        raise TypeError(
            f"model: expected a …ForMaskedLM or …ForCausalLM, got {qualified_name(type(inner))}, which has no decoder"
        )
    check_decoder(decoder)
    if not isinstance(own_forward(decoder), DecoderForward):
        check_free(decoder)
    if reason := read_by_hooks({"the model": model, **around(model, decoder)}):
        raise ValueError(reason)
    return cast(nn.Linear, decoder)


def _probe(inner: Any, decoder: nn.Linear) -> LogitTransform:
    if reason := why_no_probe([inner]):
        return assume_transform(inner.config, reason)

    def run(input_ids: Tensor, attention_mask: Tensor) -> Any:
        return inner(input_ids=input_ids, attention_mask=attention_mask).logits

    try:
        transform = probe_model(inner, inner.config, decoder, run)
    except ValueError as error:
        rows, width = decoder.weight.shape
        raise ValueError(
            f"{type(inner).__name__}: {error} (get_output_embeddings() is [{rows}, {width}], config.vocab_size is "
            f"{getattr(inner.config.get_text_config(), 'vocab_size', None)})"
        ) from error
    for name, value in (("use_bidirectional_attention", True), ("is_causal", False)):
        if getattr(inner.config, name, None) is value and _is_causal(inner, decoder):
            warnings.warn(
                f"config.{name} is {value}, but {type(inner).__name__} ignores it: tokens attend to earlier ones only",
                stacklevel=3,
            )
    return transform


def _is_causal(inner: Any, decoder: nn.Linear) -> bool:
    """Whether the first token's hidden state ignores the last token."""
    collector = DecoderForward(decoder, LogitTransform.of(inner.config))
    device = decoder.weight.device
    token = probe_token(inner.config)
    ids = torch.full((1, 4), token, device=device)
    other = ids.clone()
    other[0, -1] = token + 2
    before = decoder.__dict__.get("forward")
    with isolated(inner, inner.parameters(), device, needs_autocast(inner.config, decoder)):
        decoder.__dict__["forward"] = collector
        try:
            first, second = (collector.collect(inner, input_ids=tokens)[1][0, 0] for tokens in (ids, other))
        finally:
            decoder.__dict__.pop("forward")
            if before is not None:
                decoder.__dict__["forward"] = before
    return torch.equal(first, second)


def _auto_class(config: Any) -> Any:
    names = config.architectures or []
    if any(map(_is_masked, names)):
        return transformers.AutoModelForMaskedLM
    if any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForCausalLM") for name in names):
        return transformers.AutoModelForCausalLM
    raise ValueError(
        f"config.architectures: expected a …ForMaskedLM or …ForCausalLM, got {names}. Load the model as the class that "
        "it is to have, and pass it to SpladeEncoder(model)"
    )


def _is_masked(name: str) -> bool:
    """Whether the class of this name is a masked language model."""
    return name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("ForMaskedLM")


def _check_mask(name: str, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name}: expected a bool or integer tensor [B, S], got {_kind(mask)}")
    if mask.ndim != 2:
        raise ValueError(f"{name}: expected [B, S], got {_kind(mask)}")
    return mask


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _find_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name that has the files of one, or None."""
    if not name:
        return None
    try:
        found = any(
            cached_file(name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False)
            for file in _TOKENIZER_FILES
        )
        return transformers.AutoTokenizer.from_pretrained(name) if found else None
    except (OSError, ValueError):
        return None


def _sentence_transformers_files(inner: Any, encoder: SpladeEncoder) -> dict[str, Any]:
    """What sentence-transformers 6 needs beside model and tokenizer, by file name."""
    masked = _is_masked(type(inner).__name__)
    transformer: dict[str, Any] = {
        "transformer_task": "fill-mask" if masked else "text-generation",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "token_embeddings",
    }
    if not masked:
        transformer["processing_kwargs"] = {"text": {"logits_to_keep": 0}}
    modules = (
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        (_POOLING_FOLDER, "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling"),
    )
    return {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": kind} for index, (path, kind) in enumerate(modules)
        ],
        "config_sentence_transformers.json": {"model_type": "SparseEncoder"},
        "sentence_bert_config.json": transformer,
        _POOLING_CONFIG: {
            "pooling_strategy": encoder.pooling_strategy,
            "activation_function": encoder.activation_function,
        },
    }
