"""Queries in BEIR's JSONL or as TSV."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..encoding.errors import DataError, UsageError
from .lines import read_lines

ID, TEXT = "_id", "text"
SUFFIXES = (".jsonl", ".jsonl.gz", ".tsv", ".tsv.gz")


class Query(NamedTuple):
    id: str
    text: str


def read_queries(path: Path) -> list[Query]:
    """The queries of a file, in its order.

    JSONL: an object a line with ``_id``, a string or an integer, and ``text``. TSV: a first line that holds the field
    ``_id`` names the columns; without it column 1 is the id and column 2 the text. Blank lines are passed over.

    Raises:
        UsageError: the name ends in none of ``SUFFIXES``.
        DataError: a line is none of these; an id is missing, empty, a second one of its kind, or holds white space,
            which a TREC run cannot; there is no query. The message names file and line.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = _jsonl(path)
    elif path.name.endswith((".tsv", ".tsv.gz")):
        rows = _tsv(path)
    else:
        raise UsageError(f"--queries: expected a name that ends in {', '.join(SUFFIXES)}, got {path}")
    queries: list[Query] = []
    first: dict[str, int] = {}
    for number, identifier, text in rows:
        where = f"{path}:{number}"
        if isinstance(identifier, int) and not isinstance(identifier, bool):
            identifier = str(identifier)
        if not isinstance(identifier, str) or not identifier:
            raise DataError(f"{where}: '{ID}': expected a string that is not empty, or an integer, got {identifier!r}")
        if not isinstance(text, str):
            raise DataError(f"{where}: '{TEXT}': expected a string, got {text!r}")
        for field, value in ((ID, identifier), (TEXT, text)):
            try:
                value.encode()
            except UnicodeEncodeError as error:  # JSON's \ud800 is a str in Python, but no text
                half = f"\\u{ord(value[error.start]):04x}"
                raise DataError(
                    f"{where}: '{field}': expected Unicode text, got half of a surrogate pair, {half}"
                ) from error
        if has_white_space(identifier):
            raise DataError(f"{where}: '{ID}': expected no white space, since a run is split at it, got {identifier!r}")
        if identifier in first:
            raise DataError(f"{where}: '{ID}': {identifier!r} stands on line {first[identifier]} as well")
        first[identifier] = number
        queries.append(Query(identifier, text))
    if not queries:
        raise DataError(f"{path}: expected at least one query, got none")
    return queries


def has_white_space(identifier: str) -> bool:
    """Whether readers that split a line at white space would cut the id, or not see it."""
    return identifier.split() != [identifier]


def _jsonl(path: Path) -> Iterator[tuple[int, Any, Any]]:
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: expected a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row.get(ID), row.get(TEXT)


def _tsv(path: Path) -> Iterator[tuple[int, str, str]]:
    columns = (0, 1)
    for place, (number, line) in enumerate(read_lines(path)):
        fields = line.split("\t")
        if place == 0 and ID in fields:
            if TEXT not in fields:
                raise DataError(f"{path}:{number}: expected a column '{TEXT}' beside '{ID}', got {fields}")
            columns = (fields.index(ID), fields.index(TEXT))
            continue
        if len(fields) <= max(columns):
            raise DataError(
                f"{path}:{number}: expected at least {max(columns) + 1} fields separated by tabs, got {len(fields)}"
            )
        yield number, fields[columns[0]], fields[columns[1]]
