"""The options that the measuring commands share, spelled once."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def parser(
    doc: str | None, *, required: bool = False, seconds: float | None = None, device: bool = False
) -> argparse.ArgumentParser:
    """``--output``, which may be ``required``, ``--append`` and ``--budget``; with a default of the seconds of rounds,
    ``--seconds``, and then, or where asked for, ``--device``."""
    made = plain(doc)
    made.add_argument("--output", type=Path, required=required, help="the result file, rewritten after every row")
    made.add_argument(
        "--append", action="store_true", help="keep what --output holds; measured again, a row is replaced"
    )
    made.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing is begun")
    if seconds is not None:
        made.add_argument("--seconds", type=float, default=seconds, help="time for the rounds of one group")
    if device or seconds is not None:
        present = "cuda" if torch.cuda.is_available() else "cpu"
        made.add_argument(
            "--device", choices=("cpu", "cuda"), default=present, help="default: a GPU where there is one"
        )
    return made


def plain(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
