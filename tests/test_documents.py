"""Numbers in documents are those of the result files beside them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo.report import render

ROOT = Path(__file__).parents[1]


def test_the_readme_shows_the_checked_in_demo_result():
    expected = render(json.loads((ROOT / "docs/demo/result.json").read_text())).strip()
    assert expected in (ROOT / "README.md").read_text()


def test_local_links_in_documents_exist():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_code_for_plain_pytorch_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "from_linear" in block]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["examples/train.py"])
def test_scripts_explain_themselves(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--stock" in done.stdout
