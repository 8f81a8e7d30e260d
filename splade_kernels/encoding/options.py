"""What decides how a text becomes a vector, as it is asked for, and what of it is wrong by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")
SCREENING: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}


@dataclass(frozen=True)
class EncoderOptions:
    """What decides how a text becomes a vector, as the command line takes it.

    Args:
        model: folder of a ``SparseEncoder`` (or of this package's ``SpladeEncoder``), or its name on the hub.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: run code that the model's repository brings.
        query: encode as queries (``encode_query``: their prompt and route), not as documents (``encode_document``).
        prompt_name: a prompt of the model in place of the task's own.
        max_length: tokens of a text, special ones and prompt included, at most the model's own maximum. None: that.
        batch_tokens: tokens that go through the model together, padding included.
        max_active_dims: keep the largest weights of each text, so many; ties go to the lowest id. None: the model's
            own setting.
        min_weight: drop smaller weights. None: keep all.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is bfloat16 on CUDA from sm_80 on, else float32.
        device: ``cpu``, ``cuda`` or ``cuda:i``; ``auto`` is the current CUDA device, else the CPU.
        screening: ``auto``, ``on`` or ``off``, see :func:`splade_kernels.splade_pool`.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    query: bool = False
    prompt_name: str | None = None
    max_length: int | None = None
    batch_tokens: int = 8192
    max_active_dims: int | None = None
    min_weight: float | None = None
    dtype: str = "auto"
    device: str = "auto"
    screening: str = "auto"


def check_options(options: EncoderOptions) -> None:
    """Raises UsageError where an option is wrong whatever the model and the machine."""
    for name in ("max_length", "batch_tokens", "max_active_dims"):
        value = getattr(options, name)
        optional = " or None" * (name != "batch_tokens")
        if not (value is None and optional) and (type(value) is not int or value < 1):
            raise UsageError(f"{name}: expected an int of at least 1{optional}, got {value!r}")
    weight = options.min_weight
    if weight is not None and not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
        raise UsageError(f"min_weight: expected a finite number of at least 0 or None, got {weight!r}")
    for name, allowed in (("dtype", ("auto", *DTYPES)), ("screening", tuple(SCREENING))):
        if getattr(options, name) not in allowed:
            raise UsageError(f"{name}: expected {', '.join(allowed)}, got {getattr(options, name)!r}")
