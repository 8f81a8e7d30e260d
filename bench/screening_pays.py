"""Whether results of a GPU say that ``screening="auto"`` should screen there, and if not, why.

    python -m bench.measure screening --precision bf16 --case sparse-normal dense --output RESULT.json
    python -m bench.screening_pays RESULT.json

``SCREENING_PAYS`` in ``splade_kernels/backends/triton/tuning.py`` may hold an architecture when a result of it is in
``bench/results/`` and no result of it there objects.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.options import plain
from bench.harness.result_file import load
from bench.tables.ratios import ratio

Result = dict[str, Any]
PRECISION = "bf16"
# Case and pass -> the least time unscreened over the time screened. Inference of a trained model's share of active
# pairs (1.5 %) has to gain; what "auto" screens beside that may lose little: training, which quantises the weight in
# every step and decides as inference does, and everything active, as early in training.
LEAST: dict[tuple[str, str], float] = {
    ("sparse-normal", "forward"): 1.1,
    ("sparse-normal", "forward_backward"): 1.0,
    ("dense", "forward"): 0.95,
    ("dense", "forward_backward"): 0.95,
}


def architecture(result: Result) -> int | None:
    """The architecture of the GPU that measured a result of one device; None of a CPU's."""
    environments = [run["environment"] for run in result["runs"]]
    return next((one.get("arch") for one in environments if one.get("gpu")), None)


def objections(results: Sequence[Result], arch: int) -> list[str]:
    """Why these results do not let "auto" screen on an architecture; empty: it pays."""
    found = [result for result in results if result.get("kind") == "screening" and architecture(result) == arch]
    if not found:
        return [f"no screening result of a GPU of sm_{arch}"]
    said = []
    for result, ((case, job), least) in itertools.product(found, LEAST.items()):
        # At the shape of a GPU.
        wanted = {"case": case, "job": job, "precision": PRECISION, "status": "measured", "scaled_from": None}
        rows = [row for row in result["rows"] if all(row.get(name) == value for name, value in wanted.items())]
        measured = {row["variant"]: row for row in reversed(rows)}
        gain = ratio(measured.get("unscreened"), measured.get("screened"))
        where = f"{case} {PRECISION} {job}"
        if gain is None:
            said.append(f"{where}: expected measured rows, screened and unscreened, found none")
        # The quartile too, for a gain that the rounds disagree on is none.
        elif (gain.low if least > 1 else gain.middle) < least:
            said.append(f"{where}: expected unscreened / screened of at least {least}, got {gain.middle:.3f}")
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    parser = plain(__doc__)
    parser.add_argument("result", nargs="+", type=Path, help="a result file of `python -m bench.measure screening`")
    results = load(parser.parse_args(arguments).result)
    architectures = {arch for result in results if (arch := architecture(result)) is not None}
    if not architectures:
        raise SystemExit("expected results of `python -m bench.measure screening` from a GPU, got none")
    for arch in sorted(architectures):
        said = objections(results, arch)
        verdict = f"sm_{arch} may enter SCREENING_PAYS (splade_kernels/backends/triton/tuning.py)"
        print("\n".join(f"sm_{arch}: {line}" for line in said) if said else verdict)


if __name__ == "__main__":
    main()
