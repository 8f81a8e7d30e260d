"""Cost against tokens, vocabulary and batch: one picture a result, with the roofline of the machine it ran on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from bench.roofline import Machine, Work

COLORS = {"stock": "#c2410c", "compile": "#a16207", "tiled": "#0f766e", "sparton": "#7e22ce", "ours": "#1d4ed8"}
AXES = {"S": "tokens a sequence", "V": "vocabulary", "B": "batch"}


def plot_curves(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Paths of the pictures written: one for each head result that has curves."""
    paths = []
    for result in results:
        rows = [row for row in result["rows"] if row.get("case", "").startswith("curve-") and row["median"]]
        if result["kind"] == "head" and rows:
            path = folder / f"{Path(result['file']).stem.removesuffix('-curves')}-curves.png"
            _plot(result, rows, path)
            paths.append(path)
    return paths


def _plot(result: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    precision = rows[0]["precision"]
    rows = [row for row in rows if row["precision"] == precision and row["job"] == "forward_backward"]
    rates = result["machine"][precision]
    machine = Machine("", rates["bytes_per_second"], rates["operations_per_second"])
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        points = [
            row | {"x": int(row["case"].split("-")[2])} for row in rows if row["case"].startswith(f"curve-{axis}-")
        ]
        for name, color in COLORS.items():
            line = sorted((point["x"], point["median"] * 1e3) for point in points if point["variant"] == name)
            if line:
                panel.plot(*zip(*line, strict=True), marker="o", markersize=4, color=color, label=name)
        floor = sorted(
            (point["x"], machine.seconds(Work(point["operations"], point["bytes"])) * 1e3)
            for point in points
            if point["variant"] == "ours"
        )
        if floor:
            panel.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1, label="roofline of ours")
        panel.set_visible(bool(points))
        others = re.sub(rf"\b{axis}\d+ ?", "", points[0]["shape"]) if points else ""
        panel.set(xscale="log", yscale="log", xlabel=f"{label} ({others.strip()})")
    panels[0].set_ylabel("forward and backward, ms")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{result['environment']['device']}, {precision}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
