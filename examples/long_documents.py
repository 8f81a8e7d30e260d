"""Peak memory and time of a training step against the length of the documents: without a head, fused, and stock.

    python -m examples.long_documents --document docs/long-documents.md

A ModernBERT of random weights, float32, gradient checkpointing, forward and backward. Every measurement has a process
of its own, which ends where it would hold more than ``--memory``: on a CPU a thread of it looks at its resident memory,
on a GPU PyTorch's allocator refuses. Where both heads run, their losses must agree, or the command ends. Then, unless
``--part lengths`` is given, the measurements that the formula of ``splade_kernels.estimate`` is held against.
On a GPU: ``--device cuda``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import options
from bench.harness.environment import device_name
from bench.harness.result_file import Budget, Result
from bench.inputs.language_models import Shape
from bench.jobs.language_models import FORMULA_CASES, HEADS, OVER_BUDGET, Job, estimated, run
from bench.tables.markdown import BUSY_PROCESSORS, machine, replace_block, table
from splade_kernels.memory import estimate, parse_bytes
from splade_kernels.memory import table as estimate_table

LENGTHS = (512, 1024, 2048, 4096, 8192)
PARTS = ("lengths", "formula")
# Largest relative difference of the losses of fused and stock.
TOLERANCE = 1e-5
# What makes two rows the same measurement.
KEY = ("part", *Shape.__dataclass_fields__, "head", "checkpointing", "optimizer", "training", "device")
NAMES = {"none": "no head", "fused": "fused", "stock": "stock"}
COLORS = {"none": "#64748b", "fused": "#1d4ed8", "stock": "#c2410c"}
BEGIN, END = "<!-- long documents: python -m examples.long_documents -->", "<!-- long documents end -->"
# What the table of batches is computed for; nothing of it is measured.
COMPUTED_MEMORY, COMPUTED_LENGTHS = "24GiB", (512, 1024, 2048, 4096, 8192)


def measure_lengths(result: Result, budget: Budget, args: Any) -> None:
    """Three rows for each length. A head that has passed the memory is not tried at greater lengths."""
    ended: dict[str, int] = {}
    limit = parse_bytes("--memory", args.memory)
    for length in args.lengths:
        shape = Shape(
            "modernbert", args.layers, args.hidden_size, args.intermediate_size, max(1, args.hidden_size // 64),
            args.vocab_size, args.batch_size, length,
        )  # fmt: skip
        losses: dict[str, float] = {}
        for head in HEADS:
            job = Job(shape, head, True, steps=args.steps, device=args.device, budget=limit)
            described = {"part": "lengths", **_describe(job)}
            if head in ended:
                result.add(described | {"status": f"not tried: {OVER_BUDGET} at {ended[head]:,}"})
                continue
            if not budget.has_room():
                result.leave_out("no time", described)
                continue
            found = budget.run(run, job)
            if found["status"] == OVER_BUDGET:
                ended[head] = length
            else:
                losses[head] = found["loss"]
            if {"fused", "stock"} <= losses.keys() and head == "stock":
                found["loss_difference"] = abs(losses["fused"] / losses["stock"] - 1)
                if not found["loss_difference"] <= TOLERANCE:
                    raise SystemExit(f"losses of fused and stock disagree at {length} tokens: {losses}")
            result.add(described | found)
            print(_line(length, head, found), flush=True)


def measure_formula(result: Result, budget: Budget) -> None:
    """A row for each case of the formula; on a CPU."""
    for job in FORMULA_CASES:
        described = {"part": "formula", **_describe(job)}
        for row in result.attempt(budget, described, run, job):
            print(f"{job.shape.family} {job.head}: {row['peak_bytes'] / 2**20:,.0f} MiB a step", flush=True)


def _describe(job: Job) -> dict[str, Any]:
    names = ("head", "checkpointing", "optimizer", "training", "device")
    return asdict(job.shape) | {name: getattr(job, name) for name in names}


def _line(length: int, head: str, found: dict[str, Any]) -> str:
    if found["status"] != "ok":
        return f"{length:6,} {NAMES[head]}: {found['status']}"
    time = f", {found['median']:.2f} s a step" if found["samples"] else ""
    return f"{length:6,} {NAMES[head]}: {found['peak_bytes'] / 2**20:,.0f} MiB{time}, loss {found['loss']:.6f}"


def curves(rows: Sequence[dict[str, Any]], field: str) -> dict[str, dict[int, tuple[float, bool]]]:
    """By head and length, a measured number and False; or, for a head that does not fit, one extrapolated and True.

    What a head takes beyond the step without one grows with the length: so it is multiplied from the longest length
    at which it was measured, and added to the measured step without a head.
    """
    found: dict[str, dict[int, tuple[float, bool]]] = {head: {} for head in HEADS}
    for row in rows:
        if row.get(field) is not None:
            found[row["head"]][row["length"]] = row[field], False
    body = found["none"]
    for row in rows:
        measured = [at for at, (_, guessed) in found[row["head"]].items() if not guessed and at in body]
        if row["status"] != "ok" and row["length"] in body and measured:
            last, length = max(measured), row["length"]
            above = found[row["head"]][last][0] - body[last][0]
            found[row["head"]][length] = body[length][0] + above * length / last, True
    return found


def lengths_table(rows: Sequence[dict[str, Any]]) -> str:
    """Memory and time of the three steps, and the ratios."""
    memory, time = curves(rows, "peak_bytes"), curves(rows, "median")
    head = ["length"]
    head += [f"{NAMES[name]}, {unit}" for unit in ("MiB", "s") for name in HEADS]
    head += [f"{what}: {ratio}" for what in ("memory", "time") for ratio in ("fused / no head", "stock / fused")]
    lines = [head]

    def cell(curve: dict[str, dict[int, tuple[float, bool]]], name: str, length: int, shown: str, scale: float) -> str:
        if length not in curve[name]:
            return "-"
        value, guessed = curve[name][length]
        return ("≈ " if guessed else "") + format(value / scale, shown)

    def ratio(curve: dict[str, dict[int, tuple[float, bool]]], above: str, below: str, length: int) -> str:
        if length not in curve[above] or length not in curve[below]:
            return "-"
        (one, guessed), (other, also) = curve[above][length], curve[below][length]
        return ("≈ " if guessed or also else "") + f"{one / other:.2f}x"

    for length in sorted({row["length"] for row in rows}):
        line = [f"{length:,}"]
        line += [cell(memory, name, length, ",.0f", 2**20) for name in HEADS]
        line += [cell(time, name, length, ",.2f", 1) for name in HEADS]
        for curve in (memory, time):
            line += [ratio(curve, "fused", "none", length), ratio(curve, "stock", "fused", length)]
        lines.append(line)
    return table(lines)


def lengths_note(rows: Sequence[dict[str, Any]], limit: str) -> str:
    """What the table shows, where stock ends, and how far the losses are apart."""
    shape = rows[0]
    text = (
        f"ModernBERT's layers, {shape['layers']} of them, {shape['hidden_size']} wide, feed-forward "
        f"{shape['intermediate_size']:,}, vocabulary {shape['vocab_size']:,}, batch {shape['batch_size']}, float32. "
        "MiB above what the process held before the step."
    )
    over = [row["length"] for row in rows if row["status"] == OVER_BUDGET]
    if over:
        longest = max(row["length"] for row in rows if row["head"] == "stock" and row["status"] == "ok")
        text += (
            f" With {limit} for the process the stock step ends between {longest:,} and {min(over):,} tokens. Numbers "
            f"with ≈ are extrapolated: the measured step without a head, and what stock took above it at {longest:,} "
            "tokens times the lengths' ratio."
        )
    differences = [row["loss_difference"] for row in rows if row.get("loss_difference") is not None]
    if differences:
        text += f" Largest relative difference of the losses of fused and stock: {max(differences):.1e}."
    others = max((row.get("others") or 0 for row in rows if row.get("clock") == "perf_counter"), default=0)
    if others > BUSY_PROCESSORS:
        text += (
            f" The machine was busy: other programs kept up to {others:.1f} processors at work, so times mean little."
        )
    return text


def formula_table(rows: Sequence[dict[str, Any]]) -> str:
    """Measured and computed bytes of a step, without parameters and optimizer's states, which are known exactly."""
    lines = [["layers", "shape: layers, D, V, B × S", "head", "step", "measured, MiB", "computed, MiB", "error"]]
    for row in rows:
        job = Job(
            Shape(**{name: row[name] for name in Shape.__dataclass_fields__}), row["head"], row["checkpointing"],
            row["optimizer"], row["training"],
        )  # fmt: skip
        shape, terms = job.shape, estimated(job)
        computed = terms.peak - terms.parameters - terms.optimizer
        step = ["training" if job.training else "inference"]
        step += ["checkpointing"] * job.checkpointing + ["AdamW"] * job.optimizer + ["padding"] * shape.padded
        step += [shape.attention] if shape.attention else []
        lines.append(
            [
                shape.family,
                f"{shape.layers}, {shape.hidden_size}, {shape.vocab_size:,}, {shape.batch_size} × {shape.length:,}",
                job.head,
                ", ".join(step),
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{computed / 2**20:,.0f}",
                f"{computed / row['peak_bytes'] - 1:+.1%}",
            ]
        )
    return table(lines)


def computed_table() -> str:
    """The largest batches of ModernBERT-base on a GPU, by the formula alone."""
    from transformers import ModernBertConfig

    rows = estimate(ModernBertConfig(), COMPUTED_MEMORY, lengths=COMPUTED_LENGTHS, autocast="bfloat16")
    return estimate_table(rows)


def block(path: Path) -> str:
    """What the document shows of a result file."""
    if not path.is_file():
        return "\n\n".join([BEGIN, "Not measured.", END])
    result = json.loads(path.read_text())
    parts = [BEGIN]
    rows = {part: [row for row in result["rows"] if row["part"] == part] for part in PARTS}
    if rows["lengths"]:
        limit = result["provenance"][rows["lengths"][0]["provenance"]]["memory"]
        picture = f"![Memory and time of a step against the length]({path.parent.name}/lengths.png)"
        parts += [
            lengths_table(rows["lengths"]),
            lengths_note(rows["lengths"], limit),
            _origin(result, "lengths"),
            picture,
        ]
    compared = [row for row in result["rows"] if row["head"] != "none" and row["status"] == "ok"]
    if compared:
        parts += ["## The formula against measurements", formula_table(compared)]
        parts += [_origin(result, "formula")] if rows["formula"] else []
    parts += [
        "## The largest batch",
        f"**Computed, not measured**: ModernBERT-base on a GPU with {COMPUTED_MEMORY}, float32 parameters under "
        "bfloat16 autocast, AdamW, padded batches, sdpa; texts of a step, queries and documents together.",
        computed_table(),
        END,
    ]
    return "\n\n".join(parts)


def _origin(result: dict[str, Any], part: str) -> str:
    numbers = dict.fromkeys(row["provenance"] for row in result["rows"] if row["part"] == part)
    runs = [result["provenance"][number] for number in numbers]
    texts = [
        f"{machine(run['environment'])}; commit {run['environment']['commit']}, `{run['command']}`, load average at "
        f"the start {run['load_average']:.1f}."
        for run in runs
    ]
    return " ".join(texts)


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory and time of a step against the length; dashed where extrapolated."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    rows = [row for row in result["rows"] if row["part"] == "lengths"]
    environment = result["provenance"][rows[0]["provenance"]]["environment"]
    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for axis, field, label, scale in zip(
        axes, ("peak_bytes", "median"), ("peak memory of a step [GiB]", "time of a step [s]"), (2**30, 1), strict=True
    ):
        for head, curve in curves(rows, field).items():
            points = sorted((length, value / scale, guessed) for length, (value, guessed) in curve.items())
            measured = [point[:2] for point in points if not point[2]]
            if not measured:
                continue
            axis.plot(*zip(*measured, strict=True), "o-", color=COLORS[head], label=NAMES[head], linewidth=1.8)
            guessed = [measured[-1], *(point[:2] for point in points if point[2])]
            axis.plot(*zip(*guessed, strict=True), "o--", color=COLORS[head], markerfacecolor="none", linewidth=1.2)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted({row["length"] for row in rows}))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.set(xlabel="tokens of a text", ylabel=label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(f"A training step of long documents: {device_name(environment)}; dashed: extrapolated", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options.parser(__doc__, device=True)
    parser.add_argument(
        "--part", nargs="*", choices=PARTS, default=[*PARTS], help="default: both; none: only the document, made again"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[*LENGTHS])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each (default: 3); 0: memory only")
    parser.add_argument("--memory", default="8GiB", help="what a process may hold (default: 8GiB)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=384)
    parser.add_argument("--vocab-size", type=int, default=50_368)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--document", type=Path, help="a page with the markers; its result is PAGE/result.json")
    args = parser.parse_args(arguments)
    output = args.output or (args.document and args.document.with_suffix("") / "result.json")
    if not args.part:
        if not (args.document and output.is_file()):
            parser.error("--part: expected what to measure, or --document PAGE with a result PAGE/result.json")
        return _render(args.document, output)
    budget = Budget(args.budget)
    result = Result(
        "long-documents", "examples.long_documents", output, append=args.append, key=KEY, run={"memory": args.memory}
    )
    if "lengths" in args.part:
        measure_lengths(result, budget, args)
    if "formula" in args.part:
        measure_formula(result, budget)
    result.finish()
    if rows := [row for row in result.rows if row["part"] == "lengths"]:
        print(lengths_table(rows))
    if rows := [row for row in result.rows if row["head"] != "none" and row["status"] == "ok"]:
        print(formula_table(rows))
    if args.document:
        _render(args.document, output)
    return result.content


def _render(document: Path, path: Path) -> dict[str, Any]:
    """Write the picture and the document's block again; returns the result that they show."""
    result: dict[str, Any] = json.loads(path.read_text())
    if any(row["part"] == "lengths" for row in result["rows"]):
        plot(result, path.parent / "lengths.png")
    document.write_text(replace_block(document.read_text(), block(path)))
    return result


if __name__ == "__main__":
    main()
