"""The commands in one application, and what becomes of their errors."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

import typer

from ..encoding.errors import DONE, FAILED, CommandError

# In the order of their use; each is the function ``command`` of a module beside this one, which may hold a class
# ``Command`` that parses its options.
COMMANDS = ("encode", "export", "search", "evaluate", "info", "estimate")

app = typer.Typer(
    name="splade-kernels",
    help="Encode a corpus with a SPLADE model, and take it to where it is searched.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name in COMMANDS:
    module = importlib.import_module(f".{name}", __package__)
    app.command(name, cls=getattr(module, "Command", None))(module.command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, or exits with that of a wrong command line, 2."""
    try:
        # Ends like an error, so that what is written under a temporary name goes; `encode` ends after a batch instead.
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    except ValueError:  # not in the main thread
        before = None
    try:
        app(args=arguments, prog_name="splade-kernels")
    except CommandError as error:
        print(f"splade-kernels: {error}", file=sys.stderr)
        return error.status
    except ModuleNotFoundError as error:  # of the extra
        if (error.name or "").split(".")[0] == "splade_kernels":
            raise
        print(f"splade-kernels: this needs {error.name}: pip install 'splade-kernels[cli]'", file=sys.stderr)
        return FAILED
    except OSError as error:  # what is left is the standard output
        print(f"splade-kernels: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return DONE
