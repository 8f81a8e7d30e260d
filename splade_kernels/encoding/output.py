"""The folder that ``splade-kernels encode`` writes, as its readers see it: ``manifest.json`` and Parquet parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SCHEMA = pa.schema([("id", pa.string()), ("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float32()))])
# Rows that a reader holds at a time.
BATCH_ROWS = 4096


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


@dataclass(frozen=True)
class Output:
    """A complete output: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def vocabulary_size(self) -> int:
        return int(self.manifest["vocabulary_size"])

    @property
    def rows(self) -> int:
        return int(self.manifest["rows"])

    @property
    def parts(self) -> list[Path]:
        return [self.folder / part["file"] for part in self.manifest["parts"]]

    def batches(self, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Batches of ``id``, ``indices`` and ``values``, in the order of the input.

        Raises:
            DataError: a part is missing, or is no Parquet file with these columns.
        """
        for path in self.parts:
            try:
                with pq.ParquetFile(path) as file:
                    if not file.schema_arrow.equals(SCHEMA):
                        raise DataError(f"{path}: expected the columns {SCHEMA}, got {file.schema_arrow}")
                    yield from file.iter_batches(batch_size=rows)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path}: {error}") from error


def open_output(folder: Path) -> Output:
    """A complete output.

    Raises:
        DataError: ``folder`` holds none, or one that has not been encoded to its end, or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{folder}: expected the output of `splade-kernels encode`, got no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version: expected {FORMAT_VERSION}, got {version!r}")
    missing = {"model", "tokenizer_sha256", "vocabulary_size", "parts", "rows", "complete"} - manifest.keys()
    if missing:
        raise DataError(f"{path}: expected that of an output of `splade-kernels encode`, got none of {min(missing)!r}")
    if not manifest["complete"]:
        raise DataError(f"{folder}: expected a complete output, got one whose encoding has not ended: run it again")
    return Output(folder, manifest)
