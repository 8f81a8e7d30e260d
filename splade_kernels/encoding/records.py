"""Records of one file or dataset, one at a time: numbered from 1, each a mapping of fields, or why it is none.

A reader yields ``(number, record)``, where ``number`` counts the lines of a text file and the rows of any other, and
``record`` is a mapping of field names, or a :class:`Problem` where this record alone cannot be read. What is wrong with
the file as a whole raises :class:`DataError`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from .errors import DataError

# A longer line is refused, so that a file without line ends does not end up in memory whole.
MOST_LINE_BYTES = 64 << 20
# Rows of a columnar file that become Python objects at a time, and bytes of a Parquet column that are read ahead.
BATCH_ROWS = 1024
READ_AHEAD = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Fields(NamedTuple):
    """Names of the fields that a text is made of."""

    id: str = "_id"
    text: str = "text"
    title: str = "title"


DEFAULT_FIELDS = Fields()


class Problem(str):
    """Why one record cannot be read, without its place."""


Record = tuple[int, "Mapping[str, Any] | Problem"]


@dataclass
class Source:
    """A file, or a dataset of the hub, and the reader of its records.

    ``size`` is in bytes, None where unknown; ``consumed`` says how many of them have been read.
    """

    name: str
    size: int | None
    unit: str
    read: Callable[[Source, Fields], Iterator[Record]]
    path: Path | None = None
    consumed: Callable[[], int] = field(default=lambda: 0, repr=False)

    def place(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number}"


def file_source(path: Path, name: str) -> Source | None:
    """The source of a file by its suffix; None where there is no reader for it."""
    for suffix, (unit, read) in READERS.items():
        if path.name.lower().endswith(suffix):
            return Source(name, path.stat().st_size, unit, read, path)
    return None


@contextmanager
def _opened(source: Source) -> Iterator[IO[bytes]]:
    assert source.path is not None
    try:
        with source.path.open("rb") as file:
            source.consumed = lambda: 0 if file.closed else file.tell()
            yield file
    except OSError as error:
        raise DataError(f"{source.name}: {error.strerror or error}") from error


def _lines(source: Source, file: IO[bytes]) -> Iterator[tuple[int, bytes | Problem]]:
    """Lines that are not blank, without a byte order mark at the file's beginning."""
    number = 0
    try:
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if len(line) > MOST_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MOST_LINE_BYTES)
                yield number, Problem(f"expected a line of at most {MOST_LINE_BYTES >> 20} MiB, got a longer one")
            elif line.strip():
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{source.name}, after line {number}: expected a whole gzip file, got: {error}") from error


def _json_record(line: bytes) -> Mapping[str, Any] | Problem:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except RecursionError:
        return Problem("expected a JSON object, got one that is nested too deeply")
    except ValueError as error:
        return Problem(f"expected a JSON object, got a line that is no JSON: {error}")
    if not isinstance(record, dict):
        return Problem(f"expected a JSON object, got {_kind(record)}")
    return record


def _not_utf8(error: UnicodeDecodeError) -> Problem:
    return Problem(f"expected UTF-8, got the byte 0x{error.object[error.start]:02x} at its byte {error.start + 1}")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def read_jsonl(source: Source, fields: Fields) -> Iterator[Record]:
    with _opened(source) as file:
        for number, line in _lines(source, file):
            yield number, line if isinstance(line, Problem) else _json_record(line)


def read_jsonl_gz(source: Source, fields: Fields) -> Iterator[Record]:
    with _opened(source) as file, gzip.GzipFile(fileobj=file) as unpacked:
        for number, line in _lines(source, unpacked):  # type: ignore[arg-type]
            yield number, line if isinstance(line, Problem) else _json_record(line)


def read_tsv(source: Source, fields: Fields) -> Iterator[Record]:
    """Without quotes or escapes. The first line is a header where one of its columns is the id field."""
    names: Sequence[str] | None = None
    with _opened(source) as file:
        for number, line in _lines(source, file):
            try:
                cells = line if isinstance(line, Problem) else line.rstrip(b"\r\n").decode().split("\t")
            except UnicodeDecodeError as error:
                cells = _not_utf8(error)
            if names is None:
                if not isinstance(cells, Problem) and fields.id in cells:
                    check_columns(source.place(number), cells, fields)
                    names = cells
                    continue
                names = (fields.id, fields.text)
            if isinstance(cells, Problem):
                yield number, cells
            elif len(cells) != len(names):
                yield number, Problem(f"expected {len(names)} columns ({', '.join(names)}), got {len(cells)}")
            else:
                yield number, dict(zip(names, cells, strict=True))


def check_columns(place: str, names: Sequence[str], fields: Fields) -> list[str]:
    """The columns to read. The title's may be missing where it has its default name.

    Raises:
        DataError: one of them is missing, or is there twice.
    """
    wanted = [fields.id, fields.text]
    if fields.title in names or fields.title not in ("", DEFAULT_FIELDS.title):
        wanted.append(fields.title)
    for name in wanted:
        if list(names).count(name) != 1:
            raise DataError(f"{place}: expected one column {name!r}, got the columns {', '.join(map(repr, names))}")
    return wanted


def read_parquet(source: Source, fields: Fields) -> Iterator[Record]:
    with _opened(source) as opened, _arrow_errors(source) as progress:
        # Without pre_buffer, and with a buffer, a row group is not read whole.
        with pq.ParquetFile(opened, buffer_size=READ_AHEAD, pre_buffer=False) as file:
            columns = _typed_columns(source, file.schema_arrow, fields)
            rows = max(file.metadata.num_rows, 1)
            source.consumed = lambda: (source.size or 0) * progress.rows // rows
            yield from progress.count(file.iter_batches(batch_size=BATCH_ROWS, columns=columns))


def read_arrow(source: Source, fields: Fields) -> Iterator[Record]:
    """Both of Arrow's formats: file (Feather) and stream (what ``datasets`` writes)."""
    # Not mapped into memory: pages of a mapped file count as memory of the process.
    with _opened(source) as opened, _arrow_errors(source) as progress:
        try:
            file = pa.ipc.open_file(opened)
            batches: Iterable[Any] = (file.get_batch(index) for index in range(file.num_record_batches))
            schema = file.schema
        except pa.ArrowInvalid:
            opened.seek(0)
            batches = stream = pa.ipc.open_stream(opened)
            schema = stream.schema
        columns = _typed_columns(source, schema, fields)
        small = (
            batch.slice(first, BATCH_ROWS)
            for batch in batches
            for first in range(0, max(batch.num_rows, 1), BATCH_ROWS)
        )
        yield from progress.count(batch.select(columns) for batch in small)


def read_hub(source: Source, fields: Fields, dataset: Any) -> Iterator[Record]:
    """Rows of a streamed dataset of the hub."""
    number = 0
    try:
        if dataset.column_names is not None:
            dataset = dataset.select_columns(check_columns(source.name, dataset.column_names, fields))
        for record in dataset:
            number += 1
            yield number, record
    except DataError:
        raise
    except Exception as error:  # of any kind: network, the hub, formats of files
        raise DataError(f"{source.name}, after row {number}: {type(error).__name__}: {error}") from error


class _Rows:
    """Rows of record batches, counted."""

    def __init__(self) -> None:
        self.rows = 0

    def count(self, batches: Iterable[Any]) -> Iterator[Record]:
        for batch in batches:
            columns = {name: _values(batch.column(index)) for index, name in enumerate(batch.schema.names)}
            for row in range(batch.num_rows):
                self.rows += 1
                record = {name: values[row] for name, values in columns.items()}
                wrong = [(name, value) for name, value in record.items() if isinstance(value, Problem)]
                yield self.rows, Problem(f"{wrong[0][0]}: {wrong[0][1]}") if wrong else record


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return _not_utf8(error)


@contextmanager
def _arrow_errors(source: Source) -> Iterator[_Rows]:
    progress = _Rows()
    try:
        yield progress
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        raise DataError(f"{source.name}, after row {progress.rows}: {message}") from error


def _typed_columns(source: Source, schema: pa.Schema, fields: Fields) -> list[str]:
    columns = check_columns(source.name, schema.names, fields)
    for name in columns:
        kind = schema.field(name).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = any(test(value) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
        integer = name == fields.id and pa.types.is_integer(value)
        # A column of nulls only has no other type, and its rows are judged one by one.
        if not (text or integer or pa.types.is_null(value)):
            expected = "strings or integers" if name == fields.id else "strings"
            raise DataError(f"{source.name}: {name}: expected a column of {expected}, got {kind}")
    return columns


READERS: dict[str, tuple[str, Callable[[Source, Fields], Iterator[Record]]]] = {
    ".jsonl": ("line", read_jsonl),
    ".jsonl.gz": ("line", read_jsonl_gz),
    ".tsv": ("line", read_tsv),
    ".parquet": ("row", read_parquet),
    ".arrow": ("row", read_arrow),
}
