"""The report: from synthetic results, and that the checked-in documents are those of the checked-in results."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from bench import report
from bench.harness.result_file import load
from bench.tables import head, markdown, ratios
from bench.tables.markdown import NOT_ON_A_GPU
from tests.bench.synthetic import cells, result, row, run, without_quartiles

ROOT = Path(__file__).parents[2]
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
TIMES = {"stock": 1.2, "unscreened": 0.5, "ours": 0.26, "screened": 0.25, "screened-first": 0.3, "matmul-real": 0.4}


def screening(medians: dict[str, dict[str, float]]) -> dict[str, object]:
    shares = {"sparse-normal": 0.015, "dense": 1.0, "trained-squad": 0.009}
    rows = [
        row(case, variant, median, shape="B16 S128 D768 V30522", active_share=shares[case],
            survivors=0.00085 if variant == "screened" else None, texts=None)
        for case, of_case in medians.items()
        for variant, median in of_case.items()
    ]  # fmt: skip
    return result("screening", rows, gpu=False)


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
    assert "Test GPU, driver 570, CUDA 12.8; python 3.11, torch 2.11; commit abc, `python -m bench`." in text
    assert "### Peak memory beyond inputs, outputs and gradients, bf16, MiB" in text
    assert "Where ours screens it computes few of these dots" in text


def test_a_red_result_is_shown_and_counted():
    wrong = copy.deepcopy(HEAD)
    wrong["rows"][2] |= {"status": "red: two runs differ", "median": None, "repeatable": False}
    text = report.render([wrong])
    assert "in 3; 1 were wrong" in text
    assert "- dev bf16 forward: red: two runs differ" in text
    assert cells(text, "dev (")[0][3] == "red"
    made = screening({"dense": TIMES})
    made["rows"][3] |= {"status": "red: two runs differ", "median": None, "samples": [], "repeatable": False}
    assert "- dense bf16 forward screened: red: two runs differ" in report.render([made])


def test_every_reason_why_a_variant_is_not_here_is_listed():
    reasons = [("forward", "for GPUs only"), ("forward_backward", "forward only"), ("forward", "for GPUs only")]
    rows = [row("dev", "rival", None, job, status=f"not here: {reason}") for job, reason in reasons]
    text = report.render([result("head", rows)])
    assert text.count("- rival not here: for GPUs only") == text.count("- rival not here: forward only") == 1


def test_without_a_gpu_the_report_says_so_and_computes_the_floor():
    text = report.render([result("head", HEAD["rows"], gpu=False)])
    assert NOT_ON_A_GPU in text
    # 2·32·128·768·30522 operations at 71 TFLOP/s.
    assert cells(text, "dev  ")[0][2] == f"{2 * 32 * 128 * 768 * 30522 / 71e12 * 1e3:.3f}" == "2.705"
    assert NOT_ON_A_GPU in report.readme_block([])
    assert NOT_ON_A_GPU not in report.render([HEAD])
    assert "RTX 3090" not in report.render([HEAD])


@pytest.mark.parametrize(
    ("others", "clock", "marked"), [(1.5, "perf_counter", True), (0.1, "perf_counter", False), (1.5, "graph", False)]
)
def test_times_beside_other_programs_are_marked_on_a_cpu(others, clock, marked):
    text = report.render([result("head", [row("dev", "ours", 0.5, others=others, clock=clock)], gpu=False)])
    assert cells(text, "dev (")[0][1] == ("500\\*" if marked else "500")
    assert ("\\* other programs kept more than 0.2 processors" in text) == marked


def test_backward_and_flops_tables():
    rows = [row("dev", "ours", 1e-3, "backward-hot", active_share=1.0)]
    backward = result("backward", [*rows, row("dev", "training-forward", 2e-3, "backward-hot")])
    rows = [row("flops", "stock", 2e-3, shape="B4096 V30522")]
    flops = result("flops", [*rows, row("flops", "ours", 1e-3, shape="B4096 V30522", bytes=9e8)])
    text = report.render([flops, backward])
    assert cells(text, "dev")[0] == ["dev", "bf16", "hot", "100.0%", "1", "2", "0.50x (0.50 to 0.50)"]
    # 9e8 bytes in 1 ms are 900 GB/s, of 1e12 bytes a second.
    assert cells(text, "B4096")[0][3:] == ["2", "1", "900.0", "90%"]
    assert text.index("## Backward") < text.index("## FLOPS")


def test_seconds_of_encodes_are_in_readme_and_results():
    rows = [
        row("encode-small", name, median, "encode", shape="64 texts", extra_bytes=mebibytes << 20)
        for name, median, mebibytes in (("stock", 10.0, 3000), ("ours", 0.5, 60))
    ]
    for text in (report.render([result("encode", rows)]), report.readme_block([result("encode", rows)])):
        (line,) = map(without_quartiles, cells(text, "encode-small: 64 texts, bf16"))
        assert line[1:] == ["10 s", "0.5 s", "20.0x faster", "3,000 MiB", "60 MiB"]


def test_every_way_to_encode_is_beside_stock_float32_and_fused_bf16():
    medians = {"stock": 8.0, "ours": 4.0, "onnx": 5.0, "onnx-int8": 2.0, "onnx-encoder": None}
    rows = [row("encode-x", name, median, "encode", precision="float32") for name, median in medians.items()]
    rows[3]["errors"] = {"output": 0.097}
    rows[4]["status"] = "not here: the package onnxruntime is not installed"
    rows += [row("encode-x", name, median, "encode") for name, median in (("stock", 6.0), ("ours", 2.5))]
    rows += [row("encode-x", "encode_sparse", 1.25, "encode")]
    text = report.render([result("encode", rows)])
    assert [without_quartiles(line)[1:] for line in cells(text, "encode-x ")] == [
        ["`encode`, stock", "float32", "8 s", "-", "3.2x slower", "-"],
        ["`encode`, stock", "bf16", "6 s", "1.3x faster", "2.4x slower", "-"],
        ["`encode`, fused", "float32", "4 s", "2.0x faster", "1.6x slower", "-"],
        ["`encode`, fused", "bf16", "2.5 s", "3.2x faster", "-", "-"],
        ["`encode_sparse`, fused", "bf16", "1.25 s", "6.4x faster", "2.0x faster", "-"],
        ["ONNX Runtime", "float32", "5 s", "1.6x faster", "2.0x slower", "-"],
        ["ONNX Runtime, int8", "int8", "2 s", "4.0x faster", "1.2x faster", "9.7e-02"],
        ["int8 encoder in ONNX Runtime, exact head", "int8", "not here", "-", "-", "-"],
    ]
    assert "- onnx-encoder not here: the package onnxruntime is not installed" in text


def test_the_caption_names_every_run_and_the_cases_of_the_later_ones():
    made, later = result("head", [row("dev", "ours", 1.0)], gpu=False, load_average=33.88), run(gpu=False)
    later["environment"] = later["environment"] | {"commit": "def"}
    del later["command"]
    made["runs"].append(later)
    made["rows"].append(row("query", "ours", 1.0, run=later))
    made["left_out"] = [
        {"case": "long", "precision": "bf16", "reason": "no time"},
        {"kind": "maximum", "arch": 90, "reason": "late"},
    ]
    assert markdown.caption(made) == (
        "Test CPU (AVX2), 2 threads; python 3.11, torch 2.11; commit abc, `python -m bench`, load average at the start "
        "33.9; query: commit def, the command was not recorded. File: `bench/results/head.json`. "
        "Left out: long bf16: no time; kind maximum arch 90: late."
    )


def test_an_unknown_kind_is_listed_and_not_dropped():
    text = report.render([result("novelty", [{"name": "first", "score": 0.123456, "detail": {"hidden": 1}}])])
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
    text = report.render(load([tmp_path / "resources.json"]))
    assert cells(text, "k ") == [["k", "bfloat16", "128", "0", "49152", "HMMA"]]


def test_the_block_between_the_markers_is_replaced():
    old = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = markdown.replace_block(old, report.readme_block([HEAD]))
    assert new.startswith("before\n" + report.BEGIN)
    assert new.endswith(report.END + "\nafter\n")
    assert "old\n" not in new
    assert "| peak memory beyond inputs, outputs and gradients, stock |" in new
    assert cells(new, "dev (")[0][1:] == ["10 ms", "2 ms", "5.0x faster (5.0 to 5.0)", "900 MiB", "30 MiB"]
    with pytest.raises(ValueError, match="expected the markers"):
        markdown.replace_block("no markers", "<!-- begin -->\n<!-- end -->")


def test_the_screening_section_compares_screened_auto_and_unscreened():
    made = screening({"sparse-normal": TIMES, "dense": TIMES | {"ours": 0.51, "screened": 0.75}})
    made["rows"][3] |= {"errors": {"bands_from_unscreened": 0.25}, "extra_bytes": 30 << 20}
    first = made["rows"][:4]
    made["rows"] += [row | {"case": "encode-squad", "job": "encode", "shape": "96 texts", "texts": 96} for row in first]
    made["rows"] += [row | {"job": "forward_backward"} for row in first]
    text = report.render([made])
    sparse, trained, memory = map(without_quartiles, cells(text, "sparse-normal"))
    assert sparse[1:3] == trained[1:3] == ["1.50%", "0.085%"]
    assert sparse[3:9] == ["1,200", "500", "260", "250", "300", "400"]
    assert sparse[9:] == ["2.0x faster", "0.52x the time", "4.8x faster", "1.7x faster", "0.62x the time"]
    assert trained[3:] == ["1,200", "500", "260", "250", "2.0x faster", "0.52x the time", "4.8x faster"]
    assert memory[1:] == ["-", "-", "-", "30 MiB"]
    dense = ["1.5x slower", "1.02x the time", "1.6x faster", "1.7x faster", "1.88x the time"]
    assert without_quartiles(cells(text, "dense")[0])[9:] == dense
    encoded = ["1.50%", "80.0", "192.0", "369.2", "384.0", "1.9x faster", "4.6x faster"]
    assert without_quartiles(cells(text, "encode-squad")[0])[1:] == encoded
    assert "Vector instructions of this CPU: avx avx2." in text
    assert "Of 14 results of ours, two runs were identical to the bit in 14; 0 were wrong." in text
    assert "unscreened one: 0.25 of what" in text


def test_curves_are_plotted_with_their_roofline_and_the_gain_against_the_share(tmp_path):
    figures = pytest.importorskip("bench.tables.figures", exc_type=ImportError)
    rows = [
        row(f"curve-{axis}-{size}", name, size * cost, "forward_backward", shape=f"B8 S{size} D768 V30522")
        for axis in "SVB"
        for size in (32, 64)
        for name, cost in (("stock", 2e-4), ("ours", 1e-4))
    ]
    made = screening({"sparse-normal": TIMES, "dense": TIMES, "trained-squad": TIMES})
    paths = figures.plot([made, result("flops", []), result("head", rows)], tmp_path)
    assert [path.name for path in paths] == ["head-curves.png", "screening-shares.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert figures.plot([HEAD, screening({"dense": TIMES})], tmp_path) == []
    assert "![Screening against the share of active pairs](x-shares.png)" in report.render([made], ["x-shares.png"])


def test_the_documents_are_those_of_the_checked_in_results():
    results = load((ROOT / "bench/results").glob("*.json"))
    figures = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs/bench").glob("*.png"))]
    assert (ROOT / "bench/RESULTS.md").read_text() == report.render(results, [f"../{figure}" for figure in figures])
    assert report.readme_block(results, figures) in (ROOT / "README.md").read_text()
    assert report.screening_block(results) in (ROOT / "docs/screening.md").read_text()


STEADY = {"median": 1.0, "samples": [1.0, 4.0, 1.0, 2.0, 1.0]}


def scaled(*factors: float) -> dict[str, object]:
    """Times beside those of :data:`STEADY`, so that their ratios are the factors."""
    samples = [factor * base for factor, base in zip(factors, STEADY["samples"], strict=True)]
    return {"median": sorted(samples)[2], "samples": samples}


def test_a_ratio_is_the_median_of_the_rounds_own_and_not_that_of_the_medians():
    """Every second round meets a slow machine: the spreads overlap, the rounds agree."""
    slower = scaled(2.0, 2.2, 2.4, 2.1, 2.3)
    assert ratios.ratio(slower, STEADY) == pytest.approx((2.2, 2.1, 2.3))
    assert ratios.against(slower, STEADY, "x the time") == "2.20x the time (2.10 to 2.30)"
    assert ratios.speedup(slower, STEADY) == "2.2x faster (2.1 to 2.3)"
    assert ratios.speedup(STEADY, slower) == "2.2x slower (2.1 to 2.3)"


def test_quartiles_on_both_sides_of_one_are_no_gain_and_no_time_has_no_ratio():
    noisy = scaled(0.8, 1.3, 0.9, 1.4, 1.2)
    assert noisy["median"] / STEADY["median"] == pytest.approx(1.2)
    assert ratios.speedup(noisy, STEADY) == ratios.against(noisy, STEADY) == "≈ 1 (0.90 to 1.30)"
    assert ratios.speedup(STEADY, noisy).startswith("≈ 1 (0.77 to 1.11")
    for one in (None, STEADY | {"median": None, "samples": []}):
        assert ratios.speedup(one, STEADY) == ratios.against(STEADY, one) == "-"


def test_both_batches_of_a_step_are_added_round_by_round():
    rows = [STEADY | {"status": "measured", "operations": 1, "bytes": 1, "extra_bytes": 5}] * 2
    rows[1] = rows[1] | {"samples": [1.0, 1.0, 3.0]}
    assert head.total(rows)["samples"] == [2.0, 5.0, 4.0]
