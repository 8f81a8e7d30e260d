"""The table of formats that docs/formats.md shows.

``python -m tests.export_formats --document docs/formats.md`` writes it there; its rows are those of
splade_kernels/exporting/formats.py.
"""

from __future__ import annotations

from functools import partial

from bench.tables.markdown import table
from splade_kernels.exporting.formats import FORMATS, MOST_DROPPED, Format
from tests import generated

COMMAND = "python -m tests.export_formats --document docs/formats.md"
BEGIN, END = f"<!-- formats: {COMMAND} -->", "<!-- formats end -->"


def block() -> str:
    """What stands in docs/formats.md between the markers."""
    head = ["`--format`", "written as", "weights", "`--scale`", "range", "terms", "notes", "from"]
    rows = [head, *map(_row, FORMATS.values())]
    said = (
        "Weights below the range vanish: they are dropped and counted, and a scale under which all weights of a row "
        f"vanish, or more than {MOST_DROPPED:.0%} of all weights, is refused. Weights above are clipped to it, counted "
        "and warned of."
    )
    return "\n\n".join([BEGIN, table(rows), said, END])


def _row(form: Format) -> list[str]:
    weights = "integers" if form.integers else "floats"
    terms = f"**{form.names}**" + (f" or {'ids' if form.names == 'tokens' else 'tokens'}" if form.either else "")
    return [f"`{form.name}`", form.written, weights, f"{form.scale:g}", form.range, terms, form.note, form.source]


main = partial(generated.main, __doc__, block)


if __name__ == "__main__":
    main()
