"""A model loaded, checked and fused, and what the options come to for it and for this machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from .errors import DataError, UsageError
from .options import SCREENING, EncoderOptions

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

# A tokenizer without a limit of its own says 10³⁰.
NO_LIMIT = 10**9
_ERROR_LENGTH = 400


def resolve_device(name: str) -> str:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    found = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if found is None:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:i, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(found[1]) if found[1] else (torch.cuda.current_device() if count else 0)
    if index >= count:
        raise UsageError(f"device: expected one of the {count} CUDA devices of this machine or cpu, got {name!r}")
    return f"cuda:{index}"


def resolve_dtype(name: str, device: str) -> str:
    if name != "auto":
        return name
    return "bfloat16" if device != "cpu" and torch.cuda.get_device_capability(device) >= (8, 0) else "float32"


def load(options: EncoderOptions, device: str, dtype: str) -> SparseEncoder:
    try:
        from sentence_transformers import SparseEncoder

        from ..integrations.sentence_transformers import fuse
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "splade_kernels":
            raise
        raise DataError(f"encoding needs {error.name}: pip install 'splade-kernels[cli]'") from error
    try:
        model = SparseEncoder(
            options.model,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            model_kwargs={"dtype": getattr(torch, dtype)},
            device=device,
        )
    except Exception as error:  # of any kind: files, the hub's client, the model's own code
        raise DataError(f"{options.model}: cannot be loaded as a SparseEncoder: {one_line(error)}") from error
    _check_no_weight_is_missing(options.model, model)
    try:
        fuse(model, screening=SCREENING[options.screening])
    except (TypeError, ValueError) as error:
        raise DataError(f"{options.model}: {one_line(error)}") from error
    return model.eval()


def _check_no_weight_is_missing(name: str, model: SparseEncoder) -> None:
    """transformers fills weights that a checkpoint lacks, an encoder's missing head for example, with random numbers.

    It marks the parameters that it has read. Adapters are read by PEFT, which marks none.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or getattr(module, "_hf_peft_config_loaded", False):
            continue
        read = {key: getattr(weight, "_is_hf_initialized", False) for key, weight in module.named_parameters()}
        missing = [key for key, was_read in read.items() if not was_read]
        if missing and len(missing) < len(read):
            raise DataError(
                f"{name}: the checkpoint lacks {len(missing)} weights of {type(module).__name__}, which would be "
                f"random: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
            )


def prompt_of(model: SparseEncoder, name: str | None, task: str) -> str | None:
    """What the model's method puts in front of a text: of the name, of the task, or of the model."""
    if name is not None and name not in model.prompts:
        known = ", ".join(map(repr, model.prompts)) or "none, since the model has no prompts"
        raise UsageError(f"prompt_name: expected one of {known}, got {name!r}")
    from ..integrations._encode import PROMPTS

    names = PROMPTS[task] if name is None else (name,)
    prompts = [model.prompts[name] for name in (*names, model.default_prompt_name) if name in model.prompts]
    return next(iter(prompts), None) or None


def first_module(model: SparseEncoder, task: str) -> Any:
    """What tokenises: the first module, or that of the task's route."""
    module: Any = model[0]
    if hasattr(module, "sub_modules"):
        route = module._resolve_route(task=task, modality="text")
        module = module.sub_modules[route][0]
    return module


def limit_length(module: Any, task: str, wanted: int | None) -> int | None:
    """Have ``module`` cut texts to ``wanted`` tokens; returns to how many it cuts them."""
    in_call = (getattr(module, "processing_kwargs", None) or {}).get("text", {})
    of_task = getattr(module, f"{task}_length", None)
    own = in_call.get("max_length") or of_task or getattr(module, "max_seq_length", None)
    own = None if own is None or own > NO_LIMIT else int(own)
    if wanted is None:
        return own
    special = getattr(module.tokenizer, "num_special_tokens_to_add", lambda: 0)()
    if wanted <= special or (own is not None and wanted > own):
        most = "" if own is None else f" and at most {own}, the model's own maximum"
        raise UsageError(f"max_length: expected more than the {special} special tokens{most}, got {wanted}")
    if not hasattr(module.tokenizer, "model_max_length"):
        raise UsageError(f"max_length: expected none, since {type(module).__name__} does not cut texts, got {wanted}")
    module.tokenizer.model_max_length = wanted
    if of_task is not None:
        setattr(module, f"{task}_length", wanted)
    if "max_length" in in_call:
        in_call["max_length"] = wanted
    return wanted


def one_line(error: Exception) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= _ERROR_LENGTH else f"{line[:_ERROR_LENGTH]}…"
