"""``manifest.json``: what an output is made of, and what a run that goes on has to have in common with it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import temporary_name, write_whole
from .output import FORMAT_VERSION, MANIFEST
from .parts import IDS, PartCounts, hash_files, ids_path, part_files, read_counts

PACKAGES = ("splade-kernels", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy", "pyarrow")
_BLOCK = 1 << 20


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an output of any state; None where the folder is empty or not there.

    Raises:
        UsageError: the folder holds something else.
    """
    path = folder / MANIFEST
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UsageError(f"--output {folder}: expected a folder, got a file")
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        # Of a process that was killed before it had written its first manifest.
        others = [entry.name for entry in folder.iterdir() if entry != temporary_name(path)]
        if others:
            message = (
                f"expected an empty folder or an output of this command, got {sorted(others)[0]} and no {MANIFEST}"
            )
            raise UsageError(f"--output {folder}: {message}") from error
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {folder}: {MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not {"format_version", "resolved", "parts"} <= manifest.keys():
        raise UsageError(f"--output {folder}: {MANIFEST}: expected that of an output of this command")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / MANIFEST, lambda file: file.write(text.encode()))


def check_resumable(folder: Path, manifest: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what the output was begun with, and what the run has now.

    Raises:
        UsageError: something differs; the message names all of it.
    """
    version = manifest["format_version"]
    if version != FORMAT_VERSION:
        raise UsageError(f"--output {folder}: format_version: expected {FORMAT_VERSION}, got {version!r}")
    differences = list(_differences(manifest.get("resolved"), json.loads(json.dumps(now))))
    if differences:
        shown = "; ".join(f"{name}: begun with {_short(old)}, now {_short(new)}" for name, old, new in differences)
        raise UsageError(f"--output {folder} cannot be continued: {shown} (--overwrite begins again)")


def _differences(old: Any, new: Any, name: str = "") -> Iterable[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{name}[{index}]")
    elif old != new:
        yield name or "resolved", old, new


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def begun(
    *, model: Mapping[str, Any], tokenizer_sha256: str, vocabulary_size: int, options: Mapping[str, Any],
    resolved: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The manifest of an output without parts."""
    return {
        "format_version": FORMAT_VERSION,
        "model": dict(model),
        "tokenizer_sha256": tokenizer_sha256,
        "vocabulary_size": vocabulary_size,
        "options": dict(options),
        "resolved": dict(resolved),
        "versions": versions(),
        "parts": [],
        "rows": 0,
        "empty": 0,
        "skipped": 0,
        "truncated": 0,
        "complete": False,
    }


def completed(manifest: Mapping[str, Any], folder: Path, parts: list[PartCounts], skipped: int) -> dict[str, Any]:
    """The manifest with all parts, whose hashes are those of what is on the disk."""
    files = part_files(folder)
    return {
        **manifest,
        "parts": [
            {"file": files[part.part].name, "rows": part.rows, "sha256": file_sha256(files[part.part])}
            for part in parts
        ],
        "rows": sum(part.rows for part in parts),
        "empty": sum(part.empty for part in parts),
        "skipped": skipped,
        "truncated": sum(part.truncated for part in parts),
        "complete": True,
    }


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_ours(folder: Path, number: int) -> bool:
    """Whether a file that is called like a part is one, though perhaps damaged."""
    counts = read_counts(part_files(folder)[number])
    return ids_path(folder, number).exists() if counts is None else counts.part == number


def remove_leftovers(folder: Path) -> None:
    """Temporary files of a process that was killed."""
    for path in [*folder.glob(".part-*.parquet.tmp"), *(folder / IDS).glob(".part-*.u64.tmp")]:
        path.unlink(missing_ok=True)
    temporary_name(folder / MANIFEST).unlink(missing_ok=True)


def remove_output(folder: Path, manifest: Mapping[str, Any]) -> None:
    """What this command wrote: the parts that the manifest names, those of a run that did not end, and what goes with
    them. The manifest goes last, so that what is left after a kill is still seen to be an output."""
    named = {str(part["file"]) for part in manifest.get("parts", [])}
    for number, path in part_files(folder).items():
        if path.name in named or is_ours(folder, number):
            path.unlink()
    for path in hash_files(folder):
        path.unlink()
    remove_leftovers(folder)
    if (folder / IDS).is_dir() and not any((folder / IDS).iterdir()):
        (folder / IDS).rmdir()
    (folder / MANIFEST).unlink(missing_ok=True)
