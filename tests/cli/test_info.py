"""``splade-kernels info``: what this process would say of itself, and of a GPU that is only pretended."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import splade_kernels as sk
from splade_kernels.cli import info
from tests.cli.commands import call


def said(capsys: Any) -> dict[str, str]:
    assert call("info") == 0
    lines = capsys.readouterr().out.splitlines()
    return {name.strip(): text for name, text in (line.split("  ", 1) for line in (line.strip() for line in lines))}


def test_versions_backends_and_processor(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("SPLADE_KERNELS_BACKEND", "torch")
    found = {name: text.strip() for name, text in said(capsys).items()}
    assert found["splade-kernels"].startswith(f"{sk.__version__}, commit ")
    for name in ("torch", "transformers", "sentence-transformers"):
        assert found[name] == version(name)
    assert found["python"].startswith(platform.python_version())
    backends = sk.available_backends()
    assert found["backend torch"] == "available"
    assert found["backend triton"] == backends["triton"]
    assert found["compiled operators"] == backends["csrc"]
    assert found["int8 kernels (CPU)"] == backends["screening"]
    assert torch.backends.cpu.get_cpu_capability() in found["instruction set"]
    assert found["SPLADE_KERNELS_BACKEND"] == "torch"


def test_a_gpu_and_its_configurations(monkeypatch: Any, capsys: Any, tmp_path: Any) -> None:
    """A pretended H100: the name, and what the table of architectures says of it."""
    tuning = pytest.importorskip("splade_kernels.backends.triton.tuning")
    properties = SimpleNamespace(name="Pretended", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(info, "backends", lambda: iter([("backend torch", "available")]))
    monkeypatch.setattr(info, "_driver", lambda: "1.2.3")
    found = {name: text.strip() for name, text in said(capsys).items()}
    assert found["GPU 0"] == "Pretended, capability 9.0, 80.0 GiB"
    assert found["CUDA"].endswith("driver 1.2.3")
    config = tuning.matmul_config(90, info.HIDDEN_SIZE, info.VOCAB_SIZE, torch.bfloat16, "ieee")
    assert f"block_v={config.block_v} block_t={config.block_t} block_k={config.block_k}" in found["maximum"]
    assert set(found) >= {"int8", "backward-weight", "backward-hidden"}
    # A table that does not apply is reported, not raised.
    (tmp_path / "table.json").write_text(json.dumps({"table": []}))
    tuning._read_environment.cache_clear()
    monkeypatch.setenv("SPLADE_KERNELS_CONFIG", str(tmp_path / "table.json"))
    found = {name: text.strip() for name, text in said(capsys).items()}
    tuning._read_environment.cache_clear()
    assert "to hold configurations for sm_90" in found["GPU 0, kernels"]


def test_where_a_package_comes_from(monkeypatch: Any, tmp_path: Any) -> None:
    """Outside of a clone, pip's record says from which commit it was installed, or nothing does."""
    monkeypatch.setattr(info, "__file__", str(tmp_path / "site-packages" / "splade_kernels" / "cli" / "info.py"))
    record = json.dumps(
        {"url": "https://example.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}
    )
    monkeypatch.setattr(info, "distribution", lambda name: SimpleNamespace(read_text=lambda file: record))
    assert info._commit() == "commit 0123456789ab"
    monkeypatch.setattr(info, "distribution", lambda name: SimpleNamespace(read_text=lambda file: None))
    assert info._commit() == "commit not known: installed from a package"
