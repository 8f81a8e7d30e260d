"""What int8 bounds leave over: against the code that screens, against counts by hand, and its tables."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import margins, report
from bench.harness.result_file import load
from bench.inputs import cases, text_model
from bench.inputs.cases import PRECISIONS, SCREENING, Case
from bench.tables.markdown import replace_block
from bench.tables.screening import margins_table
from splade_kernels.backends import int8_bound
from splade_kernels.backends.tiled.screening import PLAIN, new_target
from tests.bench.synthetic import cells

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
def test_both_criteria_leave_what_the_backend_computes(share, monkeypatch):
    monkeypatch.setattr(margins, "WIDTH", 128)
    case = replace(SMALL, active_share=share)
    rows, offsets, weight, bias = packed(case)
    computed = PLAIN.maximise(rows, offsets, weight, bias, new_target(rows, offsets, weight))
    row = margins.survivors(case)[0]
    assert (row["levels"], row["real_tokens"]) == (127, len(rows))
    assert round(row["best_tokens"] * len(rows) * len(weight), 6) == computed
    assert row["best_tokens_per_active_pair"] == pytest.approx(computed / (share * 3 * 300), rel=1e-3)


def test_the_shares_are_those_of_the_definitions():
    """Each pair on its own, in float64, with an allowance A for rounding."""
    rows, offsets, weight, bias = (x.double() if x.is_floating_point() else x for x in packed(SMALL))
    found = {row["levels"]: row for row in margins.survivors(SMALL)}
    assert list(found) == [127, 63]
    sequences = [slice(*edges) for edges in itertools.pairwise(offsets.tolist())]
    for levels, row in found.items():
        steps = [x.abs().amax(1, keepdim=True) / levels for x in (rows, weight)]
        near = [(x / step).round() * step for x, step in zip((rows, weight), steps, strict=True)]
        allowed = (64 + 128) * 2**-23
        radius, word_radius = (
            (x - y).norm(dim=1) + allowed * x.norm(dim=1) for x, y in zip((rows, weight), near, strict=True)
        )
        far = radius[:, None] * (weight.norm(dim=1) + word_radius) + rows.norm(dim=1)[:, None] * word_radius
        stands, dots = near[0] @ near[1].t(), rows @ weight.t()
        assert row["bound"] == pytest.approx((far.mean() / dots.std(correction=0)).item(), rel=1e-4)
        relu = stands + far > -bias
        reached = torch.cat([(stands + far)[some] >= (stands - far)[some].amax(0) for some in sequences])
        active = sum(int((dots > -bias)[some].any(0).sum()) for some in sequences)
        for name, alive in (("active", dots > -bias), ("relu", relu), ("best", relu & reached)):
            groups = [group for some in sequences for group in alive[some].split(16)]
            # 12, 24 and 35 tokens are 1, 2 and 3 groups.
            for what, parts, every in (
                ("pairs", [alive[some] for some in sequences], 3), ("groups", groups, 6), ("tokens", alive, len(rows))
            ):  # fmt: skip
                count = sum(int((part.any(0) if part.dim() == 2 else part).sum()) for part in parts)
                assert row[f"{name}_{what}"] * every * 300 == pytest.approx(count, abs=0.01), (name, what)
        assert row["best_pairs"] == row["relu_pairs"]
        assert row["relu_tokens_per_active_pair"] == pytest.approx(int(relu.sum()) / active)
    assert found[63]["relu_tokens"] > found[127]["relu_tokens"]


def test_a_dot_outside_its_bound_is_an_error(monkeypatch):
    real = int8_bound.radius_and_norm

    def narrow(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        radius, norm = real(*arguments)
        return radius / 8, norm

    monkeypatch.setattr(int8_bound, "radius_and_norm", narrow)
    with pytest.raises(ArithmeticError, match="small, 127 levels: a dot is outside its bound"):
        margins.survivors(SMALL)


def test_the_group_is_that_of_the_gpu_kernels():
    common = pytest.importorskip("splade_kernels.backends.triton.common", exc_type=ImportError)
    assert common.GROUP == margins.GROUP


def test_the_file_and_its_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(text_model, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(cases, "shown_in", lambda place: [SCREENING["trained-squad"], SMALL])
    path = tmp_path / "margins.json"
    monkeypatch.setattr(sys, "argv", ["margins", f"--output={path}"])
    margins.main()
    content = json.loads(path.read_text())
    assert content["kind"] == "margins"
    assert content["provenance"][0]["command"] == "python -m bench.margins"
    assert [row["levels"] for row in content["rows"]] == [127, 63]
    (absent,) = content["left_out"]
    assert absent["case"] == "trained-squad"
    assert absent["reason"].startswith("no trained model here")
    results = load([path])
    assert margins_table(results[0]) in capsys.readouterr().out
    document = replace_block(f"a\n{report.BEGIN}\n{report.END}\nb\n", report.screening_block(results))
    (line, _) = cells(document, "small")
    first = content["rows"][0]
    relu = [f"{first[f'relu_{what}']:.2%}" for what in ("pairs", "groups")]
    assert line[:7] == ["small", "5.00%", "127", f"{first['bound']:.2f}", *relu, f"{first['relu_tokens']:.3%}"]
    assert line[-2:] == [f"{first['best_tokens']:.3%}", f"{first['best_tokens_per_active_pair']:.2f}"]
    assert f"Left out: trained-squad: {absent['reason']}." in document
    assert "`bench/results/margins.json`" in document
    assert margins_table(results[0]) in report.render(results)
    assert "Not measured." in report.screening_block([])
