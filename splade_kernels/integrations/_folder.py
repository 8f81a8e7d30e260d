"""What is read from, and written to, the folder or hub repository of an encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

POOLING_FOLDER = "1_SpladePooling"
POOLING_CONFIG = f"{POOLING_FOLDER}/config.json"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_OF_THE_ADAPTER = ("revision", "subfolder")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")


def load_model(name_or_path: str, model_kwargs: dict[str, Any]) -> Any:
    """The model of a folder or hub name, of the class that its ``config.architectures`` names.

    Where there is a PEFT adapter, it is a ``PeftModel`` around the adapter's base model.
    """
    adapter = find_adapter_config_file(name_or_path, **_file_arguments(model_kwargs))
    if adapter is not None:
        base = json.loads(Path(adapter).read_text()).get("base_model_name_or_path")
        if not base:
            raise ValueError(
                f"{name_or_path} holds a PEFT adapter whose adapter_config.json names no base model: load that model, "
                "then SpladeEncoder(peft.PeftModel.from_pretrained(model, folder))"
            )
        import peft

        of_adapter = _file_arguments(model_kwargs)
        of_base = {name: value for name, value in model_kwargs.items() if name not in _OF_THE_ADAPTER}
        return peft.PeftModel.from_pretrained(load_model(base, of_base), name_or_path, **of_adapter)
    config = model_kwargs.get("config")
    if config is None:
        trusted = {name: value for name, value in model_kwargs.items() if name == "trust_remote_code"}
        config = transformers.AutoConfig.from_pretrained(name_or_path, **_file_arguments(model_kwargs), **trusted)
    return _auto_class(config).from_pretrained(name_or_path, **model_kwargs)


def _hub_arguments(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: model_kwargs[name] for name in _HUB_ARGUMENTS if name in model_kwargs}


def _file_arguments(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where the model's own files are, as opposed to those of sentence-transformers."""
    subfolder = {name: model_kwargs[name] for name in ("subfolder",) if model_kwargs.get(name)}
    return _hub_arguments(model_kwargs) | subfolder


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


def saved_pooling(name_or_path: str, model_kwargs: dict[str, Any]) -> dict[str, str]:
    """The options that sentence-transformers wrote, or its defaults where no folder of its own is.

    With a ``subfolder``, its files may be there or, as ``0_Transformer`` once was, be the model's alone.

    Raises:
        ValueError: it wrote its folder with another pooling, in another place (a Router), or with further modules.
        OSError: whether there are such options cannot be seen, because the hub cannot be reached.
    """
    remedy = "pass pooling_strategy and activation_function"
    options = {**_file_arguments(model_kwargs), "_raise_exceptions_for_missing_entries": False}
    try:
        modules = cached_file(name_or_path, "modules.json", **options)
        if modules is None and options.pop("subfolder", None):
            modules = cached_file(name_or_path, "modules.json", **options)
        file = cached_file(name_or_path, POOLING_CONFIG, **options)
    except OSError as error:
        raise OSError(f"{name_or_path}: could not look for {POOLING_CONFIG}: {remedy}. {error}") from error
    listed = [] if modules is None else json.loads(Path(modules).read_text())
    kinds = [str(module["type"]) for module in listed]
    if others := [kind for kind in kinds if not kind.endswith(("Transformer", "SpladePooling", "Router"))]:
        raise ValueError(
            f"{name_or_path}: modules.json names {', '.join(others)}, which SpladeEncoder would leave out: {remedy} to "
            "have the embeddings before that"
        )
    saved = {"pooling_strategy": "max", "activation_function": "relu"}
    if file is not None:
        found = json.loads(Path(file).read_text())
        saved |= {name: found[name] for name in saved if name in found}
    elif modules is not None:
        raise ValueError(f"{name_or_path}: expected {POOLING_CONFIG} beside modules.json, found none: {remedy}")
    return saved


def find_tokenizer(name: str) -> Any:
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


def sentence_transformers_files(inner: Any, pooling_strategy: str, activation_function: str) -> dict[str, Any]:
    """What sentence-transformers 6 needs beside model and tokenizer, by file name."""
    # Of the classes it derives from, because FSDP2 and users give the class another name.
    masked = any(_is_masked(kind.__name__) for kind in type(inner).__mro__)
    transformer: dict[str, Any] = {
        "transformer_task": "fill-mask" if masked else "text-generation",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "token_embeddings",
    }
    if not masked:
        transformer["processing_kwargs"] = {"text": {"logits_to_keep": 0}}
    modules = (
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        (POOLING_FOLDER, "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling"),
    )
    return {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": kind} for index, (path, kind) in enumerate(modules)
        ],
        "config_sentence_transformers.json": {"model_type": "SparseEncoder"},
        "sentence_bert_config.json": transformer,
        POOLING_CONFIG: {"pooling_strategy": pooling_strategy, "activation_function": activation_function},
    }
