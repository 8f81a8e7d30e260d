"""The distances from float64: a head that chooses wrong tokens is found out, and the command end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import numerics, report
from bench.harness.result_file import load
from bench.inputs.cases import PRECISIONS, Case
from bench.inputs.variants import VARIANTS, Variant
from bench.jobs.numerics import GRADIENTS, PROBED, Exact, errors
from bench.tables.numerics import LABELS

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "bench/results"
CASE = Case("ragged", 3, 20, 64, 300, lengths="ragged")


def head_of_rounded_dots(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Chooses each token by its dot rounded to quarters; its values are exact."""
    dots = (hidden @ weight.t()).masked_fill((mask == 0)[..., None], -torch.inf)
    chosen = (4 * dots.detach()).round().argmax(dim=1)
    return torch.log1p(torch.relu(dots.gather(1, chosen[:, None])[:, 0] + bias))


def test_tokens_chosen_by_rounded_dots_are_wrong_ones(monkeypatch):
    exact = Exact(CASE, PRECISIONS["float32"], CPU)
    monkeypatch.setitem(VARIANTS, "rounded", Variant(lambda training: head_of_rounded_dots))
    found = errors(exact, "rounded", CPU)["errors"]
    chosen = (4 * exact.dots).round().argmax(dim=1, keepdim=True)
    misses = (exact.dots.gather(1, chosen)[:, 0] < exact.largest - 1e-5)[:PROBED]
    active = (exact.output > 0)[:PROBED]
    assert 0.1 < float(misses.float().mean()) < 0.9
    assert found["wrong_tokens"] == pytest.approx(float((misses & active).sum() / active.sum()), abs=2 / 600)
    assert found["grad_weight"] > 0.3 < found["grad_hidden"]


@pytest.mark.parametrize("name", ["stock", "ours"])
def test_float32_heads_are_exact_but_for_rounding(name):
    found = errors(Exact(CASE, PRECISIONS["float32"], CPU), name, CPU)["errors"]
    assert found["wrong_tokens"] == 0
    assert max(found.values()) < 1e-6


def test_the_command_measures_every_head_and_the_report_shows_it(tmp_path):
    path = tmp_path / "numerics-cpu.json"
    names = ["stock", "unscreened", "ours", "screened"]
    arguments = ["--output", str(path), "--batch-size=2", "--vocab-size=64", "--case", "S32-D768", "S128-D128"]
    result = numerics.main([*arguments, "--precision", "float32", "bf16", "--variant", *names])
    assert [row["status"] for row in result["rows"]] == ["measured"] * 16
    text = report.errors_block(load([path]))
    assert text.count("| bf16 ") == text.count("| float32 ") == 8
    assert all(text.count(f"| {LABELS[name]} ") == 4 for name in names)
    assert "B2 S32 D768 V64:" in text


def test_in_the_checked_in_result_ours_chooses_right_and_stock_does_not():
    rows = json.loads((RESULTS / "numerics-cpu.json").read_text())["rows"]
    half = [row for row in rows if row["precision"] == "bf16"]
    ours = [row["errors"] for row in half if row["variant"] in ("unscreened", "ours", "screened")]
    stock = [row["errors"] for row in half if row["variant"] == "stock"]
    assert len(ours) == 3 * len(stock) > 0
    assert max(found["wrong_tokens"] for found in ours) == 0
    assert max(found[name] for found in ours for name in GRADIENTS) <= 3e-3
    assert min(found["wrong_tokens"] for found in stock) > 0.001
