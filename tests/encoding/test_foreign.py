"""Files in the output that this run did not make: none is taken for a part, and none is deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.encoding.models import encode, model_folder, parts
from tests.encoding.test_resume import synthetic


def again(corpus: Path, output: Path, *arguments: object, model: Path | None = None) -> int:
    return encode("--input", corpus, "--output", output, "--rows-per-part", 5, "--threads", 1, *arguments, model=model)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and its complete output of four parts."""
    folder = tmp_path_factory.mktemp("foreign")
    corpus = synthetic(folder / "corpus.jsonl", 20)
    assert again(corpus, folder / "out", "--quiet") == 0
    return corpus, folder / "out"


@pytest.fixture
def corpus(made: tuple[Path, Path]) -> Path:
    return made[0]


@pytest.fixture
def output(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "out"))


def test_a_manifest_of_something_else_is_never_taken(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text('{"format_version": 2, "header": {}}')
    for options in ((), ("--overwrite",)):
        assert again(corpus, tmp_path / "out", *options) == 2
        assert "manifest.json: expected that of an output of this command" in capsys.readouterr().err
    assert manifest.read_text() == '{"format_version": 2, "header": {}}'


@pytest.mark.parametrize("what", ["a file of another kind", "a copy of another part"])
def test_what_is_only_called_like_a_part_is_refused_before_anything_is_deleted(
    corpus: Path, output: Path, what: str, capsys: pytest.CaptureFixture
) -> None:
    if what == "a copy of another part":
        shutil.copy(output / "part-00000.parquet", output / "part-00009.parquet")
    else:
        (output / "part-00009.parquet").write_bytes(b"something")
    before = parts(output)
    for options in ((), ("--overwrite",)):
        assert again(corpus, output, *options) == 2
        assert "part-00009.parquet: expected a part of this output, got another file" in capsys.readouterr().err
    assert parts(output) == before


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "a part missing"])
def test_a_part_of_another_model_or_of_other_options_is_refused(
    corpus: Path, output: Path, tmp_path: Path, missing: bool, capsys: pytest.CaptureFixture
) -> None:
    for number, (options, model) in enumerate([((), model_folder(1)), (("--max-active-dims", 3), None)]):
        other = tmp_path / f"other-{number}"
        assert again(corpus, other, "--quiet", *options, model=model) == 0
        folder = Path(shutil.copytree(output, tmp_path / f"mixed-{number}"))
        shutil.copy(other / "part-00001.parquet", folder)
        if missing:
            (folder / "part-00000.parquet").unlink()
        assert again(corpus, folder) == 2
        assert "part-00001.parquet: expected a part of this output, got one of another" in capsys.readouterr().err


def test_other_hash_files_stay(corpus: Path, output: Path) -> None:
    (output / "ids/part-notes.u64").write_text("mine")
    assert again(corpus, output, "--overwrite", "--quiet") == 0
    assert (output / "ids/part-notes.u64").read_text() == "mine"


def test_a_run_that_made_no_part_is_begun_anew(tmp_path: Path) -> None:
    """With the line mended, which changes the size of the file, and with other options."""
    good = {"_id": "a", "text": "the moon"}, {"_id": "b", "text": "the sea"}
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps(good[0]) + "\n{oops\n")
    assert again(path, tmp_path / "out") == 1
    path.write_text("".join(json.dumps(row) + "\n" for row in good))
    assert again(path, tmp_path / "out", "--batch-tokens", 64, "--quiet") == 0
