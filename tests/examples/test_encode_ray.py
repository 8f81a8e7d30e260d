"""``examples/encode_ray.py`` on a Ray of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the package ray is not installed: pip install '.[ray]'")

import pyarrow as pa
import pyarrow.parquet as pq

from tests.examples import engine_corpus, ray_worker_killed


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_no_row_and_repeats_none(tmp_path: Path) -> None:
    """SIGKILL in flight, after the batch has been computed; ``--in-order`` holds all the same. Bad data ends a run."""
    model, corpus = engine_corpus.write(tmp_path)
    (tmp_path / "calls").mkdir()
    command = [sys.executable, "-m", ray_worker_killed.__name__, "--model", model, "--input", corpus]
    command += ["--output", str(tmp_path / "vectors"), "--workers", "2", "--rows", "10", "--in-order"]
    command += ["--max-active-dims", str(engine_corpus.LIMIT)]
    environment = {
        **os.environ,
        ray_worker_killed.FOLDER: str(tmp_path / "calls"),
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]

    found = pa.concat_tables(pq.read_table(file) for file in sorted((tmp_path / "vectors").glob("*.parquet")))
    engine_corpus.check(found, model)
    assert found["id"].to_pylist() == [row["_id"] for row in engine_corpus.rows()]
    killed = (tmp_path / "calls" / "killed").read_text()
    calls = [file.name.split("-") for file in (tmp_path / "calls").glob("*-*")]
    assert [call for process, call in sorted(calls) if process == killed] == ["1", "2"]
    assert len({process for process, _ in calls}) >= 3  # both workers, and the next life of one
    # Those of all rows, and the one that was lost.
    assert len(calls) >= engine_corpus.ROWS // 10 + 1
    refused = (tmp_path / "calls" / "refused").read_text()
    assert "_id: row 1 of the batch (from 0): expected an id, got null" in refused
