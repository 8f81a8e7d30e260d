"""The names that a format's terms get: tokens of the model's tokenizer, or ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..encoding.errors import DataError
from ..encoding.output import Output
from .formats import Format, Names

# What ids without a usable token are called; a token that reads like this is one of them.
_BY_ID = re.compile(r"\[v\d+\]")


def term_names(output: Output, form: Format, names: Names) -> list[str]:
    """The name of every term, [V], each a different one.

    Raises:
        DataError: the tokenizer cannot be loaded, or is not the one that the texts were encoded with.
    """
    if names == "ids":
        return [str(term) for term in range(output.vocabulary_size)]
    tokenizer = load_tokenizer(output)
    tokens = tokenizer.convert_ids_to_tokens(range(min(len(tokenizer), output.vocabulary_size)))
    tokens += [None] * (output.vocabulary_size - len(tokens))
    seen: set[str] = set()
    found = []
    for term, token in enumerate(tokens):
        usable = token is not None and token not in seen and not _BY_ID.fullmatch(token)
        if not usable or (form.unusable is not None and form.unusable.search(token)):
            token = by_id(term)
        seen.add(token)
        found.append(token)
    return found


def by_id(term: int) -> str:
    return f"[v{term}]"


def load_tokenizer(output: Output) -> Any:
    """The tokenizer of the manifest's model, which has to be the one whose hash the manifest holds.

    Where a model's folder has another or none, as that of a ``Router`` may, those of its modules are tried.
    """
    from ..encoding.identity import tokenizer_sha256

    model, expected = output.manifest["model"], output.manifest["tokenizer_sha256"]
    found = []
    for load in (_from_folder, _from_modules):
        try:
            tokenizers = list(load(model["name"], model.get("revision")))
        except Exception as error:  # of any kind: files, the hub's client
            found.append(f"{type(error).__name__}: {error}".strip().splitlines()[0])
            continue
        for tokenizer in tokenizers:
            found.append(tokenizer_sha256(tokenizer))
            if found[-1] == expected:
                return tokenizer
    raise DataError(
        f"the tokenizer of {model['name']!r} (revision {model.get('revision')}): expected the one that the texts were "
        f"encoded with (tokenizer_sha256 {expected}), got {', '.join(dict.fromkeys(found))}; --ids needs no tokenizer"
    )


def _from_folder(name: str, revision: str | None) -> Iterator[Any]:
    from transformers import AutoTokenizer

    yield AutoTokenizer.from_pretrained(name, revision=revision)


def _from_modules(name: str, revision: str | None) -> Iterator[Any]:
    from sentence_transformers import SparseEncoder

    for module in SparseEncoder(name, revision=revision, device="cpu").modules():
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is not None:
            yield tokenizer
