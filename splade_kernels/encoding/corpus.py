"""The rows of a corpus as a stream: which files there are, and what of a record becomes an id and a text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DataError, UsageError
from .records import DEFAULT_FIELDS, READERS, Fields, Problem, Source, file_source, read_hub

# How many of the rows that were skipped are named in the end.
NAMED = 3


class Row(NamedTuple):
    """A text, its id, and where it was read."""

    id: str
    text: str
    source: Source
    number: int

    @property
    def place(self) -> str:
        return self.source.place(self.number)


class Corpus:
    """Rows of ``sources`` in their order, the first ``limit`` of them.

    Iterating reads them from the beginning each time; ``skipped`` counts, and ``skipped_first`` names the first of,
    the records that were left out since then, which with ``on_error="fail"`` raise instead.

    Raises:
        DataError: from the iterator: a file cannot be read, or with ``on_error="fail"`` a record is none. The message
            names the file, the line or row, and the field.
    """

    def __init__(
        self, sources: list[Source], fields: Fields, on_error: str, limit: int | None, split: str | None
    ) -> None:
        self.sources = sources
        self.fields = fields
        self.on_error = on_error
        self.limit = limit
        self.split = split
        self._restart()

    def _restart(self) -> None:
        self.read = 0
        self.skipped = 0
        self.skipped_first: list[str] = []
        self._finished_bytes = 0
        self._current: Source | None = None

    def __iter__(self) -> Iterator[Row]:
        self._restart()
        return itertools.islice(self._rows(), self.limit)

    def _rows(self) -> Iterator[Row]:
        for source in self.sources:
            self._current = source
            for number, record in source.read(source, self.fields):
                found = record if isinstance(record, Problem) else _id_and_text(record, self.fields)
                if not isinstance(found, Problem):
                    self.read += 1
                    yield Row(*found, source, number)
                elif self.on_error == "fail":
                    raise DataError(f"{source.place(number)}: {found}")
                else:
                    self.skipped += 1
                    if len(self.skipped_first) < NAMED:
                        self.skipped_first.append(f"{source.place(number)}: {found}")
            self._current = None
            self._finished_bytes += source.size or 0

    def again(self) -> Corpus:
        """The same corpus from its beginning, while this one is being read."""
        sources = [replace(source) for source in self.sources]
        return Corpus(sources, self.fields, self.on_error, self.limit, self.split)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What a resumed run compares: names and sizes of the files."""
        return [{"name": source.name, "size": source.size} for source in self.sources]

    @property
    def fraction(self) -> float | None:
        """How much of the corpus has been read, None where its size is not known."""
        sizes = [source.size for source in self.sources]
        if not all(sizes):
            return self.read / self.limit if self.limit else None
        current = self._current.consumed() if self._current else 0
        fraction = (self._finished_bytes + current) / sum(size or 0 for size in sizes)
        return max(fraction, self.read / self.limit) if self.limit else fraction


def _id_and_text(record: Mapping[str, Any], fields: Fields) -> tuple[str, str] | Problem:
    name = record.get(fields.id, _MISSING)
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name:
        return _expected(fields.id, "a string that is not empty, or an integer", name)
    text = record.get(fields.text, _MISSING)
    if not isinstance(text, str):
        return _expected(fields.text, "a string", text)
    title = record.get(fields.title)
    if title is not None and not isinstance(title, str):
        return _expected(fields.title, "a string or null", title)
    for field, value in zip(fields, (name, text, title or ""), strict=True):
        # JSON's \ud800 is a str in Python, but no text: neither UTF-8 nor a tokenizer has anything for it.
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                got = f"half of a surrogate pair, \\u{ord(value[error.start]):04x}"
                return Problem(f"{field}: expected Unicode text, got {got}")
    return name, f"{title} {text}" if title else text


_MISSING = object()


def _expected(field: str, expected: str, got: object) -> Problem:
    if got is _MISSING:
        return Problem(f"{field}: expected {expected}, got no such field")
    shown = json.dumps(got, default=repr, ensure_ascii=False)
    return Problem(f"{field}: expected {expected}, got {shown if len(shown) <= 80 else shown[:80] + '…'}")


def open_corpus(
    name: str,
    fields: Fields = DEFAULT_FIELDS,
    *,
    split: str = "train",
    on_error: str = "fail",
    limit: int | None = None,
) -> Corpus:
    """The corpus at a path, or else of that name on the hub (``NAME`` or ``NAME:CONFIG``).

    Raises:
        UsageError: there is no reader for a file's suffix, or ``split`` is none of a saved dataset's.
        DataError: there is nothing of this name.
    """
    path = Path(name)
    if path.is_dir():
        sources, of_split = _folder_sources(path, split)
    elif path.exists():
        source = file_source(path, path.name) if path.is_file() else None
        if source is None:
            raise UsageError(f"--input {name}: expected a folder or a file that ends in {', '.join(READERS)}")
        sources, of_split = [source], None
    elif name.lower().endswith(tuple(READERS)):
        raise DataError(f"{name}: no such file")
    else:
        sources, of_split = [_hub_source(name, split)], split
    return Corpus(sources, fields, on_error, limit, of_split)


def _folder_sources(folder: Path, split: str) -> tuple[list[Source], str | None]:
    """The folder's own files in the order of their names, or those of a saved dataset in its own order."""
    of_split = None
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        known = _json(splits, "splits")
        if split not in known:
            raise UsageError(f"--split: expected one of {', '.join(map(repr, known))} ({folder}), got {split!r}")
        folder, of_split = folder / split, split
    state = folder / "state.json"
    if state.is_file():
        files = [folder / str(file["filename"]) for file in _json(state, "_data_files")]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise DataError(f"{state}: expected the files that it names, got no {missing[0]}")
    else:
        # A leading dot or underscore is what other writers give to files that are no data.
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.name[0] not in "._")
    sources = [file_source(file, file.name) for file in files]
    unknown = [file.name for file, source in zip(files, sources, strict=True) if source is None]
    if unknown:
        raise UsageError(f"{folder}: expected files that end in {', '.join(READERS)}, got {unknown[0]}")
    if not sources:
        raise DataError(f"{folder}: expected files that end in {', '.join(READERS)}, got none")
    return [source for source in sources if source is not None], of_split


def _json(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected what datasets.save_to_disk writes, got {error!r}") from error


def _hub_source(name: str, split: str) -> Source:
    place = f"{name} ({split})"
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise DataError(
            f"{name}: no such file; a dataset of the hub needs {error.name}: pip install datasets"
        ) from error
    dataset_name, _, configuration = name.partition(":")
    try:
        dataset = load_dataset(dataset_name, configuration or None, split=split, streaming=True)
    except Exception as error:  # of any kind: network, the hub, formats of files
        message = " ".join(str(error).split())
        raise DataError(
            f"{name}: no such file, and no dataset of the hub: {type(error).__name__}: {message}"
        ) from error
    return Source(place, None, "row", partial(read_hub, dataset=dataset))
