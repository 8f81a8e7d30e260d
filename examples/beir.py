"""A retrieval collection in BEIR's folder layout, read and checked.

    DIR/corpus.jsonl        {"_id": ..., "title": ... (optional), "text": ...} a line
    DIR/queries.jsonl       {"_id": ..., "text": ...} a line
    DIR/qrels/SPLIT.tsv     query-id <tab> corpus-id <tab> score, with a header; a score above 0 means relevant

Layout: Thakur et al. 2021, "BEIR: A Heterogeneous Benchmark for Zero-shot Evaluation of Information Retrieval Models",
arXiv:2104.08663. Every error is an :class:`InputError` that names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BeirFolder", "InputError", "read_beir"]

QRELS_HEADER = ["query-id", "corpus-id", "score"]


class InputError(ValueError):
    """A file, folder or name from the user cannot be used; the message says what was expected and what was found."""


@dataclass(frozen=True)
class BeirFolder:
    """One collection: texts by id, and for each split the relevant passages of each query (ids, in file order)."""

    corpus: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, list[str]]]

    def pairs(self, split: str) -> list[tuple[str, str]]:
        """Every (query, relevant passage) of a split, as texts."""
        return [
            (self.queries[query_id], self.corpus[corpus_id])
            for query_id, corpus_ids in self.relevant[split].items()
            for corpus_id in corpus_ids
        ]


def read_beir(folder: Path) -> BeirFolder:
    """Reads ``corpus.jsonl``, ``queries.jsonl`` and the splits ``train``, ``dev`` and ``test`` as far as they exist.

    A passage is its title and text joined by a space, as BEIR's own evaluation has it.

    Raises:
        InputError: a file is missing or malformed, an id is unknown or repeated, a text that a pair needs is empty, a
            split holds no relevant pair, or a query of one split is in another as well.
    """
    for needed in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        if not (folder / needed).is_file():
            raise InputError(f"{folder / needed}: expected a file here (BEIR layout), found none")

    corpus: dict[str, str] = {}
    for where, entry in _entries(folder / "corpus.jsonl"):
        title = entry.get("title") or ""
        if not isinstance(title, str):
            raise InputError(f"{where}: 'title': expected a string, got {title!r}")
        corpus[_new_id(entry, corpus, where)] = f"{title} {_text(entry, where)}".strip()

    queries: dict[str, str] = {}
    for where, entry in _entries(folder / "queries.jsonl"):
        queries[_new_id(entry, queries, where)] = _text(entry, where).strip()

    relevant: dict[str, dict[str, list[str]]] = {}
    for split in ("train", "dev", "test"):
        path = folder / "qrels" / f"{split}.tsv"
        if path.is_file():
            relevant[split] = _read_qrels(path, queries, corpus, earlier=relevant)
    return BeirFolder(corpus, queries, relevant)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that hold something, each with its ``file:line``."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\r\n")


def _entries(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for where, line in _lines(path):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: expected a JSON object: {error}") from error
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected a JSON object, got {type(entry).__name__}")
        yield where, entry


def _new_id(entry: dict[str, object], known: dict[str, str], where: str) -> str:
    identifier = entry.get("_id")
    if not isinstance(identifier, str) or not identifier:
        raise InputError(f"{where}: '_id': expected a non-empty string, got {identifier!r}")
    if identifier in known:
        raise InputError(f"{where}: '_id' {identifier!r} stands on an earlier line already")
    return identifier


def _text(entry: dict[str, object], where: str) -> str:
    text = entry.get("text")
    if not isinstance(text, str):
        raise InputError(f"{where}: 'text': expected a string, got {text!r}")
    return text


def _read_qrels(
    path: Path, queries: dict[str, str], corpus: dict[str, str], earlier: dict[str, dict[str, list[str]]]
) -> dict[str, list[str]]:
    lines = _lines(path)
    where, header = next(lines, (f"{path}:1", ""))
    if header.split("\t") != QRELS_HEADER:
        raise InputError(f"{where}: expected the header {QRELS_HEADER} separated by tabs, got {header!r}")

    judged: set[tuple[str, str]] = set()
    relevant: dict[str, list[str]] = {}
    for where, line in lines:
        fields = line.split("\t")
        if len(fields) != len(QRELS_HEADER):
            raise InputError(f"{where}: expected {len(QRELS_HEADER)} fields separated by tabs, got {len(fields)}")
        query_id, corpus_id, score = fields
        for identifier, texts, source in ((query_id, queries, "queries.jsonl"), (corpus_id, corpus, "corpus.jsonl")):
            if identifier not in texts:
                raise InputError(f"{where}: {identifier!r} is not an '_id' of {source}")
        try:
            is_relevant = int(score) > 0
        except ValueError:
            raise InputError(f"{where}: score: expected an integer, got {score!r}") from None
        if (query_id, corpus_id) in judged:
            raise InputError(f"{where}: {query_id!r} and {corpus_id!r} are judged on an earlier line already")
        judged.add((query_id, corpus_id))
        # A query in two splits would be trained on and then evaluated.
        for split, others in earlier.items():
            if query_id in others:
                raise InputError(f"{where}: query {query_id!r} belongs to the split '{split}' as well")
        if is_relevant:
            if not queries[query_id] or not corpus[corpus_id]:
                raise InputError(f"{where}: the text of {query_id!r} or of {corpus_id!r} is empty")
            relevant.setdefault(query_id, []).append(corpus_id)
    if not relevant:
        raise InputError(f"{path}: expected at least one pair with a score above 0, found none")
    return relevant
