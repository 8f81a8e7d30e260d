"""Files that are there whole or not at all, and the lock on a folder."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import DataError, UsageError


def temporary_name(path: Path) -> Path:
    """Beside it and hidden, and the same each time, so that what a killed process left is written over."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name, to the disk, and then give it its own.

    Raises:
        DataError: it cannot be written; there is no file then but what was there before.
    """
    temporary = temporary_name(path)
    try:
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """What has been renamed in the folder is so after a power cut as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold ``flock`` on the folder, without waiting for it.

    Raises:
        UsageError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(f"{folder}: another process is writing to it") from error
            # File systems over a network may not be able to.
            warn(f"{folder}: cannot be locked ({error.strerror}): let no other process write to it")
        yield
    finally:
        os.close(descriptor)
