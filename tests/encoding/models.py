"""A tiny model on the disk, the command line in this process, and what an output holds."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from splade_kernels.encoding import run as runs
from splade_kernels.encoding.encoder import TextEncoder
from tests.st_models import sparse_encoder

ROOT = Path(__file__).parents[2]
SQUAD = ROOT.parent / "shared/data/squad/corpus.jsonl"
_FOLDER = tempfile.TemporaryDirectory(prefix="tiny-sparse-encoders-")

needs_squad = pytest.mark.skipif(not SQUAD.is_file(), reason=f"{SQUAD} is not here")


@functools.cache
def model_folder(seed: int = 0) -> Path:
    folder = Path(_FOLDER.name) / f"model-{seed}"
    model = sparse_encoder()
    if seed:
        import torch

        with torch.no_grad():
            for parameter in model.parameters():
                parameter += seed / 1000
    model.save_pretrained(str(folder))
    return folder


# Loading takes longer than all else that a test does.
_loaded = functools.cache(TextEncoder)


def encode(*arguments: Any, model: Path | None = None) -> int:
    """``splade-kernels encode`` in this process; returns the exit status. Models are loaded once."""
    from splade_kernels.cli.app import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "TextEncoder", _loaded)
        try:
            return run(["encode", "--model", str(model or model_folder()), *map(str, arguments)])
        except SystemExit as ended:
            return int(ended.code or 0)


def command(*arguments: Any) -> list[str]:
    """The same in a process of its own, started in ``ROOT`` with :func:`environment`."""
    return [sys.executable, "-m", "splade_kernels", "encode", "--model", str(model_folder()), *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of all parts in order."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("part-*.parquet")):
        found += pq.read_table(path).to_pylist()
    return found


def parts(folder: Path) -> dict[str, bytes]:
    """Bytes of the parts and of the hashes beside them."""
    files = [*folder.glob("part-*.parquet"), *folder.glob("ids/*.u64")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
