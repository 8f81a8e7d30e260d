"""``splade-kernels search``: an index of a tiny model, searched with queries that the stock model encodes as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder

from splade_kernels.encoding.encoder import TextEncoder
from splade_kernels.encoding.identity import model_identity, tokenizer_sha256
from splade_kernels.encoding.options import EncoderOptions
from splade_kernels.searching.evaluation import read_run
from tests.cli.commands import call
from tests.searching.encoded import write_output
from tests.st_models import PAIRS, sparse_encoder

QUERIES, DOCUMENTS = zip(*PAIRS, strict=True)
IDS = [f"d{number}" for number in range(len(DOCUMENTS))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    encoder = sparse_encoder()
    encoder.prompts = {"query": "what is ", "document": "", "other": "the sky "}
    encoder.save_pretrained(str(folder))
    return Path(folder)


@pytest.fixture(scope="module")
def index(model: Path, tmp_path_factory: Any) -> Path:
    """Written from what the stock model computes."""
    dense = SparseEncoder(str(model), device="cpu").encode_document(list(DOCUMENTS)).to_dense().numpy()
    folder = Path(tmp_path_factory.mktemp("index"))
    encoder = TextEncoder(EncoderOptions(str(model), device="cpu"))
    manifest = {"model": model_identity(str(model)), "tokenizer_sha256": tokenizer_sha256(encoder.tokenizer)}
    write_output(folder, IDS, dense, manifest=manifest)
    return folder


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "queries.jsonl"
    rows = [{"_id": f"q{number}", "text": text} for number, text in enumerate(QUERIES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"_id": "blank", "text": " "}]))
    return path


def search(model: Path, index: Path, queries: Path, output: Path, *more: Any) -> int:
    return call("search", "--model", model, "--index", index, "--queries", queries, "--output", output, *more)


def stock_scores(model: Path, **options: Any) -> Any:
    """``[queries, documents]`` in float64, of embeddings by the stock model."""
    stock = SparseEncoder(str(model), device="cpu")
    encoded = stock.encode_query(list(QUERIES), **options), stock.encode_document(list(DOCUMENTS))
    queries, documents = (part.to_dense().double().numpy() for part in encoded)
    return queries @ documents.T


@pytest.mark.parametrize(
    ("options", "stock"),
    [
        ([], {}),
        (["--prompt-name", "other"], {"prompt_name": "other"}),
        (["--max-active-dims", 2], {"max_active_dims": 2}),
    ],
    ids=["query-prompt", "named-prompt", "pruned"],
)
def test_the_run_is_that_of_the_stock_model(
    options: list[Any], stock: dict[str, Any], model: Path, index: Path, queries: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "run.trec"
    assert search(model, index, queries, output, "-k", 5, "--batch-tokens", 64, *options) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{len(QUERIES) + 1} queries, {len(DOCUMENTS)} documents, " in said.err
    rows = [line.split(" ") for line in output.read_text().splitlines()]
    found = read_run(output)
    true = stock_scores(model, **stock)
    assert {len(row) for row in rows} == {6}
    assert {(row[1], row[5]) for row in rows} == {("Q0", "splade-kernels")}
    for number in range(len(QUERIES)):
        mine = [row for row in rows if row[0] == f"q{number}"]
        assert [int(row[3]) for row in mine] == [*range(1, len(mine) + 1)]
        assert len(mine) == min(5, (true[number] > 0).sum())
        scores = np.array([float(row[4]) for row in mine])
        np.testing.assert_allclose(scores, true[number, [IDS.index(row[2]) for row in mine]], rtol=1e-4)
        assert scores.min(initial=np.inf) >= np.sort(true[number])[::-1][len(mine) - 1] * (1 - 1e-4) or not len(mine)
        assert [(-float(row[4]), row[2]) for row in mine] == sorted((-float(row[4]), row[2]) for row in mine)
    assert sum(map(len, found.values())) == len(rows) > 2 * len(QUERIES)
    assert "blank" not in found


def test_scores_read_back_as_the_same_float32(model: Path, index: Path, queries: Path, tmp_path: Path) -> None:
    from splade_kernels.encoding.output import open_output
    from splade_kernels.searching import exact

    assert search(model, index, queries, tmp_path / "run.trec", "--quiet", "--threads", torch.get_num_threads()) == 0
    encoder = TextEncoder(EncoderOptions(str(model), query=True, device="cpu"))
    vectors = exact.to_csr(encoder([*QUERIES, " "]), encoder.vocabulary_size, "cpu")
    hits = exact.search(open_output(index), vectors, 1000)
    scores = [float(line.split()[4]) for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert np.array_equal(np.float32(scores), np.concatenate([found.scores for found in hits]))


def test_seismic_finds_the_same_in_a_small_corpus(model: Path, index: Path, queries: Path, tmp_path: Path) -> None:
    pytest.importorskip("seismic")
    for engine in ("exact", "seismic"):
        assert search(model, index, queries, tmp_path / engine, "--engine", engine, "--quiet", "--threads", 1) == 0
    exact, approximate = (read_run(tmp_path / engine) for engine in ("exact", "seismic"))
    assert {query: set(found) for query, found in exact.items()} == {q: set(found) for q, found in approximate.items()}


def changed(model: Path, folder: Path, what: str) -> Path:
    shutil.copytree(model, folder)
    if what == "tokenizer":
        path = next(folder.rglob("tokenizer.json"))
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["sky"], vocabulary["sea"] = vocabulary["sea"], vocabulary["sky"]
        path.write_text(json.dumps(content))
    else:
        path = next(folder.rglob("model.safetensors"))
        weights = load_file(path)
        name = next(name for name, value in weights.items() if value.dim() == 2)
        weights[name][0, 0] += 1
        save_file(weights, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("what", "message"), [("weights", "got other weights"), ("tokenizer", "expected the tokenizer")]
)
def test_another_model_is_refused(
    what: str, message: str, model: Path, index: Path, queries: Path, tmp_path: Path, capsys: Any
) -> None:
    other = changed(model, tmp_path / "other", what)
    assert search(other, index, queries, tmp_path / "run.trec") == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "queries.jsonl"]
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)  # the same model under another name
    assert search(moved, index, queries, tmp_path / "run.trec") == 0


def test_what_is_there_stays(model: Path, index: Path, queries: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "run.trec"
    output.write_text("mine")
    assert search(model, index, queries, output) == 2
    assert "--output: expected a path that is not there yet" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert search(model, index, queries, output, "--overwrite") == 0
    assert read_run(output)
    assert search(model, index, queries, tmp_path, "--overwrite") == 2  # a folder


def test_errors_have_one_line_and_a_status(
    model: Path, index: Path, queries: Path, tmp_path: Path, capsys: Any
) -> None:
    output, bad = tmp_path / "run.trec", tmp_path / "bad.tsv"
    bad.write_text("1\ta\n1\tb\n")
    cases: list[tuple[int, str, Any]] = [
        (1, "bad.tsv:2: '_id': '1' stands on line 1", [model, index, bad, output]),
        (1, "no manifest.json", [model, tmp_path, queries, output]),
        (1, "cannot be loaded", [tmp_path, index, queries, output]),
        (1, "No such file", [model, index, queries, tmp_path / "none" / "run.trec"]),
        (2, "max_length", [model, index, queries, output, "--max-length", "100000"]),
        (2, "prompt_name: expected one of", [model, index, queries, output, "--prompt-name", "x"]),
        (2, "device: expected", [model, index, queries, output, "--device", "tpu"]),
        (2, "--engine", [model, index, queries, output, "--engine", "lucene"]),
        (2, "-k", [model, index, queries, output, "-k", "0"]),
    ]
    for status, message, arguments in cases:
        assert search(*arguments) == status, message
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
        assert said.startswith("Usage") or said.splitlines()[-1].startswith("splade-kernels: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tsv", "queries.jsonl"]
