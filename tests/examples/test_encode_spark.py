"""``examples/encode_spark.py`` on a Spark of this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("pyspark", reason="the package pyspark is not installed: pip install '.[spark]'")

import pyarrow.parquet as pq

from tests.examples import engine_corpus

JAVA = 17


def need_java() -> None:
    """Skip, and say so also where skips are not shown."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    said = subprocess.run([java, "-version"], capture_output=True, text=True).stderr if java else ""
    found = re.search(r'version "(\d+)', said)
    if found is None or int(found[1]) < JAVA:
        reason = f"Spark is NOT tested: expected Java {JAVA} or later, got {found[0] if found else 'no java'}"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)


@pytest.mark.slow
def test_every_row_once_with_its_vector(tmp_path: Path) -> None:
    need_java()
    model, corpus = engine_corpus.write(tmp_path)
    command = [sys.executable, "-m", "examples.encode_spark", "--model", model, "--input", corpus]
    command += ["--output", str(tmp_path / "vectors"), "--max-active-dims", str(engine_corpus.LIMIT)]
    command += ["--partitions", "3"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
        "PYSPARK_SUBMIT_ARGS": "--master local[2] --conf spark.ui.enabled=false pyspark-shell",
        "SPARK_LOCAL_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert (tmp_path / "vectors" / "_SUCCESS").is_file()
    engine_corpus.check(pq.read_table(tmp_path / "vectors"), model)
