"""Rows as they are read from each kind of input, and what a good row is."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from splade_kernels.encoding import records
from splade_kernels.encoding.corpus import open_corpus
from splade_kernels.encoding.errors import DataError, UsageError
from splade_kernels.encoding.records import Fields

IDS, TITLES, TEXTS = ["7", "b", "c"], ["Sea", "", None], ["salt", "honey", ""]
EXPECTED = [("7", "Sea salt"), ("b", "honey"), ("c", "")]
COLUMNS = {"_id": IDS, "title": TITLES, "text": TEXTS}
LINES = [json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in zip(*COLUMNS.values(), strict=True)]


def read(path, *args, **kwargs) -> list[tuple[str, str]]:
    return [(row.id, row.text) for row in open_corpus(str(path), *args, **kwargs)]


def write(path, suffix) -> None:
    text = "\n".join(LINES) + "\n"
    if suffix == ".jsonl":
        path.write_text(text)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif suffix == ".tsv":
        rows = [COLUMNS, *zip(IDS, ["Sea", "", ""], TEXTS, strict=True)]
        path.write_text("".join("\t".join(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        pq.write_table(pa.table(COLUMNS), path)
    else:
        pa.feather.write_feather(pa.table(COLUMNS), path)


@pytest.mark.parametrize("suffix", records.READERS)
def test_each_suffix(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    write(path, suffix)
    corpus = open_corpus(str(path))
    found = list(corpus)
    assert [(row.id, row.text) for row in found] == EXPECTED
    first = 2 if suffix == ".tsv" else 1
    unit = "row" if suffix in (".parquet", ".arrow") else "line"
    assert [row.place for row in found] == [f"corpus{suffix}, {unit} {first + index}" for index in range(3)]
    assert corpus.identity == [{"name": f"corpus{suffix}", "size": path.stat().st_size}]
    assert corpus.fraction == 1.0
    assert read(path, limit=2) == EXPECTED[:2]


def test_a_suffix_in_capitals(tmp_path):
    write(tmp_path / "CORPUS.JSONL", ".jsonl")
    assert read(tmp_path / "CORPUS.JSONL") == EXPECTED


def test_integers_become_strings(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"_id": 7, "text": "x"}\n{"_id": -123456789012345678901234567890, "text": "y"}\n{"_id": 0, "text": "z"}\n'
    )
    assert [name for name, _ in read(path)] == ["7", "-123456789012345678901234567890", "0"]
    pq.write_table(pa.table({"_id": pa.array([7, 2**63], pa.uint64()), "text": ["x", "y"]}), tmp_path / "c.parquet")
    assert [name for name, _ in read(tmp_path / "c.parquet")] == ["7", str(2**63)]


def test_fields_by_name(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"docno": "a", "body": "x", "headline": "T", "title": "no", "text": "no"}\n{"docno": "b", "body": "y"}\n'
    )
    fields = Fields("docno", "body", "headline")
    assert read(path, fields) == [("a", "T x"), ("b", "y")]
    assert read(path, fields._replace(title="")) == [("a", "x"), ("b", "y")]


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    path = tmp_path / "c.jsonl"
    text = "\ufeff" + "\r\n".join([LINES[0], "", *LINES[1:], "  ", ""]) + "\r\n\n"
    path.write_bytes(text.encode())
    corpus = open_corpus(str(path))
    assert [(row.id, row.text) for row in corpus] == EXPECTED
    assert [row.number for row in corpus] == [1, 3, 4]
    path = tmp_path / "c.tsv"
    path.write_bytes("\ufeff_id\ttext\r\na\tx y\r\n\r\nb\tz".encode())
    assert read(path) == [("a", "x y"), ("b", "z")]


def test_no_line_ends_but_newlines(tmp_path):
    """U+2028 and others are line ends for ``str.splitlines`` only."""
    texts = ["a\u2028b", "a\u0085b", "a\x0bb"]
    path = tmp_path / "c.tsv"
    path.write_bytes("".join(f"{index}\t{text}\n" for index, text in enumerate(texts)).encode())
    assert [text for _, text in read(path)] == texts


def test_tsv_without_a_header(tmp_path):
    """Column 1 is the id, whatever it is called: here ``id``, where the id field is ``_id``. Quotes are text."""
    path = tmp_path / "c.tsv"
    path.write_text('id\ttext\na\t"quoted" text\n')
    assert read(path) == [("id", "text"), ("a", '"quoted" text')]
    assert read(path, Fields(id="id")) == [("a", '"quoted" text')]


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_LINE_BYTES", 1 << 20)
    path = tmp_path / "c.jsonl"
    path.write_text(LINES[0] + "\n" + '{"x": "' + "y" * (16 << 20) + '"}\n' + LINES[1] + "\n")
    tracemalloc.start()
    assert read(path, on_error="skip") == EXPECTED[:2]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    with pytest.raises(DataError, match=r"c\.jsonl, line 2: expected a line of at most 1 MiB, got a longer one"):
        read(path)


def test_a_large_row_group_is_not_read_whole(tmp_path):
    """32 MiB of text in one row group, of which Arrow's memory pool holds a few at a time."""
    path = tmp_path / "c.parquet"
    texts = [f"{index:x}" * 200 for index in range(1 << 24, (1 << 24) + 40_000)]
    names = [str(index) for index in range(len(texts))]
    pq.write_table(
        pa.table({"_id": names, "text": texts}),
        path,
        row_group_size=len(texts),
        use_dictionary=False,
        compression="none",
    )
    del texts, names
    before, peak = pa.total_allocated_bytes(), 0
    for row in open_corpus(str(path)):
        if row.number % 500 == 0:
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert row.number == 40_000
    assert peak < path.stat().st_size / 4


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_kinds_of_string_columns(tmp_path, kind):
    texts = pa.array(["x", "y", "x"]).cast(kind) if kind != pa.string_view() else pa.array(["x", "y", "x"], kind)
    table = pa.table({"_id": [1, 2, 3], "text": texts, "other": [[1]] * 3})
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "c.arrow") == [("1", "x"), ("2", "y"), ("3", "x")]


def test_an_arrow_file_that_is_cut_off(tmp_path):
    write(tmp_path / "c.arrow", ".arrow")
    whole = (tmp_path / "c.arrow").read_bytes()
    (tmp_path / "c.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"^c\.arrow, after row 0: "):
        read(tmp_path / "c.arrow")


def test_a_parquet_file_that_is_damaged(tmp_path):
    """The footer is whole, the pages are not."""
    path = tmp_path / "c.parquet"
    names = [str(index) for index in range(50_000)]
    pq.write_table(pa.table({"_id": names, "text": names}), path, row_group_size=10_000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^c\.parquet, after row \d+: "):
        read(path)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "10.jsonl").write_text(LINES[1])
    (tmp_path / "2.jsonl").write_text(LINES[2])
    pq.write_table(pa.table({name: values[:1] for name, values in COLUMNS.items()}), tmp_path / "01.parquet")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/3.jsonl").write_text("no JSON")
    for other in (".hidden.jsonl", "_SUCCESS"):
        (tmp_path / other).write_text("no JSON")
    corpus = open_corpus(str(tmp_path))
    assert [(row.id, row.text) for row in corpus] == EXPECTED
    assert [source["name"] for source in corpus.identity] == ["01.parquet", "10.jsonl", "2.jsonl"]
    assert corpus.fraction == 1.0


def test_what_datasets_saves(tmp_path):
    one = datasets.Dataset.from_dict(COLUMNS)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one") == EXPECTED
    datasets.DatasetDict({"train": one.select([0]), "test": one.select([2, 1])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two") == EXPECTED[:1]
    assert read(tmp_path / "two", split="test") == [EXPECTED[2], EXPECTED[1]]
    with pytest.raises(UsageError, match=r"--split: expected one of 'train', 'test' .*, got 'dev'"):
        read(tmp_path / "two", split="dev")
    (shard,) = (tmp_path / "one").glob("data-00001-*")
    shard.unlink()
    with pytest.raises(DataError, match=r"state\.json: expected the files that it names, got no data-00001"):
        read(tmp_path / "one")


@pytest.fixture
def hub(monkeypatch):
    """``load_dataset`` without a network: it streams COLUMNS, and remembers what it was asked for."""
    asked = []

    def load_dataset(name, configuration=None, **options):
        asked.append((name, configuration, options))
        if name == "nobody/nothing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub")
        return datasets.Dataset.from_dict(COLUMNS | {"other": [1, 2, 3]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_dataset_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus("BeIR/scifact:corpus", split="corpus")
    found = list(corpus)
    assert hub == [("BeIR/scifact", "corpus", {"split": "corpus", "streaming": True})]
    assert [(row.id, row.text) for row in found] == EXPECTED
    assert found[1].place == "BeIR/scifact:corpus (corpus), row 2"
    assert corpus.identity == [{"name": "BeIR/scifact:corpus (corpus)", "size": None}]
    assert corpus.fraction is None
    assert list(open_corpus("squad", limit=2))[1].id == "b"
    assert hub[1] == ("squad", None, {"split": "train", "streaming": True})
    with pytest.raises(DataError, match=r"^squad \(train\): expected one column 'docno', got the columns '_id', "):
        read("squad", Fields(id="docno"))
    with pytest.raises(
        DataError, match=r"^nobody/nothing: no such file, and no dataset of the hub: DatasetNotFoundError"
    ):
        open_corpus("nobody/nothing")


def test_an_existing_path_wins_over_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BeIR").mkdir()
    (tmp_path / "BeIR/scifact:corpus").mkdir()
    (tmp_path / "BeIR/scifact:corpus/a.jsonl").write_text(LINES[1])
    assert read("BeIR/scifact:corpus") == EXPECTED[1:2]
    assert not hub


def test_the_fraction_grows_with_what_has_been_read(tmp_path):
    """Also of a packed file, and with a limit that ends earlier."""
    lines = "".join(f'{{"_id": {index}, "text": "{index:x} {"salt" * 20}"}}\n' for index in range(20_000))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
    (tmp_path / "c.jsonl").write_text(lines)
    for name in ("c.jsonl", "c.jsonl.gz"):
        corpus = open_corpus(str(tmp_path / name))
        fractions = [corpus.fraction for row in corpus if row.number % 4000 == 0]
        for index, fraction in enumerate(fractions, 1):
            assert fraction == pytest.approx(index / 5, abs=0.1)
    corpus = open_corpus(str(tmp_path / "c.jsonl"), limit=1000)
    assert [corpus.fraction for row in corpus if row.number % 500 == 0] == [0.5, 1.0]
