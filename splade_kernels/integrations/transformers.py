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
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import check_options
from ..modules import qualified_name
from ._folder import find_tokenizer, load_model, saved_pooling, sentence_transformers_files
from ._hand_off import (
    UNFUSE_FIRST,
    DecoderForward,
    around,
    check_device,
    check_in_place,
    join,
    places,
    read_by_hooks,
)
from ._language_model import attention_is_given, check_model, language_model, probe
from ._probe import uses_flash_attention

__all__ = ["SpladeEncoder"]

_FLATTENED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


class SpladeEncoder(nn.Module):
    """A masked or causal language model as a SPLADE encoder: a batch of tokens to ``[B, V]`` embeddings.

    ``y[b, v] = act(max_s logits[b, s, v])`` over the real tokens ``s``, or the sum of ``act(logits)``: see
    :func:`splade_kernels.splade_pool`, which computes them from what the model gives to its decoder. A final soft cap
    of the logits (Gemma) and a scale (Granite, Cohere) are applied before the activation.

    The model is not copied or changed, except for the ``forward`` of its decoder on the instance, which knows whether
    an encoder is running in the thread that calls it. The keys of the ``state_dict`` are ``"model."`` and those of the
    model, ties stay ties, and :meth:`release`, or the end of the last encoder on a decoder, takes the ``forward`` away.

    Making an encoder runs the model twice on a few tokens, on one thread, to see that it hands its hidden states to
    the decoder and what it does to the logits. Make it before ``torch.compile``, and before other threads compute.

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
        inner = language_model(model)
        decoder = check_model(model, inner)
        self._transform = probe(inner, decoder)
        self._hand_off: DecoderForward | None = None
        self._lengths_arrive = False  # at the attention, those of flattened sequences: seen in the first call with some
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

        From the folder of a PEFT adapter, it is an encoder around a ``PeftModel`` (``peft`` has to be installed).

        Args:
            name_or_path: as in ``AutoModelForMaskedLM.from_pretrained``.
            pooling_strategy, activation_function: None for what ``1_SpladePooling/config.json`` says, which
                sentence-transformers writes, or else ``"max"`` and ``"relu"``.
            screening, backend: as in :func:`splade_kernels.splade_pool`.
            model_kwargs: further arguments of the model's ``from_pretrained``, such as ``dtype``.

        Raises:
            ValueError: ``config.architectures`` names no masked or causal language model, or sentence-transformers
                saved its pooling in another place, or further modules after it, so that it has to be given.
        """
        model = load_model(str(name_or_path), model_kwargs)
        options = {"pooling_strategy": pooling_strategy, "activation_function": activation_function}
        given = {name: value for name, value in options.items() if value is not None}
        if given != options:
            given = {**saved_pooling(str(name_or_path), model_kwargs), **given}
        return cls(model, screening=screening, backend=backend, **given)

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
                its flash attentions, because others attend across sequences. The lengths of the keys, and
                ``position_ids`` that start anew in each sequence, are added unless given.

        Returns:
            ``[B, V]``, ``V`` the rows of the decoder; of the dtype of the hidden states, float32 under autocast.

        Raises:
            TypeError: ``labels`` were given, or a mask is not bool or integer.
            ValueError: a mask has the wrong shape, or sequences are flattened without flash attention, or in a model
                that keeps their lengths from it.
            RuntimeError: the model was changed since the encoder was made, or the encoder was released.
        """
        if self._hand_off is None:
            raise RuntimeError("this encoder was released: make a new one, SpladeEncoder(model)")
        if "_is_replica" in self.__dict__:
            raise RuntimeError(
                "torch.nn.DataParallel replicas keep the first device's decoder: use torchrun "
                "(DistributedDataParallel), or one visible device"
            )
        if "labels" in batch:
            raise TypeError("labels: expected none, since the encoder returns embeddings and no loss")
        if isinstance(kept := batch.get("logits_to_keep", 0), Tensor) or kept != 0:
            raise ValueError(f"logits_to_keep: expected 0, for all tokens, got {kept!r}")
        options: dict[str, Any] = {
            "pooling_strategy": self.pooling_strategy,
            "activation_function": self.activation_function,
            "screening": self.screening,
            "backend": self.backend,
        }
        tokens = _token_shape(input_ids, batch.get("inputs_embeds"))
        if not _FLATTENED.isdisjoint(batch) and any(batch.get(name) is not None for name in _FLATTENED):
            self._check_flattened(batch, attention_mask, pooling_mask, tokens)
            options |= {"cu_seqlens": batch["cu_seq_lens_q"], "max_seqlen": batch.get("max_length_q")}
            batch |= self._complete_flattened(batch, tokens[1])
        elif pooling_mask is not None:
            options["attention_mask"] = _check_mask("pooling_mask", pooling_mask)
        elif attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
                raise ValueError(
                    f"attention_mask: expected [B, S], or a pooling_mask [B, S] beside it, got {_kind(attention_mask)}"
                )
            options["attention_mask"] = _check_mask("attention_mask", attention_mask)
        mask = options.get("attention_mask")
        if mask is not None and tuple(mask.shape) != tokens:
            name = "attention_mask" if pooling_mask is None else "pooling_mask"
            raise ValueError(f"{name}: expected {list(tokens)}, got {list(mask.shape)}")
        hand_off, decoder = self._hand_off, self._hand_off.decoder
        self._check_unchanged(decoder)
        check_device("input_ids", input_ids, decoder)
        if input_ids is not None:
            batch["input_ids"] = input_ids
        if attention_mask is not None:
            batch["attention_mask"] = attention_mask
        if self._takes_cache:
            batch.setdefault("use_cache", False)  # keys and values that nobody would read
        if "cu_seqlens" in options and not (self._lengths_arrive or torch.compiler.is_compiling()):
            with attention_is_given("cu_seq_lens_q", language_model(self.model)):
                _, hidden_states = hand_off.collect(self.model, **batch)
            self._lengths_arrive = True
        else:
            _, hidden_states = hand_off.collect(self.model, **batch)
        if tuple(hidden_states.shape[:-1]) != tokens:
            raise RuntimeError(
                f"the model gave its decoder {list(hidden_states.shape[:-1])} tokens for {list(tokens)}, so it adds or "
                "drops some, and no mask fits them"
            )
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

        Raises:
            ValueError: there is a PEFT adapter in ``folder`` that is not the model's.
        """
        folder = Path(folder)
        inner = language_model(self.model)
        has_adapter = inner is not self.model or getattr(inner, "_hf_peft_config_loaded", False)
        if not has_adapter and (folder / "adapter_config.json").exists():
            raise ValueError(
                f"folder: {folder} holds a PEFT adapter, which would be loaded on top of the model: choose another one"
            )
        self.model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is None:
            tokenizer = find_tokenizer(str(inner.name_or_path)) or find_tokenizer(str(folder))
        if tokenizer is None:
            warnings.warn(
                f"{folder} was saved without a tokenizer, for transformers alone: for sentence-transformers, call "
                "save_pretrained(folder, tokenizer)",
                stacklevel=2,
            )
            return
        tokenizer.save_pretrained(folder)
        files = sentence_transformers_files(inner, self.pooling_strategy, self.activation_function)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """That of the model; trainers look for it."""
        language_model(self.model).activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The earlier name, whose options have other names."""
        language_model(self.model).gradient_checkpointing_enable(**options)

    def extra_repr(self) -> str:
        names = ("pooling_strategy", "activation_function", "screening", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._hand_off is not None:  # a copied decoder is the stock one
            self._join()

    def _join(self) -> None:
        # Not as attributes: as a module's attribute the decoder would be in the state_dict twice.
        decoder = language_model(self.model).get_output_embeddings()
        self._hand_off = join(decoder, self._transform, self)
        self._around = {"the model": self.model, **around(self.model, decoder)}
        self._places = places(self.model, decoder)

    def _check_unchanged(self, decoder: nn.Linear) -> None:
        check_in_place(self._places, decoder)
        if reason := read_by_hooks(self._around):
            raise RuntimeError(f"{reason}. They were added after the encoder was made: {UNFUSE_FIRST}")

    def _check_flattened(
        self, batch: Mapping[str, Any], attention_mask: Any, pooling_mask: Any, tokens: tuple[int, ...]
    ) -> None:
        if not uses_flash_attention(self.config):
            name = getattr(self.config, "_attn_implementation", None)
            raise ValueError(
                "cu_seq_lens_q: expected an attention that keeps flattened sequences apart, such as "
                f"attn_implementation='flash_attention_2', got {name!r}, with which tokens attend across sequences"
            )
        if batch.get("cu_seq_lens_q") is None:
            raise ValueError("cu_seq_lens_q: expected the cumulative lengths [B + 1], got None")
        if attention_mask is not None or pooling_mask is not None:
            raise ValueError("attention_mask: expected none, and no pooling_mask, beside cu_seq_lens_q")
        if tokens[0] != 1:
            raise ValueError(f"input_ids: expected [1, T] beside cu_seq_lens_q, got {list(tokens)}")

    def _complete_flattened(self, batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """What must not be missing: flash attention would take all sequences for one, and positions would run on."""
        ends = batch["cu_seq_lens_q"]
        longest = batch.get("max_length_q")
        longest = tokens if longest is None else longest
        added = {"cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        added = {name: value for name, value in added.items() if batch.get(name) is None}
        if batch.get("position_ids") is None:
            inner = language_model(self.model)
            if "position_ids" not in inspect.signature(type(inner).forward).parameters:
                raise ValueError(
                    f"cu_seq_lens_q: {qualified_name(type(inner))} takes no position_ids, so that its positions would "
                    "run on from one sequence to the next"
                )
            position = torch.arange(tokens, device=ends.device)
            start = ends[torch.searchsorted(ends, position, right=True) - 1]
            added["position_ids"] = (position - start + _first_position(inner)).unsqueeze(0)
        return added


def _token_shape(input_ids: Any, inputs_embeds: Any) -> tuple[int, ...]:
    """``(B, S)``."""
    for name, tensor, ndim in (("input_ids", input_ids, 2), ("inputs_embeds", inputs_embeds, 3)):
        if tensor is not None:
            if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
                shape = "[B, S]" if ndim == 2 else "[B, S, E]"
                raise ValueError(f"{name}: expected a tensor {shape}, got {_kind(tensor)}")
            return tuple(tensor.shape[:2])
    raise ValueError("input_ids: expected token ids [B, S], or inputs_embeds [B, S, E], got neither")


def _first_position(inner: nn.Module) -> int:
    """Position of a sequence's first token: 0, but ``padding_idx + 1`` in RoBERTa and its descendants.

    Those alone have an integer ``padding_idx`` in the module that holds their table of positions.
    """
    for module in inner.modules():
        index = getattr(module, "padding_idx", None)
        if isinstance(index, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return index + 1
    return 0


def _check_mask(name: str, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name}: expected a bool or integer tensor [B, S], got {_kind(mask)}")
    if mask.ndim != 2:
        raise ValueError(f"{name}: expected [B, S], got {_kind(mask)}")
    return mask


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
