"""A whole run: rows in, parts out, and the manifest that makes of them an output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import manifest as manifests
from .corpus import Corpus, Row, open_corpus
from .duplicates import Hashes, Seen, check_duplicates, id_hashes
from .encoder import Encoded, TextEncoder, WeightError
from .errors import DataError, UsageError
from .files import locked
from .identity import model_identity, tokenizer_sha256
from .options import EncoderOptions
from .output import part_name
from .parts import (
    IDS,
    PartCounts,
    cut,
    encoding_digest,
    part_files,
    read_counts,
    read_hashes,
    rows_digest,
    write_hashes,
    write_part,
)
from .progress import Progress
from .ranks import Alone, join
from .records import DEFAULT_FIELDS, Fields
from .stopping import Stop


@dataclass(frozen=True)
class RunOptions:
    """What ``splade-kernels encode`` is called with; its help says what each means."""

    encoder: EncoderOptions
    input: str
    output: Path
    fields: Fields = DEFAULT_FIELDS
    split: str = "train"
    rows_per_part: int = 2000
    limit: int | None = None
    threads: int | None = None
    on_error: str = "fail"
    overwrite: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Summary:
    """What a run has come to. ``tokens`` and ``seconds`` are this process's own, 0 where there was nothing to do."""

    folder: Path
    rows: int
    empty: int
    skipped: int
    truncated: int
    terms: int
    tokens: int
    seconds: float
    nothing_to_do: bool

    def __str__(self) -> str:
        speed = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.seconds else ""
        done = "nothing to do: " if self.nothing_to_do else ""
        return (
            f"{done}{self.rows:,} rows ({self.empty:,} empty, {self.skipped:,} skipped, {self.truncated:,} truncated), "
            f"{self.terms / max(self.rows, 1):.1f} terms a row{speed}, in {self.folder}"
        )


def run(options: RunOptions, stop: Stop) -> Summary | None:
    """Encode what is missing of a corpus; returns None on the ranks that do not end the run.

    Raises:
        CommandError: with the exit status of the command, and a message of one line.
    """
    for name, value in (
        ("rows_per_part", options.rows_per_part),
        ("limit", options.limit),
        ("threads", options.threads),
    ):
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    ranks = join(stop.check)
    with ranks.failing():
        try:
            return _Run(options, ranks, stop)()
        except OSError as error:
            raise DataError(f"{error.filename or options.output}: {error.strerror or error}") from error


class _Run:
    def __init__(self, options: RunOptions, ranks: Alone, stop: Stop) -> None:
        self.options = options
        self.ranks = ranks
        self.stop = stop
        self.folder = options.output
        # Only rank 0 speaks, and only rank 0 looks at what is there already.
        self.first = ranks.rank == 0
        label = "encode" if ranks.world_size == 1 else f"encode (rank 0 of {ranks.world_size})"
        self.progress = Progress(options.quiet or not self.first, label)

    def __call__(self) -> Summary | None:
        options = self.options
        corpus = open_corpus(
            options.input, options.fields, split=options.split, on_error=options.on_error, limit=options.limit
        )
        with ExitStack() as stack:
            if self.first:
                stack.enter_context(_made(self.folder))
                manifests.read_manifest(self.folder)
                stack.enter_context(locked(self.folder, self.progress.warn))
            encoder = self._encoder()
            shared = self.ranks.share(lambda: self._begin(encoder, corpus))
            summary = None
            if not shared["complete"]:
                parts = self._encode(encoder, corpus, set(shared["done"]), shared["encoding"])
                self.ranks.wait_for_all()
                summary = self._end(shared["manifest"], corpus, parts) if self.first else None
            elif self.first:
                summary = self._summary(self._counts(), shared["manifest"]["skipped"], True)
            self.ranks.wait_for_first()
            return summary

    def _encoder(self) -> TextEncoder:
        options = self.options.encoder
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        if options.device == "auto" and self.ranks.world_size > 1 and torch.cuda.is_available():
            options = replace(options, device=f"cuda:{self.ranks.local_rank % torch.cuda.device_count()}")
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading the weights
        encoder = TextEncoder(options)
        self.stop.check()
        return encoder

    def _begin(self, encoder: TextEncoder, corpus: Corpus) -> dict[str, Any]:
        """What is there already, and a manifest if there was none."""
        model = model_identity(self.options.encoder.model, self.options.encoder.revision)
        resolved = self._resolved(encoder, corpus, model["sha256"])
        found = manifests.read_manifest(self.folder)
        if found is not None:
            self._check_parts()
            # Nothing is lost where nothing was made: of bad data in the first part, or of too little memory.
            if self.options.overwrite or not (found.get("complete") or part_files(self.folder)):
                manifests.remove_output(self.folder, found)
                found = None
        if found is None:
            given = {**asdict(self.options.encoder), **asdict(self.options), "fields": self.options.fields._asdict()}
            del given["encoder"]
            found = manifests.begun(
                model=model,
                tokenizer_sha256=resolved["tokenizer_sha256"],
                vocabulary_size=encoder.vocabulary_size,
                options=given | {"output": str(self.folder)},
                resolved=resolved,
            )
            manifests.write_manifest(self.folder, found)
        else:
            manifests.check_resumable(self.folder, found, resolved)
        (self.folder / IDS).mkdir(exist_ok=True)
        manifests.remove_leftovers(self.folder)
        done, encoding = [], encoding_digest(resolved)
        for number, path in part_files(self.folder).items():
            counts = read_counts(path)
            if counts is None:
                self.progress.warn(f"{path}: damaged, and encoded again")
            elif counts.encoding_blake2b == encoding:
                done.append(number)
            else:
                raise UsageError(
                    f"{path}: expected a part of this output, got one of another model or with other options "
                    "(--overwrite begins again)"
                )
        complete = bool(found["complete"]) and len(done) == len(found["parts"])
        if found["complete"] and not complete:
            # Until all parts are there again.
            found = {**found, "complete": False}
            manifests.write_manifest(self.folder, found)
        return {"manifest": found, "done": done, "complete": complete, "encoding": encoding}

    def _check_parts(self) -> None:
        """Raises where a file is called like a part and is none, before anything is deleted or gone on from."""
        for number, path in part_files(self.folder).items():
            if not manifests.is_ours(self.folder, number):
                raise UsageError(f"{path}: expected a part of this output, got another file")

    def _resolved(self, encoder: TextEncoder, corpus: Corpus, model_sha256: str | None) -> dict[str, Any]:
        """What has to be the same for a run to be continued: all that changes a part, and which rows are in it."""
        options = self.options
        return {
            "model_sha256": model_sha256,
            "tokenizer_sha256": tokenizer_sha256(encoder.tokenizer),
            "query": options.encoder.query,
            "prompt": encoder.prompt,
            "max_length": encoder.max_length,
            "dtype": encoder.dtype,
            "max_active_dims": encoder.max_active_dims,
            "min_weight": options.encoder.min_weight,
            "batch_tokens": options.encoder.batch_tokens,
            "screening": options.encoder.screening,
            "fields": options.fields._asdict(),
            "split": corpus.split,
            "on_error": options.on_error,
            "rows_per_part": options.rows_per_part,
            "limit": options.limit,
            "input": corpus.identity,
        }

    def _encode(self, encoder: TextEncoder, corpus: Corpus, done: set[int], encoding: str) -> int:
        """Encode the parts of this rank that are missing; returns how many the corpus has."""
        seen, number, before = Seen(), -1, corpus.fraction
        with self.progress, self._watched(encoder):
            for number, rows in enumerate(cut(corpus, self.options.rows_per_part)):
                self.ranks.look()
                hashes: Hashes | None = None
                if self.first:
                    hashes = self._ids(number, rows, number in done)
                    found = seen.add(hashes)
                    if len(found):
                        check_duplicates(found, rows, corpus.again())
                if number not in done and self.ranks.takes(number):
                    self.progress.start(before)
                    if hashes is None:
                        hashes = id_hashes(row.id for row in rows)
                    counts = write_part(self.folder, number, rows, hashes, _encoded(encoder, rows), encoding)
                    self.progress.part(counts.rows, counts.terms, corpus.fraction)
                before = corpus.fraction
        return number + 1

    def _ids(self, number: int, rows: list[Row], done: bool) -> Hashes:
        """The hashes of a part's ids. A part that is there has to be of these rows."""
        if done:
            counts = read_counts(self.folder / part_name(number))
            if counts is None or counts.rows_blake2b != rows_digest(rows):
                raise UsageError(
                    f"--output {self.folder} cannot be continued: {part_name(number)} was made of other rows than "
                    f"those from {rows[0].place} on, though names and sizes are the same (--overwrite begins again)"
                )
        hashes = id_hashes(row.id for row in rows)
        if done and not np.array_equal(hashes, read_hashes(self.folder, number)):
            write_hashes(self.folder, number, hashes)
        return hashes

    @contextmanager
    def _watched(self, encoder: TextEncoder) -> Iterator[None]:
        """Look for signals and for other ranks' errors before each batch, and count its tokens, padding included."""

        def before_batch(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            self.ranks.look()
            features = inputs[0]
            if "input_ids" in features:
                ids, flattened = features["input_ids"], "cu_seq_lens_q" in features
                self.progress.batch(len(features["cu_seq_lens_q"]) - 1 if flattened else len(ids), ids.numel())

        hook = encoder.model.register_forward_pre_hook(before_batch)
        try:
            yield
        finally:
            hook.remove()

    def _counts(self) -> list[PartCounts]:
        counts = [read_counts(path) for path in part_files(self.folder).values()]
        return [count for count in counts if count is not None]

    def _end(self, manifest: dict[str, Any], corpus: Corpus, parts: int) -> Summary:
        counts = self._counts()
        if [count.part for count in counts] != list(range(parts)):
            raise DataError(
                f"{self.folder}: expected the parts 0 to {parts - 1}, got {[count.part for count in counts]}"
            )
        if not parts:
            raise DataError(f"{self.options.input}: expected rows, got none{self._skipped(corpus)}")
        manifests.write_manifest(self.folder, manifests.completed(manifest, self.folder, counts, corpus.skipped))
        if corpus.skipped:
            self.progress.warn(f"{corpus.skipped:,} skipped, the first of them: {'; '.join(corpus.skipped_first)}")
        return self._summary(counts, corpus.skipped, False)

    def _skipped(self, corpus: Corpus) -> str:
        return f" ({corpus.skipped:,} were skipped, the first: {corpus.skipped_first[0]})" if corpus.skipped else ""

    def _summary(self, counts: list[PartCounts], skipped: int, nothing_to_do: bool) -> Summary:
        def total(of: Callable[[PartCounts], int]) -> int:
            return sum(map(of, counts))

        return Summary(
            folder=self.folder,
            rows=total(lambda count: count.rows),
            empty=total(lambda count: count.empty),
            skipped=skipped,
            truncated=total(lambda count: count.truncated),
            terms=total(lambda count: count.terms),
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
            nothing_to_do=nothing_to_do,
        )


def _encoded(encoder: TextEncoder, rows: list[Row]) -> Encoded:
    try:
        return encoder([row.text for row in rows])
    except WeightError as error:
        row = rows[error.row]
        raise DataError(f"{row.place}: {row.id!r}: {error.reason}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DataError(
            f"{rows[0].place} and what follows: out of memory: lower --batch-tokens (--overwrite, if parts are there)"
        ) from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, which goes again if this made it and nothing came into it."""
    missing = not folder.exists()
    if missing:
        folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        if missing and not any(folder.iterdir()):
            folder.rmdir()
        raise
