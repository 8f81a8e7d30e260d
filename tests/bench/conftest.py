"""The measuring command on tiny subjects, with the rates of a machine made up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.harness import steps, timing
from bench.jobs import operators


@pytest.fixture
def unweighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes in which memory is measured take seconds to start."""
    monkeypatch.setattr(operators, "weigher", lambda *arguments: steps.unweighed)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 1e11)


Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unweighed: None, rates: None) -> Measure:
    """``python -m bench.measure KIND`` over subjects by name; what it left in its file."""
    path = tmp_path / "result.json"

    def run(kind: str, subjects: dict[str, Any], *options: str) -> dict[str, Any]:
        monkeypatch.setattr(measure, "plan", lambda kind, names, device: iter(subjects.items()))
        arguments = [kind, "--device=cpu", "--precision=float32", "--seconds=0", *options]
        monkeypatch.setattr(sys, "argv", ["measure", *arguments, f"--output={path}"])
        measure.main()
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    return run
