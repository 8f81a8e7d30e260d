"""Exports in the engines that are to read them: their top 10 against exact scores in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from splade_kernels.exporting.export import export
from tests.exporting.outputs import Encoded, random_rows, write_output

INSTALL = "is not installed: pip install '.[engines]'"
QUERIES = 20


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Encoded:
    rows = random_rows(1500)
    rows[7] = {}
    return write_output(tmp_path_factory.mktemp("engines") / "encoded", rows)


def terms_of(query: np.ndarray) -> tuple[list[int], list[float]]:
    terms = np.flatnonzero(query)
    return terms.tolist(), query[terms].tolist()


def assert_same(found: list[tuple[str, float]], expected: list[tuple[str, float]], tolerance: float) -> None:
    """The same documents in the same order, but for those whose scores are as near as ``tolerance``."""
    scores = dict(expected)
    assert len(found) == len(expected)
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=tolerance)
    for (row, score), (_, other) in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores.get(row, other), score, rtol=tolerance)


@pytest.mark.parametrize("index", ["SeismicIndex", "SeismicIndexLV"])
def test_seismic_finds_what_exact_scores_find(index: str, encoded, tmp_path) -> None:
    """Its index is approximate: at least 9 of 10 with its defaults, all with whole summaries. Weights are float16."""
    seismic = pytest.importorskip("seismic", reason=f"the package pyseismic-lsr {INSTALL}")
    export(encoded.folder, "seismic", tmp_path / "corpus.jsonl", names="ids")
    string = seismic.get_seismic_string()
    for energy, least in ((0.4, 9), (1.0, 10)):
        built = getattr(seismic, index).build(str(tmp_path / "corpus.jsonl"), summary_energy=energy, num_threads=1)
        assert built.len == 1500
        assert built.nnz == encoded.matrix.nnz
        for seed in range(QUERIES):
            query = encoded.query(seed)
            terms, weights = terms_of(query)
            components, values = np.array(list(map(str, terms)), string), np.array(weights, np.float32)
            hits = built.search("q", components, values, k=10, query_cut=12, heap_factor=0.9)
            expected = encoded.top(query)
            assert len({row for _, _, row in hits} & {row for row, _ in expected}) >= least
            if energy == 1:
                assert_same([(row, score) for _, score, row in hits], expected, 1e-3)


def test_seismic_takes_tokens_of_up_to_100_characters() -> None:
    """What ``MORE_THAN_100`` rests on."""
    seismic = pytest.importorskip("seismic", reason=f"the package pyseismic-lsr {INSTALL}")
    assert seismic.get_seismic_string() == "U100"


def bmp_query(query: np.ndarray) -> np.ndarray:
    """BMP takes a query's weights as 5 bits: up to 32, rounded up."""
    return np.ceil(query * np.float32(32 / query.max())).astype(np.float64)


def test_bmp_finds_what_exact_integer_scores_find(tmp_path) -> None:
    """Exactly, on the weights that were written and the query's as it rounds them."""
    bmp = pytest.importorskip("bmp", reason=f"the package bmp {INSTALL}")
    rows = random_rows(1500)
    # Weights beyond 5, which are clipped: 5.1 would be 260, of 8 bits 4.
    for row in range(20, 1500, 150):
        rows[row] = {term: 5.05 + weight / 10 for term, weight in rows[row].items()}
    encoded = write_output(tmp_path / "encoded", rows)
    export(encoded.folder, "ciff", tmp_path / "corpus.ciff", names="ids")
    bmp.ciff2bmp(str(tmp_path / "corpus.ciff"), str(tmp_path / "corpus.bmp"), 32, False)
    searcher = bmp.Searcher(str(tmp_path / "corpus.bmp"))
    written = encoded.matrix.astype(np.float64)
    written.data = np.minimum(np.rint(written.data * 51), 255)
    overlaps = []
    for seed in range(QUERIES):
        query = encoded.query(seed)
        terms, weights = terms_of(query)
        hits = searcher.search(dict(zip(map(str, terms), weights, strict=True)), 10, 1.0, 1.0)
        assert_same(list(zip(*hits, strict=True)), encoded.top(bmp_query(query), matrix=written), 0)
        overlaps.append(len(set(hits[0]) & {row for row, _ in encoded.top(query)}))
    assert min(overlaps) >= 8
    assert sum(overlaps) >= 9.5 * QUERIES


def test_bmp_takes_weights_modulo_256(tmp_path) -> None:
    """Why they are clipped: 300 counts as 44, and 256 as nothing. In a process of its own, which may end itself.

    The row with the weight 2 is in the block that is scored last, which BMP leaves out.
    """
    pytest.importorskip("bmp", reason=f"the package bmp {INSTALL}")
    pytest.importorskip("ciff_toolkit", reason=f"the package ciff-toolkit {INSTALL}")
    script = """
import sys
import bmp
from ciff_toolkit.ciff_pb2 import DocRecord, Header, PostingsList
from ciff_toolkit.write import CiffWriter
file, rows = sys.argv[1], 2000
postings = PostingsList(term="a", df=rows, cf=rows)
for row in range(rows):
    postings.postings.add(docid=int(row > 0), tf={100: 300, 200: 255, 300: 256, 1500: 2}.get(row, 1))
with CiffWriter(file) as writer:
    writer.write_header(Header(version=1, num_postings_lists=1, num_docs=rows, total_postings_lists=1, total_docs=rows))
    writer.write_postings_lists([postings])
    writer.write_documents(DocRecord(docid=row, collection_docid=f"d{row}", doclength=1) for row in range(rows))
bmp.ciff2bmp(file, file + ".bmp", 32, False)
print("\\nFOUND", bmp.Searcher(file + ".bmp").search({"a": 1.0}, 10, 1.0, 1.0))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "corpus.ciff")], capture_output=True, text=True, timeout=120
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    rows, scores = eval(line.removeprefix("FOUND "))
    found = dict(zip(rows, scores, strict=True))
    assert rows[0] == "d200"
    assert found["d200"] == 255 * 32
    assert found["d100"] == 44 * 32
    assert "d300" not in found


def test_qdrant_finds_what_exact_scores_find(encoded, tmp_path) -> None:
    qdrant = pytest.importorskip("qdrant_client", reason=f"the package qdrant-client {INSTALL}")
    models = qdrant.models
    export(encoded.folder, "qdrant", tmp_path / "corpus.jsonl")
    client = qdrant.QdrantClient(":memory:")
    client.create_collection("corpus", vectors_config={}, sparse_vectors_config={"splade": models.SparseVectorParams()})
    with (tmp_path / "corpus.jsonl").open() as lines:
        client.upsert("corpus", [models.PointStruct.model_validate_json(line) for line in lines])
    assert client.count("corpus").count == 1500
    for seed in range(5):
        query = encoded.query(seed)
        terms, weights = terms_of(query)
        vector = models.SparseVector(indices=terms, values=weights)
        hits = client.query_points("corpus", query=vector, using="splade", limit=10).points
        assert_same([(hit.payload["id"], hit.score) for hit in hits], encoded.top(query), 1e-6)


def test_duckdb_finds_what_exact_scores_find_in_the_parts_themselves(encoded) -> None:
    duckdb = pytest.importorskip("duckdb", reason=f"the package duckdb {INSTALL}")
    for seed in range(QUERIES):
        query = encoded.query(seed)
        hits = duckdb.sql(sql_of_the_page(encoded.folder), params=list(terms_of(query))).fetchall()
        assert_same(hits, encoded.top(query), 1e-12)


def sql_of_the_page(folder: Path) -> str:
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text()
    (code,) = [block for block in page.split("```") if block.startswith("python") and "duckdb" in block]
    return code.split('"""')[1].replace("corpus/part-", f"{folder}/part-")


def test_milvus_lite_finds_what_exact_scores_find(encoded, tmp_path) -> None:
    pytest.importorskip("milvus_lite", reason=f"the package milvus-lite {INSTALL}")
    pymilvus = pytest.importorskip("pymilvus", reason=f"the package pymilvus {INSTALL}")
    from splade_kernels.encoding.output import open_output

    client = pymilvus.MilvusClient(str(tmp_path / "milvus.db"))
    schema = client.create_schema()
    schema.add_field("id", pymilvus.DataType.VARCHAR, is_primary=True, max_length=512)
    schema.add_field("splade", pymilvus.DataType.SPARSE_FLOAT_VECTOR)
    index = client.prepare_index_params()
    index.add_index("splade", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    client.create_collection("corpus", schema=schema, index_params=index)
    for batch in open_output(encoded.folder).batches():
        rows = [row for row in batch.to_pylist() if row["indices"]]
        vectors = [dict(zip(row["indices"], row["values"], strict=True)) for row in rows]
        client.insert("corpus", [{"id": row["id"], "splade": v} for row, v in zip(rows, vectors, strict=True)])
    queries = [encoded.query(seed) for seed in range(QUERIES)]
    asked = [dict(zip(*terms_of(query), strict=True)) for query in queries]
    found = client.search("corpus", data=asked, anns_field="splade", limit=10)
    client.close()
    for query, hits in zip(queries, found, strict=True):
        assert_same([(hit["id"], hit["distance"]) for hit in hits], encoded.top(query), 1e-6)
