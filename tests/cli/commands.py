"""The commands as a user calls them, in this process."""

from __future__ import annotations

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
