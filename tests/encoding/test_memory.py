"""Memory does not grow with the corpus."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.encoding.models import ROOT, environment, model_folder

# Not ru_maxrss, which begins with that of the process that started this one.
_PEAK = """
import re, sys
from pathlib import Path
from splade_kernels.cli.app import run
try:
    sys.exit(run(sys.argv[1:]))
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak_kib(corpus: Path, output: Path) -> int:
    command = ["encode", "--model", str(model_folder()), "--input", str(corpus), "--output", str(output), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *command, "--threads", "1"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def short_texts(rows: int) -> dict[str, list[str]]:
    return {"_id": [f"doc{row}" for row in range(rows)], "text": [f"water {row % 7} rust" for row in range(rows)]}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_200_000_short_texts_take_little_more_than_20_000(tmp_path, suffix):
    """At most 1.1 times the peak, the hashes of the ids included. Most of either are the libraries: to hold the rows
    themselves takes 50 MiB more, which is less than a tenth."""
    peaks = {}
    for rows in (20_000, 200_000):
        columns, path = short_texts(rows), tmp_path / f"{rows}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.table(columns), path, row_group_size=rows)
        else:
            pairs = zip(*columns.values(), strict=True)
            path.write_text("".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in pairs))
        peaks[rows] = peak_kib(path, tmp_path / f"out-{rows}")
    assert peaks[200_000] <= 1.1 * peaks[20_000], peaks
    assert peaks[200_000] <= peaks[20_000] + (30 << 10), peaks
