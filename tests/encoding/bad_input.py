"""The table of input that ``splade-kernels encode`` refuses, and of what it says.

docs/encoding.md shows the table (``python -m tests.encoding.bad_input --document docs/encoding.md`` writes it there);
tests/encoding/test_bad_input.py holds each of its entries.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench.tables.markdown import table
from tests import generated

BEGIN = "<!-- bad input: python -m tests.encoding.bad_input --document docs/encoding.md -->"
END = "<!-- bad input end -->"
GOOD = b'{"_id": "a", "text": "water"}\n'


def parquet(columns: dict[str, object]) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


def not_utf8(path: Path) -> None:
    """A column of strings whose second holds the byte 0xff."""
    data = pa.py_buffer(b"water\xff")
    offsets = pa.py_buffer(b"".join(number.to_bytes(4, "little") for number in (0, 5, 6)))
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    pq.write_table(pa.table({"_id": ["a", "b"], "text": text}), path)


@dataclass(frozen=True)
class Case:
    """``file`` with ``content`` (None: there is none; a function writes it), and what is said of it.

    ``skipped``: rows that ``--on-error skip`` leaves out and counts; None where it fails all the same.
    """

    what: str
    file: str
    content: bytes | dict[str, bytes] | Callable[[Path], object] | None
    message: str
    skipped: int | None = 1
    status: int = 1
    arguments: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        path = folder / self.file
        if callable(self.content):
            self.content(path)
        elif isinstance(self.content, dict):
            for name, content in self.content.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
        elif self.content is not None:
            path.write_bytes(self.content)


_ID = "_id: expected a string that is not empty, or an integer, got"
_SUFFIXES = ".jsonl, .jsonl.gz, .tsv, .parquet, .arrow"
CASES = [
    Case("a line that is no JSON", "c.jsonl", GOOD + b'{"_id": "b", "text": "bees\n',
         "c.jsonl, line 2: expected a JSON object, got a line that is no JSON: Invalid control character at: line 1 "
         "column 27 (char 26)"),
    Case("a line that is no object", "c.jsonl", GOOD + b'["b", "bees"]\n',
         "c.jsonl, line 2: expected a JSON object, got an array"),
    Case("a line nested too deeply", "c.jsonl", GOOD + b"[" * 200_000 + b"\n",
         "c.jsonl, line 2: expected a JSON object, got one that is nested too deeply"),
    Case("a file that is one long line, in UTF-16", "c.jsonl", GOOD.decode().encode("utf-16"),
         "c.jsonl, line 1: expected UTF-8, got the byte 0xff at its byte 1", skipped=2),
    Case("invalid UTF-8", "c.jsonl", GOOD + b'{"_id": "b", "text": "\xff"}\n',
         "c.jsonl, line 2: expected UTF-8, got the byte 0xff at its byte 23"),
    Case("half of a surrogate pair", "c.jsonl", GOOD + rb'{"_id": "b", "text": "bees \ud83d"}' + b"\n",
         r"c.jsonl, line 2: text: expected Unicode text, got half of a surrogate pair, \ud83d"),
    Case("no id", "c.jsonl", GOOD + b'{"text": "bees"}\n', f"c.jsonl, line 2: {_ID} no such field"),
    Case("an id that is null", "c.jsonl", GOOD + b'{"_id": null, "text": "bees"}\n', f"c.jsonl, line 2: {_ID} null"),
    Case("an empty id", "c.jsonl", GOOD + b'{"_id": "", "text": "bees"}\n', f'c.jsonl, line 2: {_ID} ""'),
    Case("an id with a decimal point", "c.jsonl", GOOD + b'{"_id": 2.0, "text": "bees"}\n',
         f"c.jsonl, line 2: {_ID} 2.0"),
    Case("an id that is a boolean", "c.jsonl", GOOD + b'{"_id": true, "text": "bees"}\n',
         f"c.jsonl, line 2: {_ID} true"),
    Case("no text", "c.jsonl", GOOD + b'{"_id": "b", "contents": "bees"}\n',
         "c.jsonl, line 2: text: expected a string, got no such field"),
    Case("a text that is null", "c.jsonl", GOOD + b'{"_id": "b", "text": null}\n',
         "c.jsonl, line 2: text: expected a string, got null"),
    Case("a text that is a number", "c.jsonl", GOOD + b'{"_id": "b", "text": 7}\n',
         "c.jsonl, line 2: text: expected a string, got 7"),
    Case("a title that is a list", "c.jsonl", GOOD + b'{"_id": "b", "title": ["bees"], "text": "bees"}\n',
         'c.jsonl, line 2: title: expected a string or null, got ["bees"]'),
    Case("an id twice", "c.jsonl", GOOD + b'{"_id": "b", "text": "bees"}\n' + GOOD,
         "c.jsonl, line 3: _id: expected an id that no other row has, got 'a', which c.jsonl, line 1 has",
         skipped=None),
    Case("an id twice, as integer and string", "c.jsonl", b'{"_id": 7, "text": "x"}\n{"_id": "7", "text": "y"}\n',
         "c.jsonl, line 2: _id: expected an id that no other row has, got '7', which c.jsonl, line 1 has",
         skipped=None),
    Case("an id in two files", "folder", {"a.jsonl": GOOD, "b.jsonl": GOOD},
         "b.jsonl, line 1: _id: expected an id that no other row has, got 'a', which a.jsonl, line 1 has",
         skipped=None),
    Case("no rows", "c.jsonl", b"\n", "c.jsonl: expected rows, got none", skipped=None),
    Case("a gzip file that is cut off", "c.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-8],
         "c.jsonl.gz, after line 1: expected a whole gzip file, got: Compressed file ended before the end-of-stream "
         "marker was reached", skipped=None),
    Case("a file that is no gzip", "c.jsonl.gz", GOOD,
         "c.jsonl.gz, after line 0: expected a whole gzip file, got: Not a gzipped file (b'{\"')", skipped=None),
    Case("a TSV row without a tab", "c.tsv", b"a\twater\nbees\n",
         "c.tsv, line 2: expected 2 columns (_id, text), got 1"),
    Case("a TSV row with a column too many", "c.tsv", b"a\twater\nb\tbees\tmore\n",
         "c.tsv, line 2: expected 2 columns (_id, text), got 3"),
    Case("a TSV row that its header does not fit", "c.tsv", b"_id\ttitle\ttext\na\twater\tsea\nb\tbees\n",
         "c.tsv, line 3: expected 3 columns (_id, title, text), got 2"),
    Case("a TSV row with an empty id", "c.tsv", b"a\twater\n\tbees\n", f'c.tsv, line 2: {_ID} ""'),
    Case("a TSV header without the text field", "c.tsv", b"_id\tcontents\na\twater\n",
         "c.tsv, line 1: expected one column 'text', got the columns '_id', 'contents'", skipped=None),
    Case("invalid UTF-8 in a TSV file", "c.tsv", b"a\twater\nb\t\xe9\n",
         "c.tsv, line 2: expected UTF-8, got the byte 0xe9 at its byte 3"),
    Case("a Parquet file without the id field", "c.parquet", parquet({"id": ["a"], "text": ["water"]}),
         "c.parquet: expected one column '_id', got the columns 'id', 'text'", skipped=None),
    Case("a Parquet file without the title field that was asked for", "c.parquet",
         parquet({"_id": ["a"], "text": ["water"]}),
         "c.parquet: expected one column 'headline', got the columns '_id', 'text'", skipped=None,
         arguments=("--title-field", "headline")),
    Case("a Parquet file with decimals for ids", "c.parquet", parquet({"_id": [1.0], "text": ["water"]}),
         "c.parquet: _id: expected a column of strings or integers, got double", skipped=None),
    Case("a Parquet file with a null for an id", "c.parquet", parquet({"_id": ["a", None], "text": ["water", "bees"]}),
         f"c.parquet, row 2: {_ID} null"),
    Case("invalid UTF-8 in a Parquet file", "c.parquet", not_utf8,
         "c.parquet, row 2: text: expected UTF-8, got the byte 0xff at its byte 1"),
    Case("a file that is no Parquet", "c.parquet", GOOD,
         "c.parquet, after row 0: Parquet magic bytes not found in footer. Either the file is corrupted or this is not "
         "a parquet file.", skipped=None),
    Case("a file that is not there", "c.jsonl", None, "c.jsonl: no such file", skipped=None),
    Case("a file of another kind", "c.csv", b"a,water\n",
         f"--input c.csv: expected a folder or a file that ends in {_SUFFIXES}", skipped=None, status=2),
    Case("a folder with a file of another kind", "folder", {"a.jsonl": GOOD, "notes.txt": b""},
         f"folder: expected files that end in {_SUFFIXES}, got notes.txt", skipped=None, status=2),
    Case("an empty folder", "folder", {"sub/a.jsonl": GOOD},
         f"folder: expected files that end in {_SUFFIXES}, got none", skipped=None),
    Case("a split that a saved dataset lacks", "folder", {"dataset_dict.json": b'{"splits": ["test"]}'},
         "--split: expected one of 'test' (folder), got 'train'", skipped=None, status=2),
]  # fmt: skip


def block() -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    rows = [("input", "message", "exit status", "with `--on-error skip`")]
    for case in CASES:
        skip = "the same" if case.skipped is None else f"skips {case.skipped}"
        rows.append((case.what, f"`{cell(case.message)}`", str(case.status), skip))
    return "\n".join([BEGIN, "", table(rows), "", END])


main = partial(generated.main, __doc__, block)


if __name__ == "__main__":
    main()
