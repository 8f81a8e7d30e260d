"""The tokens that ids are written as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from splade_kernels.encoding.errors import DataError
from splade_kernels.encoding.identity import tokenizer_sha256
from splade_kernels.encoding.output import open_output
from splade_kernels.exporting.export import export
from splade_kernels.exporting.formats import FORMATS
from splade_kernels.exporting.terms import term_names
from tests.exporting.outputs import Encoded, write_output
from tests.st_models import backbone, sparse_encoder, tokenizer

TOKENS = [
    "[PAD]",
    "hello",
    ".",
    "a.b",
    "wa lk",
    "\u00a0",
    "tab\t",
    "é",
    "[v1]",
    "x" * 101,
    "y" * 100,
    '"',
    "日本",
    "##s",
]
VOCABULARY = len(TOKENS) + 3


@pytest.fixture
def encoded(tmp_path: Path) -> Encoded:
    """A model's folder with a tokenizer of ``TOKENS``, three ids fewer than the vocabulary, and one row of all ids."""
    vocab = {token: index for index, token in enumerate(TOKENS)}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[PAD]")))
    fast.save_pretrained(tmp_path / "model")
    hashed = tokenizer_sha256(fast)
    row = {term: 1.0 + term for term in range(VOCABULARY)}
    folder, model = tmp_path / "encoded", str(tmp_path / "model")
    return write_output(folder, [row], vocabulary=VOCABULARY, model=model, tokenizer_sha256=hashed)


def names(encoded: Encoded, name: str) -> list[str]:
    return term_names(open_output(encoded.folder), FORMATS[name], "tokens")


BEYOND = [f"[v{term}]" for term in range(len(TOKENS), VOCABULARY)]


@pytest.mark.parametrize(
    ("name", "unusable"),
    [
        ("anserini", ["wa lk", "\u00a0", "tab\t", "[v1]"]),
        ("ciff", ["wa lk", "\u00a0", "tab\t", "[v1]"]),
        ("pisa", ["wa lk", "\u00a0", "tab\t", "[v1]"]),
        ("seismic", ["x" * 101, "[v1]"]),
        ("opensearch", [".", "a.b", "[v1]"]),
        ("elasticsearch", [".", "a.b", "[v1]"]),
    ],
)
def test_tokens_that_a_reader_cannot_take_are_written_by_id(encoded, name: str, unusable: list[str], tmp_path) -> None:
    expected = [f"[v{term}]" if token in unusable else token for term, token in enumerate(TOKENS)] + BEYOND
    assert names(encoded, name) == expected
    assert len(set(expected)) == VOCABULARY
    done = export(encoded.folder, name, tmp_path / "out", names="tokens")
    said = f"{len(unusable) + 3} terms have no token that {name} can take, and are written as [v123]"
    assert said in done.warnings
    if name == "seismic":
        vector = json.loads((tmp_path / "out").read_text())["vector"]
        assert vector == {token: 1.0 + term for term, token in enumerate(expected)}


def test_ids_are_numbers_and_need_no_tokenizer(encoded, tmp_path) -> None:
    (tmp_path / "model" / "tokenizer.json").unlink()
    done = export(encoded.folder, "seismic", tmp_path / "out", names="ids")
    vector = json.loads((tmp_path / "out").read_text())["vector"]
    assert vector == {str(term): 1.0 + term for term in range(VOCABULARY)}
    assert done.warnings == []


@pytest.mark.parametrize("broken", ["another", "none"])
def test_another_tokenizer_or_none_is_an_error_that_names_it(encoded, broken: str, tmp_path) -> None:
    model = tmp_path / "model"
    if broken == "another":
        tokenizer().save_pretrained(model)
    else:
        model.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="the tokenizer of .*model'.*tokenizer_sha256") as caught:
        export(encoded.folder, "anserini", tmp_path / "out")
    said = str(caught.value)
    assert str(model) in said
    assert "--ids needs no tokenizer" in said
    assert "\n" not in said
    if broken == "another":
        assert tokenizer_sha256(tokenizer()) in said
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_saved_sparse_encoder_is_found(tmp_path) -> None:
    model = sparse_encoder()
    model.save(str(tmp_path / "model"))
    hashed = tokenizer_sha256(model.tokenizer)
    row = {3: 1.0, 10: 2.0}
    folder = write_output(tmp_path / "encoded", [row], model=str(tmp_path / "model"), tokenizer_sha256=hashed).folder
    export(folder, "seismic", tmp_path / "out")
    expected = dict(zip(model.tokenizer.convert_ids_to_tokens(list(row)), row.values(), strict=True))
    assert json.loads((tmp_path / "out").read_text())["vector"] == expected


def test_the_tokenizer_of_a_route_is_found(tmp_path) -> None:
    """A Router's folder keeps its tokenizers in the folders of the routes."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import Router, SpladePooling, Transformer

    route = [Transformer(str(backbone()), transformer_task="fill-mask"), SpladePooling("max")]
    model = SparseEncoder(modules=[Router.for_query_document(query_modules=route, document_modules=route)])
    model.save(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    hashed = tokenizer_sha256(tokenizer())
    folder = write_output(
        tmp_path / "encoded", [{10: 2.0}], model=str(tmp_path / "model"), tokenizer_sha256=hashed
    ).folder
    export(folder, "seismic", tmp_path / "out")
    assert json.loads((tmp_path / "out").read_text())["vector"] == {tokenizer().convert_ids_to_tokens(10): 2.0}
