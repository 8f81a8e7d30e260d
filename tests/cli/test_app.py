"""What becomes of signals and of a standard output that cannot be written."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from splade_kernels.cli import app, export
from splade_kernels.exporting import export as exporting
from tests.exporting.outputs import write_output


def test_sigterm_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = write_output(tmp_path / "encoded", [{1: 1.0}] * 3)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(exporting, "write_npz", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        app.run(["export", str(encoded.folder), "--format", "npz", "--output", str(tmp_path / "out.npz")])
    assert ended.value.code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["encoded"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_standard_output_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    encoded = write_output(tmp_path / "encoded", [{1: 1.0}] * 3)
    monkeypatch.setattr(export, "print", full, raising=False)
    assert app.run(["export", str(encoded.folder), "--format", "npz", "--output", str(tmp_path / "out.npz")]) == 1
    assert capsys.readouterr().err == "splade-kernels: standard output: No space left on device\n"
