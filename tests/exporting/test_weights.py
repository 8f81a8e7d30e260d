"""Scaling, rounding, dropping and clipping, and rows that no export takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from splade_kernels.encoding.errors import DataError, UsageError
from splade_kernels.encoding.output import MANIFEST, SCHEMA, open_output
from splade_kernels.exporting.export import export
from splade_kernels.exporting.formats import FORMATS, Format
from splade_kernels.exporting.weights import Weights
from tests.exporting.outputs import Encoded, random_rows, write_output

INTEGERS = [form for form in FORMATS.values() if form.integers]
FLOATS = [form for form in FORMATS.values() if not form.integers]


def weights_of(encoded: Encoded, form: Format, scale: float | None = None) -> list[dict[int, float]]:
    """What an export writes for each row, weights by id."""
    found = []
    for rows in Weights(open_output(encoded.folder), form, scale):
        for first, last in zip(rows.offsets, rows.offsets[1:], strict=False):
            found.append(dict(zip(rows.indices[first:last].tolist(), rows.values[first:last].tolist(), strict=True)))
    return found


@pytest.mark.parametrize("form", INTEGERS, ids=lambda form: form.name)
@pytest.mark.parametrize("scale", [None, 20.0, 77.7])
def test_integers_are_rounded_to_the_nearest_and_zeros_dropped(form: Format, scale: float | None, tmp_path) -> None:
    rows = random_rows(900)
    # Halves go to the even neighbour: 0.5 and 2.5 at the scales 20 and 100.
    rows[5] |= {7: 0.025, 8: 0.125, 9: 0.075, 11: 0.0049}
    encoded = write_output(tmp_path / "encoded", rows)
    factor = form.scale if scale is None else scale
    expected = []
    for row in rows:
        scaled = {term: round(float(np.float32(weight)) * factor) for term, weight in row.items()}
        expected.append({term: min(value, int(form.largest)) for term, value in scaled.items() if value > 0})
    assert weights_of(encoded, form, scale) == expected
    survey = Weights(open_output(encoded.folder), form, scale).survey()
    assert survey.terms == sum(map(len, expected))
    assert survey.dropped == encoded.matrix.nnz - survey.terms > 0
    assert survey.clipped == sum(round(float(value) * factor) > form.largest for value in encoded.matrix.data)
    assert survey.total == sum(sum(row.values()) for row in expected)
    assert survey.largest_sum == max(sum(row.values()) for row in expected)
    assert survey.frequencies.tolist() == [sum(term in row for row in expected) for term in range(300)]


@pytest.mark.parametrize("form", FLOATS, ids=lambda form: form.name)
def test_floats_are_the_weights_themselves_or_scaled(form: Format, tmp_path) -> None:
    rows = random_rows(50)
    encoded = write_output(tmp_path / "encoded", rows)
    assert weights_of(encoded, form) == rows
    expected = [{term: float(np.float32(weight * 2.5)) for term, weight in row.items()} for row in rows]
    assert weights_of(encoded, form, 2.5) == expected


def test_what_a_float_format_cannot_hold_is_dropped_or_clipped(tmp_path) -> None:
    rows = [{1: 1.0, 2: 1e-39, 3: 3e38}] + [{1: 1.0}] * 30
    encoded = write_output(tmp_path / "encoded", rows)
    smallest = float(np.float32(1e-39))
    largest = float(np.float32(3e38))
    assert weights_of(encoded, FORMATS["npz"])[0] == {1: 1.0, 2: smallest, 3: largest}
    assert weights_of(encoded, FORMATS["elasticsearch"])[0] == {1: 1.0, 3: largest}
    assert weights_of(encoded, FORMATS["seismic"])[0] == {1: 1.0, 3: 65504.0}
    assert weights_of(encoded, FORMATS["npz"], 10)[0][3] == float(np.finfo(np.float32).max)
    survey = Weights(open_output(encoded.folder), FORMATS["seismic"]).survey()
    assert (survey.dropped, survey.clipped) == (1, 1)
    assert survey.warnings == ["1 weights were clipped to 65,504"]


@pytest.mark.parametrize("form", INTEGERS, ids=lambda form: form.name)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_scales_that_lose_all_fractions_are_refused(form: Format, scale: float, tmp_path) -> None:
    encoded = write_output(tmp_path / "encoded", [{1: 5.0, 2: 6.0}])
    with pytest.raises(UsageError, match=rf"--scale: expected more than 1 for {form.name}.*got {scale:g}"):
        export(encoded.folder, form.name, tmp_path / "out", scale=scale, names="ids")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [0.0, -2.0, float("nan"), float("inf")])
def test_scales_that_are_no_factors_are_refused(scale: float, tmp_path) -> None:
    encoded = write_output(tmp_path / "encoded", [{1: 5.0}])
    with pytest.raises(UsageError, match="--scale: expected a number above 0"):
        export(encoded.folder, "npz", tmp_path / "out", scale=scale)


def test_a_scale_that_empties_a_row_is_refused_and_one_that_does_not_is_named(tmp_path) -> None:
    rows = [{1: 1.0}, {}, {3: 0.004, 4: 0.0041}, {5: 0.003}] + [{1: 1.0}] * 100
    encoded = write_output(tmp_path / "encoded", rows)
    with pytest.raises(UsageError, match=r"--scale 100: all weights of the row 'd2' vanish.*more than 166\.667"):
        export(encoded.folder, "anserini", tmp_path / "out", names="ids")
    done = export(encoded.folder, "anserini", tmp_path / "out", names="ids", scale=167)
    assert (done.rows, done.terms, done.dropped) == (104, 104, 0)


@pytest.mark.parametrize(("small", "refused"), [(10, False), (11, True)])
def test_a_scale_that_loses_more_than_a_tenth_is_refused(small: int, refused: bool, tmp_path) -> None:
    row = {term: 0.001 if term < small else 1.0 for term in range(100)}
    encoded = write_output(tmp_path / "encoded", [row])
    if refused:
        with pytest.raises(UsageError, match="--scale 100: 11 of 100 weights vanish in anserini, more than 10%"):
            export(encoded.folder, "anserini", tmp_path / "out", names="ids")
    else:
        assert export(encoded.folder, "anserini", tmp_path / "out", names="ids").dropped == 10


def test_a_row_whose_weights_add_up_beyond_32_bits_is_refused(tmp_path) -> None:
    encoded = write_output(tmp_path / "encoded", [dict.fromkeys(range(2), 12000000.0)])
    with pytest.raises(UsageError, match="add up to 2400000000, beyond 2147483647"):
        export(encoded.folder, "pisa", tmp_path / "out", names="ids")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({1: 1.0, 2: float("nan")}, "values: expected finite weights above 0, got nan at index 2"),
        ({1: float("inf")}, "values: expected finite weights above 0, got inf at index 1"),
        ({1: -1.0}, "values: expected finite weights above 0, got -1 at index 1"),
        ({1: 0.0}, "values: expected finite weights above 0, got 0 at index 1"),
        ({300: 1.0}, "indices: expected 0 to 299, got 1 at index 300"),
        ({-1: 1.0}, "indices: expected 0 to 299, got 1 at index -1"),
    ],
)
def test_rows_that_encode_does_not_write_are_errors_with_the_rows_id(row, said: str, tmp_path) -> None:
    encoded = write_output(tmp_path / "encoded", [*random_rows(500), {}, row])
    with pytest.raises(DataError, match=f"the row 'd501': {said}"):
        export(encoded.folder, "npz", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["encoded"]


@pytest.mark.parametrize("indices", [[4, 3], [3, 3]])
def test_indices_out_of_order_are_an_error(indices: list[int], tmp_path) -> None:
    encoded = write_output(tmp_path / "encoded", [{1: 1.0}])
    table = pa.table([["d0"], [indices], [[1.0, 1.0]]], schema=SCHEMA)
    pq.write_table(table, encoded.folder / "part-00000.parquet")
    with pytest.raises(DataError, match="the row 'd0': indices: expected them ascending, got 1 at index 3"):
        export(encoded.folder, "npz", tmp_path / "out")


def test_rows_with_unequal_lists_and_missing_rows_are_errors(tmp_path) -> None:
    encoded = write_output(tmp_path / "encoded", [{1: 1.0}])
    part = encoded.folder / "part-00000.parquet"
    pq.write_table(pa.table([["d0"], [[1, 2]], [[1.0]]], schema=SCHEMA), part)
    with pytest.raises(DataError, match="row 'd0': expected as many indices as values"):
        export(encoded.folder, "npz", tmp_path / "out")
    pq.write_table(pa.table([["d0", "d1"], [[1], []], [[1.0], []]], schema=SCHEMA), part)
    with pytest.raises(DataError, match="expected the manifest's 1 rows, got 2"):
        export(encoded.folder, "npz", tmp_path / "out")


def test_an_output_that_is_not_complete_is_refused(tmp_path) -> None:
    encoded = write_output(tmp_path / "encoded", [{1: 1.0}], complete=False)
    with pytest.raises(DataError, match="expected a complete output"):
        export(encoded.folder, "npz", tmp_path / "out")
    (encoded.folder / MANIFEST).write_text(json.dumps({"format_version": 99}))
    with pytest.raises(DataError, match="format_version"):
        export(encoded.folder, "npz", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("pisa", "a\nb", r"without line breaks for pisa, got 'a\\nb'"),
        ("ciff", "a\rb", r"without line breaks for ciff"),
        ("lsr-benchmark", "a\nb", r"without line breaks for lsr-benchmark"),
        ("elasticsearch", "é" * 257, "of up to 512 bytes for elasticsearch"),
        ("opensearch", "e" * 513, "of up to 512 bytes for opensearch"),
    ],
)
def test_ids_that_a_reader_would_split_or_refuse_are_errors(name: str, row: str, said: str, tmp_path: Path) -> None:
    encoded = write_output(tmp_path / "encoded", [{1: 1.0}, {2: 1.0}], ["d0", row])
    with pytest.raises(DataError, match=f"id: expected ids {said}"):
        export(encoded.folder, name, tmp_path / "out", names="ids")
    export(encoded.folder, "qdrant", tmp_path / "out")
