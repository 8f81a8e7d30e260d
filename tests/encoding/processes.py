"""``splade-kernels encode`` in processes that can be killed, forked from one that has the imports behind it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splade_kernels.encoding import ranks
from tests.encoding.models import model_folder

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.encoding.processes", "splade_kernels.cli.app", "splade_kernels.encoding.run"])
PATIENCE = 120.0


@dataclass
class Running:
    """A process, and the file of its stdout and stderr."""

    process: Any
    log: Path

    @property
    def said(self) -> str:
        """Its lines on stderr that are the command's, without what libraries log."""
        lines = self.log.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if line.startswith("splade-kernels: ") or "Traceback" in line)

    def wait(self) -> int:
        """The exit status; negative for a signal."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, self.log.read_text()
        return int(self.process.exitcode)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def start(log: Path, *arguments: Any, prepare: Callable[[], None] | None = None, **environment: str) -> Running:
    """``prepare`` is called in the process before the command."""
    command = ["encode", "--model", str(model_folder()), *map(str, arguments)]
    process = _CONTEXT.Process(target=_run, args=(str(log), command, environment, prepare))
    process.start()
    return Running(process, log)


def start_ranks(folder: Path, size: int, *arguments: Any, prepare: Callable[[], None] | None = None) -> list[Running]:
    """``size`` processes as a launcher starts them, without the launcher, which would end all with the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        start(folder / f"rank-{rank}.log", *arguments, prepare=prepare, RANK=str(rank), **common)
        for rank in range(size)
    ]


def impatient() -> None:
    """Signs of life that come and are missed early."""
    ranks.BEAT, ranks.GIVEN_UP, ranks.LAST_WORDS = 0.1, 2.0, 3.0


def _run(log: str, command: list[str], environment: dict[str, str], prepare: Callable[[], None] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    from splade_kernels.cli import main

    main(command)
