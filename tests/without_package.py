"""Other processes, in which a package cannot be imported: what ``splade_kernels`` saves must load without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_BLOCKED = """
import importlib
import sys
import torch

PACKAGE = sys.argv.pop(1)

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"{PACKAGE} cannot be imported here", name=name)

sys.meta_path.insert(0, Blocked())
try:
    importlib.import_module(PACKAGE)
except ImportError:
    pass
else:
    raise AssertionError(f"{PACKAGE} was imported")
"""

_ENCODE = """
from sentence_transformers import SparseEncoder

texts = torch.load(sys.argv[1])
torch.save([SparseEncoder(folder, device="cpu").encode(texts).to_dense() for folder in sys.argv[3:]], sys.argv[2])
"""


def run(code: str, *arguments: str | Path, package: str = "splade_kernels") -> str:
    """``code`` with ``sys`` and ``torch`` imported, and the arguments in ``sys.argv``; returns what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _BLOCKED + code, package, *arguments]
    done = subprocess.run(command, check=True, env=environment, timeout=300, stdout=subprocess.PIPE, text=True)
    return done.stdout


def encode(folders: Sequence[str | Path], texts: list[str], scratch: Path) -> list[Tensor]:
    """Embeddings of ``texts`` by the ``SparseEncoder`` of each folder."""
    torch.save(texts, scratch / "texts.pt")
    run(_ENCODE, scratch / "texts.pt", scratch / "out.pt", *folders)
    found: list[Tensor] = torch.load(scratch / "out.pt")
    return found
