"""``EncodeBatch``: Arrow in, Arrow out; what it refuses; that it can be sent to another process."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import splade_kernels.encoding
from splade_kernels.encoding import EncodeBatch, batch
from splade_kernels.encoding.encoder import TextEncoder, WeightError
from splade_kernels.encoding.errors import DataError, UsageError
from splade_kernels.encoding.options import EncoderOptions
from splade_kernels.encoding.output import SCHEMA
from tests.st_models import TEXTS

TITLES = ["the sea", None, "", *["a wheel"] * (len(TEXTS) - 3)]
ROWS = pa.table({"_id": [f"d{row}" for row in range(len(TEXTS))], "text": TEXTS, "title": TITLES, "year": [1] * 32})


def texts_of(titles: list[str | None]) -> list[str]:
    return [f"{title} {text}" if title else text for title, text in zip(titles, TEXTS, strict=True)]


@pytest.fixture(scope="module")
def encoder(model_folder: str) -> TextEncoder:
    return TextEncoder(EncoderOptions(model_folder, max_active_dims=20))


@pytest.fixture(scope="module")
def step(model_folder: str) -> EncodeBatch:
    return EncodeBatch(model_folder, max_active_dims=20)


def test_a_table_becomes_one(encoder: TextEncoder, step: EncodeBatch) -> None:
    """The same bits as of the encoder that gets title and text in one, also where the table has several chunks."""
    expected = encoder(texts_of(TITLES)).to_arrow(ROWS["_id"])
    assert step(ROWS).equals(expected)
    assert step(pa.concat_tables([ROWS.slice(0, 7), ROWS.slice(7)])).equals(expected)


def test_a_record_batch_becomes_one(step: EncodeBatch) -> None:
    (rows,) = ROWS.slice(3, 9).to_batches()
    found = step(rows)
    assert isinstance(found, pa.RecordBatch) and found.schema == SCHEMA
    assert pa.Table.from_batches([found]).equals(step(ROWS.slice(3, 9)))


def test_no_rows_do_not_load_a_model() -> None:
    step = EncodeBatch("no such model")
    assert step(ROWS.slice(0, 0)).equals(SCHEMA.empty_table())
    (empty,) = [pa.RecordBatch.from_pylist([], ROWS.schema)]
    found = step(empty)
    assert isinstance(found, pa.RecordBatch) and (found.schema, found.num_rows) == (SCHEMA, 0)


def test_blank_texts_keep_their_rows(step: EncodeBatch) -> None:
    found = step(pa.table({"_id": ["a", "b", "c"], "text": ["", " ", "the sea"]}))
    assert found["id"].to_pylist() == ["a", "b", "c"]
    assert [len(ids) > 0 for ids in found["indices"].to_pylist()] == [False, False, True]


def test_ids_may_be_integers_in_a_dictionary(step: EncodeBatch) -> None:
    rows = pa.table({"_id": pa.array([7, 8, 7]).dictionary_encode(), "text": ["a", "b", "c"]})
    assert step(rows)["id"].to_pylist() == ["7", "8", "7"]


def test_titles(encoder: TextEncoder, model_folder: str) -> None:
    def encode(table: pa.Table, **fields: Any) -> pa.Table:
        return EncodeBatch(model_folder, max_active_dims=20, **fields)(table)

    without = encoder(TEXTS).to_arrow(ROWS["_id"])
    assert encode(ROWS, title_field=None).equals(without)
    assert encode(ROWS.drop_columns("title")).equals(without)
    assert encode(ROWS.set_column(2, "title", pa.nulls(len(TEXTS)))).equals(without)
    renamed = ROWS.rename_columns(["key", "body", "head", "year"])
    fields = {"id_field": "key", "text_field": "body", "title_field": "head"}
    assert encode(renamed, **fields).equals(encode(ROWS)) and not encode(ROWS).equals(without)
    with pytest.raises(DataError, match=r"head: expected one column of this name, got the columns 'key', 'body'"):
        encode(renamed.drop_columns("head"), **fields)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_columns_of_other_string_types(step: EncodeBatch, kind: pa.DataType) -> None:
    names = ("_id", "text", "title")
    arrays = [pa.array(ROWS[name].to_pylist(), pa.string()) for name in names]
    arrays = [array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind) for array in arrays]
    assert step(pa.table(arrays, names=list(names))).equals(step(ROWS))


def test_integers_become_strings(step: EncodeBatch) -> None:
    found = step(ROWS.set_column(0, "_id", pa.array(range(-1, 31), pa.int64())))
    assert found["id"].to_pylist() == [str(number) for number in range(-1, 31)]
    assert found["indices"].equals(step(ROWS)["indices"])


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xc3\x28")]
)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"_id": ["a", None], "text": ["b", "c"]}, "_id: row 1 of the batch (from 0): expected an id, got null"),
        ({"_id": ["a", ""], "text": ["b", "c"]}, "_id: row 1 of the batch (from 0): expected an id, got an empty one"),
        ({"_id": [None], "text": ["b"]}, "_id: row 0 of the batch (from 0): expected an id, got null"),
        ({"_id": [1, None], "text": ["b", "c"]}, "_id: row 1 of the batch (from 0): expected an id, got null"),
        ({"_id": [0.5], "text": ["b"]}, "_id: expected a column of strings or integers, got double"),
        ({"text": ["b"]}, "_id: expected one column of this name, got the columns 'text'"),
        ({"_id": ["a"], "text": [None]}, "text: row 0 of the batch (from 0): expected a text, got null"),
        ({"_id": ["a"], "text": [1]}, "text: expected a column of strings, got int64"),
        ({"_id": ["a"]}, "text: expected one column of this name, got the columns '_id'"),
        ({"_id": ["a"], "text": ["b"], "title": [1]}, "title: expected a column of strings, got int64"),
        ({"_id": ["a"], "text": NOT_UTF8}, "text: Invalid UTF8 sequence"),
        ({"_id": NOT_UTF8, "text": ["b"]}, "_id: Invalid UTF8 sequence"),
    ],
)
@pytest.mark.parametrize("kind", ["table", "record batch"])
def test_what_is_refused(kind: str, columns: dict[str, Any], message: str) -> None:
    """Before a model is loaded: there is none."""
    table = pa.table(columns)
    with pytest.raises(DataError) as error:
        EncodeBatch("no such model")(table if kind == "table" else table.to_batches()[0])
    assert str(error.value).startswith(message)


def test_wrong_options_are_refused_where_the_object_is_made() -> None:
    with pytest.raises(UsageError, match="dtype: expected auto"):
        EncodeBatch("model", dtype="int8")
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_terms'"):
        EncodeBatch("model", max_terms=5)


def test_a_weight_that_is_not_finite_names_the_id(step: EncodeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(texts: list[str]) -> Any:
        raise WeightError(2, "expected finite weights, got nan for vocabulary id 7")

    monkeypatch.setattr(batch, "_encoder", lambda options: encode)
    with pytest.raises(DataError, match="^_id 'd2': expected finite weights, got nan for vocabulary id 7$"):
        step(ROWS)


def test_an_object_is_small_and_loads_the_model_once_in_a_process(
    step: EncodeBatch, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spark sends one with every partition."""
    expected = step(ROWS)
    sent = pickle.dumps(step)
    assert len(sent) < 1000
    batch._encoder.cache_clear()
    loaded = []
    monkeypatch.setattr(batch, "TextEncoder", lambda options: (loaded.append(options), TextEncoder(options))[1])
    for _ in range(3):
        assert pickle.loads(sent)(ROWS).equals(expected)
    assert loaded == [EncoderOptions(model_folder, max_active_dims=20)]


def test_the_package_is_light_until_it_is_asked_for() -> None:
    heavy = "{'pyarrow', 'sentence_transformers', 'transformers', 'typer', 'ray', 'pyspark'}"
    code = (
        "import sys, splade_kernels, splade_kernels.encoding.errors as errors\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)\n"
        "from splade_kernels.encoding import EncodeBatch\n"
        f"assert {heavy} & set(sys.modules) == {{'pyarrow'}}, {heavy} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        splade_kernels.encoding.Other  # noqa: B018


def test_the_code_in_the_docs_runs(model_folder: str) -> None:
    """As printed, but for the model: a tiny one."""
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("naver/splade-v3", model_folder), names)
    assert names["vectors"].schema == SCHEMA and names["vectors"]["id"].to_pylist() == ["d1", "d2"]
    assert [len(ids) > 0 for ids in names["vectors"]["indices"].to_pylist()] == [True, False]
