"""What the commands report in one line and an exit status, instead of a traceback."""

from __future__ import annotations

DONE, FAILED, USAGE = 0, 1, 2


class CommandError(Exception):
    """An error whose message is all that its reader needs."""

    status = FAILED


class DataError(CommandError):
    """Data, a model or a file that cannot be used. The message names the file, the line and the field."""


class UsageError(CommandError):
    """Options that do not fit each other, an output that is there already, a run that cannot be resumed."""

    status = USAGE
