"""The ``--help`` of every command, as docs/command-line.md shows it.

    python -m tests.cli.help_page --document docs/command-line.md

The width is fixed, so that no terminal and no ``COLUMNS`` changes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from typer.main import get_command

from bench.tables.markdown import replace_block
from splade_kernels.cli.app import COMMANDS, app

BEGIN = "<!-- help: python -m tests.cli.help_page --document docs/command-line.md -->"
END = "<!-- help end -->"
NAME, WIDTH = "splade-kernels", 100


def help_of(command: str) -> str:
    """What ``splade-kernels COMMAND --help`` prints in a terminal of ``WIDTH`` columns."""
    group = get_command(app)
    context = group.make_context(NAME, [], resilient_parsing=True, terminal_width=WIDTH)
    found = group.get_command(context, command)
    with found.make_context(command, [], parent=context, resilient_parsing=True) as inner:
        return str(found.get_help(inner)).rstrip()


def block() -> str:
    sections = [f"### {NAME} {command}\n\n```text\n{help_of(command)}\n```" for command in COMMANDS]
    return "\n".join([BEGIN, "", *(f"{section}\n" for section in sections), END])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, help="replace the text between its markers")
    path = parser.parse_args(arguments).document
    if path is None:
        print(block())
    else:
        path.write_text(replace_block(path.read_text(), block()))


if __name__ == "__main__":
    main()
