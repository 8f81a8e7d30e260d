"""The corpus that the tests of examples/encode_ray.py and encode_spark.py encode, and the vectors that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from splade_kernels.encoding.encoder import TextEncoder
from splade_kernels.encoding.options import EncoderOptions
from splade_kernels.encoding.output import SCHEMA
from tests.st_models import TEXTS, sparse_encoder

ROWS = 200
LIMIT = 40


def rows() -> list[dict[str, Any]]:
    """Texts of one to three sentences, some with a title, some blank."""
    titles = ["", *TEXTS]
    return [
        {
            "_id": f"d{row}",
            "title": titles[row % 7],
            "text": " ".join(TEXTS[(row * 5 + place) % len(TEXTS)] for place in range(row % 4)),
        }
        for row in range(ROWS)
    ]


def write(folder: Path) -> tuple[str, str]:
    """A model and the corpus, in ``folder``."""
    sparse_encoder().save_pretrained(str(folder / "model"), create_model_card=False)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return str(folder / "model"), str(folder / "corpus.jsonl")


def check(found: pa.Table, model: str) -> None:
    """Every row once, with what TextEncoder computes for its text; other batches round otherwise."""
    assert found.schema.remove_metadata().names == SCHEMA.names
    assert sorted(found["id"].to_pylist()) == sorted(row["_id"] for row in rows())
    encoder = TextEncoder(EncoderOptions(model, max_active_dims=LIMIT))
    expected = encoder([f"{row['title']} {row['text']}" if row["title"] else row["text"] for row in rows()])
    assert expected.empty == sum(not row["title"] and not row["text"] for row in rows()) > 0
    want = _dense(expected.to_arrow([row["_id"] for row in rows()]), encoder.vocabulary_size)
    got = _dense(found, encoder.vocabulary_size)
    assert (np.count_nonzero(want, axis=1) == LIMIT).any()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)


def _dense(table: pa.Table, width: int) -> np.ndarray:
    """``[ROWS, width]`` in the order of the ids."""
    table = table.sort_by("id")
    out = np.zeros((table.num_rows, width), np.float32)
    for row, (ids, weights) in enumerate(zip(table["indices"].to_pylist(), table["values"].to_pylist(), strict=True)):
        assert ids == sorted(set(ids)) and len(ids) == len(weights)
        out[row, ids] = weights
    return out
