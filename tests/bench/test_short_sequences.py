"""Two ways to the gradients of short sequences: the model's numbers by hand, and the measurement end to end."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest
import torch

from bench import report, short_sequences
from bench.harness import truth
from bench.harness.result_file import by_device, load
from bench.inputs.cases import PRECISIONS, Case, make_inputs
from bench.inputs.distributions import at_share, draw
from bench.jobs import short_sequences as model
from bench.jobs.short_sequences import Rates, Shape, costs
from bench.tables import short_sequences as short_sequences_tables

CPU = torch.device("cpu")
TINY = "--device cpu --batch-size 3 --hidden-size 16 --vocab-size 70 --length 3 5 --seconds 0.01".split()


def test_rows_that_are_gathered_cost_twice_the_intensity_over_the_length():
    """2 p B V D e bytes against 2 B S D V operations: p e R / (M S) forwards, and what is streamed beside the rows."""
    for length, share in itertools.product((14, 60, 256), (0.05, 1.0)):
        tokens, entries = 32 * length, 32 * 30522
        streamed = tokens * 768 * 2 + 30522 * 768 * 2 + 6 * entries + 24 * share * entries
        beside = streamed / (2 * tokens * 768 * 30522 / 135.0)
        assert costs(Shape(length), share, Rates.of(135.0)).gather == pytest.approx(270 * share / length + beside)
    assert costs(Shape(14), 1.0, Rates.of(135.0)).gather == pytest.approx(270 / 14, rel=0.05)


def test_rows_of_h_from_a_cache_make_gathering_cheaper_and_scattering_not():
    memory, cached = (costs(Shape(14), 1.0, Rates.of(150.0, factor)) for factor in (1.0, 1e9))
    assert memory.gather - cached.gather == pytest.approx(150 / 14)
    assert memory.scatter == cached.scatter


def test_scattering_costs_two_products_and_the_bytes_of_g():
    tokens, entries, intensity = 32 * 60, 32 * 30522, 150.0
    forward = 2 * tokens * 768 * 30522 / intensity
    zeroed, sectors, entries = tokens * 30522 * 2, 64 * entries, 6 * entries
    found = costs(Shape(60), 1.0, Rates.of(intensity)).scatter
    assert found == pytest.approx(2 + (zeroed + sectors + entries) / forward)
    # Zeroing G takes e R / (2 D M) forwards whatever the length.
    assert zeroed / forward == pytest.approx(2 * intensity / (2 * 768))


def test_a_product_cannot_take_less_than_its_bytes():
    found = costs(Shape(1, batch_size=1), 0.0, Rates.of(1e9))
    weight_bytes = 30522 * 768 * 2
    assert found.forward == weight_bytes + 768 * 2 + 4 * 30522
    assert found.scatter * found.forward > 2 * weight_bytes


@pytest.mark.parametrize("intensity", model.INTENSITIES)
def test_the_ways_cross_where_it_says(intensity):
    rates = Rates.of(intensity)
    for length in model.LENGTHS:
        share = model.crossing_share(Shape(length), rates)
        if share is None:
            found = costs(Shape(length), 1.0, rates)
            assert found.gather <= found.scatter
        else:
            found = costs(Shape(length), share, rates)
            assert found.gather == pytest.approx(found.scatter)
    for share in (0.2, 1.0):
        longest = model.crossing_length(share, rates)
        shorter, longer = (costs(Shape(length), share, rates) for length in (longest, longest + 1))
        assert shorter.scatter < shorter.gather
        assert longer.scatter >= longer.gather
    assert model.crossing_length(0.005, rates, lengths=(14, 60)) is None
    assert model.INTENSITIES[0] == pytest.approx(71e12 / 936e9), "the datasheet's"


@pytest.mark.parametrize("precision", ["float32", "bf16", "bf16-autocast"])
@pytest.mark.parametrize("tile_bytes", [1 << 28, 1 << 9])
def test_scattered_gradients_are_right_in_one_tile_and_in_many(precision, tile_bytes, monkeypatch):
    monkeypatch.setattr(short_sequences, "TILE_BYTES", tile_bytes)
    case, chosen = Case("", 3, 5, 16, 70), PRECISIONS[precision]
    inputs = make_inputs(case, chosen, CPU)
    drawn = draw(partial(at_share, 0.5), case, chosen, CPU)
    found = short_sequences.scatter_step(chosen, inputs, drawn)()
    assert [tensor.dtype for tensor in found] == [chosen.dtype] * 3
    exact = truth.backward(*drawn, inputs)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in exact]
    for ours, theirs in zip(found, exact, strict=True):
        assert truth.relative_distance(ours, theirs) < short_sequences.BOUNDS[precision] / 4
    width = short_sequences.tile_width(15, 70, chosen.compute_dtype)
    assert width == (70 if tile_bytes > 1000 else tile_bytes // 15 // chosen.compute_dtype.itemsize)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_both_ways_are_checked_and_measured(precision, tmp_path, rates):
    path = tmp_path / "result.json"
    shares = ["--share", "0.05", "1.0", "--budget", "300", "--precision", precision]
    result = short_sequences.main(["--output", str(path), *TINY, *shares])
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert (result["kind"], result["left_out"]) == ("short-sequences", [])
    assert [(row["case"], row["job"]) for row in result["rows"][::4]] == [
        ("S3", "active-5%"), ("S3", "active-100%"), ("S5", "active-5%"), ("S5", "active-100%"),
    ]  # fmt: skip
    for row in result["rows"]:
        assert (row["status"], row["precision"]) == ("measured", precision)
        assert row["rounds"] >= 9
        assert row["median"] > 0
        both = row["variant"] in ("gather", "scatter")
        assert set(row["errors"]) == ({"grad_hidden", "grad_weight", "grad_bias"} if both else set())
        assert all(
            error <= short_sequences.BOUNDS[precision] / (1 + (row["variant"] == "gather"))
            for error in row["errors"].values()
        )
        assert (row["predicted_forwards"] is not None) == both
    assert [row["variant"] for row in result["rows"][:4]] == list(short_sequences_tables.VARIANTS)
    shape = Shape(3, 3, 16, 70, 4 if precision == "float32" else 2)
    expected = costs(shape, 0.05, Rates(1e11, 1e10, 1e10, 1e10))
    assert result["rows"][0]["predicted_forwards"] == pytest.approx(expected.gather)
    assert result["rows"][1]["predicted_forwards"] == pytest.approx(expected.scatter)
    text = report.render(by_device(result, "short-sequences-cpu.json"))
    assert text.count("| S3 (B3 S3 D16 V70)") == text.count("| S5 (B3 S5 D16 V70)") == 2


def test_a_wrong_gradient_is_red_and_not_timed(tmp_path, monkeypatch, rates):
    right = short_sequences.scatter_step

    def scaled(*arguments: object) -> object:
        step = right(*arguments)
        return lambda: tuple(1.01 * tensor for tensor in step())

    monkeypatch.setattr(short_sequences, "scatter_step", scaled)
    path = tmp_path / "result.json"
    with pytest.raises(SystemExit, match="S3 float32 active-100% scatter: red: beyond"):
        short_sequences.main(["--output", str(path), *TINY, "--share", "1", "--budget", "300"])
    rows = json.loads(path.read_text())["rows"]
    assert [row["median"] is None for row in rows] == [False, True, False, False] * 2
    assert "- S3 float32 active-100% scatter: red" in report.render(load([path]))


def test_without_an_output_the_command_prints_or_writes_the_models_tables(tmp_path, capsys):
    assert short_sequences.main([]) is None
    block = short_sequences_tables.block()
    assert capsys.readouterr().out.strip() == block
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{short_sequences_tables.BEGIN}\nold\n{short_sequences_tables.END}\n\nafter\n")
    short_sequences.main(["--document", str(page)])
    assert page.read_text() == f"before\n\n{block}\n\nafter\n"
