"""Encoding texts to sparse CSR batches with a sentence-transformers ``SparseEncoder``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sentence_transformers.sparse_encoder import SparseEncoder
from torch import Tensor

from ..functional import check_count, sparsify

# Texts of one result, in batches: so many are sorted by length together.
BATCHES = 16


def encode_sparse(
    model: SparseEncoder,
    texts: Sequence[str],
    *,
    task: str | None = None,
    batch_size: int = 32,
    max_active_dims: int | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Embeddings of ``texts``, in their order, as sparse CSR tensors of ``16 · batch_size`` texts each.

    ``model.encode_query``, ``encode_document`` or ``encode`` compute them, with their prompts, routes and batches,
    sorted by length within a result. Indices are int64 and ascend in each row. ``splade_kernels.csr`` joins and
    searches the results.

    With a list of devices, one pool of processes serves the whole call: it starts when the first result is asked for
    and stops when the iterator is exhausted, closed, dropped or fails. A ``pool`` of your own is used as it is and
    keeps running. Without ``chunk_size``, a process gets about two pieces of each result, in whole batches.

    Args:
        model: a ``SparseEncoder``, fused or not.
        texts: what to encode.
        task: ``"query"``, ``"document"``, or None for ``encode``.
        batch_size: texts that go through the model together.
        max_active_dims: keep each embedding's largest entries, at most so many. None: the model's own setting. Ties go
            to the lowest vocabulary id, unless the model has a setting: its method then chooses first, by ``topk``.
        options: further arguments of the model's method (``prompt``, ``prompt_name``, ``device``, ``pool``, ...).

    Yields:
        ``[up to 16 · batch_size, V]`` sparse CSR, on the device that the method returns, or on the CPU where PyTorch
        has no CSR tensors for it (MPS). The dense embeddings of one result are held at a time.

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
    if max_active_dims is not None:
        max_active_dims = check_count("max_active_dims", max_active_dims, 1, "an int or None")
    limit = model.max_active_dims if max_active_dims is None else max_active_dims
    options |= {
        "batch_size": batch_size,
        "convert_to_tensor": True,
        "convert_to_sparse_tensor": False,
        # Where the model has a setting, its method would apply that one, even where more was asked for.
        "max_active_dims": None if model.max_active_dims is None else limit,
    }
    return _batches(model, methods[task], list(texts), limit, options)


def _batches(
    model: SparseEncoder, method: Any, texts: list[str], limit: int | None, options: dict[str, Any]
) -> Iterator[Tensor]:
    batch_size, devices, own_pool = options["batch_size"], options.get("device"), None
    # The method itself would start a pool for a list of devices at each call, which is once for each result.
    if texts and options.get("pool") is None and isinstance(devices, list) and devices:
        own_pool = options["pool"] = model.start_multi_process_pool(devices)
    chunked = options.get("pool") is not None and options.get("chunk_size") is None
    try:
        for first in range(0, len(texts), BATCHES * batch_size):
            part = texts[first : first + BATCHES * batch_size]
            if chunked:  # the method's default, a tenth of a process's share, would split batches
                pieces = 2 * len(options["pool"]["processes"])
                options["chunk_size"] = batch_size * math.ceil(len(part) / (batch_size * pieces))
            yield sparsify(method(part, **options), max_active_dims=limit)
    finally:
        if own_pool is not None:
            model.stop_multi_process_pool(own_pool)
