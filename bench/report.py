"""Result files to ``bench/RESULTS.md`` and the blocks of README.md, docs/screening.md and docs/numerics.md; every
number in them comes from a file named there.

    python -m bench.report bench/results/*.json [--output bench/RESULTS.md] [--readme README.md]
                           [--screening docs/screening.md] [--numerics docs/numerics.md] [--figures docs/bench]

A file's ``kind`` chooses its section; a kind without one is shown as a plain table of its rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness import options
from bench.harness.result_file import load
from bench.tables import encode, operators, ratios
from bench.tables.head import floors_section, head_section, readme_part
from bench.tables.markdown import Result, badge, joined, replace_block, section
from bench.tables.numerics import numerics_block, numerics_section
from bench.tables.overhead import overhead_section
from bench.tables.screening import margins_block, margins_section, screening_section
from bench.tables.short_sequences import short_sequences_section
from bench.tables.training import limits_table, training_table

BEGIN, END = "<!-- bench: python -m bench.report bench/results/*.json -->", "<!-- bench end -->"
SECTIONS: dict[str, Callable[[Result], str]] = {
    "head": head_section,
    "encode": encode.encode_section,
    "screening": screening_section,
    "margins": margins_section,
    "numerics": numerics_section,
    "backward": operators.backward_section,
    "short-sequences": short_sequences_section,
    "flops": operators.flops_section,
    "training": lambda result: section("Training", result, training_table(result)),
    "overhead": overhead_section,
    "limits": lambda result: section("Limits", result, limits_table(result)),
    "compaction": operators.plain_section,
    "resources": operators.resources_section,
}


def render(results: Sequence[Result], figures: Sequence[str] = ()) -> str:
    """The whole of RESULTS.md."""
    order = list(SECTIONS)
    ranked = sorted(results, key=lambda result: order.index(result["kind"]) if result["kind"] in order else 99)
    absent = badge(results)
    parts = [
        "# Results",
        "Written by `python -m bench.report bench/results/*.json`; how it is measured: "
        "[docs/benchmarks.md](../docs/benchmarks.md).",
        ratios.NOTE,
        absent and f"{absent} What a GPU would need at least is computed below, from its datasheet.",
        absent and floors_section(),
        *map(_picture, figures),
        *(SECTIONS.get(result["kind"], operators.plain_section)(result) for result in ranked),
    ]
    return joined(*parts) + "\n"


def readme_block(results: Sequence[Result], figures: Sequence[str] = ()) -> str:
    """Forward and backward of the named cases and whole encodes, stock against ours, one table a device."""
    heads = [part for result in results if result["kind"] == "head" for part in readme_part(result)]
    encodes = [part for result in results if result["kind"] == "encode" for part in encode.encode_part(result)]
    last = "All cases, precisions and floors: [bench/RESULTS.md](bench/RESULTS.md)."
    return joined(BEGIN, badge(results), *heads, *encodes, *map(_picture, figures), last, END)


def screening_block(results: Sequence[Result]) -> str:
    """What int8 bounds leave over."""
    margins = [margins_block(result) for result in results if result["kind"] == "margins"]
    return joined(BEGIN, *(margins or ["Not measured."]), END)


def errors_block(results: Sequence[Result]) -> str:
    """How far each head is from float64, a table a device."""
    numerics = [numerics_block(result) for result in results if result["kind"] == "numerics"]
    return joined(BEGIN, *(numerics or ["Not measured."]), END)


def _picture(figure: str) -> str:
    shows = "Screening against the share of active pairs" if figure.endswith("-shares.png") else "Cost against one size"
    return f"![{shows}]({figure})"


def main() -> None:
    parser = options.plain(__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("bench/RESULTS.md"))
    parser.add_argument("--readme", type=Path, help="replace the block between its markers")
    parser.add_argument("--screening", type=Path, help="docs/screening.md: replace the block between its markers")
    parser.add_argument("--numerics", type=Path, help="docs/numerics.md: replace the block between its markers")
    parser.add_argument("--figures", type=Path, help="folder for the plots; needs matplotlib")
    args = parser.parse_args()
    results = load(args.results)
    figures: list[Path] = []
    if args.figures:
        from bench.tables.figures import plot

        figures = plot(results, args.figures)

    def links(document: Path) -> list[str]:
        return [os.path.relpath(path, document.parent) for path in figures]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(render(results, links(args.output)))
    if args.readme:
        args.readme.write_text(replace_block(args.readme.read_text(), readme_block(results, links(args.readme))))
    if args.screening:
        args.screening.write_text(replace_block(args.screening.read_text(), screening_block(results)))
    if args.numerics:
        args.numerics.write_text(replace_block(args.numerics.read_text(), errors_block(results)))


if __name__ == "__main__":
    main()
