"""What several tests of integrations set up, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def autocast_cache() -> Iterator[None]:
    """PyTorch's exporter turns the cache off, and leaves it off where the export fails; graphs guard on it."""
    enabled = torch.is_autocast_cache_enabled()
    yield
    torch.set_autocast_cache_enabled(enabled)
