"""Cost against tokens, vocabulary and batch with the machine's roofline; gain of screening against the active share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from bench.harness.roofline import Machine, Work
from bench.tables.ratios import Ratio, ratio

COLORS = {"stock": "#c2410c", "compile": "#a16207", "tiled": "#0f766e", "sparton": "#7e22ce", "ours": "#1d4ed8"}
SCREENING_COLORS = {"screened": "#1d4ed8", "ours": "#0f766e"}
AXES = {"S": "tokens a sequence", "V": "vocabulary", "B": "batch"}


def plot(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Paths of the pictures written: of each head result's curves, and of each screening result with several shares."""
    paths = []
    for result in results:
        stem, kind = folder / Path(result["file"]).stem.removesuffix("-curves"), result["kind"]
        curves = [row for row in result["rows"] if row.get("case", "").startswith("curve-") and row["median"]]
        if kind == "head" and curves:
            paths.append(stem.with_name(f"{stem.name}-curves.png"))
            _plot_curves(curves, paths[-1])
        inference = [row for row in result["rows"] if row.get("job") == "forward"]
        if kind == "screening" and len({row["active_share"] for row in inference}) > 1:
            paths.append(stem.with_name(f"{stem.name}-shares.png"))
            _plot_shares(inference, paths[-1])
    return sorted(paths)


def _plot_shares(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Random numbers as lines, text as single marks: the case named trained-squad has another shape."""
    rows = [row for row in rows if row["precision"] == rows[0]["precision"]]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharex=True)
    for panel, rival in zip(panels, ("unscreened", "stock"), strict=True):
        base = {row["case"]: row for row in rows if row["variant"] == rival}
        for name, color in SCREENING_COLORS.items():
            label = {"ours": "auto"}.get(name, name)
            points = [
                (100 * row["active_share"], gain, row["case"].endswith("squad"))
                for row in rows
                if row["variant"] == name and (gain := ratio(base.get(row["case"]), row))
            ]
            line = sorted((x, gain) for x, gain, text in points if not text)
            if line:
                _with_quartiles(panel, line, marker="o", markersize=4, color=color, label=label)
            for x, gain, text in points:
                if text:
                    style = {"marker": "*", "markersize": 9, "linestyle": "", "label": f"{label}, text"}
                    _with_quartiles(panel, [(x, gain)], color=color, **style)
        panel.axhline(1, color="black", linestyle="--", linewidth=1)
        panel.set(
            xscale="log",
            xlabel="active (sequence, vocabulary entry) pairs, %",
            ylabel=f"times as fast as {rival}",
            ylim=(0, None),
        )
        panel.xaxis.set_major_formatter("{x:g}")
        panel.legend(frameon=False, fontsize=8)
    _save(figure, f"{rows[0]['run']['environment']['device']}, forward, {rows[0]['precision']}", path)


def _with_quartiles(panel: Any, points: Sequence[tuple[float, Ratio]], **style: Any) -> None:
    places, gains = zip(*points, strict=True)
    lengths = [[gain.middle - gain.low for gain in gains], [gain.high - gain.middle for gain in gains]]
    panel.errorbar(places, [gain.middle for gain in gains], yerr=lengths, elinewidth=1, capsize=2, **style)


def _plot_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    precision = rows[0]["precision"]
    rows = [row for row in rows if row["precision"] == precision and row["job"] == "forward_backward"]
    machine = Machine(**rows[0]["run"]["machine"][precision])
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        mine = [row for row in rows if row["case"].startswith(f"curve-{axis}-")]
        points = [row | {"x": int(row["case"].split("-")[2])} for row in mine]
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
    _save(figure, f"{rows[0]['run']['environment']['device']}, {precision}", path)


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
