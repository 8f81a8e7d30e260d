"""The demo's two pictures, from its result alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from examples.demo.report import describe_machine, relative_differences

__all__ = ["plot_losses", "plot_memory"]

STOCK_COLOR = "#c2410c"
FUSED_COLOR = "#1d4ed8"
SMOOTHING_STEPS = 11
FLOAT32_EPSILON = 2.0**-23


def plot_losses(result: dict[str, Any], path: Path) -> None:
    """Left: both loss curves. Right: their relative difference over the steps both did."""
    stock, fused = result["training"]["stock"]["losses"], result["training"]["fused"]["losses"]
    differences = relative_differences(stock, fused)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), width_ratios=(3, 2), layout="constrained")

    steps = range(1, len(fused) + 1)
    left.plot(steps, fused, color=FUSED_COLOR, alpha=0.3, linewidth=0.8)
    left.plot(steps, _running_mean(fused), linewidth=1.8, color=FUSED_COLOR, label=f"fused head, {len(fused)} steps")
    left.plot(
        range(1, len(stock) + 1),
        stock,
        linestyle="none",
        marker="o",
        markersize=4.5,
        markerfacecolor="none",
        color=STOCK_COLOR,
        label=f"stock head, first {len(stock)} steps",
    )
    left.set(xlabel="training step", ylabel="SpladeLoss", xlim=(0, len(fused) + 1), ylim=(0, None))
    left.set_title(f"Loss (thick: mean of {SMOOTHING_STEPS} steps)", fontsize=10)
    left.legend(frameon=False)

    right.plot(range(1, len(differences) + 1), differences, "o-", color="#334155", markersize=4)
    right.axhline(FLOAT32_EPSILON, color="#94a3b8", linestyle="--", linewidth=1, label="float32 epsilon")
    right.set(
        xlabel="training step", ylabel="|fused − stock| / stock", ylim=(0, 1.4 * max(FLOAT32_EPSILON, *differences))
    )
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False)
    right.set_title("Relative loss difference", fontsize=10)
    _finish(figure, (left, right), f"SPLADE training, stock and fused head\n{_origin(result)}", path)


def plot_memory(result: dict[str, Any], path: Path) -> None:
    """Peak memory of the head alone, forward and backward, against sequence length."""
    memory = result["memory"]
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for name, color in (("stock", STOCK_COLOR), ("fused", FUSED_COLOR)):
        axis.plot(memory["lengths"], memory[name], "o-", linewidth=1.8, color=color, label=f"{name} head")
        axis.annotate(
            f"{memory[name][-1]:,.0f} MiB",
            (memory["lengths"][-1], memory[name][-1]),
            textcoords="offset points",
            xytext=(-6, 6),
            ha="right",
            fontsize=9,
            color=color,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(memory["lengths"])
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set(
        xlabel="sequence length [tokens]",
        ylabel="peak memory, forward + backward [MiB]",
        ylim=(0, 1.1 * max(memory["stock"])),
    )
    axis.legend(frameon=False, loc="upper left")
    shape = f"batch {memory['batch_size']}, hidden size {memory['hidden_size']}, vocabulary {memory['vocab_size']:,}"
    _finish(figure, (axis,), f"The SPLADE head alone: {shape}, float32\n{_origin(result)}", path)


def _finish(figure: Any, axes: tuple[Any, ...], title: str, path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _origin(result: dict[str, Any]) -> str:
    versions = result["versions"]
    return (
        f"{describe_machine(result['machine'])}; torch {versions['torch']}, "
        f"sentence-transformers {versions['sentence-transformers']}"
    )


def _running_mean(values: list[float]) -> list[float]:
    half = SMOOTHING_STEPS // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
