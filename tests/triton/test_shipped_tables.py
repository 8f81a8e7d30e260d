"""The tables of configurations that ship, and how their files are read."""

from __future__ import annotations

import json
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

pytest.importorskip("triton")
from splade_kernels.backends.triton import tuning
from tests.triton import tables

SHIPPED = tuning.FOLDER


@pytest.fixture(autouse=True)
def fresh():
    """What is read once a process, once a test."""
    tuning.shipped_table.cache_clear()
    yield
    tuning.shipped_table.cache_clear()


def test_what_ships_is_of_its_architecture():
    files = sorted(SHIPPED.glob("*"))
    entries = Counter()
    for path in files:
        arch = int(path.stem.removeprefix("sm_").split("-")[0])
        assert arch in tuning.ARCHITECTURES
        assert {shape.architecture for shape in tuning._read(path)} == {arch}
        entries.update([*tuning._read(path)])
    assert set(entries.values()) <= {1}, "an entry is in two files of an architecture"


def test_an_architecture_may_have_its_table_in_several_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    entries = [tuning.entry(*item) for item in tables.table(90).items()]
    for name, part in (("sm_90.json", entries[:2]), ("sm_90-backward.json", entries[2:]), ("sm_900.json", ["x"])):
        (tmp_path / name).write_text(json.dumps({"table": part}))
    assert tuning.shipped_table(90) == tables.table(90)


def test_results_of_what_ships_are_checked_in():
    results = [path.read_bytes() for path in (Path(__file__).parents[2] / "bench/results").glob("tuning*.json")]
    assert all(path.read_bytes() in results for path in SHIPPED.glob("*"))


def test_what_ships_is_in_the_wheel():
    files = SHIPPED.glob("*")
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (pattern,) = [line for line in project.splitlines() if "backends.triton" in line and ".json" in line]
    assert all(fnmatch(f"configs/{path.name}", pattern.split('"')[3]) for path in [*files, Path("sm_86.json")])
