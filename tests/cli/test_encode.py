"""The command as it is installed: its help, its exit status, and what it needs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from splade_kernels.cli.app import run
from tests.encoding.models import ROOT, command, encode, environment, model_folder, parts, rows

OPTIONS = """--model --input --output --text-field --title-field --id-field --split --query --prompt-name --max-length
--batch-tokens --max-active-dims --min-weight --dtype --device --screening --rows-per-part --limit --threads --on-error
--revision --trust-remote-code --overwrite --quiet""".split()
DEFAULTS = {
    "--text-field": "text", "--title-field": "title", "--id-field": "_id", "--split": "train", "--batch-tokens": "8192",
    "--dtype": "auto", "--device": "auto", "--screening": "auto", "--rows-per-part": "2000", "--on-error": "fail",
}  # fmt: skip


@pytest.fixture
def help_text(monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    with pytest.raises(SystemExit) as ended:
        run(["encode", "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_option_its_choices_and_defaults(help_text):
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", help_text)) == {*OPTIONS, "--help"}
    for choices in ("auto|float32|bfloat16|float16", "auto|on|off", "fail|skip", "auto|cpu|cuda[:i]"):
        assert choices in help_text
    for name, default in DEFAULTS.items():
        (line,) = re.findall(rf"^\s*{name} .*(?:\n {{20,}}.*)*", help_text, re.MULTILINE)
        assert f"[default: {default}]" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--input", "x.jsonl", "--output", "out"],
        ["--model", "m", "--input", "x.jsonl", "--output", "out", "--dtype", "int8"],
        ["--model", "m", "--input", "x.jsonl", "--output", "out", "--on-error", "ignore"],
        ["--model", "m", "--input", "x.jsonl", "--output", "out", "--no-such-option"],
        ["--model", "m", "--input", "x.jsonl", "--output", "out", "--limit", "many"],
    ],
)
def test_a_wrong_command_line_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run(["encode", *arguments])
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_every_option_reaches_the_run(tmp_path, monkeypatch):
    from splade_kernels.encoding import run as runs

    given = []
    monkeypatch.setattr(runs, "run", lambda options, stop: given.append(options))
    arguments = """--model m --input in.jsonl --output out --text-field body --title-field headline --id-field docno
    --split test --query --prompt-name p --max-length 9 --batch-tokens 10 --max-active-dims 11 --min-weight 0.25
    --dtype float16 --device cuda:1 --screening off --rows-per-part 12 --limit 13 --threads 3 --on-error skip
    --revision r --trust-remote-code --overwrite --quiet""".split()
    with pytest.raises(SystemExit) as ended:
        run(["encode", *arguments])
    assert not ended.value.code
    (options,) = given
    assert options.encoder == runs.EncoderOptions(
        model="m", revision="r", trust_remote_code=True, query=True, prompt_name="p", max_length=9, batch_tokens=10,
        max_active_dims=11, min_weight=0.25, dtype="float16", device="cuda:1", screening="off",
    )  # fmt: skip
    assert (options.input, str(options.output), options.split) == ("in.jsonl", "out", "test")
    assert tuple(options.fields) == ("docno", "body", "headline")
    assert (options.rows_per_part, options.limit, options.threads) == (12, 13, 3)
    assert (options.on_error, options.overwrite, options.quiet) == ("skip", True, True)


def test_the_command_in_a_process_of_its_own(tmp_path):
    (tmp_path / "c.tsv").write_text("a\twater boils\nb\t\n")
    arguments = ("--threads", 1, "--input", tmp_path / "c.tsv", "--output", tmp_path / "out")
    done = subprocess.run(command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.fullmatch(r"2 rows \(1 empty, 0 skipped, 0 truncated\), [\d.]+ terms a row, .* in .*out\n", done.stdout)
    assert [row["id"] for row in rows(tmp_path / "out")] == ["a", "b"]
    assert encode(*arguments[:5], tmp_path / "here") == 0
    assert parts(tmp_path / "here") == parts(tmp_path / "out")


def test_queries_use_the_prompt_of_queries(tmp_path):
    """A model with a prompt for queries: its outputs for documents and queries differ by it."""
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(model_folder()), device="cpu")
    model.prompts["query"] = "what is "
    model.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "c.jsonl").write_text('{"_id": 1, "text": "rust"}\n')
    found = {}
    for more in ([], ["--query"]):
        output = tmp_path / f"out{len(more)}"
        assert encode("--input", tmp_path / "c.jsonl", "--output", output, *more, model=tmp_path / "model") == 0
        found[bool(more)] = rows(output)[0]["indices"]
    stock = model.encode_query("rust").to_dense().nonzero().flatten().tolist()
    assert found[True] == stock
    assert found[False] == model.encode_document("rust").to_dense().nonzero().flatten().tolist() != stock


def test_importing_the_command_imports_nothing_heavy():
    code = (
        "import sys, splade_kernels.cli.encode\n"
        "print(*{'pyarrow', 'sentence_transformers', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "splade_kernels.encoding.run", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "splade_kernels.encoding.records", raising=False)
    assert run(["encode", "--model", "m", "--input", "x.jsonl", "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "splade-kernels: encode needs pyarrow: pip install 'splade-kernels[cli]'\n"
