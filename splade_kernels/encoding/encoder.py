"""Texts in, sparse vectors out: one model with the options of a run, resolved and checked once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import DataError
from .loading import NO_LIMIT, first_module, limit_length, load, one_line, prompt_of, resolve_device, resolve_dtype
from .options import EncoderOptions, check_options

if TYPE_CHECKING:
    import pyarrow as pa

# Dense at a time are the embeddings of one batch: at most so many float32 numbers, 64 MiB, and so many texts.
MOST_NUMBERS = 1 << 24
MOST_TEXTS = 512
# Texts that are tokenised together to see how many lost tokens.
COUNTED = 64


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
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype, self.device)
        self.model = load(options, self.device, self.dtype)
        self.prompt = prompt_of(self.model, options.prompt_name, self.task)
        module = first_module(self.model, self.task)
        self.tokenizer: Any = module.tokenizer
        self.max_length = limit_length(module, self.task, options.max_length)
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
            raise DataError(f"{self.options.model}: cannot encode a text: {one_line(error)}") from error
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
        module, lost = first_module(self.model, self.task), set()
        whole: Any = {"prompt": self.prompt, "task": self.task, "processing_kwargs": {"text": {"truncation": False}}}
        ordered = sorted(texts, key=len)  # so that little of it is padding
        with _without_limit(module.tokenizer):
            for first in range(0, len(ordered), COUNTED):
                some = ordered[first : first + COUNTED]
                counts = _token_counts(module.preprocess(some, **whole))
                lost |= {text for text, count in zip(some, counts, strict=True) if count > self.max_length}
        return lost


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
    tokenizer.model_max_length = NO_LIMIT
    try:
        yield
    finally:
        tokenizer.model_max_length = limit
