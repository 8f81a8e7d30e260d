"""What the formats of ``splade-kernels export`` are, one row each; docs/formats.md shows the table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Names = Literal["tokens", "ids"]

# The field, or the named vector, that holds the weights where an engine's documents have fields.
FIELD = "splade"
# A scale under which a larger share of the weights vanishes is refused; so is one that leaves a row without any.
MOST_DROPPED = 0.1

FLOAT32_MAX, FLOAT32_MIN_NORMAL, FLOAT32_MIN = 3.4028234663852886e38, 1.1754943508222875e-38, 1.401298464324817e-45
FLOAT16_MAX, FLOAT16_MIN = 65504.0, 2.0**-24
INT32_MAX = 2.0**31 - 1
WHITESPACE = re.compile(r"\s|[\x00-\x1f\x85]|^$")
DOT = re.compile(r"\.|^$")
# The tokens of pyseismic-lsr are NumPy's U100.
MORE_THAN_100 = re.compile(r"^.{101,}", re.DOTALL)


@dataclass(frozen=True)
class Format:
    """How one reader wants an encoded corpus.

    ``integers``: weights are ``rint(weight * scale)``; otherwise ``float32(weight * scale)``. ``smallest`` and
    ``largest`` are what the format can hold: weights below vanish (they are dropped and counted), weights above are
    clipped (and counted). ``unusable``: tokens that the reader cannot take, which are written as ``[v123]``.
    """

    name: str
    written: str
    integers: bool
    scale: float
    names: Names
    smallest: float
    largest: float
    note: str
    source: str
    either: bool = True
    folder: bool = False
    unusable: re.Pattern[str] | None = None
    id_bytes: int | None = None
    id_lines: bool = False

    @property
    def range(self) -> str:
        if self.integers:
            return f"1 to {self.largest:,.0f}"
        return f"{self.smallest:.2g} to {self.largest:.5g}"


_TABLE = (
    Format(
        "anserini",
        'JSONL: `{"id", "contents": "", "vector": {token: integer}}`; `JsonVectorCollection` takes a folder of files '
        "whose names end in `.jsonl`",
        integers=True,
        scale=100,
        names="tokens",
        smallest=1,
        largest=INT32_MAX,
        unusable=WHITESPACE,
        note="Index with `-impact -pretokenized`. The reader truncates floats to integers, and writes each token as "
        "often as its weight says into a text that is split at white space. The scale is that of naver/splade; "
        "Pyserini's is 256/5. Rows without terms are written; Anserini counts them as empty and leaves them out.",
        source="castorini/anserini, `JsonVectorCollection.java` (`asInt()`), `DefaultLuceneDocumentGenerator.java`; "
        "naver/splade, `create_anserini_collection.py`",
    ),
    Format(
        "pisa",
        "a folder with PISA's uncompressed collection, base name `index`: `index.docs`, `.freqs`, `.sizes`, `.terms`, "
        "`.documents`, `.termlex`, `.doclex`, as `ciff2pisa` writes them",
        integers=True,
        scale=100,
        names="tokens",
        smallest=1,
        largest=INT32_MAX,
        folder=True,
        unusable=WHITESPACE,
        id_lines=True,
        note="Impacts are the frequencies: go on with `compress_inverted_index` and `create_wand_data`, both with "
        "`--scorer quantized` or none. Terms are sorted by their bytes.",
        source="pisa-engine/ciff, `src/lib.rs`, `payload_vector.rs`; not read back by PISA itself here, which has no "
        "wheel: the files are compared with the CIFF export",
    ),
    Format(
        "ciff",
        "one file of the Common Index File Format, version 1",
        integers=True,
        scale=51,
        names="tokens",
        smallest=1,
        largest=255,
        unusable=WHITESPACE,
        id_lines=True,
        note="The scale maps weights up to 5, the range that Pyserini takes, to 255. Readers with 8-bit impacts would "
        "take a larger one modulo 256 (BMP does), so they are clipped. BMP needs 1,000 documents or more.",
        source="osirrc/ciff, `ciff.proto`; ciff-toolkit and bmp, which the tests run",
    ),
    Format(
        "seismic",
        'JSONL: `{"id", "content": "", "vector": {token: float}}`',
        integers=False,
        scale=1,
        names="tokens",
        smallest=FLOAT16_MIN,
        largest=FLOAT16_MAX,
        unusable=MORE_THAN_100,
        note="Tokens are strings, also with `--ids`. `SeismicIndex` keeps weights as float16, and takes up to 65,535 "
        "distinct tokens; `SeismicIndexLV` takes more.",
        source="pyseismic-lsr, which the tests run; TusKANNy/seismic, `json_utils.rs`",
    ),
    Format(
        "opensearch",
        f'NDJSON for `_bulk`: `{{"index": {{"_id"}}}}`, then `{{"{FIELD}": {{key: float}}}}`',
        integers=False,
        scale=1,
        names="ids",
        smallest=FLOAT32_MIN_NORMAL,
        largest=FLOAT32_MAX,
        unusable=DOT,
        id_bytes=512,
        note="Ids are for `sparse_vector`, which takes integers as keys, folds them modulo 32,768, and quantises "
        "weights to 8 bits up to `quantization_ceiling_ingest`. `--tokens` is for `rank_features`, which refuses dots "
        "in keys: such tokens are written as `[v123]`.",
        source="opensearch-project/neural-search, `SparseVectorFieldMapper.java`, `SparseVector.java`, "
        "`SparseConstants.java`; OpenSearch's documentation of `rank_features`",
    ),
    Format(
        "elasticsearch",
        f'NDJSON for `_bulk`: `{{"index": {{"_id"}}}}`, then `{{"{FIELD}": {{key: float}}}}`',
        integers=False,
        scale=1,
        names="ids",
        smallest=FLOAT32_MIN_NORMAL,
        largest=FLOAT32_MAX,
        unusable=DOT,
        id_bytes=512,
        note="For `sparse_vector`, which takes strictly positive normal floats and keeps 9 significant bits of them "
        "(0.4%). Its first versions refuse dots in keys: with `--tokens`, such tokens are written as `[v123]`.",
        source="elastic/elasticsearch, `SparseVectorFieldMapper.java`; Elasticsearch's documentation of "
        "`sparse_vector`",
    ),
    Format(
        "qdrant",
        f'JSONL of points: `{{"id": UUID, "payload": {{"id"}}, "vector": {{"{FIELD}": {{"indices", "values"}}}}}}`',
        integers=False,
        scale=1,
        names="ids",
        smallest=FLOAT32_MIN,
        largest=FLOAT32_MAX,
        either=False,
        note="Ids of points are unsigned integers or UUIDs: `uuid.uuid5(uuid.NAMESPACE_OID, id)`, and the original is "
        "in the payload.",
        source="qdrant-client, which the tests run",
    ),
    Format(
        "lsr-benchmark",
        "a folder with `doc/doc-embeddings.npz` (`data`, `indices`, `indptr`) and `doc/doc-ids.txt`; `query/query-…` "
        "where queries were encoded",
        integers=False,
        scale=1,
        names="ids",
        smallest=FLOAT32_MIN,
        largest=FLOAT32_MAX,
        either=False,
        folder=True,
        id_lines=True,
        note="What `dataset.doc_embeddings(PATH)` reads. Both parts of a submission are two exports into two folders.",
        source="reneuir/lsr-benchmark, `lsr_benchmark/irds.py`; the tests read as it does, not with it",
    ),
    Format(
        "npz",
        "one file for `scipy.sparse.load_npz` (CSR, not compressed), with the ids as a further array, `ids`",
        integers=False,
        scale=1,
        names="ids",
        smallest=FLOAT32_MIN,
        largest=FLOAT32_MAX,
        either=False,
        note='`numpy.load(PATH)["ids"]` are the ids of the rows.',
        source="SciPy, which the tests run",
    ),
)
FORMATS = {one.name: one for one in _TABLE}
