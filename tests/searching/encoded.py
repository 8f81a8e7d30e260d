"""Encoded corpora made by hand: a folder as ``splade-kernels encode`` writes it, from any sparse rows."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.sparse import csr_array
from torch import Tensor

from splade_kernels.encoding.output import FORMAT_VERSION, MANIFEST, SCHEMA, Output, open_output, part_name


def random_rows(count: int, size: int, share: float, seed: int, *, levels: int = 0) -> Any:
    """``[count, size]`` dense float32; whole numbers up to ``levels`` if given, so that many scores are equal."""
    generator = np.random.default_rng(seed)
    values = generator.integers(1, levels + 1, (count, size)) if levels else generator.random((count, size)) + 0.01
    return np.where(generator.random((count, size)) < share, values, 0).astype(np.float32)


def to_csr(dense: Any) -> Tensor:
    stored = csr_array(dense)
    arrays = (torch.from_numpy(array.astype(np.int64)) for array in (stored.indptr, stored.indices))
    return torch.sparse_csr_tensor(*arrays, torch.from_numpy(stored.data), stored.shape, check_invariants=True)


def write_output(
    folder: Path, ids: Sequence[str], dense: Any, rows_per_part: int = 7, manifest: dict[str, Any] | None = None
) -> Output:
    """A complete output with the non-zeros of ``[N, V]``, a dense or a SciPy array."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = csr_array(dense)
    places = [slice(first, last) for first, last in itertools.pairwise(stored.indptr)]
    rows, values = [stored.indices[place] for place in places], [stored.data[place] for place in places]
    parts = []
    for first in range(0, len(ids), rows_per_part):
        part = slice(first, first + rows_per_part)
        path = folder / part_name(len(parts))
        pq.write_table(pa.table([list(ids[part]), rows[part], values[part]], schema=SCHEMA), path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        parts.append({"file": path.name, "rows": len(ids[part]), "sha256": digest})
    content = {
        "format_version": FORMAT_VERSION,
        "vocabulary_size": dense.shape[1],
        "parts": parts,
        "rows": len(ids),
        "empty": sum(not len(row) for row in rows),
        "complete": True,
        "model": {"name": "/no/model", "revision": None, "sha256": "0" * 64},
        "tokenizer_sha256": "0" * 64,
        **(manifest or {}),
    }
    (folder / MANIFEST).write_text(json.dumps(content))
    return open_output(folder)
