"""Encoding texts to sparse CSR batches with a sentence-transformers ``SparseEncoder``."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from sentence_transformers.sparse_encoder import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, Transformer
from torch import Tensor
from tqdm import tqdm

from .. import csr
from ..functional import check_count, sparsify

# Texts of one result, in batches.
BATCHES = 16
# Texts that are sorted together: so many that neighbours have nearly the same length, and few enough to be held.
WINDOW = 16_384
# A batch has at most so many times ``batch_size`` texts, however short they are: its embeddings are dense.
MOST = 4
# Texts that are tokenised together where their tokens are counted.
COUNTED = 256
# What ``encode`` keeps for itself; it hands all other arguments to ``preprocess``.
_OF_ENCODE = frozenset(inspect.signature(SparseEncoder.encode).parameters)
# The prompts that the model's methods look for when none is named.
PROMPTS = {None: (), "query": ("query",), "document": ("document", "passage", "corpus")}


def encode_sparse(
    model: SparseEncoder,
    texts: Sequence[str],
    *,
    task: str | None = None,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    max_active_dims: int | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Embeddings of ``texts``, in their order, as sparse CSR tensors of ``16 · batch_size`` texts each.

    ``model.encode_query``, ``encode_document`` or ``encode`` compute them, with their prompts and routes. Up to 16,384
    texts at a time are sorted by their numbers of tokens and cut into batches of equally many tokens, padding
    included, so that little of a batch is padding. Indices are int64 and ascend in each row. ``splade_kernels.csr``
    joins and searches the results.

    With a list of devices, one pool of processes serves the whole call: it starts when the first result is asked for
    and stops when the iterator is exhausted, closed, dropped or fails. A ``pool`` of your own is used as it is and
    keeps running. It gets 16 batches of the sorted texts at a time; without ``chunk_size``, a process gets about two
    pieces of those, in whole batches.

    Args:
        model: a ``SparseEncoder``, fused or not.
        texts: what to encode.
        task: ``"query"``, ``"document"``, or None for ``encode``.
        batch_size: texts of mean length that go through the model together; at most four times as many short ones.
        batch_tokens: tokens that go through the model together, padding included; a longer text goes alone. None:
            ``batch_size`` times the mean of the texts that are sorted together. It has no effect on what is not
            tokenised for a Transformer module (a static embedding, images), which goes in batches of ``batch_size``.
        max_active_dims: keep each embedding's largest entries, at most so many. None: the model's own setting. Ties go
            to the lowest vocabulary id, unless the model has a setting: its method then chooses first, by ``topk``.
        options: further arguments of the model's method (``prompt``, ``prompt_name``, ``device``, ``pool``, ...).
            ``show_progress_bar`` shows one bar over all texts.

    Yields:
        ``[up to 16 · batch_size, V]`` sparse CSR, on the device that the method returns, or on the CPU where PyTorch
        has no CSR tensors for it (MPS). Held at a time are the dense embeddings of one batch, with a pool those of 16,
        and twice the CSR embeddings of the texts that are sorted together.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """
    methods = {None: model.encode, "query": model.encode_query, "document": model.encode_document}
    if task not in tuple(methods):
        raise ValueError(f"task: expected 'query', 'document' or None, got {task!r}")
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected a sequence of texts, got {type(texts).__name__}")
    for name in ("convert_to_tensor", "convert_to_sparse_tensor"):
        if name in options:
            raise TypeError(f"{name}: expected it left out, since the result is always sparse CSR")
    batch_size = check_count("batch_size", batch_size, 1)
    if batch_tokens is not None:
        batch_tokens = check_count("batch_tokens", batch_tokens, 1, "an int or None")
    if max_active_dims is not None:
        max_active_dims = check_count("max_active_dims", max_active_dims, 1, "an int or None")
    limit = model.max_active_dims if max_active_dims is None else max_active_dims
    shown = options.pop("show_progress_bar", None)
    if shown is None:  # as in the model's methods
        shown = logging.getLogger(SparseEncoder.__module__).getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    options |= {
        "show_progress_bar": False,
        "convert_to_tensor": True,
        "convert_to_sparse_tensor": False,
        # Where the model has a setting, its method would apply that one, even where more was asked for.
        "max_active_dims": None if model.max_active_dims is None else limit,
    }

    def method(batch: list[str], **call: Any) -> Tensor:
        return sparsify(methods[task](batch, **(options | call)), max_active_dims=limit)

    return _results(model, method, task, list(texts), batch_size, batch_tokens, options, shown)


def _results(
    model: SparseEncoder, method: Callable[..., Tensor], task: str | None, texts: list[str], batch_size: int,
    batch_tokens: int | None, options: dict[str, Any], shown: bool,
) -> Iterator[Tensor]:  # fmt: skip
    devices, own_pool = options.get("device"), None
    # The method itself would start a pool for a list of devices at each call, which is once for each batch.
    if texts and options.get("pool") is None and isinstance(devices, list) and devices:
        own_pool = options["pool"] = model.start_multi_process_pool(devices)
    pool = options.get("pool")
    rows = BATCHES * batch_size
    window = rows * max(1, WINDOW // rows)
    bar = tqdm(total=len(texts), desc="Texts", disable=not shown)

    def embeddings(part: list[str], order: list[int], sizes: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        first = 0
        for count, size in sizes:
            call = {"batch_size": size}
            if pool is not None and options.get("chunk_size") is None:
                # The method's default, a tenth of a process's share, would split batches.
                call["chunk_size"] = size * math.ceil(count / (size * 2 * len(pool["processes"])))
            yield method([part[index] for index in order[first : first + count]], **call)
            first += count
            bar.update(count)

    try:
        for start in range(0, len(texts), window):
            part = texts[start : start + window]
            tokens = _count_tokens(model, part, task, options)
            lengths = tokens or [model._input_length(text) for text in part]
            # Longest first, so that what does not fit in memory shows at once.
            order = sorted(range(len(part)), key=lengths.__getitem__, reverse=True)
            ordered = [tokens[index] for index in order] if tokens else [1] * len(part)
            sizes = _sizes(ordered, batch_size, batch_tokens if tokens else None, pool is not None)
            joined = csr.join(embeddings(part, order, sizes))
            places = torch.tensor(order, device=joined.device).argsort()
            for first in range(0, len(part), rows):
                yield csr.take(joined, places[first : first + rows])
            del joined  # before the next window is computed
    finally:
        bar.close()
        if own_pool is not None:
            model.stop_multi_process_pool(own_pool)


def _sizes(lengths: list[int], batch_size: int, batch_tokens: int | None, pooled: bool) -> Iterator[tuple[int, int]]:
    """``(texts, batch size)`` of each call for texts of these lengths, which descend: a call is one batch, of a pool
    up to 16, and a batch has at most ``batch_tokens``, padding included."""
    if batch_tokens is None:
        batch_tokens = batch_size * sum(lengths) // len(lengths)
    first = 0
    while first < len(lengths):
        size = max(1, min(MOST * batch_size, batch_tokens // lengths[first]))
        count = min(BATCHES * min(size, batch_size) if pooled else size, len(lengths) - first)
        yield count, min(size, count)
        first += count


def _count_tokens(
    model: SparseEncoder, texts: list[str], task: str | None, options: dict[str, Any]
) -> list[int] | None:
    """Tokens of each text as the model's ``preprocess`` makes them, with prompt and truncation; None where they are no
    texts or not tokenised for a Transformer module."""
    module: Any = model[0]
    if isinstance(module, Router):
        routes: Any = module.sub_modules
        route = task or module.default_route
        module = routes[route][0] if route in routes else None
    # Where a mapping chooses the route, what ``preprocess`` returns decides.
    tokenised = module is None or isinstance(module, Transformer)
    if not tokenised or not all(isinstance(text, str) for text in texts):
        return None
    names = PROMPTS[task] if options.get("prompt_name") is None else (options["prompt_name"],)
    prompts = [model.prompts[name] for name in (*names, model.default_prompt_name) if name in model.prompts]
    prompt = next(iter(prompts), None) if options.get("prompt") is None else options["prompt"]
    more = {name: value for name, value in options.items() if name not in _OF_ENCODE}
    if task is not None:
        more["task"] = task
    order = sorted(range(len(texts)), key=lambda index: model._input_length(texts[index]))
    counts = [0] * len(texts)
    for first in range(0, len(texts), COUNTED):
        chosen = order[first : first + COUNTED]
        features = model.preprocess([texts[index] for index in chosen], prompt=prompt, **more)
        found = token_counts(features)
        if found is None:
            return None
        for index, count in zip(chosen, found.clamp(min=1).tolist(), strict=True):
            counts[index] = count
    return counts


def token_counts(features: dict[str, Any]) -> Tensor | None:
    """Tokens of each text of what ``preprocess`` returns, ``[B]``; None where it is not tokenised for a Transformer."""
    if "cu_seq_lens_q" in features:
        return features["cu_seq_lens_q"].diff()  # type: ignore[no-any-return]
    if "attention_mask" in features:
        return features["attention_mask"].sum(dim=1)  # type: ignore[no-any-return]
    return None
