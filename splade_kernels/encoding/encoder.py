"""Texts in, sparse vectors out: one model with the options of a run, resolved and checked once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from sentence_transformers import SparseEncoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCREENING: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}
# Dense at a time are the embeddings of one batch: at most so many float32 numbers, 64 MiB, and so many texts.
MOST_NUMBERS = 1 << 24
MOST_TEXTS = 512
# Texts that are tokenised together to see how many lost tokens.
COUNTED = 64
_ERROR_LENGTH = 400
# A tokenizer without a limit of its own says 10³⁰.
_NO_LIMIT = 10**9


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


class WeightError(DataError):
    """A weight that is no finite number; ``row`` is the place of its text in the call."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(row, reason)  # as pickle wants it
        self.row = row
        self.reason = reason

    def __str__(self) -> str:
        return f"text {self.row}: {self.reason}"


@dataclass
class Encoded:
    """Sparse vectors of ``n`` texts: those of text ``i`` are ``indices`` and ``values`` from ``offsets[i]`` on.

    Args:
        offsets: ``[n + 1]``, int64, ascending from 0.
        indices: vocabulary ids, int32, ascending in each text.
        values: their weights, float32, finite.
        truncated: texts that lost tokens to the maximum length.
        empty: blank texts, which have no terms.
    """

    offsets: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    truncated: int
    empty: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def to_arrow(self, ids: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.Table:
        """A table of :data:`.output.SCHEMA`, with a row for each text."""
        import pyarrow as pa

        from .output import SCHEMA

        offsets = pa.array(self.offsets, pa.int32())  # refuses what int32 cannot hold
        columns = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in (self.indices, self.values)]
        return pa.table([ids, *columns], schema=SCHEMA)


class TextEncoder:
    """A SPLADE model with the fused head, and how texts go through it.

    ``encoder(texts)`` computes what ``SparseEncoder.encode_document`` or ``encode_query`` compute, in float32 on the
    host, pruned by ``min_weight`` and ``max_active_dims``. Blank texts (empty, or whitespace only) have no terms and
    are not run through the model. Texts of one call are batched together and no others: with the same texts, machine
    and threads, a call returns the same bits.

    Attributes:
        options: as they were given.
        model: the fused ``SparseEncoder`` in evaluation mode. Its own ``max_active_dims`` has been moved here.
        task: ``"document"`` or ``"query"``.
        prompt: what is put in front of each text, or None.
        max_length: tokens of a text at most; None where neither the model nor the options have a limit.
        dtype, device: as resolved, ``"bfloat16"`` and ``"cuda:0"`` for example.
        max_active_dims: as resolved; None keeps all terms.
        vocabulary_size: width of the vectors.
        tokenizer: of the route that texts take.

    Raises:
        UsageError: an option is wrong by itself, or for this model or machine.
        DataError: the model cannot be loaded, is no SPLADE model, or cannot be fused.
    """

    def __init__(self, options: EncoderOptions) -> None:
        check_options(options)
        self.options = options
        self.task = "query" if options.query else "document"
        self.device = _device(options.device)
        self.dtype = _dtype(options.dtype, self.device)
        self.model = _load(options, self.device, DTYPES[self.dtype])
        self.prompt = _prompt(self.model, options.prompt_name, self.task)
        module = _first_module(self.model, self.task)
        self.tokenizer: Any = module.tokenizer
        self.max_length = _limit_length(module, self.task, options.max_length)
        limit = self.model.max_active_dims if options.max_active_dims is None else options.max_active_dims
        self.max_active_dims = limit
        # Its method would choose first, with ties in any order.
        self.model.max_active_dims = None
        self.vocabulary_size = self._width()

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Encode texts; row ``i`` of the result is ``texts[i]``.

        Raises:
            TypeError: one is no ``str``.
            WeightError: a weight is NaN or infinite.
        """
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts: expected str, got {type(text).__name__} at {row}")
        real = [row for row, text in enumerate(texts) if text.strip()]
        chosen = [texts[row] for row in real]
        with self._texts_at_the_limit() as found:
            parts = [_to_numpy(part) for part in self._encode_sparse(chosen)] if chosen else []
        counts = np.zeros(len(texts), np.int64)
        counts[real] = np.concatenate([counts for counts, _, _ in parts]) if parts else []
        indices = np.concatenate([indices for _, indices, _ in parts]) if parts else np.empty(0, np.int32)
        values = np.concatenate([values for _, _, values in parts]) if parts else np.empty(0, np.float32)
        rows = np.repeat(np.arange(len(texts)), counts)
        _check_finite(rows, indices, values)
        if self.options.min_weight is not None:
            kept = values >= self.options.min_weight
            indices, values = indices[kept], values[kept]
            counts = np.bincount(rows[kept], minlength=len(texts))
        truncated = self._that_lost_tokens(found)
        return Encoded(
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            indices=indices,
            values=values,
            truncated=sum(text in truncated for text in chosen),
            empty=len(texts) - len(real),
        )

    def _encode_sparse(self, texts: list[str], batch_size: int | None = None) -> Iterator[torch.Tensor]:
        from ..integrations.sentence_transformers import encode_sparse

        if batch_size is None:
            # encode_sparse goes up to four times as many texts where they are short.
            batch_size = max(1, min(MOST_TEXTS, MOST_NUMBERS // self.vocabulary_size) // 4)
        # The K largest of those that are at least w are those at least w of the K largest.
        return encode_sparse(
            self.model,
            texts,
            task=self.task,
            batch_size=batch_size,
            batch_tokens=self.options.batch_tokens,
            max_active_dims=self.max_active_dims,
            prompt_name=self.options.prompt_name,
            show_progress_bar=False,
        )

    def _width(self) -> int:
        try:
            (batch,) = self._encode_sparse(["."], batch_size=1)
        except Exception as error:
            raise DataError(f"{self.options.model}: cannot encode a text: {_one_line(error)}") from error
        return int(batch.shape[1])

    @contextmanager
    def _texts_at_the_limit(self) -> Iterator[set[str]]:
        """Collects the texts that are tokenised to ``max_length`` tokens, as the model's ``preprocess`` sees them."""
        found: set[str] = set()
        if self.max_length is None:
            yield found
            return
        preprocess, limit = self.model.preprocess, self.max_length

        def watched(inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            features = preprocess(inputs, *args, **kwargs)
            found.update(text for text, count in zip(inputs, _token_counts(features), strict=True) if count >= limit)
            return features

        vars(self.model)["preprocess"] = watched
        try:
            yield found
        finally:
            del vars(self.model)["preprocess"]

    def _that_lost_tokens(self, texts: set[str]) -> set[str]:
        """Those of more than ``max_length`` tokens, by tokenising them whole."""
        if self.max_length is None or not texts:
            return set()
        module, lost = _first_module(self.model, self.task), set()
        whole: Any = {"prompt": self.prompt, "task": self.task, "processing_kwargs": {"text": {"truncation": False}}}
        ordered = sorted(texts, key=len)  # so that little of it is padding
        with _without_limit(module.tokenizer):
            for first in range(0, len(ordered), COUNTED):
                some = ordered[first : first + COUNTED]
                counts = _token_counts(module.preprocess(some, **whole))
                lost |= {text for text, count in zip(some, counts, strict=True) if count > self.max_length}
        return lost


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


def _device(name: str) -> str:
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


def _dtype(name: str, device: str) -> str:
    if name != "auto":
        return name
    return "bfloat16" if device != "cpu" and torch.cuda.get_device_capability(device) >= (8, 0) else "float32"


def _load(options: EncoderOptions, device: str, dtype: torch.dtype) -> SparseEncoder:
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
            model_kwargs={"dtype": dtype},
            device=device,
        )
    except Exception as error:  # of any kind: files, the hub's client, the model's own code
        raise DataError(f"{options.model}: cannot be loaded as a SparseEncoder: {_one_line(error)}") from error
    try:
        fuse(model, screening=SCREENING[options.screening])
    except (TypeError, ValueError) as error:
        raise DataError(f"{options.model}: {_one_line(error)}") from error
    return model.eval()


def _prompt(model: SparseEncoder, name: str | None, task: str) -> str | None:
    """What the model's method puts in front of a text: of the name, of the task, or of the model."""
    if name is not None and name not in model.prompts:
        known = ", ".join(map(repr, model.prompts)) or "none, since the model has no prompts"
        raise UsageError(f"prompt_name: expected one of {known}, got {name!r}")
    from ..integrations._encode import PROMPTS

    names = PROMPTS[task] if name is None else (name,)
    prompts = [model.prompts[name] for name in (*names, model.default_prompt_name) if name in model.prompts]
    return next(iter(prompts), None) or None


def _first_module(model: SparseEncoder, task: str) -> Any:
    """What tokenises: the first module, or that of the task's route."""
    module: Any = model[0]
    if hasattr(module, "sub_modules"):
        route = module._resolve_route(task=task, modality="text")
        module = module.sub_modules[route][0]
    return module


def _limit_length(module: Any, task: str, wanted: int | None) -> int | None:
    """Have ``module`` cut texts to ``wanted`` tokens; returns to how many it cuts them."""
    in_call = (getattr(module, "processing_kwargs", None) or {}).get("text", {})
    of_task = getattr(module, f"{task}_length", None)
    own = in_call.get("max_length") or of_task or getattr(module, "max_seq_length", None)
    own = None if own is None or own > _NO_LIMIT else int(own)
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


def _token_counts(features: dict[str, Any]) -> list[int]:
    from ..integrations._encode import token_counts

    counts = token_counts(features)
    return [] if counts is None else counts.tolist()


def _to_numpy(batch: torch.Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Terms of each row, their ids and their weights."""
    counts = batch.crow_indices().diff().cpu().numpy()
    indices = batch.col_indices().to("cpu", torch.int32).numpy()
    return counts, indices, batch.values().to("cpu", torch.float32).numpy()


def _check_finite(rows: npt.NDArray[np.int64], indices: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> None:
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        first = wrong[0]
        raise WeightError(
            int(rows[first]),
            f"expected finite weights, got {values[first]} for vocabulary id {indices[first]}",
        )


@contextmanager
def _without_limit(tokenizer: Any) -> Iterator[None]:
    """Some modules cut to the tokenizer's limit whatever their call says; beyond it, tokenizers warn."""
    limit = tokenizer.model_max_length
    tokenizer.model_max_length = _NO_LIMIT
    try:
        yield
    finally:
        tokenizer.model_max_length = limit


def _one_line(error: Exception) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= _ERROR_LENGTH else f"{line[:_ERROR_LENGTH]}…"
