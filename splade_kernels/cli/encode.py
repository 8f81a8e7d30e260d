"""``splade-kernels encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..encoding.stopping import stoppable


def command(
    model: Annotated[str, typer.Option(help="Folder of a SparseEncoder, or its name on the hub.", show_default=False)],
    input_: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="PATH|NAME[:CONFIG]",
            help="A .jsonl, .jsonl.gz, .tsv, .parquet or .arrow file, a folder of such files, or a dataset of the hub.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the Parquet parts and manifest.json.", show_default=False)],
    text_field: Annotated[str, typer.Option(help="Field that is encoded.")] = "text",
    title_field: Annotated[str, typer.Option(help="Field that goes in front of it where it is not empty.")] = "title",
    id_field: Annotated[str, typer.Option(help="Field that names a row: a string or an integer.")] = "_id",
    split: Annotated[str, typer.Option(help="Split of a dataset of the hub or of a saved DatasetDict.")] = "train",
    query: Annotated[bool, typer.Option("--query", help="Encode as queries (encode_query), not as documents.")] = False,
    prompt_name: Annotated[str | None, typer.Option(help="A prompt of the model in place of the task's own.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a text, special ones and prompt included. Default: the model's own.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch, padding included.")] = 8192,
    max_active_dims: Annotated[
        int | None, typer.Option(help="Keep the largest weights, so many a text. Default: the model's own setting.")
    ] = None,
    min_weight: Annotated[float | None, typer.Option(help="Drop smaller weights first.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the model; auto is bfloat16 on CUDA from sm_80 on, else float32."),
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where the model runs.")] = "auto",
    screening: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="Skip blocks of the vocabulary that cannot be active.")
    ] = "auto",
    rows_per_part: Annotated[int, typer.Option(help="Rows of a part: what a run that is ended loses.")] = 2000,
    limit: Annotated[int | None, typer.Option(help="Encode the first rows only, so many.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch on the CPU. Default: PyTorch's.")] = None,
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="What a row that cannot be read does: end the run, or be counted."),
    ] = "fail",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run wrote to the output, and begin again.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
) -> None:
    """Encode a corpus into a folder of sparse vectors (Parquet). The same command again goes on where it was ended."""
    # Before sentence-transformers is imported, which takes long: Ctrl-C has its meaning from here on.
    with stoppable() as stop:
        try:
            from ..encoding.options import EncoderOptions
            from ..encoding.ranks import Elsewhere
            from ..encoding.records import Fields
            from ..encoding.run import RunOptions, run
        except ModuleNotFoundError as error:
            raise missing_package(error) from error
        options = RunOptions(
            encoder=EncoderOptions(
                model=model,
                revision=revision,
                trust_remote_code=trust_remote_code,
                query=query,
                prompt_name=prompt_name,
                max_length=max_length,
                batch_tokens=batch_tokens,
                max_active_dims=max_active_dims,
                min_weight=min_weight,
                dtype=dtype,
                device=device,
                screening=screening,
            ),
            input=input_,
            output=output,
            fields=Fields(id_field, text_field, title_field),
            split=split,
            rows_per_part=rows_per_part,
            limit=limit,
            threads=threads,
            on_error=on_error,
            overwrite=overwrite,
            quiet=quiet,
        )
        try:
            summary = run(options, stop)
        except Elsewhere as error:  # the rank that failed has said why
            raise typer.Exit(error.status) from error
    if summary is not None and not quiet:
        print(summary)


def missing_package(error: ModuleNotFoundError) -> Exception:
    if (error.name or "").split(".")[0] == "splade_kernels":
        return error
    from ..encoding.errors import DataError

    return DataError(f"encode needs {error.name}: pip install 'splade-kernels[cli]'")
