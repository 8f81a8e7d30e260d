"""Runs examples/encode_ray.py on a Ray of this machine, two of whose workers encode and one is killed in flight.

A program of its own, since Ray leaves threads and processes in the one that starts it. ``KILL_FOLDER`` in the
environment names a folder, which gets a file for each call (its name is the worker's process, and the call's number),
``killed``, which holds the process that was, and ``refused``: what became of a row without an id.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from examples import encode_ray
from splade_kernels.encoding import EncodeBatch

FOLDER = "KILL_FOLDER"


class KilledOnce(EncodeBatch):
    """The first worker that has encoded its second batch dies before it can hand it over."""

    calls = 0

    def __call__(self, batch: Any) -> Any:
        found = super().__call__(batch)
        folder = Path(os.environ[FOLDER])
        self.calls += 1
        (folder / f"{os.getpid()}-{self.calls}").touch()
        if self.calls == 2:
            try:
                with (folder / "killed").open("x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:  # the other worker, or the next life of this one
                return found
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def refused(model: str) -> str:
    """The error of a row without an id."""
    rows = ray.data.from_items(
        [{"_id": "a", "text": "the sea"}, {"_id": None, "text": "the sky"}], override_num_blocks=1
    )
    try:
        encode_ray.encode(rows, workers=1, rows=8, cpus=1, gpus=0, model=model).materialize()
    except Exception as error:
        return str(error)
    return "nothing"


def main() -> None:
    # Three, so that one is left for reading and writing.
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=128 << 20)
    message = refused(sys.argv[sys.argv.index("--model") + 1])
    (Path(os.environ[FOLDER]) / "refused").write_text(message)
    with mock.patch.object(encode_ray, "EncodeBatch", KilledOnce):
        encode_ray.main()


if __name__ == "__main__":
    main()
