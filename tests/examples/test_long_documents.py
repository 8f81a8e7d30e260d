"""``examples/long_documents.py`` at small sizes; the formula of ``splade_kernels.estimate`` against measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the package is not installed: pip install '.[st]'")
pytest.importorskip("matplotlib", reason="the package is not installed: pip install '.[bench]'")

from bench.harness import memory
from bench.inputs.language_models import Shape
from bench.jobs.language_models import FORMULA_CASES, OVER_BUDGET, Job, estimated, run
from examples import long_documents as example

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc, which Linux has")
# The others take the same code and longer.
FAST = (1, 3, 7, 9, 13, 15)
BOUND = 0.15


def name(case: Job) -> str:
    steps = ["checkpointing"] * case.checkpointing + ["inference"] * (not case.training)
    return "-".join([case.shape.family, f"{case.shape.batch_size}x{case.shape.length}", case.head, *steps])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name(case), marks=[] if i in FAST else pytest.mark.slow)
        for i, case in enumerate(FORMULA_CASES)
    ],
)
def test_the_formula_is_within_15_percent_of_what_was_measured(case: Job) -> None:
    """Of the step alone: parameters and the optimizer's state, which are known exactly, would hide an error."""
    terms, found = estimated(case), run(case)
    assert terms.parameters + terms.optimizer == pytest.approx(found["held_bytes"], rel=0.02)
    assert terms.peak - terms.parameters - terms.optimizer == pytest.approx(found["peak_bytes"], rel=BOUND)


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses agree at both lengths, or the command would have ended; memory is as the formula says."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{example.block(tmp_path / 'page' / 'result.json')}\n\nafter\n")
    small = "--layers 1 --hidden-size 64 --intermediate-size 96 --vocab-size 16000 --memory 4GiB"
    example.main(f"--part lengths --lengths 512 2048 --steps 1 {small} --device cpu --document {page}".split())
    shown = example.block(tmp_path / "page" / "result.json")
    assert page.read_text() == f"before\n\n{shown}\n\nafter\n"
    assert "Not measured." not in shown
    assert (tmp_path / "page" / "lengths.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "page" / "result.json").read_text())
    assert example.main(["--part", "--document", str(page)]) == result
    assert page.read_text() == f"before\n\n{shown}\n\nafter\n"
    assert example.lengths_table(result["rows"]) in capsys.readouterr().out
    rows = {(row["length"], row["head"]): row for row in result["rows"]}
    for length in (512, 2048):
        assert rows[length, "fused"]["loss"] == pytest.approx(rows[length, "stock"]["loss"], rel=example.TOLERANCE)
    assert all(row["median"] > 0 for row in rows.values())
    step: dict[str, float] = {}
    for head in ("fused", "stock"):
        row = rows[2048, head]
        terms = estimated(Job(Shape(**{field: row[field] for field in Shape.__dataclass_fields__}), head, True))
        step[head] = terms.peak - terms.parameters
    ratio = rows[2048, "fused"]["peak_bytes"] / rows[2048, "stock"]["peak_bytes"]
    assert ratio == pytest.approx(step["fused"] / step["stock"], rel=2 * BOUND)
    assert ratio < 0.2


def test_a_process_over_the_memory_ends() -> None:
    job = Job(Shape("modernbert", 1, 64, 96, 1, 16000, 2, 2048), "stock", True, budget=2**30)
    assert run(job) == {"status": OVER_BUDGET}
    with pytest.raises(ValueError, match="--memory: expected bytes"):
        example.main(["--memory", "much", "--lengths", "8"])


def test_losses_that_disagree_end_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(job: Job) -> dict[str, Any]:
        loss = 1.0 + 2e-5 * (job.head == "fused")
        return {"status": "ok", "loss": loss, "peak_bytes": 1 << 20, "held_bytes": 0, "samples": []}

    monkeypatch.setattr(example, "run", found)
    with pytest.raises(SystemExit, match="losses of fused and stock disagree at 64 tokens"):
        example.main(["--part", "lengths", "--lengths", "64", "--output", str(tmp_path / "result.json")])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["head"] for row in rows] == ["none", "fused"]


def test_what_does_not_fit_is_extrapolated_from_the_longest_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step without a head is measured; what stock takes above it grows with the length."""

    def found(job: Job) -> dict[str, Any]:
        if job.head == "stock" and job.shape.length > 4096:
            return {"status": OVER_BUDGET}
        body = (job.shape.length / 1024) ** 2
        taken = body + {"none": 0, "fused": 1, "stock": job.shape.length / 64}[job.head]
        return {
            "status": "ok", "loss": 1.0, "peak_bytes": taken * 2**20, "held_bytes": 0, "samples": [taken],
            "median": taken, "clock": "perf_counter", "others": 0.0,
        }  # fmt: skip

    monkeypatch.setattr(example, "run", found)
    rows = example.main("--part lengths --lengths 4096 8192 16384 --device cpu".split())["rows"]
    for field, scale in (("peak_bytes", 2**20), ("median", 1)):
        stock = example.curves(rows, field)["stock"]
        assert stock == {
            4096: ((16 + 64) * scale, False), 8192: ((64 + 128) * scale, True), 16384: ((256 + 256) * scale, True)
        }  # fmt: skip
    (last,) = [row for row in rows if row["head"] == "stock" and row["length"] == 16384]
    assert last["status"] == "not tried: over the budget at 8,192"
    assert "≈ 192" in example.lengths_table(rows)
    assert "ends between 4,096 and 8,192 tokens" in example.lengths_note(rows, "8GiB")


def test_glibc_gives_freed_blocks_back() -> None:
    """What the high-water mark of a second step rests on: without, it keeps blocks that lie below one in use."""
    assert memory.in_a_process(_kept_after_blocks) < 8 * 2**20


def _kept_after_blocks() -> int:
    with memory.unpooled():
        before = memory.reset_peak()
        blocks = [torch.ones(1 << 18) for _ in range(64)]  # 1 MiB each
        del blocks[:-1]
        return memory.reset_peak() - before
