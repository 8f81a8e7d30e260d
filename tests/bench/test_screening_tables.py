"""The screening section of the report and its figure, from synthetic results."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report


def result(medians: dict[str, dict[str, float]], **more: object) -> dict[str, object]:
    found = []
    for case, of_case in medians.items():
        share = {"sparse-normal": 0.015, "dense": 1.0, "trained-squad": 0.009}.get(case, 0.05)
        for variant, median in of_case.items():
            row = {"case": case, "shape": "B16 S128 D768 V30522", "precision": "float32", "job": "forward"}
            row |= {"variant": variant, "status": "measured", "median": median, "extra_bytes": None, "repeatable": True}
            row |= {"active_share": share, "survivors": 0.00085 if variant == "screened" else None, "errors": {}}
            found.append(row | {"samples": [median] * 3, "clock": "perf_counter", "others": 0.0, "texts": None})
    environment = {"device": "Test CPU", "gpu": False, "threads": 2, "cpu_capability": "AVX2", "python": "3.11"}
    environment |= {"packages": {"torch": "2.13"}, "commit": "abc", "cpu_flags": ["avx", "avx2"]}
    machine = {"float32": {"bytes_per_second": 1e10, "operations_per_second": 1e11}}
    base = {"kind": "screening", "file": "screening-cpu.json", "command": "python -m bench", "left_out": []}
    return base | {"environment": environment, "machine": machine, "rows": found} | more


TIMES = {"stock": 1.2, "unscreened": 0.5, "ours": 0.26, "screened": 0.25, "screened-first": 0.3, "matmul-real": 0.4}


def cells(text: str, start: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_section_compares_screened_auto_and_unscreened():
    made = result({"sparse-normal": TIMES, "dense": TIMES | {"ours": 0.51, "screened": 0.75}})
    made["rows"][3] |= {"errors": {"bands_from_unscreened": 0.25}, "extra_bytes": 30 << 20}
    encoded = [
        row | {"case": "encode-squad", "job": "encode", "shape": "96 texts", "texts": 96} for row in made["rows"][:4]
    ]
    made["rows"] += [*encoded, *(row | {"job": "forward_backward"} for row in made["rows"][:4])]
    text = report.render([made])
    sparse, trained, memory = (without_quartiles(row) for row in cells(text, "sparse-normal"))
    assert sparse[1:3] == trained[1:3] == ["1.50%", "0.085%"]
    assert sparse[3:9] == ["1,200", "500", "260", "250", "300", "400"]
    assert sparse[9:] == ["2.0x faster", "0.52x the time", "4.8x faster", "1.7x faster", "0.62x the time"]
    assert trained[3:] == ["1,200", "500", "260", "250", "2.0x faster", "0.52x the time", "4.8x faster"]
    assert memory[1:] == ["-", "-", "-", "30 MiB"]
    assert without_quartiles(cells(text, "dense")[0])[9:] == [
        "1.5x slower", "1.02x the time", "1.6x faster", "1.7x faster", "1.88x the time",
    ]  # fmt: skip
    assert without_quartiles(cells(text, "encode-squad")[0])[1:] == [
        "1.50%", "80.0", "192.0", "369.2", "384.0", "1.9x faster", "4.6x faster",
    ]  # fmt: skip
    assert "Vector instructions of this CPU: avx avx2." in text
    assert "Of 14 results of ours, two runs were identical to the bit in 14; 0 were wrong." in text
    assert "unscreened one: 0.25 of what" in text


def without_quartiles(row: list[str]) -> list[str]:
    return [cell.split(" (")[0] for cell in row]


def test_a_red_row_is_listed_and_has_no_time():
    made = result({"dense": TIMES})
    made["rows"][3] |= {"status": "red: two runs differ", "median": None, "samples": [], "repeatable": False}
    text = report.render([made])
    assert cells(text, "dense")[0][6] == "red"
    assert "- dense float32 forward screened: red: two runs differ" in text
    assert "in 3; 1 were wrong" in text


def test_the_gain_is_plotted_against_the_share(tmp_path: Path):
    figures = pytest.importorskip("bench.tables.figures", exc_type=ImportError)
    made = result({"sparse-normal": TIMES, "dense": TIMES, "trained-squad": TIMES})
    (path,) = figures.plot_shares([made, result({}, kind="head")], tmp_path)
    assert path.name == "screening-cpu-shares.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert figures.plot_shares([result({"dense": TIMES})], tmp_path) == []
    assert "![Screening against the share of active pairs](x-shares.png)" in report.render([made], ["x-shares.png"])
