"""``splade-kernels search``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..encoding.errors import DataError, UsageError

if TYPE_CHECKING:
    from ..encoding.encoder import TextEncoder
    from ..encoding.output import Output


def command(
    index: Annotated[Path, typer.Option(metavar="DIR", help="What encode wrote.")],
    model: Annotated[
        str, typer.Option(metavar="M", help="The model that has encoded it: a folder, or a name on the hub.")
    ],
    queries: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="BEIR's JSONL (_id, text), or TSV (id, text; a header only if it holds _id); also .gz."
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The TREC run to write: qid Q0 docid rank score tag.")],
    k: Annotated[int, typer.Option("-k", min=1, metavar="N", help="Documents a query.")] = 1000,
    engine: Annotated[
        Literal["exact", "seismic"],
        typer.Option(help="Score every document, or search approximately (extra: seismic).", metavar="exact|seismic"),
    ] = "exact",
    prompt_name: Annotated[str | None, typer.Option(metavar="NAME", help="Prompt, if not that of queries.")] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of a query, special ones counted; default: the model's own.")
    ] = None,
    max_active_dims: Annotated[
        int | None, typer.Option(metavar="K", help="Terms of a query at most; default: the model's own setting.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens a batch, padding counted.")] = 8192,
    dtype: Annotated[str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Of the model.")] = "auto",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Of the model, and of the products of exact search.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of the CPU; default: what PyTorch and Seismic take.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="R", help="Of a model on the hub; default: the one that encoded the index.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run if it is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No summary on the standard error.")] = False,
) -> None:
    """Search an encoded corpus, and write a TREC run.

    The order is by score, descending, then by id (its UTF-8 bytes), ascending. A document with score 0 is not in it.
    """
    import torch

    from ..encoding.encoder import TextEncoder, WeightError
    from ..encoding.options import EncoderOptions
    from ..encoding.output import open_output
    from ..searching import exact, seismic
    from ..searching.lines import new_file
    from ..searching.queries import read_queries
    from ..searching.run import write_run

    corpus, asked = open_output(index), read_queries(queries)
    if threads is not None:
        torch.set_num_threads(threads)
    encoded_by = corpus.manifest["model"]
    if revision is None and encoded_by["name"] == model:
        revision = encoded_by["revision"]
    options = EncoderOptions(
        model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        query=True,
        prompt_name=prompt_name,
        max_length=max_length,
        batch_tokens=batch_tokens,
        max_active_dims=max_active_dims,
        dtype=dtype,
        device=device,
    )
    with new_file(output, overwrite=overwrite) as file:
        if engine == "seismic":
            seismic.library()
        encoder = TextEncoder(options)
        _refuse_another_model(encoder, corpus)
        begin = time.perf_counter()
        try:
            encoded = encoder([query.text for query in asked])
        except WeightError as error:
            raise DataError(f"{queries}: query {asked[error.row].id!r}: {error}") from error
        vectors = exact.to_csr(encoded, corpus.vocabulary_size, encoder.device)
        if engine == "seismic":
            hits = seismic.search(corpus, vectors, k, threads or 0)
        else:
            hits = exact.search(corpus, vectors, k)
        lines = write_run(file, [query.id for query in asked], hits)
        seconds = time.perf_counter() - begin
    if not quiet:
        without = sum(not found.ids for found in hits)
        summary = f"{len(asked)} queries, {corpus.rows} documents, {lines} lines in {output}, {seconds:.1f} s"
        cut = f"; {encoded.truncated} queries cut to {encoder.max_length} tokens" * bool(encoded.truncated)
        print(f"{summary}{cut}" + f"; {without} queries found nothing" * bool(without), file=sys.stderr)


def _refuse_another_model(encoder: TextEncoder, corpus: Output) -> None:
    """By the hashes of the manifest; a Router has a tokenizer for each route, of which only one is known here."""
    from ..encoding.identity import model_identity, tokenizer_sha256

    name, path = encoder.options.model, corpus.folder / "manifest.json"
    recorded = corpus.manifest["model"]
    identity = model_identity(name, encoder.options.revision)
    if identity["sha256"] != recorded["sha256"]:
        raise UsageError(
            f"--model: expected the model that {path} names, {recorded['name']} (sha256 {recorded['sha256'][:12]}…), "
            f"got other weights or another configuration, {name} (sha256 {str(identity['sha256'])[:12]}…)"
        )
    if not hasattr(encoder.model[0], "sub_modules"):
        digest = tokenizer_sha256(encoder.tokenizer)
        if digest != corpus.manifest["tokenizer_sha256"]:
            raise UsageError(f"--model: expected the tokenizer that {path} names, got another one in {name}")
