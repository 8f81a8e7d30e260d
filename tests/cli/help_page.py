"""The ``--help`` of every command, as docs/command-line.md shows it.

    python -m tests.cli.help_page --document docs/command-line.md

The width is fixed, so that no terminal and no ``COLUMNS`` changes it.
"""

from __future__ import annotations

from functools import partial

from typer.main import get_command

from splade_kernels.cli.app import COMMANDS, app
from tests import generated

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


main = partial(generated.main, __doc__, block)


if __name__ == "__main__":
    main()
