"""SciFact with weights that no model has computed: ``log(1 + tf) · idf`` over BERT's vocabulary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.sparse import csr_array

from bench.inputs.text_model import DATA


class Weighted(NamedTuple):
    document_ids: list[str]
    documents: Any  # [N, V] SciPy CSR, float32
    query_ids: list[str]
    queries: Any  # [Q, V]


def weighted(documents: int | None = None, queries: int | None = None) -> Weighted:
    """All of it, or its first documents and queries."""
    folder = DATA / "scifact"
    if not (folder / "corpus.jsonl").is_file():
        pytest.skip(f"{folder} is not there")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizerFast(vocab=str(DATA / "vocab.txt"), do_lower_case=True)
    wanted = {"corpus": documents, "queries": queries}
    read = [
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()[:count]]
        for name, count in wanted.items()
    ]
    texts = [[f"{row.get('title', '')} {row['text']}" for row in rows] for rows in read]
    counts = [_counts(tokenizer, part) for part in texts]
    seen = np.bincount(counts[0].indices, minlength=len(tokenizer))
    idf = np.log1p(len(texts[0]) / (1 + seen)).astype(np.float32)
    for part in counts:
        part.data = np.log1p(part.data) * idf[part.indices]
    return Weighted([row["_id"] for row in read[0]], counts[0], [row["_id"] for row in read[1]], counts[1])


def _counts(tokenizer: Any, texts: Sequence[str]) -> Any:
    rows = [sorted(Counter(ids).items()) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    offsets = np.cumsum([0, *map(len, rows)])
    indices = np.array([index for row in rows for index, _ in row], np.int32)
    values = np.array([count for row in rows for _, count in row], np.float32)
    return csr_array((values, indices, offsets), shape=(len(texts), len(tokenizer)))
