"""A run that is killed, stopped or refused, and what the same command does next."""

from __future__ import annotations

import itertools
import json
import random
import signal
import time
from pathlib import Path

import pytest

from splade_kernels.encoding.stopping import stoppable
from tests.encoding.models import ROOT, encode, model_folder, needs_squad, parts
from tests.encoding.processes import _CONTEXT, Running, start
from tests.st_models import TEXTS

DATA = ROOT.parent / "shared/data"


def synthetic(path: Path, rows: int) -> Path:
    words, choose = " ".join(TEXTS).split(), random.Random(0)
    texts = (" ".join(choose.sample(words, choose.randint(0, 40))) for _ in range(rows))
    path.write_text("".join(json.dumps({"_id": index, "text": text}) + "\n" for index, text in enumerate(texts)))
    return path


def manifest(output: Path) -> dict:
    """Without where it lies."""
    found = json.loads((output / "manifest.json").read_text())
    del found["options"]["output"]
    return found


def count(output: Path) -> int:
    return len(list(output.glob("part-*.parquet")))


def kill_and_resume(arguments: list, output: Path, kills: int, log: Path) -> int:
    """Kill the command so many times by SIGKILL, each time a random moment after it has made a part or two; then let
    it end. Returns how many temporary files it left."""
    choose, left = random.Random(0), 0
    for _ in range(kills):
        before = count(output)
        running = start(log, *arguments, "--output", output)
        running.until(lambda before=before: count(output) > before)
        time.sleep(choose.uniform(0, 0.2))
        running.signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        left += len(list(output.rglob("*.tmp")))
        assert json.loads((output / "manifest.json").read_text())["complete"] is False
    assert start(log, *arguments, "--output", output).wait() == 0
    assert not list(output.rglob("*.tmp"))
    return left


def check_kills(corpus: Path, tmp_path: Path, rows: int, rows_per_part: int, kills: int) -> None:
    arguments = ["--input", corpus, "--limit", rows, "--rows-per-part", rows_per_part, "--threads", 1]
    assert start(tmp_path / "log", *arguments, "--output", tmp_path / "undisturbed").wait() == 0
    kill_and_resume(arguments, tmp_path / "killed", kills, tmp_path / "log")
    undisturbed, killed = parts(tmp_path / "undisturbed"), parts(tmp_path / "killed")
    assert len(undisturbed) == 2 * -(-rows // rows_per_part)
    assert killed == undisturbed
    assert manifest(tmp_path / "killed") == manifest(tmp_path / "undisturbed")


def test_killed_three_times(tmp_path):
    check_kills(synthetic(tmp_path / "c.jsonl", 400), tmp_path, rows=390, rows_per_part=15, kills=3)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "scifact/corpus.jsonl").is_file(), reason=f"{DATA}/scifact is not here")
def test_killed_ten_times_in_5000_passages(tmp_path):
    check_kills(DATA / "scifact/corpus.jsonl", tmp_path, rows=5000, rows_per_part=250, kills=10)


@pytest.fixture
def corpus(tmp_path) -> Path:
    model_folder()
    return synthetic(tmp_path / "corpus.jsonl", 60)


@pytest.fixture
def output(corpus, tmp_path) -> Path:
    """Complete, of four parts."""
    assert again(corpus, tmp_path / "out", "--quiet") == 0
    return tmp_path / "out"


def again(corpus, output, *arguments) -> int:
    return encode("--input", corpus, "--output", output, "--rows-per-part", 15, "--threads", 1, *arguments)


def running(corpus, tmp_path, *arguments) -> Running:
    return start(tmp_path / "log", "--input", corpus, "--output", tmp_path / "stopped", "--threads", 1, *arguments)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_and_the_command_goes_on(tmp_path, number, status):
    corpus = synthetic(tmp_path / "corpus.jsonl", 3000)
    stopped = running(corpus, tmp_path, "--rows-per-part", 100)
    stopped.until(lambda: count(tmp_path / "stopped") > 1)
    stopped.signal(number)
    assert stopped.wait() == status
    assert (
        stopped.said
        == f"splade-kernels: stopped by {signal.Signals(number).name}; the same command goes on from here\n"
    )
    left = parts(tmp_path / "stopped")
    assert 4 <= len(left) < 60
    assert not list((tmp_path / "stopped").rglob("*.tmp"))
    assert running(corpus, tmp_path, "--rows-per-part", 100).wait() == 0
    whole = parts(tmp_path / "stopped")
    assert len(whole) == 60
    assert left.items() <= whole.items()


def test_a_signal_does_not_wait_for_the_part(tmp_path):
    """All rows are one part, of 5,000 batches."""
    corpus = synthetic(tmp_path / "corpus.jsonl", 5000)
    stopped = running(corpus, tmp_path, "--rows-per-part", 5000, "--batch-tokens", 1)
    stopped.until((tmp_path / "stopped/manifest.json").exists)
    stopped.signal(signal.SIGINT)
    begun = time.monotonic()
    assert stopped.wait() == 130
    assert time.monotonic() - begun < 10
    assert count(tmp_path / "stopped") == 0


def _two_signals() -> None:
    with stoppable() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("goes on after the second")


def test_the_second_ctrl_c_ends_at_once():
    process = _CONTEXT.Process(target=_two_signals)
    process.start()
    process.join(60)
    assert process.exitcode == 130


def test_signals_mean_what_they_meant_after_a_run():
    before = signal.getsignal(signal.SIGINT)
    with stoppable():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    "arguments, differences",
    [
        (("--max-length", 32), "max_length: begun with 64, now 32"),
        (("--max-active-dims", 5), "max_active_dims: begun with null, now 5"),
        (("--min-weight", 0.5), "min_weight: begun with null, now 0.5"),
        (("--dtype", "bfloat16"), 'dtype: begun with "float32", now "bfloat16"'),
        (("--batch-tokens", 99), "batch_tokens: begun with 8192, now 99"),
        (("--screening", "on"), 'screening: begun with "auto", now "on"'),
        (("--query",), "query: begun with false, now true"),
        (("--rows-per-part", 16), "rows_per_part: begun with 15, now 16"),
        (("--limit", 7), "limit: begun with null, now 7"),
        (("--on-error", "skip"), 'on_error: begun with "fail", now "skip"'),
        (("--title-field", "t"), 'fields.title: begun with "title", now "t"'),
        (("--min-weight", 1, "--limit", 7), "min_weight: begun with null, now 1.0; limit: begun with null, now 7"),
    ],
)
def test_other_options_are_refused_and_named(corpus, output, capsys, arguments, differences):
    before = parts(output)
    for complete in (True, False):
        if not complete:
            (output / "part-00001.parquet").unlink()
            assert before.pop("part-00001.parquet")
        assert again(corpus, output, *arguments) == 2
        said = capsys.readouterr().err
        message = f"--output {output} cannot be continued: {differences} (--overwrite begins again)"
        assert said == f"splade-kernels: {message}\n"
        assert parts(output) == before


def test_another_model_is_refused(corpus, output, capsys):
    assert encode("--input", corpus, "--output", output, "--rows-per-part", 15, model=model_folder(seed=1)) == 2
    assert "cannot be continued: model_sha256: begun with " in capsys.readouterr().err


def test_another_input_is_refused(corpus, output, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text())
    assert again(other, output) == 2
    assert 'input[0].name: begun with "corpus.jsonl", now "other.jsonl"' in capsys.readouterr().err
    size = corpus.stat().st_size
    corpus.write_text(corpus.read_text() + "\n")
    assert again(corpus, output) == 2
    assert f"input[0].size: begun with {size}, now {size + 1}" in capsys.readouterr().err


def test_other_rows_in_a_file_of_the_same_size_are_refused(corpus, output, capsys):
    """A part is missing, and meanwhile a row of another has been corrected in place."""
    (output / "part-00003.parquet").unlink()
    lines = corpus.read_text().splitlines(keepends=True)
    lines[20] = lines[20].replace('"text": "', '"text": "X', 1)[:-4] + lines[20][-3:]
    corpus.write_text("".join(lines))
    assert again(corpus, output) == 2
    said = capsys.readouterr().err
    assert "part-00001.parquet was made of other rows than those from corpus.jsonl, line 16 on, though " in said


def test_what_may_differ(corpus, output, tmp_path, monkeypatch):
    whole = parts(output)
    (output / "part-00001.parquet").unlink()
    moved = tmp_path / "moved"
    moved.mkdir()
    corpus.rename(moved / corpus.name)
    monkeypatch.chdir(moved)
    assert again(corpus.name, output, "--quiet", "--threads", 1, "--device", "cpu") == 0
    assert parts(output) == whole


def test_a_complete_output_is_left_alone(corpus, output, capsys):
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert again(corpus, output) == 0
    assert capsys.readouterr().out.startswith("nothing to do: 60 rows ")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize("name", ["part-00001.parquet", "ids/part-00001.u64"])
def test_what_is_missing_or_damaged_is_made_again(corpus, output, name):
    whole, content = parts(output), (output / name).read_bytes()
    for damaged in (None, content[: len(content) // 2]):
        (output / name).unlink()
        if damaged is not None:
            (output / name).write_bytes(damaged)
        if name.startswith("ids"):
            (output / "part-00003.parquet").unlink()  # what is complete is not read again
        assert again(corpus, output) == 0
        assert parts(output) == whole
        assert json.loads((output / "manifest.json").read_text())["complete"] is True


def test_counts_survive(tmp_path):
    """Rows, empty, skipped and truncated of a run in two steps are those of one."""
    corpus = synthetic(tmp_path / "c.jsonl", 60)
    lines = corpus.read_text().splitlines()
    for index, line in (
        (2, "no JSON"),
        (3, '{"_id": "e", "text": ""}'),
        (50, "no JSON"),
        (51, '{"_id": "f", "text": " "}'),
    ):
        lines[index] = line
    corpus.write_text("\n".join(lines))
    arguments = ("--on-error", "skip", "--max-length", 16, "--quiet")
    assert again(corpus, tmp_path / "out", *arguments) == 0
    once = manifest(tmp_path / "out")
    assert (once["rows"], once["skipped"]) == (58, 2)
    assert once["empty"] >= 2
    assert 0 < once["truncated"] < 58
    for removed in itertools.combinations(range(4), 2):
        for number in removed:
            (tmp_path / f"out/part-0000{number}.parquet").unlink()
        assert again(corpus, tmp_path / "out", *arguments) == 0
        assert manifest(tmp_path / "out") == once


@needs_squad
def test_real_passages_stopped_at_every_part(tmp_path, monkeypatch):
    """Each run makes one part, and is then interrupted: the parts are those of one run."""
    from splade_kernels.encoding import run as runs
    from splade_kernels.encoding.stopping import Stopped
    from tests.encoding.models import SQUAD

    arguments = ("--input", SQUAD, "--limit", 60, "--rows-per-part", 12, "--quiet")
    assert encode(*arguments, "--output", tmp_path / "once") == 0
    real = runs.write_part

    def write_and_stop(*args):
        real(*args)
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(runs, "write_part", write_and_stop)
    for made in range(1, 6):
        assert encode(*arguments, "--output", tmp_path / "steps") == 130
        assert count(tmp_path / "steps") == made
    monkeypatch.undo()
    assert encode(*arguments, "--output", tmp_path / "steps") == 0
    assert parts(tmp_path / "steps") == parts(tmp_path / "once")
    assert manifest(tmp_path / "steps") == manifest(tmp_path / "once")
