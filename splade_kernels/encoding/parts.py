"""One part of an output: a Parquet file of some rows, and beside it the hashes of their ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .corpus import Row
from .duplicates import Hashes
from .files import write_whole
from .output import SCHEMA, part_name

if TYPE_CHECKING:
    from .encoder import Encoded

# Folder of the hashes, and the key of the Parquet metadata that a part's counts are in.
IDS = "ids"
KEY = b"splade_kernels"
# What of a run's resolved options decides how a text becomes a vector.
ENCODING = (
    "model_sha256", "tokenizer_sha256", "query", "prompt", "max_length", "dtype", "max_active_dims", "min_weight",
    "batch_tokens", "screening",
)  # fmt: skip
_NAME = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True)
class PartCounts:
    """What a part says of itself.

    ``rows_blake2b`` is that of the ids and texts that it was made of, ``encoding_blake2b`` of the model and the options
    that made vectors of them.
    """

    part: int
    rows: int
    empty: int
    truncated: int
    terms: int
    rows_blake2b: str
    encoding_blake2b: str


def cut(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    rows = iter(rows)
    while part := list(islice(rows, size)):
        yield part


def rows_digest(rows: Sequence[Row]) -> str:
    """Of ids and texts, each with its length, so that no two sequences of rows have the same bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        for value in (row.id.encode(), row.text.encode()):
            digest.update(len(value).to_bytes(8, "little"))
            digest.update(value)
    return digest.hexdigest()


def encoding_digest(resolved: Mapping[str, Any]) -> str:
    """Of all that the vector of a text depends on."""
    found = json.dumps({name: resolved[name] for name in ENCODING}, sort_keys=True)
    return hashlib.blake2b(found.encode(), digest_size=16).hexdigest()


def ids_path(folder: Path, number: int) -> Path:
    return folder / IDS / f"{Path(part_name(number)).stem}.u64"


def write_part(
    folder: Path, number: int, rows: Sequence[Row], hashes: Hashes, encoded: Encoded, encoding: str
) -> PartCounts:
    """The bytes depend on the rows, the model, the options of the encoder (``encoding``: their digest), and libraries.

    Raises:
        DataError: it cannot be written.
    """
    terms, digest = len(encoded.indices), rows_digest(rows)
    counts = PartCounts(number, len(rows), encoded.empty, encoded.truncated, terms, digest, encoding)
    table = encoded.to_arrow([row.id for row in rows]).replace_schema_metadata({KEY: json.dumps(asdict(counts))})
    write_hashes(folder, number, hashes)  # before the part: where there is a part, there are its hashes
    write_whole(folder / part_name(number), lambda file: pq.write_table(table, file, compression="zstd"))
    return counts


def write_hashes(folder: Path, number: int, hashes: Hashes) -> None:
    write_whole(ids_path(folder, number), lambda file: file.write(hashes.astype("<u8").tobytes()))


def read_counts(path: Path) -> PartCounts | None:
    """What a part says of itself, or None where it is no whole part of an output."""
    try:
        with pq.ParquetFile(path) as file:
            said = (file.metadata.metadata or {}).get(KEY)
            if said is None or not file.schema_arrow.equals(SCHEMA):
                return None
            counts = PartCounts(**json.loads(said))
            return counts if counts.rows == file.metadata.num_rows else None
    except (OSError, pa.ArrowException, ValueError, TypeError):
        return None


def part_files(folder: Path) -> dict[int, Path]:
    """The files that are called like parts, by number."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    named = {int(match[1]): path for match, path in found if match}
    return {number: named[number] for number in sorted(named) if named[number].name == part_name(number)}


def hash_files(folder: Path) -> list[Path]:
    """The files of hashes beside parts, whether or not these are there."""
    return [path for path in (folder / IDS).glob("part-*.u64") if _NAME.fullmatch(f"{path.stem}.parquet")]


def read_hashes(folder: Path, number: int) -> Hashes:
    """Those beside a part, none where there is no such file."""
    try:
        return np.fromfile(ids_path(folder, number), "<u8").astype(np.uint64)
    except FileNotFoundError:
        return np.empty(0, np.uint64)
