"""What holds for every format: names, bytes, memory, and the file system; and the command."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from splade_kernels.cli import app
from splade_kernels.encoding.errors import DataError, UsageError
from splade_kernels.exporting import export as exporting
from splade_kernels.exporting.export import export
from splade_kernels.exporting.formats import FORMATS
from tests.exporting.outputs import Encoded, random_rows, write_output

ROOT = Path(__file__).parents[2]
# More rows than a reader's batch of 4,096.
ROWS = 5000


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Encoded:
    return write_output(tmp_path_factory.mktemp("export") / "encoded", random_rows(ROWS, terms=6))


def contents(path: Path) -> dict[str, bytes]:
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_corpus_is_the_same_bytes(name: str, encoded, tmp_path) -> None:
    """However it is cut into parts."""
    other = write_output(tmp_path / "other", random_rows(ROWS, terms=6), rows_per_part=1700)
    first = export(encoded.folder, name, tmp_path / "first", names="ids")
    second = export(other.folder, name, tmp_path / "second", names="ids")
    assert first == second
    assert first.rows == ROWS
    assert contents(tmp_path / "first") == contents(tmp_path / "second") != {}


@pytest.mark.parametrize("name", FORMATS)
def test_an_existing_output_is_refused_and_left(name: str, encoded, tmp_path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(UsageError, match="--output: expected a path that does not exist, got .*out"):
        export(encoded.folder, name, path, names="ids")
    assert contents(tmp_path) == {"out": b"mine"}
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--output"):
        export(encoded.folder, name, path, names="ids")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_export_that_fails(name: str, error, encoded, tmp_path, monkeypatch) -> None:
    write = exporting._write

    def fails(*arguments) -> None:
        write(*arguments)
        assert [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
        raise error

    monkeypatch.setattr(exporting, "_write", fails)
    expected = DataError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        export(encoded.folder, name, tmp_path / "out", names="ids")
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert str(caught.value) == f"{tmp_path / 'out'}: No space left on device"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_an_error_of_one_line(encoded, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(exporting, "_write", lambda *arguments: Path("/dev/full").write_bytes(b"x" * 10**6))
    with pytest.raises(DataError, match=r"out: No space left on device$"):
        export(encoded.folder, "npz", tmp_path / "out")


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.either])
def test_formats_of_integer_terms_refuse_tokens(name: str, encoded, tmp_path) -> None:
    with pytest.raises(UsageError, match=f"--tokens: expected --ids for {name}"):
        export(encoded.folder, name, tmp_path / "out", names="tokens")


def test_unknown_formats_are_refused(encoded, tmp_path) -> None:
    with pytest.raises(UsageError, match="--format: expected one of anserini, pisa, .*, got 'lucene'"):
        export(encoded.folder, "lucene", tmp_path / "out")


def test_more_tokens_than_seismic_takes_and_ids_that_opensearch_folds_are_said(tmp_path) -> None:
    count = 65_536
    rows = [dict.fromkeys(range(first, first + 128), 1.0) for first in range(0, count, 128)]
    encoded = write_output(tmp_path / "encoded", rows, vocabulary=count)
    seismic = export(encoded.folder, "seismic", tmp_path / "seismic", names="ids").warnings
    assert seismic == ["65536 distinct tokens: SeismicIndex takes 65535, SeismicIndexLV more"]
    opensearch = export(encoded.folder, "opensearch", tmp_path / "opensearch").warnings
    assert opensearch == ["OpenSearch's sparse_vector folds ids modulo 32768: different terms become one"]
    fewer = write_output(tmp_path / "fewer", rows[:256], vocabulary=count)
    for name in ("seismic", "opensearch"):
        assert export(fewer.folder, name, tmp_path / f"fewer-{name}", names="ids").warnings == []


def run(*arguments: object) -> int:
    try:
        return app.run(["export", *map(str, arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)


def test_the_command_prints_the_counts(encoded, tmp_path, capsys) -> None:
    output = tmp_path / "new" / "out.ciff"
    assert run(encoded.folder, "--format", "ciff", "--output", output, "--ids", "--scale", "200") == 0
    done = export(encoded.folder, "ciff", tmp_path / "again", names="ids", scale=200)
    assert done.clipped > 0
    out, err = capsys.readouterr()
    assert out == f"rows: 5000\nterms: {done.terms}\ndropped: {done.dropped}\nclipped: {done.clipped}\n"
    assert err == f"splade-kernels: warning: {done.clipped} weights were clipped to 255\n"
    assert contents(output) == contents(tmp_path / "again")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--format", "anserini", "--scale", "1", "--ids"], 2, "--scale: expected more than 1"),
        (["--format", "qdrant", "--tokens"], 2, "--tokens: expected --ids for qdrant"),
        (["--format", "anserini"], 1, "the tokenizer of '/no/model'"),
    ],
)
def test_the_status_is_2_for_options_and_1_for_data(arguments, status: int, said: str, encoded, tmp_path, capsys):
    assert run(encoded.folder, "--output", tmp_path / "out", *arguments) == status
    err = capsys.readouterr().err
    assert err.startswith(f"splade-kernels: {said}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_output_is_status_1(tmp_path, capsys) -> None:
    assert run(tmp_path, "--format", "npz", "--output", tmp_path / "out") == 1
    assert "expected the output of `splade-kernels encode`" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--format", "lucene"], ["--format", "npz", "--scale", "much"], []])
def test_a_wrong_command_line_is_status_2(arguments: list[str], encoded, tmp_path) -> None:
    assert run(encoded.folder, "--output", tmp_path / "out", *arguments) == 2


@pytest.fixture(scope="module")
def small_and_large(tmp_path_factory) -> list[Path]:
    """Two outputs, the second of ten times the rows."""
    folder, found = tmp_path_factory.mktemp("memory"), []
    for count in (16_000, 160_000):
        rows = random_rows(1000, 3000, terms=40) * (count // 1000)
        ids = [f"d{row:07d}" for row in range(count)]
        found.append(write_output(folder / str(count), rows, ids, vocabulary=3000, rows_per_part=8000).folder)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc/self/status")
@pytest.mark.parametrize("name", ["elasticsearch", "ciff", "pisa", "npz"])
def test_the_memory_does_not_grow_with_the_corpus(name: str, small_and_large: list[Path], tmp_path) -> None:
    """Of a process of its own (getrusage would count its parent): beyond what it imports, 4 MiB of noise more."""
    script = (
        "import sys, pathlib\n"
        "from splade_kernels.exporting import inverted\n"
        "inverted.POSTINGS_HELD = 1 << 18\n"
        "from splade_kernels.exporting.export import export\n"
        "def peak():\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "export(pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), names='ids')\n"
        "print(peak() - before)"
    )
    grown = []
    for folder in small_and_large:
        command = [sys.executable, "-c", script, str(folder), name, str(tmp_path / folder.name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
        grown.append(int(done.stdout) / 1024)
    assert grown[1] < grown[0] + 4, grown
