"""The options that encode_ray and encode_spark share."""

from __future__ import annotations

import argparse
from typing import Any

# Arguments of EncodeBatch, with what the command line says of them.
_TEXTS: dict[str, dict[str, Any]] = {
    "id_field": {"default": "_id", "help": "column of the ids (default: _id)"},
    "text_field": {"default": "text", "help": "column of the texts (default: text)"},
    "title_field": {"default": "title", "help": "column of the titles (default: title, if there is one)"},
    "query": {"action": "store_true", "help": "encode as queries, not as documents"},
    "max_length": {"type": int, "help": "tokens of a text at most (default: the model's maximum)"},
    "max_active_dims": {"type": int, "help": "terms of a text at most (default: the model's setting)"},
    "min_weight": {"type": float, "help": "drop smaller weights"},
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments of EncodeBatch, and with ``--input`` and ``--output``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that every machine can read, or name on the hub")
    parser.add_argument("--input", required=True, help="file or folder, .jsonl, .jsonl.gz or .parquet by --format")
    parser.add_argument("--format", choices=("json", "parquet"), default="json", help="of the input (default: json)")
    parser.add_argument("--output", required=True, help="folder that gets the Parquet files")
    for name, settings in _TEXTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser


def of_encode_batch(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line said, as keyword arguments of EncodeBatch."""
    return {"model": args.model} | {name: getattr(args, name) for name in _TEXTS}
