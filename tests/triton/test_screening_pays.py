"""``screening="auto"`` screens on the GPUs alone for which a checked-in result says that it pays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import screening_pays
from bench.harness.result_file import load
from bench.inputs import variants
from bench.inputs.cases import SCREENING
from bench.screening_pays import LEAST, objections

RESULTS = Path(__file__).parents[2] / "bench/results"
# Milliseconds that satisfy every bound: unscreened, screened.
PAYING = {(case, job): (1.0, 0.5 if case == "sparse-normal" else 1.0) for case, job in LEAST}


def result(times: dict[tuple[str, str], tuple[float, float]], arch: int = 90, **more: object) -> dict[str, object]:
    rows = [
        {"case": case, "job": job, "variant": variant, "precision": "bf16", "status": "measured", "samples": [time] * 9}
        for (case, job), pair in times.items()
        for variant, time in zip(("unscreened", "screened"), pair, strict=True)
    ]
    return {"kind": "screening", "runs": [{"environment": {"gpu": True, "arch": arch}}], "rows": rows} | more


def test_a_result_that_gains_and_loses_little_says_that_auto_pays():
    assert objections([result(PAYING)], 90) == []


@pytest.mark.parametrize("where", LEAST, ids=" ".join)
def test_a_result_that_misses_one_bound_objects(where):
    def screened_in(seconds: float) -> list[str]:
        return objections([result(PAYING | {where: (1.0, seconds)})], 90)

    assert screened_in(1 / (LEAST[where] + 0.001)) == []
    (said,) = screened_in(1 / (LEAST[where] - 0.001))
    assert said.startswith(" bf16 ".join(where))
    assert f"at least {LEAST[where]}, got {LEAST[where] - 0.001:.3f}" in said


def test_a_gain_that_the_rounds_disagree_on_is_none():
    made = result(PAYING)
    row = next(row for row in made["rows"] if (row["case"], row["variant"]) == ("sparse-normal", "screened"))
    row["samples"] = [0.5] * 6 + [1.2] * 3
    assert len(objections([made], 90)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"status": "red: two runs differ", "samples": []},
        {"precision": "float32"},
        {"job": "encode"},
        {"scaled_from": "B32 S256 D768 V30522"},
        {"variant": "screened-first"},
    ],
    ids=str,
)
def test_what_was_not_measured_says_nothing(change):
    made = result(PAYING)
    made["rows"][1] |= change
    (said,) = objections([made], 90)
    assert "expected measured rows" in said


def test_results_of_others_say_nothing_and_every_result_of_a_gpu_counts():
    cpu = result(PAYING, runs=[{"environment": {"gpu": False, "device": "Test CPU"}}])
    head = result(PAYING, kind="head")
    for others in ([], [result(PAYING, arch=86)], [cpu], [head]):
        assert objections(others, 90) == ["no screening result of a GPU of sm_90"]
    slow = result(dict.fromkeys(LEAST, (1.0, 2.0)))
    assert len(objections([result(PAYING), slow], 90)) == len(LEAST)


def test_the_bounds_are_on_cases_that_are_measured():
    assert {case for case, _ in LEAST} <= set(SCREENING)
    assert SCREENING["sparse-normal"].active_share == 0.015
    assert SCREENING["dense"].active_share == 1.0


def test_the_command_gives_the_verdict_of_every_architecture(tmp_path, capsys):
    paths = []
    for arch, seconds in ((86, 0.5), (90, 2.0)):
        paths.append(str(tmp_path / f"{arch}.json"))
        made = result(PAYING | {("dense", "forward"): (1.0, 2 * seconds)}, arch)
        rows = [row | {"provenance": 0} for row in made["rows"]]
        Path(paths[-1]).write_text(json.dumps({"kind": made["kind"], "provenance": made["runs"], "rows": rows}))
    screening_pays.main(paths)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("sm_86 may enter SCREENING_PAYS")
    assert second.startswith("sm_90: dense bf16 forward: expected")
    with pytest.raises(SystemExit, match="from a GPU, got none"):
        screening_pays.main([str(RESULTS / "screening-cpu.json")])


def test_every_architecture_that_auto_screens_on_has_its_result():
    tuning = pytest.importorskip("splade_kernels.backends.triton.tuning", exc_type=ImportError)
    results = load(RESULTS.glob("*.json"))
    said = {arch: objections(results, arch) for arch in tuning.SCREENING_PAYS}
    assert not any(said.values()), said


def test_ours_may_be_a_cuda_graph_where_auto_does_not_screen(monkeypatch):
    tuning = pytest.importorskip("splade_kernels.backends.triton.tuning", exc_type=ImportError)
    from splade_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    cuda = torch.device("cuda")
    ours, screened, unscreened = (variants.VARIANTS[name] for name in ("ours", "screened", "unscreened"))
    monkeypatch.setattr(tuning, "SCREENING_PAYS", frozenset())
    assert [one.captured(False, cuda) for one in (ours, screened, unscreened)] == [True, False, True]
    monkeypatch.setattr(tuning, "SCREENING_PAYS", frozenset({90}))
    assert [one.captured(False, cuda) for one in (ours, screened, unscreened)] == [False, False, True]
    assert all(one.captured(True, cuda) for one in (ours, screened, unscreened))
