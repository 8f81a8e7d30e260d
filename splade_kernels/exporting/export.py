"""One encoded corpus, written for one reader."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..encoding.errors import DataError, UsageError
from ..encoding.output import open_output
from .arrays import write_lsr_benchmark, write_npz
from .ciff import write_ciff
from .formats import FORMATS, Format, Names
from .lines import write_lines
from .pisa import write_pisa
from .terms import by_id, term_names
from .weights import Survey, Weights

# The keys of SeismicIndex are 16 bits wide; OpenSearch folds ids to 15.
SEISMIC_TOKENS, OPENSEARCH_IDS = 65_535, 32_768


@dataclass(frozen=True)
class Exported:
    """What was written: rows, their terms, and the weights that vanished or were clipped."""

    rows: int
    terms: int
    dropped: int
    clipped: int
    warnings: list[str] = field(default_factory=list)


def export(
    folder: Path, format: str, path: Path, *, scale: float | None = None, names: Names | None = None
) -> Exported:
    """Write the encoded corpus of ``folder`` to ``path`` for the reader ``format`` (:data:`.formats.FORMATS`).

    A first pass checks all rows and counts; nothing is written before. The memory does not grow with the corpus. The
    same corpus gives the same bytes. ``path`` is there when it is whole, and only then.

    Args:
        folder: the output of ``splade-kernels encode``.
        scale: what weights are multiplied by; None: the format's default.
        names: ``"tokens"`` or ``"ids"``; None: the format's default.

    Raises:
        UsageError: an unknown format, a ``path`` that exists, names or a scale that the format cannot have.
        DataError: ``folder`` is no complete output; the tokenizer of its model is not to be had; a file system error.
    """
    if format not in FORMATS:
        raise UsageError(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}")
    form = FORMATS[format]
    if names == "tokens" and not form.either:
        raise UsageError(f"--tokens: expected --ids for {format}, whose terms are integers")
    if os.path.lexists(path):
        raise UsageError(f"--output: expected a path that does not exist, got {path}")
    weights = Weights(open_output(folder), form, scale)
    used: Names = names or form.names
    terms = term_names(weights.output, form, used) if form.either else []
    found = weights.survey()
    _write_beside(weights, found, terms, path)
    found.warnings.extend(_warnings(form, found, terms, used))
    return Exported(found.rows, found.terms, found.dropped, found.clipped, found.warnings)


def _write_beside(weights: Weights, found: Survey, terms: list[str], path: Path) -> None:
    """Write under a temporary name beside ``path``, flush to the disk, and rename."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(weights, found, terms, temporary)
        for written in temporary.rglob("*") if weights.form.folder else [temporary]:
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write(weights: Weights, found: Survey, terms: list[str], path: Path) -> None:
    name = weights.form.name
    if weights.form.folder:
        path.mkdir()
    if name == "pisa":
        write_pisa(weights, found, terms, path)
    elif name == "lsr-benchmark":
        write_lsr_benchmark(weights, found, path)
    elif name == "npz":
        write_npz(weights, found, path)
    else:
        with path.open("wb") as file:
            if name == "ciff":
                write_ciff(weights, found, terms, file)
            else:
                write_lines(name, weights, terms, file)


def _warnings(form: Format, found: Survey, terms: list[str], names: Names) -> list[str]:
    occurring = np.flatnonzero(found.frequencies).tolist()
    said = []
    if names == "tokens":
        by_ids = sum(terms[term] == by_id(term) for term in occurring)
        if by_ids:
            said.append(f"{by_ids} terms have no token that {form.name} can take, and are written as [v123]")
    if form.name == "seismic" and len(occurring) > SEISMIC_TOKENS:
        said.append(f"{len(occurring)} distinct tokens: SeismicIndex takes {SEISMIC_TOKENS}, SeismicIndexLV more")
    if form.name == "opensearch" and names == "ids" and occurring and occurring[-1] >= OPENSEARCH_IDS:
        said.append(f"OpenSearch's sparse_vector folds ids modulo {OPENSEARCH_IDS}: different terms become one")
    return said
