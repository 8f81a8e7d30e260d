"""Encoded corpora as ``splade-kernels encode`` leaves them, made from numbers instead of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse

from splade_kernels.encoding.output import FORMAT_VERSION, MANIFEST, SCHEMA, part_name

VOCABULARY = 300


@dataclass(frozen=True)
class Encoded:
    """A folder, and what it holds: ``ids`` and ``matrix`` [n, V], float32."""

    folder: Path
    ids: list[str]
    matrix: scipy.sparse.csr_matrix

    def query(self, seed: int = 0) -> np.ndarray:
        """A query of a dozen terms, [V], float32."""
        rng = np.random.default_rng(seed)
        found = np.zeros(self.matrix.shape[1], np.float32)
        found[rng.choice(len(found), 12, replace=False)] = rng.uniform(0.1, 2, 12)
        return found

    def top(self, query: np.ndarray, k: int = 10, matrix: Any = None) -> list[tuple[str, float]]:
        """The first ``k`` by score descending, computed in float64."""
        scores = (self.matrix if matrix is None else matrix).astype(np.float64) @ query.astype(np.float64)
        order = sorted(range(len(self.ids)), key=lambda row: (-scores[row], self.ids[row]))[:k]
        return [(self.ids[row], float(scores[row])) for row in order]


def write_output(
    folder: Path,
    rows: Sequence[dict[int, float]],
    ids: Sequence[str] | None = None,
    *,
    vocabulary: int = VOCABULARY,
    rows_per_part: int = 400,
    model: str = "/no/model",
    tokenizer_sha256: str = "0" * 64,
    **manifest: Any,
) -> Encoded:
    """``rows`` are weights by id; they are written in parts, with a manifest."""
    folder.mkdir(parents=True)
    ids = [f"d{row}" for row in range(len(rows))] if ids is None else list(ids)
    parts = []
    for number, first in enumerate(range(0, len(rows), rows_per_part)):
        some = slice(first, first + rows_per_part)
        columns = [
            ids[some],
            [sorted(row) for row in rows[some]],
            [[row[i] for i in sorted(row)] for row in rows[some]],
        ]
        path = folder / part_name(number)
        pq.write_table(pa.table(columns, schema=SCHEMA), path)
        hashed = hashlib.sha256(path.read_bytes()).hexdigest()
        parts.append({"file": path.name, "rows": len(columns[0]), "sha256": hashed})
    written = {
        "format_version": FORMAT_VERSION,
        "model": {"name": model, "revision": None, "sha256": "0" * 64},
        "tokenizer_sha256": tokenizer_sha256,
        "vocabulary_size": vocabulary,
        "options": {"query": False},
        "resolved": {},
        "versions": {},
        "parts": parts,
        "rows": len(rows),
        "empty": sum(not row for row in rows),
        "skipped": 0,
        "truncated": 0,
        "complete": True,
        **manifest,
    }
    (folder / MANIFEST).write_text(json.dumps(written))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    indices = np.array([index for row in rows for index in sorted(row)], np.int64)
    values = np.array([row[index] for row in rows for index in sorted(row)], np.float32)
    return Encoded(folder, ids, scipy.sparse.csr_matrix((values, indices, indptr), (len(rows), vocabulary)))


def random_rows(count: int, vocabulary: int = VOCABULARY, seed: int = 0, terms: int = 30) -> list[dict[int, float]]:
    """Rows of up to ``terms`` terms, weights log(1 + x) up to about 3, each row with another number of terms."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        chosen = rng.choice(vocabulary, int(rng.integers(1, terms + 1)), replace=False)
        weights = np.log1p(rng.exponential(1.5, len(chosen)) + 0.05).astype(np.float32)
        found.append(dict(zip(chosen.tolist(), weights.tolist(), strict=True)))
    return found
