"""``splade-kernels estimate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..encoding.errors import DataError, UsageError
from .several import SeveralValues as Command

__all__ = ["Command", "command"]


def command(
    model: Annotated[str, typer.Option(metavar="M", help="A folder, a config.json, or a name on the hub.")],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Of the device: 24GiB, 80GB, or bytes.")],
    lengths: Annotated[
        list[int] | None,
        typer.Option(metavar="N...", help="Tokens a text, padding counted.  [default: 128 256 512 … 8192]"),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training/--inference", help="Forward and backward, or forward alone.")
    ] = True,
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Of the model's parameters.")
    ] = "float32",
    autocast: Annotated[
        str | None, typer.Option(metavar="bfloat16|float16", help="Of autocast; default: none.")
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="adamw|none", help="Whose state is kept, in training.")] = "adamw",
    attention: Annotated[
        str, typer.Option(metavar="sdpa|eager|flash_attention_2", help="The model's implementation of attention.")
    ] = "sdpa",
    padding: Annotated[bool, typer.Option("--padding/--no-padding", help="Whether batches hold padding.")] = True,
    device: Annotated[str, typer.Option(metavar="cuda|cpu", help="Kind of the device.")] = "cuda",
    reserve: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What is not the step's; default: 1GiB on a GPU, 0.5GiB on a CPU."),
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="R", help="Of a model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")
    ] = False,
) -> None:
    """The largest batch that fits, for each length, with the stock head and with the fused one.

    By formula: nothing is measured, and the weights are not loaded.
    """
    from ..memory import LENGTHS, estimate, table

    config = _configuration(model, revision, trust_remote_code)
    try:
        rows = estimate(
            config,
            memory,
            lengths=lengths or LENGTHS,
            dtype=dtype,
            autocast=autocast,
            training=training,
            optimizer=None if optimizer == "none" else optimizer,
            attention=attention,
            padded=padding,
            device=device,
            reserve=reserve,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    dtypes = dtype + f", autocast {autocast}" * bool(autocast)
    what = f"training with {optimizer}" if training else "inference"
    print(f"{model}: the largest batch in {memory} on {device}, {what}, {dtypes}, by formula, not measured\n")
    print(table(rows))


def _configuration(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """transformers' configuration; of a folder of sentence-transformers that of its first module."""
    from transformers import AutoConfig

    path = Path(model)
    modules = path / "modules.json"
    try:
        if modules.is_file():
            path = path / json.loads(modules.read_text())[0]["path"]
        name = str(path) if path.exists() else model
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any kind: files, the hub's client, the model's own code
        raise DataError(f"{model}: no configuration of transformers: {str(error).splitlines()[0]}") from error
