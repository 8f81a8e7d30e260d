"""The step for engines that read, distribute and write themselves: an Arrow batch of texts in, one of vectors out."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from .encoder import TextEncoder, WeightError
from .errors import DataError
from .options import EncoderOptions, check_options
from .output import SCHEMA

ID_FIELD, TEXT_FIELD, TITLE_FIELD = "_id", "text", "title"
Batch = TypeVar("Batch", pa.Table, pa.RecordBatch)


class EncodeBatch:
    """Encode Arrow batches, for Ray Data's ``map_batches`` and Spark's ``mapInArrow`` (docs/engines.md).

        texts.map_batches(EncodeBatch, fn_constructor_kwargs={"model": "naver/splade-v3"}, batch_format="pyarrow")
        encode = EncodeBatch("naver/splade-v3")
        texts.mapInArrow(lambda batches: map(encode, batches), "id string, indices array<int>, values array<float>")

    The result has the rows of the batch in their order and the columns of :data:`.output.SCHEMA`, and is a Table or
    RecordBatch as the batch was. A text is ``title + " " + text`` where there is a title that is not empty. Other
    columns are left out. An object can be pickled; it holds options only, and the model is loaded with the first rows,
    once in each process.

    Args:
        model: folder of the model, which every machine must be able to read, or its name on the hub.
        id_field: column of the ids: strings, or integers, which become strings.
        text_field: column of the texts.
        title_field: column of the titles, where null is an empty one. None: texts have no titles. The batch may lack
            the column if it is the default.
        options: further fields of :class:`EncoderOptions`, such as ``query=True``.

    Raises:
        TypeError, UsageError: an option is unknown, or wrong by itself.
    """

    def __init__(
        self,
        model: str,
        *,
        id_field: str = ID_FIELD,
        text_field: str = TEXT_FIELD,
        title_field: str | None = TITLE_FIELD,
        **options: Any,
    ) -> None:
        self.options = EncoderOptions(str(model), **options)
        check_options(self.options)
        self.id_field = id_field
        self.text_field = text_field
        self.title_field = title_field

    def __call__(self, batch: Batch) -> Batch:
        """Encode the rows of a Table or RecordBatch.

        Raises:
            DataError: an id is missing, null or empty, a text is missing or null, a column is of another type or no
                UTF-8, a weight is not finite, or the model cannot be used. The message names field and row.
        """
        ids, texts = self._ids(batch), self._texts(batch)
        if not batch.num_rows:  # engines send such batches to learn the schema
            found = SCHEMA.empty_table()
        else:
            try:
                found = _encoder(self.options)(texts.to_pylist()).to_arrow(ids)
            except WeightError as error:
                raise DataError(f"{self.id_field} {ids[error.row].as_py()!r}: {error.reason}") from error
        if isinstance(batch, pa.RecordBatch):
            columns = [column.combine_chunks() for column in found.columns]
            return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
        return found

    def _ids(self, batch: pa.Table | pa.RecordBatch) -> pa.Array:
        column = _column(batch, self.id_field)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_integer(column.type):
            column = column.cast(pa.string())
        ids = _strings(column, self.id_field, "strings or integers")
        _refuse(pc.is_null(ids), self.id_field, "an id, got null")
        _refuse(pc.equal(ids, ""), self.id_field, "an id, got an empty one")
        return ids

    def _texts(self, batch: pa.Table | pa.RecordBatch) -> pa.Array:
        texts = _strings(_column(batch, self.text_field), self.text_field, "strings")
        _refuse(pc.is_null(texts), self.text_field, "a text, got null")
        name = self.title_field
        if name is None or (name == TITLE_FIELD and name not in batch.schema.names):
            return texts
        titles = pc.fill_null(_strings(_column(batch, name), name, "strings"), "")
        return pc.if_else(pc.equal(titles, ""), texts, pc.binary_join_element_wise(titles, texts, " "))


@functools.cache
def _encoder(options: EncoderOptions) -> TextEncoder:
    """One in each process: Spark makes a new object of :class:`EncodeBatch` for each partition."""
    return TextEncoder(options)


def _column(batch: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    if batch.schema.names.count(name) != 1:
        names = ", ".join(map(repr, batch.schema.names)) or "none"
        raise DataError(f"{name}: expected one column of this name, got the columns {names}")
    column = batch.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _strings(column: pa.Array, name: str, expected: str) -> pa.Array:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(kind(column.type) for kind in kinds):
        raise DataError(f"{name}: expected a column of {expected}, got {column.type}")
    try:
        column.validate(full=True)
        return column.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise DataError(f"{name}: {error}") from error


def _refuse(wrong: pa.BooleanArray, name: str, message: str) -> None:
    if pc.any(wrong, min_count=0).as_py():
        row = pc.index(wrong, True).as_py()
        raise DataError(f"{name}: row {row} of the batch (from 0): expected {message}")
