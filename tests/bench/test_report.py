"""The report: from synthetic results, and that the checked-in documents are those of the checked-in results."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from bench import report
from bench.inputs.cases import PRECISIONS, Case
from bench.tables import head_limits

ROOT = Path(__file__).parents[2]


def row(case: str, variant: str, median: float | None, job: str = "forward", **more: object) -> dict[str, object]:
    base = {"case": case, "shape": "B32 S128 D768 V30522", "precision": "bf16", "job": job, "variant": variant}
    state = {"status": "measured", "median": median, "repeatable": True, "extra_bytes": None, "others": None}
    samples = [] if median is None else [median] * 3
    return base | state | {"samples": samples, "operations": 10**9, "bytes": 10**6} | more


def result(kind: str, rows: list[dict[str, object]], gpu: bool = True, **more: object) -> dict[str, object]:
    environment = {"device": "Test GPU", "gpu": gpu, "python": "3.11", "packages": {"torch": "2.11"}, "commit": "abc"}
    environment |= {"driver": "570", "cuda": "12.8"} if gpu else {"threads": 2, "cpu_capability": "AVX2"}
    machine = {"bf16": {"bytes_per_second": 1e12, "operations_per_second": 1e14}}
    shown = {"kind": kind, "file": f"{kind}.json", "command": "python -m bench", "environment": environment}
    return shown | {"machine": machine, "rows": rows, "left_out": []} | more


HEAD = result(
    "head",
    [
        row("dev", "stock", 4e-3, extra_bytes=500 << 20),
        row("dev", "sparton", None, status="out of memory"),
        row("dev", "ours", 2e-3, extra_bytes=20 << 20),
        row("dev", "matmul-padded", 1.6e-3),
        row("gooaq-question", "stock", 2e-3),
        row("gooaq-question", "ours", 0.25e-3),
        row("gooaq-answer", "stock", 2e-3),
        row("gooaq-answer", "ours", 0.75e-3),
        row("dev", "stock", 10e-3, job="forward_backward", extra_bytes=900 << 20),
        row("dev", "ours", 2e-3, job="forward_backward", extra_bytes=30 << 20),
    ],
)


def cells(text: str, start: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_head_table_compares_with_stock_matmul_and_roofline():
    text = report.render([HEAD])
    forward, trained, memory = cells(text, "dev (")
    # 1e9 operations at 1e14 a second are 10 µs of the 2 ms.
    assert forward[1:] == ["4", "out of memory", "2", "1.6", "2.0x faster (2.0 to 2.0)", "1.25x (1.25 to 1.25)", "0%"]
    assert trained[1:] == ["10", "2", "5.0x faster (5.0 to 5.0)", "-", "0%"]
    assert memory[1:] == ["500 MiB", "20 MiB", "900 MiB", "30 MiB"]
    assert cells(text, "gooaq (both")[0][1:5] == ["4", "-", "1", "-"]
    assert "4.0x faster (4.0 to 4.0)" in cells(text, "gooaq (both")[0]
    assert "two runs were identical to the bit in 4; 0 were wrong" in text
    assert "Test GPU, driver 570, CUDA 12.8; python 3.11, torch 2.11; commit abc. Command: `python -m bench`" in text


def test_slower_is_called_slower():
    rows = [row("dev", "stock", 1e-3, "forward_backward"), row("dev", "ours", 2e-3, "forward_backward")]
    assert "2.0x slower (2.0 to 2.0)" in cells(report.readme_block([result("head", rows)]), "dev")[0]


def test_a_red_result_is_shown_and_counted():
    wrong = copy.deepcopy(HEAD)
    wrong["rows"][2] |= {"status": "red: two runs differ", "median": None, "repeatable": False}
    text = report.render([wrong])
    assert "in 3; 1 were wrong" in text
    assert "- dev bf16 forward: red: two runs differ" in text
    assert cells(text, "dev (")[0][3] == "red"


def test_without_a_gpu_the_report_says_so_and_computes_the_floor():
    text = report.render([result("head", HEAD["rows"], gpu=False)])
    assert report.NOT_ON_A_GPU in text
    # 2·32·128·768·30522 operations at 71 TFLOP/s.
    assert cells(text, "dev  ")[0][2] == f"{2 * 32 * 128 * 768 * 30522 / 71e12 * 1e3:.3f}" == "2.705"
    assert report.NOT_ON_A_GPU in report.readme_block([])
    assert report.NOT_ON_A_GPU not in report.render([HEAD])
    assert "RTX 3090" not in report.render([HEAD])


@pytest.mark.parametrize(
    ("others", "clock", "marked"), [(1.5, "perf_counter", True), (0.1, "perf_counter", False), (1.5, "graph", False)]
)
def test_times_beside_other_programs_are_marked_on_a_cpu(others, clock, marked):
    text = report.render([result("head", [row("dev", "ours", 0.5, others=others, clock=clock)], gpu=False)])
    assert cells(text, "dev (")[0][1] == ("500\\*" if marked else "500")
    assert ("\\* other programs kept more than 0.2 processors" in text) == marked


def test_backward_and_flops_tables():
    backward = result(
        "backward",
        [
            row("dev", "ours", 1e-3, job="backward-hot", active_share=1.0),
            row("dev", "training-forward", 2e-3, job="backward-hot"),
        ],
    )
    flops = result(
        "flops",
        [
            row("flops", "stock", 2e-3, shape="B4096 V30522"),
            row("flops", "ours", 1e-3, shape="B4096 V30522", bytes=9e8),
        ],
    )
    text = report.render([flops, backward])
    assert cells(text, "dev")[0] == ["dev", "bf16", "hot", "100.0%", "1", "2", "0.50x (0.50 to 0.50)"]
    # 9e8 bytes in 1 ms are 900 GB/s, of 1e12 bytes a second.
    assert cells(text, "B4096")[0][3:] == ["2", "1", "900.0", "90%"]
    assert text.index("## Backward") < text.index("## FLOPS")


def test_training_names_machine_versions_commit_and_load():
    training = result("training", [], gpu=False, load_average=33.88, predictions=[], seed_run={})
    text = report.render([training])
    assert (
        "python 3.11, torch 2.11; commit abc. Command: `python -m bench`; file `bench/results/training.json`." in text
    )
    assert "Load average of the machine at the start: 33.9." in text


def test_tables_say_what_memory_leaves_out_and_what_the_roofline_counts():
    assert "### Peak memory beyond inputs, outputs and gradients, bf16, MiB" in report.render([HEAD])
    assert "| peak memory beyond inputs, outputs and gradients, stock |" in report.readme_block([HEAD])
    assert "Where ours screens it computes few of these dots" in report.render([HEAD])


def test_an_unknown_kind_is_listed_and_not_dropped():
    other = result("novelty", [{"name": "first", "score": 0.123456, "detail": {"hidden": 1}}])
    text = report.render([other])
    assert "## novelty: Test GPU" in text
    assert cells(text, "first")[0] == ["first", "0.1235"]
    assert "detail" not in text


def test_resources_are_a_bare_list(tmp_path):
    rows = [
        {"kernel": "k", "arch": arch, "dtype": "bfloat16", "config": {}, "registers": 128, "spill_bytes": 0}
        | {"shared_bytes": 49152, "instructions": {"HMMA": 64, "LDGSTS": 8}}
        for arch in (86, 90)
    ]
    (tmp_path / "resources.json").write_text(json.dumps(rows))
    text = report.render(report.load([tmp_path / "resources.json"]))
    assert cells(text, "k ") == [["k", "bfloat16", "128", "0", "49152", "HMMA"]]


def test_limits_by_hand_and_against_measurements():
    case, bf16 = Case("l", 4, 8, hidden_size=2, vocab_size=100), PRECISIONS["bf16"]
    assert head_limits.held_bytes(case, bf16) == 2 * (4 * 8 + 100) * 2 * 2 + 2 * 400 * 2
    assert head_limits.extra_bytes(case, bf16, "stock") == 3 * 4 * 8 * 100 * 2
    assert head_limits.extra_bytes(case, bf16, "ours") == 8 * 400 + (128 << 20)
    for variant in ("stock", "ours"):
        batch = head_limits.largest_batch(512, 30522, bf16, variant)
        fits, exceeds = (Case("l", size, 512) for size in (batch, batch + 1))
        assert head_limits.held_bytes(fits, bf16) + head_limits.extra_bytes(fits, bf16, variant) <= 24 << 30
        assert head_limits.held_bytes(exceeds, bf16) + head_limits.extra_bytes(exceeds, bf16, variant) > 24 << 30
    assert "not been held against a measurement" in head_limits.section([])
    formula = 3 * 32 * 128 * 30522 * 2
    rows = [row("dev", "stock", 1.0, "forward_backward", extra_bytes=formula // 2)]
    rows.append(row("dev", "ours", 1.0, "forward_backward", extra_bytes=0))
    assert "stock 0.50 to 0.50 in 1 cases, fused (a bound) at most 0.00 in 1." in head_limits.section(rows)


def test_the_block_between_the_markers_is_replaced():
    old = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.replace_block(old, report.readme_block([HEAD]))
    assert new.startswith("before\n" + report.BEGIN)
    assert new.endswith(report.END + "\nafter\n")
    assert "old\n" not in new
    assert cells(new, "dev (")[0][1:] == ["10 ms", "2 ms", "5.0x faster (5.0 to 5.0)", "900 MiB", "30 MiB"]
    with pytest.raises(ValueError, match="expected the markers"):
        report.replace_block("no markers", "<!-- begin -->\n<!-- end -->")


def test_curves_are_plotted_with_their_roofline(tmp_path):
    figures = pytest.importorskip("bench.tables.figures", exc_type=ImportError)
    rows = [
        row(f"curve-{axis}-{size}", name, size * cost, "forward_backward", shape=f"B8 S{size} D768 V30522")
        for axis in "SVB"
        for size in (32, 64)
        for name, cost in (("stock", 2e-4), ("ours", 1e-4))
    ]
    (path,) = figures.plot_curves([result("head", rows), result("flops", [])], tmp_path)
    assert path.name == "head-curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert figures.plot_curves([HEAD], tmp_path) == []


def test_the_documents_are_those_of_the_checked_in_results():
    results = report.load((ROOT / "bench/results").glob("*.json"))
    figures = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs/bench").glob("*.png"))]
    assert (ROOT / "bench/RESULTS.md").read_text() == report.render(results, [f"../{figure}" for figure in figures])
    assert report.readme_block(results, figures) in (ROOT / "README.md").read_text()
    assert report.screening_block(results) in (ROOT / "docs/screening.md").read_text()


def test_what_was_left_out_may_be_described_by_its_fields():
    result = {
        "kind": "tuning",
        "file": "t.json",
        "rows": [],
        "left_out": [{"kind": "maximum", "arch": 90}, "dev: no time"],
    }
    environment = {"packages": {}, "python": "3.12", "commit": "c", "device": "GPU X", "gpu": True}
    assert "Left out: kind maximum arch 90; dev: no time." in report.caption(result | {"environment": environment})
