"""What int8 bounds leave over: against the code that screens, against counts by hand, and its tables."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import margins, report, screening_model
from bench.inputs import cases
from bench.inputs.cases import PRECISIONS, SCREENING, Case
from bench.tables import margins as margins_tables
from splade_kernels.backends import int8_bound
from splade_kernels.backends.tiled import screening

CPU = torch.device("cpu")
FLOAT32 = PRECISIONS["float32"]
# Sequences of 12 to 35 tokens: up to three groups.
SMALL = Case("small", 3, 35, hidden_size=64, vocab_size=300, lengths="ragged", active_share=0.05)


def packed(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Real tokens, where each sequence begins, weight, bias."""
    inputs = cases.make_inputs(case, FLOAT32, CPU)
    hidden, weight, bias = (leaf.detach() for leaf in inputs.leaves)
    real = inputs.mask != 0
    return hidden[real], torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)), weight, bias


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_one_scale_a_row_leaves_what_the_backend_computes(share, monkeypatch):
    monkeypatch.setattr(margins, "WIDTH", 128)
    case = replace(SMALL, active_share=share)
    rows, offsets, weight, bias = packed(case)
    computed = screening.PLAIN.maximise(rows, offsets, weight, bias, screening.new_target(rows, offsets, weight))
    row = margins.survivors(case)[0]
    assert (row["levels"], row["blocks"], row["real_tokens"]) == (127, 1, len(rows))
    assert round(row["best_tokens"] * len(rows) * len(weight), 6) == computed
    assert row["best_tokens_per_active_pair"] == pytest.approx(computed / (share * 3 * 300), rel=1e-3)


def test_one_scale_a_row_is_the_backends():
    rows = packed(SMALL)[0]
    near, scale, radius, norm = int8_bound.quantise(rows)
    found = margins.quantise(rows, 127, 1)
    for ours, theirs in zip(found, (near[None], scale[None], radius, norm), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("levels", "blocks"), [(127, 1), (63, 1), (127, 4), (63, 8)])
def test_bounds_hold_and_are_no_wider_than_rounding(levels, blocks):
    rows, _, weight, _ = packed(SMALL)
    tokens, words = (margins.quantise(x, levels, blocks) for x in (rows, weight))
    assert tokens.near.abs().amax() == levels
    # Each block's largest element is at the last level.
    assert torch.equal(tokens.near.abs().amax(dim=2), torch.full((blocks, len(rows)), levels, dtype=torch.int8))
    near, far = margins.bounds(tokens, words, slice(100, 200))
    stood = [
        torch.cat([x.double() * s.double()[:, None] for x, s in zip(side.near, side.scale, strict=True)], dim=1)
        for side in (tokens, words)
    ]
    expected = stood[0] @ stood[1][100:200].t()
    assert (near - expected).abs().max() < 1e-5
    exact = rows.double() @ weight[100:200].double().t()
    assert ((near - exact).abs() <= far).all()
    # Residuals of rounding are uniform in half a step to either side; the largest element of a block has none.
    step = tokens.scale.square().mean(dim=0).sqrt()
    assert (tokens.radius / (step * ((64 - blocks) / 12) ** 0.5)).mean().item() == pytest.approx(1, abs=0.03)


def test_counts_by_hand():
    layout = margins.Layout(torch.tensor([17, 2, 16]))
    alive = torch.zeros(35, 2, dtype=torch.bool)
    alive[[3, 15], 0] = True  # one group of the first sequence
    alive[[15, 16, 17, 34], 1] = True  # both groups of the first sequence, the second, the third
    assert layout.counts(alive).tolist() == [1 + 3, 1 + 4, 2 + 4]
    values = torch.arange(35.0)[:, None]
    assert layout.largest(values)[:, 0].tolist() == [16.0] * 17 + [18.0] * 2 + [34.0] * 16


def test_the_shares_are_those_of_the_definitions():
    """Each pair on its own, in float64, with an allowance A for rounding."""
    rows, offsets, weight, bias = (x.double() if x.is_floating_point() else x for x in packed(SMALL))
    found = {(row["levels"], row["blocks"]): row for row in margins.survivors(SMALL)}
    assert list(found) == [(levels, blocks) for levels in (127, 63) for blocks in (1, 2, 4, 8)]
    for (levels, blocks), row in found.items():
        near = []
        for x in (rows, weight):
            parts = x.view(len(x), blocks, -1)
            step = parts.abs().amax(2, keepdim=True) / levels
            near.append((parts / step).round().mul(step).view_as(x))
        allowed = (64 + 128) * 2**-23
        radius, word_radius = (
            (x - y).norm(dim=1) + allowed * x.norm(dim=1) for x, y in zip((rows, weight), near, strict=True)
        )
        far = radius[:, None] * (weight.norm(dim=1) + word_radius) + rows.norm(dim=1)[:, None] * word_radius
        stands = near[0] @ near[1].t()
        assert row["bound"] == pytest.approx((far.mean() / (rows @ weight.t()).std(correction=0)).item(), rel=1e-4)
        totals = dict.fromkeys(("active", "relu", "best"), 0)
        pairs, groups, tokens = dict(totals), dict(totals), dict(totals)
        for first, last in zip(offsets.tolist(), offsets[1:].tolist(), strict=False):
            some = slice(first, last)
            relu = stands[some] + far[some] > -bias
            reached = stands[some] + far[some] >= (stands - far)[some].amax(0)
            alive = {"active": rows[some] @ weight.t() > -bias, "relu": relu, "best": relu & reached}
            for name, left in alive.items():
                pairs[name] += int(left.any(0).sum())
                groups[name] += sum(int(part.any(0).sum()) for part in left.split(16))
                tokens[name] += int(left.sum())
        # 12, 24 and 35 tokens are 1, 2 and 3 groups.
        for what, counts, every in (("pairs", pairs, 3), ("groups", groups, 6), ("tokens", tokens, len(rows))):
            for name, count in counts.items():
                assert row[f"{name}_{what}"] * every * 300 == pytest.approx(count, abs=0.01), (name, what)
        assert row["best_pairs"] == row["relu_pairs"]
        assert row["relu_tokens_per_active_pair"] == pytest.approx(tokens["relu"] / pairs["active"])
    assert found[63, 1]["relu_tokens"] > found[127, 1]["relu_tokens"] > found[127, 8]["relu_tokens"]


def test_a_dot_outside_its_bound_is_an_error(monkeypatch):
    real = int8_bound.radius_and_norm

    def narrow(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        radius, norm = real(*arguments)
        return radius / 8, norm

    monkeypatch.setattr(int8_bound, "radius_and_norm", narrow)
    with pytest.raises(ArithmeticError, match="small, levels and blocks \\(127, 1\\): a dot is outside its bound"):
        margins.survivors(SMALL)


def test_the_group_is_that_of_the_gpu_kernels():
    common = pytest.importorskip("splade_kernels.backends.triton.common", exc_type=ImportError)
    assert common.GROUP == margins.GROUP


def test_the_file_and_its_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(screening_model, "FOLDER", tmp_path / "none")
    monkeypatch.setitem(SCREENING, "sparse-normal", SMALL)
    monkeypatch.setattr(margins, "CASES", ("trained-squad", "sparse-normal"))
    path = tmp_path / "margins.json"
    monkeypatch.setattr(sys, "argv", ["margins", f"--output={path}"])
    margins.main()
    content = json.loads(path.read_text())
    assert content["kind"] == "margins"
    assert content["command"] == "python -m bench.margins"
    assert content["environment"]["commit"]
    assert len(content["rows"]) == 8
    (absent,) = content["left_out"]
    assert absent.startswith("trained-squad: no trained model here")
    assert margins_tables.tables(content) in capsys.readouterr().out
    results = report.load([path])
    document = report.replace_block(f"a\n{report.BEGIN}\n{report.END}\nb\n", report.screening_block(results))
    lines = [[x.strip() for x in line.split("|")[1:-1]] for line in document.splitlines() if line.startswith("| ")]
    first, second = content["rows"][0], content["rows"][1]
    relu = [f"{first[f'relu_{what}']:.2%}" for what in ("pairs", "groups")]
    cells = ["small", "5.00%", "127", f"{first['bound']:.2f}", *relu, f"{first['relu_tokens']:.3%}"]
    assert lines[1][:7] == cells
    assert lines[1][-2:] == [f"{first['best_tokens']:.3%}", f"{first['best_tokens_per_active_pair']:.2f}"]
    assert lines[4][:2] == ["small", "127"]
    assert lines[4][3] == f"{second['bound']:.2f}, {second['best_tokens']:.3%}"
    assert f"Left out: {absent}." in document
    assert "`bench/results/margins.json`" in document
    assert margins_tables.tables(results[0]) in report.render(results)
    assert "Not measured." in report.screening_block([])
