"""Text files line by line, so that an error can name the line; what is written appears whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..encoding.errors import DataError, UsageError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, without their ends, and their numbers from 1. A name in ``.gz`` is decompressed.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: expected UTF-8, got the byte 0x{raw[error.start]:02x}"
                    ) from error
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[TextIO]:
    """A file that takes its name when the block ends without an error, and leaves nothing behind otherwise.

    Raises:
        UsageError: ``path`` exists, and ``overwrite`` is not set.
        DataError: it cannot be written.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        raise UsageError(f"--output: expected a path that is not there yet, got {path}: remove it or pass --overwrite")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
