"""Other processes, in which ``splade_kernels`` cannot be imported: what is saved must load there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_BLOCKED = """
import sys
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "splade_kernels":
            raise ImportError("splade_kernels cannot be imported here")

sys.meta_path.insert(0, Blocked())
try:
    import splade_kernels
except ImportError:
    pass
else:
    raise AssertionError("splade_kernels was imported")
"""

_ENCODE = """
from sentence_transformers import SparseEncoder

texts = torch.load(sys.argv[1])
torch.save([SparseEncoder(folder, device="cpu").encode(texts).to_dense() for folder in sys.argv[3:]], sys.argv[2])
"""


def run(code: str, *arguments: str | Path) -> None:
    """``code`` with ``sys`` and ``torch`` imported, and the arguments in ``sys.argv``."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", _BLOCKED + code, *arguments], check=True, env=environment, timeout=300)


def encode(folders: Sequence[str | Path], texts: list[str], scratch: Path) -> list[Tensor]:
    """Embeddings of ``texts`` by the ``SparseEncoder`` of each folder."""
    torch.save(texts, scratch / "texts.pt")
    run(_ENCODE, scratch / "texts.pt", scratch / "out.pt", *folders)
    found: list[Tensor] = torch.load(scratch / "out.pt")
    return found
