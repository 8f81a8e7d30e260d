"""Reading queries, and that a bad line is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from splade_kernels.encoding.errors import CommandError, DataError, UsageError
from splade_kernels.searching.queries import read_queries

JSONL = '{"_id": "q1", "text": "first", "metadata": {}}\n\n{"text": "", "_id": 7}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("q.jsonl", JSONL, [("q1", "first"), ("7", "")]),
        ("q.jsonl", "\ufeff" + JSONL, [("q1", "first"), ("7", "")]),
        ("q.tsv", "1\tone two\n2\ttwo \n", [("1", "one two"), ("2", "two ")]),
        ("q.tsv", "1\tone\textra\r\n2\ttwo\r\n", [("1", "one"), ("2", "two")]),
        ("q.tsv", "text\tlang\t_id\none\ten\t1\n", [("1", "one")]),
        ("q.tsv", "id\ttext\n1\tone\n", [("id", "text"), ("1", "one")]),  # no field _id: no header
        ("q.tsv", '1\t"quoted\n', [("1", '"quoted')]),
    ],
)
def test_queries_are_read(name: str, content: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_queries(path) == expected
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    assert read_queries(packed) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", JSONL + "{oops\n", "q.jsonl:4: expected a JSON object"),
        ("q.jsonl", "[" * 100_000, "q.jsonl:1: expected a JSON object"),
        ("q.jsonl", '{"_id": "a", "text": "\\ud800"}', r"q.jsonl:1: 'text': expected Unicode text, .* \\ud800"),
        ("q.jsonl", '{"_id": "\\ud800", "text": "a"}', r"q.jsonl:1: '_id': expected Unicode text, .* \\ud800"),
        ("q.jsonl", JSONL + "[1]\n", "q.jsonl:4: expected a JSON object, got list"),
        (
            "q.jsonl",
            '{"text": "x"}\n',
            "q.jsonl:1: '_id': expected a string that is not empty, or an integer, got None",
        ),
        ("q.jsonl", '{"_id": "", "text": "x"}\n', "q.jsonl:1: '_id': expected .* got ''"),
        ("q.jsonl", '{"_id": true, "text": "x"}\n', "q.jsonl:1: '_id': expected .* got True"),
        ("q.jsonl", '{"_id": 1.0, "text": "x"}\n', "q.jsonl:1: '_id': expected .* got 1.0"),
        ("q.jsonl", '{"_id": "a b", "text": "x"}\n', "q.jsonl:1: '_id': expected no white space, .* got 'a b'"),
        ("q.jsonl", JSONL + '{"_id": "7", "text": "x"}\n', "q.jsonl:4: '_id': '7' stands on line 3 as well"),
        ("q.jsonl", '{"_id": "q"}\n', "q.jsonl:1: 'text': expected a string, got None"),
        ("q.jsonl", "\n", "q.jsonl: expected at least one query, got none"),
        ("q.tsv", "1\tone\n2\n", "q.tsv:2: expected at least 2 fields separated by tabs, got 1"),
        ("q.tsv", "\tone\n", "q.tsv:1: '_id': expected a string that is not empty"),
        ("q.tsv", "_id\tquery\n1\tone\n", "q.tsv:1: expected a column 'text' beside '_id'"),
        ("q.tsv", "1\tone\n1\ttwo\n", "q.tsv:2: '_id': '1' stands on line 1 as well"),
        ("q.csv", "1,one\n", "--queries: expected a name that ends in .jsonl"),
    ],
)
def test_a_bad_line_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CommandError, match=message) as raised:
        read_queries(tmp_path / name)
    assert isinstance(raised.value, UsageError if name == "q.csv" else DataError)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_queries(tmp_path / "none.jsonl")
    (tmp_path / "q.tsv").write_bytes(b"1\tone\n2\t\xe9\n")
    with pytest.raises(DataError, match=r"q\.tsv:2: expected UTF-8, got the byte 0xe9"):
        read_queries(tmp_path / "q.tsv")
    (tmp_path / "q.tsv.gz").write_bytes(gzip.compress(b"1\tone\n")[:-12])
    with pytest.raises(DataError, match=r"q\.tsv\.gz: "):
        read_queries(tmp_path / "q.tsv.gz")
