"""Many processes: the same files as of one, from any number of them, and how they end when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from splade_kernels.encoding import ranks
from splade_kernels.encoding.errors import DataError, UsageError
from splade_kernels.encoding.ranks import Alone, join
from tests.encoding.models import ROOT, encode, environment, model_folder, parts
from tests.encoding.processes import Running, impatient, start_ranks
from tests.encoding.test_resume import count, manifest, synthetic


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return synthetic(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", 100)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    """The output of one process, 10 parts."""
    output = tmp_path_factory.mktemp("alone") / "out"
    assert encode(*options(corpus), "--output", output) == 0
    return output


def options(corpus) -> tuple:
    return ("--input", corpus, "--rows-per-part", 10, "--threads", 1)


def ended(processes: list[Running]) -> list[int]:
    return [process.wait() for process in processes]


@pytest.mark.parametrize("size", [2, 3])
def test_the_files_are_those_of_one_process(corpus, alone, tmp_path, size):
    processes = start_ranks(tmp_path, size, *options(corpus), "--output", tmp_path / "out")
    assert ended(processes) == [0] * size
    assert parts(tmp_path / "out") == parts(alone)
    assert manifest(tmp_path / "out") == manifest(alone)
    # Rank 0 alone speaks.
    assert processes[0].log.read_text().startswith("100 rows (")
    assert [process.log.read_text() for process in processes[1:]] == [""] * (size - 1)


def test_any_number_of_processes_goes_on_from_any_other(corpus, alone, tmp_path):
    output = tmp_path / "out"
    for name in ("part-00001.parquet", "part-00004.parquet", "part-00009.parquet"):
        (output / "ids").mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes((alone / name).read_bytes())
    begun = json.loads((alone / "manifest.json").read_text())
    begun |= {"parts": [], "rows": 0, "empty": 0, "truncated": 0, "complete": False}
    (output / "manifest.json").write_text(json.dumps(begun))
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert ended(start_ranks(tmp_path, 3, *options(corpus), "--output", output)) == [0, 0, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert parts(output) == parts(alone)
    (output / "part-00002.parquet").unlink()
    assert ended(start_ranks(tmp_path, 2, *options(corpus), "--output", output)) == [0, 0]
    assert parts(output) == parts(alone)
    (output / "part-00003.parquet").unlink()
    assert encode(*options(corpus), "--output", output) == 0
    assert manifest(output) == manifest(alone)
    processes = start_ranks(tmp_path, 2, *options(corpus), "--output", output)
    assert ended(processes) == [0, 0]
    assert processes[0].log.read_text().startswith("nothing to do: 100 rows ")


def _fail_in_part_five() -> None:
    from splade_kernels.encoding import run as runs

    real = runs._encoded

    def encoded(encoder, rows):
        if rows[0].id == "50":
            raise DataError("corpus.jsonl, line 51: '50': no finite weights")
        return real(encoder, rows)

    runs._encoded = encoded


def test_the_error_of_one_rank_ends_all_and_names_it(corpus, alone, tmp_path):
    processes = start_ranks(tmp_path, 3, *options(corpus), "--output", tmp_path / "out", prepare=_fail_in_part_five)
    assert ended(processes) == [1, 1, 1]
    assert processes[2].said == "splade-kernels: rank 2: corpus.jsonl, line 51: '50': no finite weights\n"
    assert [process.said for process in processes[:2]] == ["", ""]
    left = parts(tmp_path / "out")
    assert "part-00002.parquet" in left
    assert left.items() <= parts(alone).items()
    assert json.loads((tmp_path / "out/manifest.json").read_text())["complete"] is False


def test_a_usage_error_of_rank_0_ends_all_with_2(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    processes = start_ranks(tmp_path, 2, *options(corpus), "--output", tmp_path / "out")
    assert ended(processes) == [2, 2]
    assert processes[0].said.startswith(f"splade-kernels: rank 0: --output {tmp_path}/out: expected an empty folder")
    assert processes[1].said == ""


def test_bad_input_is_said_once(tmp_path):
    corpus = synthetic(tmp_path / "corpus.jsonl", 30)
    corpus.write_text(corpus.read_text() + "no JSON\n")
    processes = start_ranks(tmp_path, 2, *options(corpus), "--output", tmp_path / "out")
    assert ended(processes) == [1, 1]
    (said,) = [process.said for process in processes if process.said]
    assert "corpus.jsonl, line 31: expected a JSON object" in said
    assert said.startswith(("splade-kernels: rank 0: ", "splade-kernels: rank 1: "))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_all(corpus, tmp_path, killed):
    """Also where no launcher sees to it. Rank 0 keeps the store."""
    processes = start_ranks(tmp_path, 2, *options(corpus), "--output", tmp_path / "out", prepare=_hang)
    for process in processes:
        process.until(lambda: count(tmp_path / "out") == 2)
    processes[killed].signal(signal.SIGKILL)
    (tmp_path / "go").touch()
    assert ended(processes)[1 - killed] == 1
    expected = "rank 1: the store of the ranks is gone" if killed == 0 else "rank 1: no sign of life for 2 s"
    assert expected in processes[1 - killed].said


def _hang() -> None:
    """Each rank waits after its first part for the file ``go``."""
    import time

    from splade_kernels.encoding import run as runs

    impatient()
    real = runs.write_part

    def write_part(folder, *args):
        counts = real(folder, *args)
        while not (folder.parent / "go").exists():
            time.sleep(0.01)
        return counts

    runs.write_part = write_part


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_one_rank_ends_all(tmp_path, number, status):
    corpus = synthetic(tmp_path / "corpus.jsonl", 3000)
    processes = start_ranks(tmp_path, 2, *options(corpus), "--output", tmp_path / "out")
    processes[1].until(lambda: (tmp_path / "out/part-00001.parquet").exists())
    processes[1].signal(number)
    assert ended(processes) == [status, status]
    assert (
        processes[1].said
        == f"splade-kernels: rank 1: stopped by {signal.Signals(number).name}; the same command goes on from here\n"
    )
    assert processes[0].said == ""


def _rank_one_hangs() -> None:
    if os.environ["RANK"] == "1":
        _hang()
    else:
        impatient()


def test_a_rank_that_waits_for_others_can_be_stopped(corpus, tmp_path):
    processes = start_ranks(
        tmp_path, 2, *options(corpus), "--limit", 20, "--output", tmp_path / "out", prepare=_rank_one_hangs
    )
    processes[0].until(lambda: count(tmp_path / "out") == 2)
    processes[0].signal(signal.SIGINT)
    assert processes[0].wait() == 130
    (tmp_path / "go").touch()
    processes[1].wait()


@pytest.mark.slow
def test_torchrun(corpus, alone, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "splade_kernels", "encode", "--model", str(model_folder())]
    arguments = map(str, (*options(corpus), "--output", tmp_path / "out"))
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("100 rows (")
    assert parts(tmp_path / "out") == parts(alone)
    assert manifest(tmp_path / "out") == manifest(alone)


def test_one_process_where_there_are_no_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert type(join()) is Alone
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert type(join()) is Alone
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert type(join()) is Alone
    assert [part for part in range(7) if join().takes(part)] == list(range(7))


def test_an_environment_that_does_not_fit(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="RANK: expected 0 to 2, got 3"):
        join()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UsageError, match="expected integers"):
        join()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DataError, match="rank 1: the other ranks cannot be reached: .*MASTER_ADDR"):
        join()


def test_the_device_of_a_rank(monkeypatch):
    """Each takes the CUDA device of its place on its machine, where none was named."""
    from splade_kernels.encoding import run as runs
    from splade_kernels.encoding.options import EncoderOptions
    from splade_kernels.encoding.stopping import Stop

    asked = []
    monkeypatch.setattr(runs, "TextEncoder", asked.append)
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runs.torch.cuda, "device_count", lambda: 2)
    for device, local_rank, world_size in [
        ("auto", 0, 8),
        ("auto", 1, 8),
        ("auto", 3, 8),
        ("cpu", 1, 8),
        ("auto", 0, 1),
    ]:
        one = Alone()
        one.rank, one.local_rank, one.world_size = local_rank, local_rank, world_size
        options = runs.RunOptions(EncoderOptions("m", device=device), "i", Path("o"))
        runs._Run(options, one, Stop())._encoder()
    assert [options.device for options in asked] == ["cuda:0", "cuda:1", "cuda:1", "cpu", "auto"]
    assert ranks.GIVEN_UP >= 60  # a rank that reads or loads for a while is not given up
