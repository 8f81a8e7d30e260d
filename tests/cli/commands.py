"""The commands as a user calls them, in this process or in another one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splade_kernels.cli.app import run

ROOT = Path(__file__).parents[2]


def call(*arguments: Any) -> int:
    """Run a command here; its exit status."""
    try:
        return run([str(argument) for argument in arguments])
    except SystemExit as error:
        return int(error.code or 0)


def start(
    *arguments: Any, folder: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m splade_kernels`` in a process of its own, which finds the package of this folder first."""
    return subprocess.run(
        [sys.executable, "-m", "splade_kernels", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
