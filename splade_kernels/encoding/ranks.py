"""Many processes, as ``torchrun`` or ``accelerate launch`` start them: who takes which part, how they hear of errors.

The processes talk through the key-value store of ``torch.distributed`` alone: they exchange no tensors.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from .errors import CommandError, DataError, UsageError

T = TypeVar("T")

# Until all ranks have started.
MOST_WAIT = timedelta(hours=12)
# Seconds between two looks at the store, between two signs of life, and without one until a rank is given up.
LOOK, BEAT, GIVEN_UP = 0.1, 5.0, 300.0
# How long a rank that fails waits for others to hear of it, if it keeps the store.
LAST_WORDS = 20.0


class Elsewhere(CommandError):
    """Another rank has failed, which has said so. Ends this one with the same status, without a word."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Alone:
    """One process."""

    rank, world_size, local_rank = 0, 1, 0

    def takes(self, part: int) -> bool:
        return part % self.world_size == self.rank

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.check = check

    def look(self) -> None:
        """Called between batches: raises where this process is to stop, or another rank has failed."""
        self.check()

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, and the others wait for; JSON."""
        return make()

    def wait_for_all(self) -> None:
        """Rank 0 returns when all have come here, the others at once."""

    def wait_for_first(self) -> None:
        """The others return when rank 0 has come here."""

    def failing(self) -> AbstractContextManager[object]:
        """Errors from within are told to the other ranks, and name this one."""
        return nullcontext()


class Ranks(Alone):
    """This process among others, with a store that all of them reach."""

    def __init__(
        self, store: Any, rank: int, world_size: int, local_rank: int, check: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(check)
        self.store = store
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self._looked = 0.0
        self._beats = {other: (b"", time.monotonic()) for other in range(world_size)}
        threading.Thread(target=self._beat, name="sign of life", daemon=True).start()

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store has gone, which this process's next look says
            for count in itertools.count():
                self.store.set(f"alive/{self.rank}", str(count))
                time.sleep(BEAT)

    def look(self) -> None:
        self.check()
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        if self._has("error"):
            error = json.loads(self.store.get("error"))
            raise Elsewhere(error["status"], error["message"])

    def _has(self, key: str) -> bool:
        try:
            return bool(self.store.check([key]))
        except RuntimeError as error:  # of torch.distributed: the process that keeps the store has ended
            raise DataError("the store of the ranks is gone, with the process that kept it") from error

    def _wait(self, key: str, *of: int) -> None:
        """Until ``key`` is there, or for ever while those it depends on live."""
        while not self._has(key):
            self.look()
            for other in of:
                self._check_alive(other)
            time.sleep(LOOK)

    def _check_alive(self, other: int) -> None:
        key = f"alive/{other}"
        said = self.store.get(key) if self._has(key) else b""
        last, since = self._beats[other]
        if said != last:
            self._beats[other] = (said, time.monotonic())
        elif time.monotonic() - since > GIVEN_UP:
            raise DataError(f"rank {other}: no sign of life for {GIVEN_UP:.0f} s")

    def share(self, make: Callable[[], T]) -> T:
        if self.rank == 0:
            made = make()
            self.store.set("shared", json.dumps(made))
            return made
        self._wait("shared", 0)
        return json.loads(self.store.get("shared"))  # type: ignore[no-any-return]

    def wait_for_all(self) -> None:
        self.store.set(f"done/{self.rank}", "")
        if self.rank == 0:
            for other in range(self.world_size):
                self._wait(f"done/{other}", other)

    def wait_for_first(self) -> None:
        if self.rank == 0:
            self.store.set("finished", "")
        else:
            self._wait("finished", 0)
        self.leave()

    def leave(self) -> None:
        """The last that a rank has to do with the store. Rank 0, which may be the one that keeps it, goes last."""
        if self.rank != 0:
            self.store.add("left", 1)
            return
        deadline = time.monotonic() + LAST_WORDS
        while int(self.store.add("left", 0)) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(LOOK)

    def failing(self) -> AbstractContextManager[object]:
        return _Telling(self)


class _Telling:
    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            return
        ranks = self.ranks
        status = error.status if isinstance(error, CommandError) else 1
        message = f"rank {ranks.rank}: {error}"
        with suppress(RuntimeError):  # the store is gone: the error itself is what can be said
            said = json.dumps({"status": status, "message": message, "rank": ranks.rank})
            first = json.loads(ranks.store.compare_set("error", "", said))
            ranks.leave()
            if first["rank"] != ranks.rank:
                raise Elsewhere(first["status"], first["message"]) from error
        if isinstance(error, CommandError):
            named = CommandError(message)
            named.status = error.status
            raise named from error


def join(check: Callable[[], None] = lambda: None) -> Alone:
    """The ranks of this run by ``RANK`` and ``WORLD_SIZE`` in the environment; one process where there are none.

    ``check`` is called whenever a rank looks for the errors of others, also while it waits for them.

    Raises:
        UsageError: they cannot be understood.
        DataError: the other ranks cannot be reached.
    """
    size = os.environ.get("WORLD_SIZE")
    if size is None or "RANK" not in os.environ or size == "1":
        return Alone(check)
    try:
        rank, world_size = int(os.environ["RANK"]), int(size)
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise UsageError(f"RANK, WORLD_SIZE, LOCAL_RANK: expected integers: {error}") from error
    if not 0 <= rank < world_size:
        raise UsageError(f"RANK: expected 0 to {world_size - 1}, got {rank}")
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=MOST_WAIT)))
    except (RuntimeError, ValueError) as error:
        raise DataError(f"rank {rank}: the other ranks cannot be reached: {' '.join(str(error).split())}") from error
    return Ranks(PrefixStore("splade-kernels encode", store), rank, world_size, local_rank, check)
