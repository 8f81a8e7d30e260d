"""The command where its extra is not installed: what to install, in one line."""

from __future__ import annotations

from pathlib import Path

from tests import without_package
from tests.searching.test_evaluation import write

_RUN = """
import runpy
sys.argv = ["splade-kernels", *sys.argv[1:]]
try:
    runpy.run_module("splade_kernels", run_name="__main__")
except SystemExit as error:
    print("status:", error.code)
"""


def test_the_message_names_the_extra() -> None:
    said = without_package.run(_RUN, "evaluate", "--run", "a", "--qrels", "b", package="typer")
    assert said == (
        "status: splade-kernels: the command line needs typer and rich: pip install 'splade-kernels[cli]' "
        "(missing: typer)\n"
    )


def test_a_command_without_its_library_names_the_extra(tmp_path: Path) -> None:
    run, qrels = write(tmp_path)
    said = without_package.run(
        "from splade_kernels.cli.app import run; sys.stderr = sys.stdout; print(run(sys.argv[1:]))",
        *("evaluate", "--run", run, "--qrels", qrels),
        package="ir_measures",
    )
    assert said == "splade-kernels: evaluate needs ir-measures: pip install 'splade-kernels[cli]'\n1\n"


def test_any_package_of_the_extra_is_named() -> None:
    said = without_package.run(
        "from splade_kernels.cli.app import run; sys.stderr = sys.stdout; print(run(sys.argv[1:]))",
        *("search", "--index", "a", "--model", "m", "--queries", "q.tsv", "--output", "o"),
        package="pyarrow",
    )
    assert said == "splade-kernels: this needs pyarrow: pip install 'splade-kernels[cli]'\n1\n"


def test_the_package_itself_imports_none_of_it() -> None:
    code = "import splade_kernels, splade_kernels.encoding, splade_kernels.searching; print(*sys.modules)"
    loaded = without_package.run(code, package="typer").split()
    assert "splade_kernels.searching" in loaded
    assert not {"rich", "pyarrow", "ir_measures", "seismic", "sentence_transformers", "transformers"} & {*loaded}
