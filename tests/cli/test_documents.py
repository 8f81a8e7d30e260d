"""docs/command-line.md: the help of every command, and the lines from a corpus to metrics."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SparseEncoder

from splade_kernels.cli.app import COMMANDS
from splade_kernels.searching import documents
from tests.cli import help_page
from tests.cli.commands import ROOT, call
from tests.st_models import PAIRS, sparse_encoder

PAGE = ROOT / "docs/command-line.md"


def test_the_page_shows_the_help_of_every_command() -> None:
    """After a change of an option: make report."""
    assert help_page.block() in PAGE.read_text()


@pytest.mark.parametrize("columns", ["40", "250"])
def test_no_terminal_changes_the_page(columns: str, monkeypatch: Any, tmp_path: Path) -> None:
    expected = help_page.block()
    monkeypatch.setenv("COLUMNS", columns)
    assert help_page.block() == expected
    page = tmp_path / "page.md"
    page.write_text(f"before\n{help_page.BEGIN}\nold\n{help_page.END}\nafter\n")
    help_page.main(["--document", str(page)])
    assert page.read_text() == f"before\n{expected}\nafter\n"
    assert max(map(len, expected.splitlines())) <= help_page.WIDTH


def test_the_page_is_what_the_commands_print(monkeypatch: Any, capsys: Any) -> None:
    """At that width: typer takes the terminal's, but no more than 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(help_page, "WIDTH", 78)
    for command in COMMANDS:
        assert call(command, "--help") == 0
        assert capsys.readouterr().out.rstrip() == help_page.help_of(command)


def test_the_page_states_the_size_of_a_block() -> None:
    page = " ".join(PAGE.read_text().split())
    assert f"{documents.ROWS:,} documents or {8 * documents.VALUES // 2**20} MiB of weights" in page


def beir(folder: Path) -> None:
    """The pairs of tests/st_models.py: the second half of each belongs to the first, and to the next one a little."""
    (folder / "qrels").mkdir(parents=True)
    rows = {
        "corpus": [{"_id": f"d{number}", "title": "", "text": text} for number, (_, text) in enumerate(PAIRS)],
        "queries": [{"_id": f"q{number}", "text": text} for number, (text, _) in enumerate(PAIRS)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    judged = [(number, other, grade) for number in range(12) for other, grade in ((number, 2), (number + 1, 1))]
    lines = ["query-id\tcorpus-id\tscore", *(f"q{query}\td{document}\t{grade}" for query, document, grade in judged)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")


def ndcg_of_the_stock_model(model: Path) -> float:
    """nDCG@10 with gains 2 and 1, from float64 products; there are no equal scores here."""
    stock = SparseEncoder(str(model), device="cpu")
    encoded = stock.encode_query([query for query, _ in PAIRS]), stock.encode_document([text for _, text in PAIRS])
    queries, texts = (part.to_dense().double().numpy() for part in encoded)
    values = []
    for number, scores in enumerate((queries @ texts.T)[:12]):
        order = [document for document in np.argsort(-scores)[:10] if scores[document] > 0]
        gains = [{number: 2, number + 1: 1}.get(document, 0) for document in order]
        values.append(sum(gain / np.log2(rank + 2) for rank, gain in enumerate(gains)) / (2 + 1 / np.log2(3)))
    return float(np.mean(values))


def test_the_lines_of_the_readme_run(tmp_path: Path, monkeypatch: Any) -> None:
    """As printed, but for the model: a tiny one, with the corpus of a BEIR folder."""
    beir(tmp_path)
    sparse_encoder().save_pretrained(str(tmp_path / "model"))
    section = (ROOT / "README.md").read_text().split("## From the command line")[1]
    install, *lines = re.findall(r"```\n(.*?)```", section, re.DOTALL)[0].splitlines()
    assert install == 'pip install "splade-kernels[cli]"'
    commands = [shlex.split(line.replace("naver/splade-v3", "model"), comments=True) for line in lines]
    assert [words[:2] for words in commands] == [["splade-kernels", name] for name in ("encode", "search", "export")]
    monkeypatch.chdir(tmp_path)
    for words in commands:
        assert call(*words[1:]) == 0, words
    assert len((tmp_path / "index.jsonl").read_text().splitlines()) == len(PAIRS)
    assert (tmp_path / "run.trec").stat().st_size


def test_the_lines_from_a_corpus_to_metrics_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """As printed, but for the model: a tiny one."""
    beir(tmp_path / "scifact")
    sparse_encoder().save_pretrained(str(tmp_path / "model"))
    section = PAGE.read_text().split("## Search it")[1]
    lines = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [
        ["splade-kernels", command] for command in ("encode", "search", "evaluate")
    ]
    monkeypatch.chdir(tmp_path)
    for line in lines:
        capsys.readouterr()
        assert call(*shlex.split(line.replace("naver/splade-v3", "model"))[1:]) == 0, line
    said = capsys.readouterr().out
    found = dict(re.findall(r"^(\S+) +(\d\.\d{4})$", said, re.MULTILINE))
    assert list(found) == ["nDCG@10", "RR@10", "R@1000"]
    expected = ndcg_of_the_stock_model(tmp_path / "model")
    assert expected > 0.2
    assert found["nDCG@10"] == f"{expected:.4f}"
    assert "over 12 queries with judgements" in said
