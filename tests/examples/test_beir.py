"""Reading a folder in BEIR's layout: what is relevant, and that a bad line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.beir import InputError, read_beir


def test_whole_collections_are_read(data: Path) -> None:
    squad, scifact = (read_beir(data / name) for name in ("squad", "scifact"))
    counts = {split: (len(queries), len(squad.pairs(split))) for split, queries in squad.relevant.items()}
    assert (len(squad.corpus), len(squad.queries)) == (2067, 10570)
    assert counts == {"train": (7398, 7398), "dev": (740, 740), "test": (2432, 2432)}
    counts = {split: (len(queries), len(scifact.pairs(split))) for split, queries in scifact.relevant.items()}
    assert (len(scifact.corpus), len(scifact.queries)) == (5183, 1109)
    assert counts == {"train": (809, 919), "test": (300, 339)}
    title, text = "1973 oil crisis", "The 1973 oil crisis began in October 1973"
    assert squad.corpus["1973_oil_crisis#0"].startswith(f"{title} {text}")


CORPUS = '{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "text": "two"}\n{"_id": "d3", "text": ""}\n'
QUERIES = '{"_id": "q1", "text": "first"}\n\n{"_id": "q2", "text": "second"}\n'
HEADER = "query-id\tcorpus-id\tscore\n"


def write_beir(folder: Path, files: dict[str, str]) -> Path:
    (folder / "qrels").mkdir()
    good = {
        "corpus.jsonl": CORPUS,
        "queries.jsonl": QUERIES,
        "qrels/train.tsv": HEADER + "q1\td1\t1\nq1\td2\t0\n",
        "qrels/test.tsv": HEADER + "q2\td1\t0\nq2\td2\t2\n",
    }
    for name, content in {**good, **files}.items():
        (folder / name).write_text(content)
    return folder


def test_scores_above_zero_are_relevant(tmp_path: Path) -> None:
    beir = read_beir(write_beir(tmp_path, {}))
    assert beir.corpus == {"d1": "T one", "d2": "two", "d3": ""}
    assert beir.relevant == {"train": {"q1": ["d1"]}, "test": {"q2": ["d2"]}}
    assert beir.pairs("train") == [("first", "T one")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", CORPUS + "{oops\n", "corpus.jsonl:4: expected a JSON object"),
        ("corpus.jsonl", CORPUS + "[1]\n", "corpus.jsonl:4: expected a JSON object, got list"),
        (
            "corpus.jsonl",
            CORPUS + '{"_id": "d1", "text": "x"}\n',
            "corpus.jsonl:4: '_id' 'd1' stands on an earlier line",
        ),
        ("corpus.jsonl", '{"_id": 7, "text": "x"}\n', "corpus.jsonl:1: '_id': expected a non-empty string, got 7"),
        (
            "corpus.jsonl",
            '{"_id": "d1", "title": 1, "text": "x"}\n',
            "corpus.jsonl:1: 'title': expected a string, got 1",
        ),
        ("queries.jsonl", QUERIES + '{"_id": "q3"}\n', "queries.jsonl:4: 'text': expected a string, got None"),
        ("qrels/train.tsv", "q1\td1\t1\n", "train.tsv:1: expected the header"),
        ("qrels/train.tsv", "", "train.tsv:1: expected the header"),
        ("qrels/train.tsv", HEADER + "q1\td1\n", "train.tsv:2: expected 3 fields separated by tabs, got 2"),
        ("qrels/train.tsv", HEADER + "q1\td1\t1\nq9\td1\t1\n", "train.tsv:3: 'q9' is not an '_id' of queries.jsonl"),
        ("qrels/train.tsv", HEADER + "q1\td9\t1\n", "train.tsv:2: 'd9' is not an '_id' of corpus.jsonl"),
        ("qrels/train.tsv", HEADER + "q1\td1\tyes\n", "train.tsv:2: score: expected an integer, got 'yes'"),
        (
            "qrels/train.tsv",
            HEADER + "q1\td1\t1\nq1\td1\t1\n",
            "train.tsv:3: 'q1' and 'd1' are judged on an earlier line",
        ),
        ("qrels/train.tsv", HEADER + "q1\td3\t1\n", "train.tsv:2: the text of 'q1' or of 'd3' is empty"),
        ("qrels/train.tsv", HEADER + "q1\td1\t0\n", "train.tsv: expected at least one pair with a score above 0"),
        ("qrels/test.tsv", HEADER + "q1\td2\t1\n", "test.tsv:2: query 'q1' belongs to the split 'train' as well"),
    ],
)
def test_a_bad_line_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_beir(write_beir(tmp_path, {name: content}))
    assert str(raised.value).startswith(f"{tmp_path / name}"[: -len(Path(name).name)] + message)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    write_beir(tmp_path, {})
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        read_beir(tmp_path)
