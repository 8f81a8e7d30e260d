"""The command line of a module that makes a part of a document: ``--document PAGE`` writes it between its markers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.tables.markdown import replace_block


def main(description: str | None, block: Callable[[], str], arguments: Sequence[str] | None = None) -> None:
    """Print what ``block`` makes, or put it in the place of what stands between the markers it begins and ends with."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, help="replace the text between its markers")
    path = parser.parse_args(arguments).document
    if path is None:
        print(block())
    else:
        path.write_text(replace_block(path.read_text(), block()))
