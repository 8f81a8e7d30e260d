"""Tables of :mod:`bench.short_sequences`: the model's in docs/kernels.md, the measured ones in bench/RESULTS.md."""

from __future__ import annotations

from bench.jobs import short_sequences as model
from bench.tables.markdown import Result, cell, grouped, section, table
from bench.tables.ratios import against, speedup

BEGIN, END = "<!-- short sequences: python -m bench.short_sequences -->", "<!-- short sequences end -->"
VARIANTS = ("gather", "scatter", "products", "training-forward")
NOTE = (
    "`gather`: the package's backward. `scatter`: the gradient scattered into a matrix of zeros, tile by tile, and two "
    "`torch.mm`; `products`: these two alone. Model: `bench/jobs/short_sequences.py` at the rates measured here, rows "
    "of h and W gathered at the rate of a copy."
)


def block() -> str:
    """What stands in docs/kernels.md between the markers."""
    shape = model.Shape(0)
    intensities = ", ".join(f"{value:.0f}" for value in model.INTENSITIES)
    parameters = (
        f"Computed, not measured, in forwards: B {shape.batch_size}, D {shape.hidden_size}, V {shape.vocab_size:,}, "
        f"{shape.itemsize} bytes an element, all tokens real. Parameters: R / M = {intensities} operations for each "
        f"byte of memory, the first of which is that of the RTX 3090's datasheet; rows of W are gathered at memory's "
        f"rate, rows of h at the same or, where it says L2, at {model.L2_FACTOR:g} times that."
    )
    crossings = "The longest sequences, in tokens, at which scattering costs less, by active share:"
    said = [f"with {share:.0%} of the pairs active {_crosses(share)}" for share in (1.0, 0.05, 0.01)]
    summary = f"By this model scattering costs less {'; '.join(said)}."
    parts = [parameters, table(model.length_rows()), crossings, table(model.share_rows()), summary]
    return "\n\n".join([BEGIN, *parts, END])


def _crosses(share: float) -> str:
    """Up to which length scattering costs less, over all the parameters of the tables."""
    rates = [model.Rates.of(one, factor) for one in model.INTENSITIES for factor in (1.0, model.L2_FACTOR)]
    longest = [length for length in (model.crossing_length(share, one) for one in rates) if length is not None]
    if not longest:
        return "at no length"
    return f"up to {min(longest)} tokens with the worst and {max(longest)} with the best of these parameters for it"


def short_sequences_section(result: Result) -> str:
    """Both ways beside the forward, measured and as the model has it."""
    header = ["case", "precision", "active", *(f"{name}, ms" for name in VARIANTS), "gather / forward"]
    rows = [[*header, "model", "scatter / forward", "model", "scatter against gather"]]
    for case, precision, _, found in grouped(result["rows"]):
        gather, scatter, forward = (found.get(name) for name in ("gather", "scatter", "training-forward"))
        any_row = next(iter(found.values()))
        cells = [f"{case} ({any_row['shape']})", precision, f"{any_row['active_share']:.1%}"]
        cells += [cell(found.get(name)) for name in VARIANTS]
        for way in (gather, scatter):
            cells += [against(way, forward), f"{way['predicted_forwards']:.2f}x" if way else "-"]
        rows.append([*cells, speedup(gather, scatter)])
    bad = [row for row in result["rows"] if row["status"] != "measured"]
    lines = [f"- {row['case']} {row['precision']} {row['job']} {row['variant']}: {row['status']}" for row in bad]
    return section("Backward of short sequences", result, NOTE, table(rows), "\n".join(lines))
