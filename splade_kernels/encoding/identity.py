"""Which model and which tokenizer have computed an output: SHA-256 of what their files and tables hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import DataError

CONFIGURATIONS = ("config.json", "adapter_config.json", "router_config.json")
# What trainers leave beside the weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_DEFAULT_ORGANIZATION = "sparse-encoder"  # of sentence-transformers, for a name without one
_BLOCK = 1 << 20
# Where sentence-transformers names the folders of a model's modules, and of a Router's.
_LISTS: dict[str, Callable[[Any], Iterable[Any]]] = {
    "modules.json": lambda modules: [module["path"] for module in modules],
    "router_config.json": lambda router: router["types"],
}


def model_identity(model: str, revision: str | None = None) -> dict[str, str | None]:
    """``name``, ``revision`` and ``sha256`` of a model that is a folder, or has been loaded from the hub.

    The hash is that of :func:`files_sha256` over the weights and configurations of the model's modules. Of safetensors
    and ``.bin`` files in one folder only the former count, which are what is loaded. The revision is the commit for a
    model of the hub, None for a folder.

    Raises:
        DataError: neither is there, or it holds no weights.
    """
    folder = Path(model)
    commit = None
    if not folder.is_dir():
        folder = _snapshot(model, revision)
        commit = folder.name
    files = sorted(set(_model_files(folder)))
    if not any(_is_weights(file) for file in files):
        raise DataError(f"{model}: expected weights (.safetensors or .bin), got none in {folder}")
    return {"name": model, "revision": commit, "sha256": files_sha256(folder, files)}


def files_sha256(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the files in the order of their names relative to ``folder``: of each, name, size and content."""
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary and rules, without the lengths to which calls cut and pad.

    Of a tokenizer that is not the ``tokenizers`` library's: of its class, vocabulary and special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        content = json.loads(backend.to_str())
        for of_the_last_call in ("truncation", "padding"):
            content.pop(of_the_last_call, None)
    else:
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "special_tokens": special}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _snapshot(model: str, revision: str | None) -> Path:
    """The folder in which the hub's client keeps the files of ``model``."""
    from huggingface_hub import snapshot_download

    for name in (model,) if "/" in model else (model, f"{_DEFAULT_ORGANIZATION}/{model}"):
        try:
            cache = os.getenv("SENTENCE_TRANSFORMERS_HOME")
            found = snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True)
        except (OSError, ValueError):  # not there; no name that the hub can have
            continue
        return Path(found)
    raise DataError(f"{model}: expected a folder, or a model that has been loaded from the hub, got neither")


def _model_files(folder: Path) -> Iterator[Path]:
    """Weights and configurations: the model's own, and those of the modules and routes of sentence-transformers."""
    files = [file for file in folder.iterdir() if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    yield from weights or filter(_is_weights, files)
    yield from (file for file in files if file.name in CONFIGURATIONS)
    for inner in filter(Path.is_dir, _inner_folders(folder)):
        yield from _model_files(inner)


def _inner_folders(folder: Path) -> Iterator[Path]:
    """Those that sentence-transformers' lists in ``folder`` name; without such lists, none."""
    for name, paths_of in _LISTS.items():
        file = folder / name
        if not file.is_file():
            continue
        try:
            paths = [str(path) for path in paths_of(json.loads(file.read_text()))]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: expected a list of modules with their folders, got {error!r}") from error
        yield from (folder / path for path in paths if path)


def _is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin") and file.name not in _NO_WEIGHTS
