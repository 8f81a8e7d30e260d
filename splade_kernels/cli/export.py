"""``splade-kernels export``."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..exporting.formats import FORMATS

FormatName: Any = enum.Enum("FormatName", {name: name for name in FORMATS})  # type: ignore[misc]


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `splade-kernels encode` wrote.")],
    format: Annotated[FormatName, typer.Option(help="What is to read it (docs/formats.md).")],
    output: Annotated[Path, typer.Option(help="The file or folder to write; it must not exist.")],
    scale: Annotated[float | None, typer.Option(help="Multiply weights by this; default: the format's.")] = None,
    tokens: Annotated[
        bool | None, typer.Option("--tokens/--ids", help="Name terms by token or by id; default: the format's.")
    ] = None,
) -> None:
    """Write an encoded corpus for a search engine."""
    from ..exporting.export import export

    names: Any = None if tokens is None else "tokens" if tokens else "ids"
    done = export(folder, format.value, output, scale=scale, names=names)
    for warning in done.warnings:
        print(f"splade-kernels: warning: {warning}", file=sys.stderr)
    print(f"rows: {done.rows}\nterms: {done.terms}\ndropped: {done.dropped}\nclipped: {done.clipped}")
