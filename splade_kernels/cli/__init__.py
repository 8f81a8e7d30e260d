"""The command line: ``splade-kernels encode``, ``export``, ``search``, ``evaluate``, ``info``, ``estimate``.

A command is a module of this package that holds a function ``command``, whose parameters are its options. Errors that
are the user's (:mod:`..encoding.errors`) end with one line and their exit status.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

INSTALL = "the command line needs typer and rich: pip install 'splade-kernels[cli]'"


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of ``splade-kernels`` and ``python -m splade_kernels``."""
    try:
        from .app import run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "splade_kernels":
            raise
        sys.exit(f"splade-kernels: {INSTALL} (missing: {error.name})")
    sys.exit(run(arguments))
