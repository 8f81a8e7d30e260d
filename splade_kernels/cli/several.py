"""Options that take several values after one name, which typer has no form for."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from typer.core import TyperCommand


class SeveralValues(TyperCommand):
    """A command without arguments, whose list options read ``--metrics nDCG@10 RR@10`` as well as the option twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, list(repeated(args, names)))


def repeated(arguments: Sequence[str], names: Container[str]) -> Iterator[str]:
    """The arguments with the name of a list option before each of its values; the next option ends them."""
    option, values = None, 0
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if argument.startswith("-") and len(argument) > 1:
            option, values = (name if name in names else None), bool(equals)
            yield argument
        else:
            if option is not None and values:
                yield option
            values += 1
            yield argument
