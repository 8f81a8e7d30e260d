"""CIFF and PISA's collection: the bytes of ciff-toolkit's writer, and what PISA's tools make of the same file."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest

from splade_kernels.encoding.output import open_output
from splade_kernels.exporting import ciff, inverted
from splade_kernels.exporting.export import export
from splade_kernels.exporting.formats import FORMATS
from splade_kernels.exporting.weights import Weights
from tests.exporting.outputs import Encoded, random_rows, write_output

pytest.importorskip("ciff_toolkit", reason="the package ciff-toolkit is not installed: pip install '.[engines]'")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Encoded:
    rows = random_rows(3000)
    rows[3] = {}
    rows[4] = {7: 5.5}
    # Gaps between the rows of a term that take one, two and three bytes, from row 0 on and not.
    for row in (0, 1, 129, 2900):
        rows[row][299] = 2.6
    for row in range(3000):
        rows[row].pop(298, None)
    rows[2999][298] = 1.0
    return write_output(tmp_path_factory.mktemp("ciff") / "encoded", rows)


def scaled(encoded: Encoded, scale: float, largest: float) -> np.ndarray:
    """What is to be found, [n, V], int64."""
    return np.minimum(np.rint(encoded.matrix.toarray().astype(np.float64) * scale), largest).astype(np.int64)


def test_ciff_toolkit_reads_the_matrix(encoded, tmp_path) -> None:
    from ciff_toolkit.read import CiffReader

    done = export(encoded.folder, "ciff", tmp_path / "out.ciff", names="ids")
    expected = scaled(encoded, 51, 255)
    found = np.zeros_like(expected)
    with CiffReader(tmp_path / "out.ciff") as reader:
        header = reader.read_header()
        terms = []
        for postings in reader.read_postings_lists():
            rows = np.cumsum([posting.docid for posting in postings.postings])
            weights = [posting.tf for posting in postings.postings]
            assert postings.df == len(weights)
            assert postings.cf == sum(weights)
            found[rows, int(postings.term)] = weights
            terms.append(postings.term)
        documents = [(one.docid, one.collection_docid, one.doclength) for one in reader.read_documents()]
    assert np.array_equal(found, expected)
    assert terms == sorted(terms)
    lengths = expected.sum(1).tolist()
    assert documents == list(zip(range(3000), encoded.ids, lengths, strict=True))
    assert (header.version, header.num_docs, header.total_docs) == (1, 3000, 3000)
    assert header.num_postings_lists == header.total_postings_lists == len(terms) == 300
    assert header.total_terms_in_collection == sum(lengths)
    assert header.average_doclength == sum(lengths) / 3000
    assert done.clipped == int((encoded.matrix.data.astype(np.float64) * 51 >= 255.5).sum()) > 0
    assert done.warnings == [f"{done.clipped} weights were clipped to 255"]


def test_the_bytes_are_those_that_ciff_toolkit_writes(encoded, tmp_path) -> None:
    from ciff_toolkit.read import CiffReader
    from ciff_toolkit.write import CiffWriter

    class Kept(io.BytesIO):
        def close(self) -> None:
            pass

    export(encoded.folder, "ciff", tmp_path / "out.ciff", names="ids")
    written = Kept()
    with CiffReader(tmp_path / "out.ciff") as reader, CiffWriter(written) as writer:
        writer.write_header(reader.read_header())
        writer.write_postings_lists(reader.read_postings_lists())
        writer.write_documents(reader.read_documents())
    assert written.getvalue() == (tmp_path / "out.ciff").read_bytes()


@pytest.mark.parametrize("number", [1, 127, 128, 16383, 16384, 2097151, 2097152, 268435455, 268435456, 2**31 - 1])
def test_numbers_at_the_limits_of_their_bytes(number: int) -> None:
    from ciff_toolkit.ciff_pb2 import PostingsList

    gaps, weights = np.array([0, number, 1, 0]), np.array([number, 1, number, 3])
    encoded, ends = ciff._encoded(gaps, weights)
    message = PostingsList.FromString(encoded.tobytes())
    assert [(one.docid, one.tf) for one in message.postings] == list(zip(gaps.tolist(), weights.tolist(), strict=True))
    assert message.SerializeToString() == encoded.tobytes()
    assert len(PostingsList.FromString(encoded[: ends[1]].tobytes()).postings) == 2


def test_postings_are_the_same_however_few_are_held(encoded, tmp_path, monkeypatch) -> None:
    export(encoded.folder, "ciff", tmp_path / "whole", names="ids")
    monkeypatch.setattr(inverted, "POSTINGS_HELD", 500)
    monkeypatch.setattr(ciff, "CHUNK", 7)
    export(encoded.folder, "ciff", tmp_path / "passes", names="ids")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "passes").read_bytes()


@pytest.mark.parametrize("held", [1, 100, 500, 10**6])
def test_no_more_postings_are_held_than_asked(encoded, held: int) -> None:
    weights = Weights(open_output(encoded.folder), FORMATS["ciff"])
    frequencies = weights.survey().frequencies
    groups = list(inverted._groups(frequencies, held))
    assert [first for first, _ in groups] == [0, *(last for _, last in groups[:-1])]
    assert groups[-1][1] == 300
    assert all(last == first + 1 or frequencies[first:last].sum() <= held for first, last in groups)
    assert len(groups) == {1: 300, 10**6: 1}.get(held, len(groups))


def read_sequences(path: Path) -> list[list[int]]:
    """PISA's binary collection: lengths and numbers, uint32."""
    numbers, found, at = np.fromfile(path, "<u4"), [], 0
    while at < len(numbers):
        end = at + 1 + int(numbers[at])
        found.append(numbers[at + 1 : end].tolist())
        at = end
    return found


def read_lexicon(path: Path) -> list[str]:
    """PISA's payload vector: the count, count + 1 offsets, the bytes."""
    data = path.read_bytes()
    count = int(np.frombuffer(data[:8], "<u8")[0])
    ends = np.frombuffer(data[8 : 16 + 8 * count], "<u8").astype(int)
    texts = data[16 + 8 * count :]
    assert ends[-1] == len(texts)
    return [texts[first:last].decode() for first, last in itertools.pairwise(ends)]


def test_pisas_collection_is_the_matrix(encoded, tmp_path) -> None:
    export(encoded.folder, "pisa", tmp_path / "out", names="ids")
    expected = scaled(encoded, 100, 2**31 - 1)
    base = tmp_path / "out" / "index"
    suffixes = {".docs", ".freqs", ".sizes", ".terms", ".documents", ".termlex", ".doclex"}
    assert {path.name for path in base.parent.iterdir()} == {f"index{suffix}" for suffix in suffixes}
    (count,), *rows = read_sequences(base.with_suffix(".docs"))
    frequencies = read_sequences(base.with_suffix(".freqs"))
    terms = base.with_suffix(".terms").read_text().splitlines()
    assert count == 3000
    found = np.zeros_like(expected)
    for term, places, weights in zip(terms, rows, frequencies, strict=True):
        assert places == sorted(places)
        found[places, int(term)] = weights
    assert np.array_equal(found, expected)
    assert terms == sorted(terms)
    assert read_sequences(base.with_suffix(".sizes")) == [expected.sum(1).tolist()]
    assert base.with_suffix(".documents").read_text().splitlines() == encoded.ids
    assert read_lexicon(base.with_suffix(".termlex")) == terms
    assert read_lexicon(base.with_suffix(".doclex")) == encoded.ids


def test_pisa_has_the_postings_of_ciff(encoded, tmp_path) -> None:
    """As ``ciff2pisa`` converts them: gaps added up, the rest taken over."""
    from ciff_toolkit.read import CiffReader

    export(encoded.folder, "pisa", tmp_path / "pisa", names="ids", scale=40)
    export(encoded.folder, "ciff", tmp_path / "ciff", names="ids", scale=40)
    with CiffReader(tmp_path / "ciff") as reader:
        lists = [(one.term, list(one.postings)) for one in reader.read_postings_lists()]
        sizes = [one.doclength for one in reader.read_documents()]
    base = tmp_path / "pisa" / "index"
    assert read_sequences(base.with_suffix(".docs"))[1:] == [
        np.cumsum([posting.docid for posting in postings]).tolist() for _, postings in lists
    ]
    assert read_sequences(base.with_suffix(".freqs")) == [[one.tf for one in postings] for _, postings in lists]
    assert base.with_suffix(".terms").read_text().splitlines() == [term for term, _ in lists]
    assert read_sequences(base.with_suffix(".sizes")) == [sizes]


@pytest.mark.parametrize("name", ["ciff", "pisa"])
@pytest.mark.parametrize("rows", [[], [{}, {}]])
def test_nothing_to_index_is_an_index_of_nothing(name: str, rows: list, tmp_path) -> None:
    from ciff_toolkit.read import CiffReader

    encoded = write_output(tmp_path / "encoded", rows)
    assert export(encoded.folder, name, tmp_path / "out", names="ids").terms == 0
    if name == "pisa":
        assert read_sequences(tmp_path / "out" / "index.docs") == [[len(rows)]]
        assert read_lexicon(tmp_path / "out" / "index.doclex") == encoded.ids
    else:
        with CiffReader(tmp_path / "out") as reader:
            assert list(reader.read_postings_lists()) == []
            assert [one.collection_docid for one in reader.read_documents()] == encoded.ids
