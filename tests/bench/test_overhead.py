from __future__ import annotations

import pytest
import torch

pytest.importorskip("sentence_transformers")

from bench import overhead
from bench.tables.overhead import overhead_table


def test_every_case_is_measured_and_shown(tmp_path, capsys):
    threads = torch.get_num_threads()
    content = overhead.main(["--output", str(tmp_path / "overhead.json"), "--rounds", "2"])
    assert torch.get_num_threads() == threads
    assert {row["case"] for row in content["rows"]} == set(overhead.CASES)
    assert {row["status"] for row in content["rows"]} == {"measured"}
    assert all((row["added_cpu"] is None) == (row["variant"] in ("by-hand", "stock")) for row in content["rows"])
    assert capsys.readouterr().out.strip().count("\n") == 1 + len(content["rows"])


def test_a_wrong_variant_is_not_timed(monkeypatch):
    right = torch.ones(2, 3)
    monkeypatch.setitem(overhead.CASES, "bert", lambda: {"by-hand": lambda: right, "encoder": lambda: right + 1e-6})
    (row,) = overhead.measure("bert", rounds=2)
    assert (row["variant"], row["status"]) == ("encoder", "red: differs from by-hand")
    assert "red" in overhead_table({"rows": [row]})
