"""``model_identity`` and ``tokenizer_sha256``: what changes them, and what does not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding
from transformers import AutoTokenizer

from splade_kernels.encoding.errors import DataError
from splade_kernels.encoding.identity import files_sha256, model_identity, tokenizer_sha256
from tests.encoding.conftest import save
from tests.st_models import sparse_encoder


@pytest.fixture
def copy(model_folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def sha256(folder: Path) -> str | None:
    return model_identity(str(folder))["sha256"]


def test_the_hash_is_over_names_sizes_and_contents(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_bytes(b"{}")
    expected = hashlib.sha256(b"config.json\x002\0{}model.safetensors\x007\0weights").hexdigest()
    assert model_identity(str(tmp_path)) == {"name": str(tmp_path), "revision": None, "sha256": expected}
    assert files_sha256(tmp_path, [tmp_path / "model.safetensors", tmp_path / "config.json"]) == expected


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "1_SpladePooling/config.json"])
def test_what_changes_it(copy: Path, model_folder: str, name: str) -> None:
    assert sha256(copy) == sha256(Path(model_folder))
    content = bytearray((copy / name).read_bytes())
    content[-2] ^= 1
    (copy / name).write_bytes(content)
    assert sha256(copy) != sha256(Path(model_folder))


def test_what_does_not(copy: Path, model_folder: str) -> None:
    """Other files, checkpoints and what trainers leave."""
    (copy / "README.md").write_text("changed")
    (copy / "training_args.bin").write_bytes(b"1")
    (copy / "pytorch_model.bin").write_bytes(b"the same weights, which are not loaded beside safetensors")
    (copy / "checkpoint-5").mkdir()
    (copy / "checkpoint-5" / "model.safetensors").write_bytes(b"2")
    assert sha256(copy) == sha256(Path(model_folder))


def test_weights_in_several_files_and_as_bin(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = []
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
        found.append(sha256(tmp_path))
    for file in tmp_path.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    found.append(sha256(tmp_path))
    assert len(set(found)) == 3


@pytest.mark.parametrize("place", ["at the top", "in a folder"])
def test_the_routes_of_a_router(tmp_path: Path, place: str) -> None:
    """sentence-transformers writes a Router that is the first module beside modules.json, another one in a folder."""
    document = sparse_encoder()
    static = SparseStaticEmbedding(tokenizer=document.tokenizer, frozen=True)
    router = Router.for_query_document([static], list(document.children()))
    save(SparseEncoder(modules=[router], device="cpu"), tmp_path)
    if place == "in a folder":
        (tmp_path / "0_Router").mkdir()
        for entry in ("router_config.json", *json.loads((tmp_path / "router_config.json").read_text())["types"]):
            (tmp_path / entry).rename(tmp_path / "0_Router" / entry)
        listed = json.loads((tmp_path / "modules.json").read_text())
        listed[0]["path"] = "0_Router"
        (tmp_path / "modules.json").write_text(json.dumps(listed))
    names = ("*.safetensors", "router_config.json", "*Pooling/config.json")
    files = [file for name in names for file in tmp_path.rglob(name)]
    assert len(files) == 4
    before = sha256(tmp_path)
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert sha256(tmp_path) != before, file
        file.write_bytes(content)
    assert sha256(tmp_path) == before


def test_a_model_of_the_hub_is_hashed_where_its_client_keeps_it(
    copy: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the client's cache, with a name that gets sentence-transformers' organisation."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--sparse-encoder--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(copy, repository / "snapshots" / commit)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "cache"))
    for name in ("tiny", "sparse-encoder/tiny"):
        expected = {"name": name, "revision": commit, "sha256": sha256(Path(model_folder))}
        assert model_identity(name) == model_identity(name, "main") == model_identity(name, commit) == expected
    with pytest.raises(DataError, match=r"tiny: expected a folder, or a model that has been loaded from the hub"):
        model_identity("tiny", "another")


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected weights \(\.safetensors or \.bin\), got none"):
        model_identity(str(tmp_path))
    with pytest.raises(DataError, match="expected a folder, or a model that has been loaded from the hub"):
        model_identity(str(tmp_path / "missing"))
    (tmp_path / "modules.json").write_text("[1]")
    with pytest.raises(DataError, match="expected a list of modules with their folders"):
        model_identity(str(tmp_path))


def test_the_tokenizer(model_folder: str) -> None:
    """Calls set how it cuts and pads, which is no property of it; its vocabulary and rules are."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    first = tokenizer_sha256(tokenizer)
    assert first == tokenizer_sha256(AutoTokenizer.from_pretrained(model_folder))
    tokenizer(["the sea", "the"], padding=True, truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_sha256(tokenizer) == tokenizer_sha256(tokenizer.backend_tokenizer) == first
    tokenizer.add_tokens(["new"])
    assert tokenizer_sha256(tokenizer) != first


def test_a_tokenizer_in_python() -> None:
    class Words:
        def __init__(self, *words: str, unknown: str = "?") -> None:
            self.words = words
            self.special_tokens_map = {"unk_token": unknown}

        def get_vocab(self) -> dict[str, int]:
            return {word: place for place, word in enumerate(self.words)}

    found = tokenizer_sha256(Words("?", "a"))
    content = {"class": "Words", "vocabulary": {"?": 0, "a": 1}, "special_tokens": {"unk_token": "?"}}
    assert found == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert len({found, tokenizer_sha256(Words("a", "?")), tokenizer_sha256(Words("?", "a", unknown="a"))}) == 3
