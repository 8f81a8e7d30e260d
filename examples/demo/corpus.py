"""Question-passage pairs from the docstrings of installed packages, read with ``ast`` and never imported.

A docstring splits at its first blank line: the qualified name and the summary are the query, the rest is the passage.
Documentation repeats itself, so three steps keep held-out text apart from training text. Summaries that are signatures
or argument entries are dropped; of passages that open with the same 20 words, the first is kept; and whole modules,
never single docstrings, are held out, without the passages that share many 5-grams with training text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

__all__ = ["Corpus", "Pair", "build_corpus", "docstrings", "split", "to_pair"]

PACKAGES = ("stdlib", "torch", "numpy", "transformers")
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "_vendor"})
MIN_SUMMARY_WORDS = 3
MAX_SUMMARY_WORDS = 40
MIN_PASSAGE_WORDS = 12
DEDUPLICATION_WORDS = 20
HELD_OUT_SHARE = 0.1
SHINGLE = 5
MAX_SHARED_SHINGLES = 0.3

WORD = re.compile(r"\w+")
SIGNATURE = re.compile(r"^[\w.]*\w\s*\(.*\)\s*(->.*|:.*|\.)?$|->")
ARGUMENT_ENTRY = re.compile(
    r"^(args?|arguments?|parameters?|returns?|raises?|yields?|keyword args|examples?|notes?|inputs?|outputs?)\s*:"
    r"|^[*`]*\w+[`]*\s*\([^)]*\)\s*:"
    r"|^[*`]*\w+[`]*\s*:\s"
    r"|^:\w+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Pair:
    """One docstring: its module, its qualified name, and its two halves."""

    module: str
    name: str
    query: str
    passage: str


@dataclass(frozen=True)
class Corpus:
    """Training pairs, held-out pairs, how many docstrings each step left, and a hash over all pairs."""

    train: list[Pair]
    held_out: list[Pair]
    counts: dict[str, int]
    held_out_shared_shingles: float
    sha256: str


def build_corpus(packages: Sequence[str] = PACKAGES) -> Corpus:
    """Reads every module of ``packages`` (``"stdlib"`` or an importable name) in sorted order and builds the split."""
    modules = [entry for package in packages for entry in _modules(package)]
    found: list[tuple[str, str, str]] = []
    for module, path in tqdm(modules, desc="modules", unit=" files"):
        found.extend((module, name, text) for name, text in docstrings(_read(path), module))
    return split(found)


def split(found: Iterable[tuple[str, str, str]]) -> Corpus:
    """``(module, qualified name, docstring)`` to the filtered, deduplicated corpus, split by module."""
    found = list(found)
    usable = [pair for pair in (to_pair(*entry) for entry in found) if pair is not None]
    unique = deduplicate(usable)
    train = [pair for pair in unique if not is_held_out(pair.module)]
    candidates = [pair for pair in unique if is_held_out(pair.module)]

    seen = {shingle for pair in train for shingle in shingles(pair.passage)}
    shares = [shared_shingles(pair.passage, seen) for pair in candidates]
    held_out = [pair for pair, share in zip(candidates, shares, strict=True) if share <= MAX_SHARED_SHINGLES]
    kept = [share for share in shares if share <= MAX_SHARED_SHINGLES]

    digest = hashlib.sha256()
    for pair in (*train, *held_out):
        digest.update("\x1f".join((pair.name, pair.query, pair.passage)).encode() + b"\x1e")
    counts = {
        "docstrings": len(found),
        "usable": len(usable),
        "unique": len(unique),
        "train": len(train),
        "held_out_candidates": len(candidates),
        "held_out": len(held_out),
    }
    return Corpus(train, held_out, counts, sum(kept) / max(1, len(kept)), digest.hexdigest())


def docstrings(source: str, module: str) -> Iterator[tuple[str, str]]:
    """``(qualified name, docstring)`` of a module's source: the module, its public classes, functions and methods."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    pending: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [(module, tree)]
    while pending:
        name, node = pending.pop(0)
        text = ast.get_docstring(node)
        if text:
            yield name, text
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    if not child.name.startswith("_"):
                        pending.append((f"{name}.{child.name}", child))


def to_pair(module: str, name: str, docstring: str) -> Pair | None:
    """Query and passage of a docstring; None when its summary or its rest says too little."""
    summary, _, rest = docstring.strip().partition("\n\n")
    summary, passage = " ".join(summary.split()), " ".join(rest.split())
    if not MIN_SUMMARY_WORDS <= len(WORD.findall(summary)) <= MAX_SUMMARY_WORDS:
        return None
    if SIGNATURE.search(summary) or ARGUMENT_ENTRY.match(summary):
        return None
    if len(WORD.findall(passage)) < MIN_PASSAGE_WORDS:
        return None
    return Pair(module, name, f"{name} {summary}", passage)


def deduplicate(pairs: Iterable[Pair]) -> list[Pair]:
    """Keeps the first pair of every passage opening (its first 20 words, lower case) and of every query."""
    openings: set[tuple[str, ...]] = set()
    queries: set[str] = set()
    kept = []
    for pair in pairs:
        opening = tuple(WORD.findall(pair.passage.lower())[:DEDUPLICATION_WORDS])
        if opening in openings or pair.query in queries:
            continue
        openings.add(opening)
        queries.add(pair.query)
        kept.append(pair)
    return kept


def is_held_out(module: str) -> bool:
    """A tenth of all modules, chosen by the hash of the name: the same on every machine, whatever is installed."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


def shingles(text: str) -> set[tuple[str, ...]]:
    """The set of 5-grams of words; the whole text when it is shorter."""
    words = WORD.findall(text.lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def shared_shingles(text: str, seen: set[tuple[str, ...]]) -> float:
    """The share of a text's 5-grams that are in ``seen``."""
    own = shingles(text)
    return len(own & seen) / len(own)


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    """``(dotted name, path)`` of a package's modules in sorted order."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"{package}: expected an installed package to read docstrings from")
        root = Path(spec.submodule_search_locations[0])
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    for path in sorted(path.as_posix() for path in paths if not SKIPPED_FOLDERS.intersection(path.parts)):
        parts = Path(path).with_suffix("").parts
        if package != "stdlib":
            parts = (package, *parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), root / path


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
