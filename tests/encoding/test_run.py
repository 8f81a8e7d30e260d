"""A run in this process: what the output holds, what is refused, and what is left when the disk is full."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from splade_kernels.encoding import duplicates, files, progress
from splade_kernels.encoding import run as runs
from splade_kernels.encoding.corpus import open_corpus
from splade_kernels.encoding.errors import DataError
from splade_kernels.encoding.output import SCHEMA, open_output
from splade_kernels.encoding.parts import read_hashes
from splade_kernels.encoding.progress import Progress
from tests.encoding.models import ROOT, command, encode, environment, model_folder, parts, rows
from tests.st_models import TEXTS

ROWS = [
    {"_id": f"d{index}", "title": "rust" if index % 5 == 0 else "", "text": text} for index, text in enumerate(TEXTS)
]
ROWS[3]["text"] = " \n"
FULL = [f"{row['title']} {row['text']}".strip() for row in ROWS]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model_folder()
    return path


@pytest.fixture
def output(corpus, tmp_path):
    """Of ``corpus`` in parts of 10 rows: 10, 10, 10 and 2."""
    assert encode("--input", corpus, "--output", tmp_path / "out", "--rows-per-part", 10, "--quiet") == 0
    return tmp_path / "out"


def again(corpus, output, *arguments) -> int:
    return encode("--input", corpus, "--output", output, "--rows-per-part", 10, *arguments)


def dense(output) -> torch.Tensor:
    found = torch.zeros(len(ROWS), json.loads((output / "manifest.json").read_text())["vocabulary_size"])
    for row, record in enumerate(rows(output)):
        found[row, record["indices"]] = torch.tensor(record["values"])
    return found


def test_the_output_is_what_the_stock_model_computes(output):
    from sentence_transformers import SparseEncoder

    assert [row["id"] for row in rows(output)] == [row["_id"] for row in ROWS]
    stock = SparseEncoder(str(model_folder()), device="cpu").encode_document(FULL).to_dense()
    stock[3] = 0
    torch.testing.assert_close(dense(output), stock)
    assert all(row["indices"] == sorted(set(row["indices"])) for row in rows(output))


def test_the_folder(output, capsys):
    manifest = json.loads((output / "manifest.json").read_text())
    names = [f"part-0000{number}.parquet" for number in range(4)]
    assert sorted(path.name for path in output.iterdir()) == ["ids", "manifest.json", *names]
    assert [part["file"] for part in manifest["parts"]] == names
    assert [part["rows"] for part in manifest["parts"]] == [10, 10, 10, 2]
    for part in manifest["parts"]:
        assert hashlib.sha256((output / part["file"]).read_bytes()).hexdigest() == part["sha256"]
        assert pq.read_schema(output / part["file"]).equals(SCHEMA)
    counts = {name: manifest[name] for name in ("rows", "empty", "skipped", "truncated", "complete", "format_version")}
    assert counts == {"rows": 32, "empty": 1, "skipped": 0, "truncated": 0, "complete": True, "format_version": 1}
    assert manifest["options"]["input"].endswith("corpus.jsonl")
    assert manifest["options"]["fields"] == {"id": "_id", "text": "text", "title": "title"}
    assert manifest["resolved"]["input"] == [
        {"name": "corpus.jsonl", "size": (output.parent / "corpus.jsonl").stat().st_size}
    ]
    assert manifest["resolved"]["max_length"] == 64
    assert manifest["versions"]["torch"] == torch.__version__
    assert len(manifest["model"]["sha256"]) == len(manifest["tokenizer_sha256"]) == 64
    assert open_output(output).rows == 32
    expected = [hashlib.blake2b(row["_id"].encode(), digest_size=8).digest() for row in ROWS]
    assert (output / "ids/part-00001.u64").read_bytes() == b"".join(expected[10:20])
    assert read_hashes(output, 1).tolist() == duplicates.id_hashes([row["_id"] for row in ROWS[10:20]]).tolist()
    assert capsys.readouterr().out == ""  # --quiet


def test_the_summary_is_one_line(corpus, output, capsys):
    terms = sum(len(row["indices"]) for row in rows(output)) / 32
    assert again(corpus, output) == 0
    said = f"nothing to do: 32 rows (1 empty, 0 skipped, 0 truncated), {terms:.1f} terms a row, in {output}\n"
    assert capsys.readouterr().out == said
    (output / "part-00002.parquet").unlink()
    assert again(corpus, output) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"32 rows (1 empty, 0 skipped, 0 truncated), {terms:.1f} terms a row, ")
    assert f" tokens/s, in {output}\n" in out
    assert " 0 tokens/s" not in out


def test_truncated_rows_are_counted(corpus, tmp_path):
    assert again(corpus, tmp_path / "out", "--max-length", 8) == 0
    lengths = [len(text.split()) for text in FULL]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["truncated"] >= sum(length > 8 for length in lengths)
    assert manifest["resolved"]["max_length"] == 8


def test_the_same_rows_are_the_same_bytes_whatever_they_are_read_from(corpus, output, tmp_path):
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert again(tmp_path / "rows.parquet", tmp_path / "other") == 0
    assert parts(tmp_path / "other") == parts(output)
    assert again(corpus, tmp_path / "short", "--limit", 20) == 0
    assert parts(tmp_path / "short").items() <= parts(output).items()
    assert len(parts(tmp_path / "short")) == 4


def test_other_options_are_passed_on(corpus, tmp_path):
    assert again(corpus, tmp_path / "out", "--max-active-dims", 5, "--min-weight", 0.5) == 0
    found = rows(tmp_path / "out")
    assert max(len(row["indices"]) for row in found) == 5
    assert min(min(row["values"]) for row in found if row["values"]) >= 0.5
    resolved = json.loads((tmp_path / "out/manifest.json").read_text())["resolved"]
    assert (resolved["max_active_dims"], resolved["min_weight"]) == (5, 0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--rows-per-part", 0), "--rows-per-part: expected at least 1, got 0"),
        (("--limit", 0), "--limit: expected at least 1, got 0"),
        (("--threads", -1), "--threads: expected at least 1, got -1"),
        (("--max-length", 65), "max_length: expected more than the 2 special tokens and at most 64"),
        (("--device", "tpu"), "device: expected auto, cpu, cuda or cuda:i, got 'tpu'"),
        (("--prompt-name", "nope"), "prompt_name: expected one of"),
    ],
)
def test_wrong_options_are_usage_errors_and_leave_nothing(corpus, tmp_path, capsys, arguments, message):
    assert encode("--input", corpus, "--output", tmp_path / "deep/out", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"splade-kernels: {message}")
    assert not (tmp_path / "deep/out").exists()


def test_a_model_that_is_not_there(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert encode("--input", corpus, "--output", tmp_path / "out", model=tmp_path / "nothing") == 1
    err = capsys.readouterr().err
    assert f"splade-kernels: {tmp_path}/nothing: cannot be loaded as a SparseEncoder: " in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(corpus, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    for more in ((), ("--overwrite",)):
        assert encode("--input", corpus, "--output", tmp_path / "out", *more) == 2
        said = capsys.readouterr().err
        assert "expected an empty folder or an output of this command, got thesis.tex and no manifest.json" in said
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
    (tmp_path / "out/manifest.json").write_text('{"name": "a web application"}')
    assert encode("--input", corpus, "--output", tmp_path / "out", "--overwrite") == 2
    assert len(os.listdir(tmp_path / "out")) == 2
    assert encode("--input", corpus, "--output", corpus) == 2
    assert "expected a folder, got a file" in capsys.readouterr().err


def test_an_empty_folder_is_taken(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    assert again(corpus, tmp_path / "out") == 0


def test_overwrite_deletes_what_the_command_wrote_only(corpus, output):
    for name in (".part-00001.parquet.tmp", "ids/.part-00001.u64.tmp", ".manifest.json.tmp"):
        (output / name).write_bytes(b"left by a kill")
    kept = ["notes.txt", "part-7.parquet", "part-00009.parquet.bak", "ids/notes.txt"]
    for name in kept:
        (output / name).write_bytes(b"mine")
    assert again(corpus, output, "--overwrite", "--limit", 10) == 0
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert found == {*kept, "manifest.json", "part-00000.parquet", "ids/part-00000.u64"}


def test_a_foreign_file_of_a_parts_name_is_not_touched(corpus, output, capsys):
    (output / "part-00009.parquet").write_bytes(b"mine")
    for more in ((), ("--overwrite",)):
        assert again(corpus, output, *more) == 2
        assert "part-00009.parquet: expected a part of this output, got another file" in capsys.readouterr().err
    assert (output / "part-00009.parquet").read_bytes() == b"mine"


def test_overwrite_loses_nothing_where_the_new_run_cannot_begin(corpus, output):
    before = parts(output)
    assert again(corpus, output, "--overwrite", "--max-length", 1000) == 2
    assert parts(output) == before


def test_another_process_holds_the_folder(corpus, output, capsys):
    descriptor = os.open(output, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert again(corpus, output) == 2
    assert capsys.readouterr().err == f"splade-kernels: {output}: another process is writing to it\n"
    os.close(descriptor)
    assert again(corpus, output) == 0


def test_a_file_system_without_locks(corpus, output, capsys, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert again(corpus, output) == 0
    assert "cannot be locked (No locks available): let no other process write to it" in capsys.readouterr().err


def test_a_full_disk_leaves_whole_parts(corpus, output, tmp_path, capsys, monkeypatch):
    """The third part does not fit: an error of the device in the middle of its file."""
    whole, write = parts(output), files.write_whole

    def on_a_small_disk(path, content):
        def fill(file):
            if path.name == "part-00002.parquet":
                file.write(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            content(file)

        write(path, fill)

    monkeypatch.setattr("splade_kernels.encoding.parts.write_whole", on_a_small_disk)
    small = tmp_path / "small"
    assert again(corpus, small) == 1
    assert capsys.readouterr().err == (
        f"splade-kernels: {small}/part-00002.parquet: cannot be written: No space left on device\n"
    )
    left = parts(small)
    assert left.pop("ids/part-00002.u64")
    assert left == {name: content for name, content in whole.items() if "-00000." in name or "-00001." in name}
    assert not list(small.rglob("*.tmp"))
    assert json.loads((small / "manifest.json").read_text())["complete"] is False
    with pytest.raises(DataError, match="whose encoding has not ended"):
        open_output(small)
    monkeypatch.undo()
    assert again(corpus, small) == 0
    assert parts(small) == whole


_ON_A_SMALL_DISK = """
mount -t tmpfs -o size=256k tmpfs "$1" || exit 99
shift
"$@"
status=$?
ls -a "$OUT" "$OUT/ids"
exit $status
"""


def test_a_file_system_that_is_full(tmp_path):
    """A real one of 256 KiB, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words, choose = " ".join(TEXTS).split(), random.Random(0)
    lines = (json.dumps({"_id": str(index), "text": " ".join(choose.sample(words, 40))}) for index in range(1000))
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    out = disk / "out"
    arguments = ("--input", tmp_path / "c.jsonl", "--output", out, "--rows-per-part", 100)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", _ON_A_SMALL_DISK, "sh", str(disk), *command(*arguments)],
        env=environment(OUT=str(out)), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr}")
    assert done.returncode == 1, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("splade-kernels: ")]
    assert said.endswith(": cannot be written: No space left on device")
    assert "part-00000.parquet" in done.stdout
    assert ".tmp" not in done.stdout


def test_weights_that_are_not_finite_name_the_row(corpus, tmp_path, capsys, monkeypatch):
    from splade_kernels.encoding.encoder import WeightError

    def fails(texts):
        raise WeightError(2, "expected finite weights, got nan for vocabulary id 7")

    real = runs._encoded
    monkeypatch.setattr(runs, "_encoded", lambda encoder, rows: real(fails, rows))
    assert again(corpus, tmp_path / "out") == 1
    assert "corpus.jsonl, line 3: 'd2': expected finite weights, got nan" in capsys.readouterr().err


def test_equal_hashes_of_different_ids_are_no_duplicates(corpus, output, tmp_path, monkeypatch):
    """Every id has one of three hashes."""
    monkeypatch.setattr(duplicates, "id_hash", lambda name: int(name[1:]) % 3)
    assert again(corpus, tmp_path / "out") == 0
    assert [row["id"] for row in rows(tmp_path / "out")] == [row["_id"] for row in ROWS]
    corpus.write_text(corpus.read_text() + json.dumps(ROWS[30] | {"text": "x"}) + "\n")
    found = open_corpus(str(corpus))
    with pytest.raises(DataError, match=r"line 33: _id: .* got 'd30', which corpus\.jsonl, line 31 has"):
        duplicates.check_duplicates(np.array([0], np.uint64), list(found)[30:], found.again())


def test_seen_finds_what_sorting_all_finds():
    generator = np.random.default_rng(0)
    seen, before = duplicates.Seen(), np.empty(0, np.uint64)
    for size in [5, 1, 0, 40, 1, 1, 1, 200, 3, 3, 1000, 7]:
        hashes = generator.integers(0, 3000, size, dtype=np.uint64)
        joined = np.concatenate([before, hashes])
        values, counts = np.unique(joined, return_counts=True)
        expected = np.intersect1d(values[counts > 1], hashes)
        assert seen.add(hashes).tolist() == expected.tolist()
        before = joined
        lengths = [len(run) for run in seen._runs]
        assert sum(lengths) == len(before)
        assert all(one > 2 * two for one, two in itertools.pairwise(lengths))


def test_lines_where_there_is_no_terminal(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert again(corpus, tmp_path / "out") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("encode: 100.0%: 32 rows, ")
    for words in (" tokens/s, ", " active terms a row, ", "ETA 0:00:00"):
        assert words in lines[-1]
    assert again(corpus, tmp_path / "other", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_the_time_that_remains_counts_from_where_the_run_went_on(monkeypatch):
    clock = iter([100.0, *[130.0] * 5])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = Progress(quiet=True)
    shown.start(0.5)
    shown.part(rows=10, terms=50, fraction=0.75)
    assert shown.remaining == pytest.approx(30.0)


def test_a_bar_on_a_terminal():
    """A pseudo-terminal: rich draws on it."""
    code = (
        "import os, pty, sys\n"
        "def read(descriptor):\n    return os.read(descriptor, 1024)\n"
        "program = 'import time\\nfrom splade_kernels.encoding.progress import Progress\\n"
        "with Progress(False) as shown:\\n    shown.start(0.0); shown.batch(3, 99); shown.part(3, 12, 0.5)\\n"
        '    shown.warn("[bold] is text")\'\n'
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-c', program], read)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(TERM="xterm", COLUMNS="120"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 rows" in done.stdout
    assert "4.0 active terms a row" in done.stdout
    assert "[bold] is text" in done.stdout
