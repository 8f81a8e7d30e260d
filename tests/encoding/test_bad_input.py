"""Every entry of the table of bad input, through the command line."""

from __future__ import annotations

import json

import pytest

from tests.encoding.bad_input import CASES, Case, block
from tests.encoding.models import ROOT, encode, model_folder


@pytest.fixture(params=CASES, ids=[case.what.replace(" ", "-") for case in CASES])
def case(request, tmp_path, monkeypatch) -> Case:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request.param.write(tmp_path)
    model_folder()  # which is made with a progress bar
    return request.param


def test_it_is_refused_in_one_line(case, capsys, tmp_path):
    assert encode("--input", case.file, "--output", "out", *case.arguments) == case.status
    said = capsys.readouterr()
    assert said.err == f"splade-kernels: {case.message}\n"
    assert said.out == ""
    manifest = tmp_path / "out/manifest.json"
    assert not manifest.exists() or json.loads(manifest.read_text())["complete"] is False


def test_on_error_skip(case, capsys, tmp_path):
    status = encode("--input", case.file, "--output", "out", "--on-error", "skip", *case.arguments)
    said = capsys.readouterr()
    if case.skipped is None:
        assert status == case.status
        assert said.err == f"splade-kernels: {case.message}\n"
    elif case.content == GOOD_UTF16:
        assert status == 1  # no row is left
        assert said.err.startswith("splade-kernels: c.jsonl: expected rows, got none (2 were skipped, the first: ")
    else:
        assert status == 0
        assert f"1 skipped, the first of them: {case.message}\n" in said.err
        manifest = json.loads((tmp_path / "out/manifest.json").read_text())
        assert (manifest["rows"], manifest["skipped"], manifest["complete"]) == (1, case.skipped, True)
        assert "1 rows (0 empty, 1 skipped, 0 truncated)" in said.out


GOOD_UTF16 = next(case.content for case in CASES if case.skipped == 2)


def test_the_page_shows_the_table():
    assert block() in (ROOT / "docs/encoding.md").read_text()
