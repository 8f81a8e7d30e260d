"""The demo's table, from its result file alone: ``python -m examples.demo.report docs/demo/result.json``."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

__all__ = ["caption", "disturbance", "markdown_table", "render", "summarize", "verdict"]

WARM_UP_STEPS = 2
BUSY_PROCESSORS = 0.2

Result = dict[str, Any]


def summarize(stock: Result, fused: Result) -> dict[str, float]:
    """Stock against fused over the steps both did; the first two steps warm up and are not timed.

    Args:
        stock: the record of the stock run: ``losses``, ``seconds``, ``peak_mib``.
        fused: the record of the fused run, at least as long.
    """
    shared = len(stock["losses"])
    warm_up = min(WARM_UP_STEPS, shared - 1)
    stock_seconds = statistics.median(stock["seconds"][warm_up:shared])
    fused_seconds = statistics.median(fused["seconds"][warm_up:shared])
    return {
        "shared_steps": shared,
        "timed_steps": shared - warm_up,
        "stock_seconds_per_step": stock_seconds,
        "fused_seconds_per_step": fused_seconds,
        "speedup": stock_seconds / fused_seconds,
        "stock_others": statistics.median(stock["others"][warm_up:shared]),
        "fused_others": statistics.median(fused["others"][warm_up:shared]),
        "stock_peak_mib": stock["peak_mib"],
        "fused_peak_mib": fused["peak_mib"],
        "peak_ratio": stock["peak_mib"] / fused["peak_mib"],
        "largest_relative_loss_difference": max(relative_differences(stock["losses"], fused["losses"])),
    }


def relative_differences(reference: list[float], losses: list[float]) -> list[float]:
    """``|loss - reference| / |reference|`` of the steps both lists have."""
    return [abs(loss - value) / abs(value) for value, loss in zip(reference, losses, strict=False)]


def markdown_table(result: Result) -> str:
    """One table: the two heads above, the retrieval below."""
    summary, retrieval = result["summary"], result["retrieval"]
    before, after, bm25 = retrieval["before"], retrieval["after"], retrieval["bm25"]
    stock_losses, fused_losses = (result["training"][head]["losses"] for head in ("stock", "fused"))
    shared = summary["shared_steps"]
    return _align(
        [
            ["training", "stock head", "fused head", "fused against stock"],
            [
                f"seconds per step (median of {summary['timed_steps']})",
                f"{summary['stock_seconds_per_step']:.3f}",
                f"{summary['fused_seconds_per_step']:.3f}",
                _ratio(summary["speedup"], "faster", "slower"),
            ],
            [
                "peak memory of a step, MiB",
                f"{summary['stock_peak_mib']:,.0f}",
                f"{summary['fused_peak_mib']:,.0f}",
                _ratio(summary["peak_ratio"], "less", "more"),
            ],
            [
                f"loss, step 1 to step {shared}",
                *(f"{losses[0]:.5f} to {losses[shared - 1]:.5f}" for losses in (stock_losses, fused_losses)),
                f"largest relative difference {summary['largest_relative_loss_difference']:.1e}",
            ],
            ["**retrieval, held-out pairs**", "**before training**", "**after training**", "**BM25 (bm25s)**"],
            ["nDCG@10", *(f"{scores['ndcg@10']:.3f}" for scores in (before, after, bm25))],
            ["MRR@10", *(f"{scores['mrr@10']:.3f}" for scores in (before, after, bm25))],
            ["active terms per query", *(f"{scores['query_active_terms']:.0f}" for scores in (before, after)), "-"],
            ["active terms per passage", *(f"{scores['passage_active_terms']:.0f}" for scores in (before, after)), "-"],
        ]
    )


def verdict(result: Result) -> str:
    """One sentence that says what the retrieval numbers are worth."""
    settings, corpus = result["settings"], result["corpus"]
    after, bm25 = result["retrieval"]["after"]["ndcg@10"], result["retrieval"]["bm25"]["ndcg@10"]
    comparison = "BM25 wins" if bm25 > after else "BM25 is behind on this text"
    return (
        f"The model is a tiny BERT trained from scratch for {settings['steps']} steps on "
        f"{corpus['counts']['train']:,} docstrings, a check that training works and no retriever to use: {comparison}."
    )


def disturbance(result: Result) -> str:
    """A warning when other work ran on the machine while the steps were timed; empty when it was quiet."""
    stock, fused = result["summary"]["stock_others"], result["summary"]["fused_others"]
    if result["machine"]["gpu"] or max(stock, fused) <= BUSY_PROCESSORS:
        return ""
    return (
        f"The machine was busy: other programs kept {stock:.1f} processors at work beside the median stock step and "
        f"{fused:.1f} beside the median fused one. The seconds per step compare nothing: run it on a quiet machine."
    )


def caption(result: Result) -> str:
    """Machine, versions, corpus and the command that reproduces the numbers."""
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{describe_machine(machine)}; {packages}. Batch {settings['batch_size']}, {settings['max_length']} tokens, "
        f"hidden size {settings['hidden_size']}, vocabulary {settings['vocab_size']:,}, "
        f"{'bfloat16 autocast' if settings['bf16'] else 'float32'}; "
        f"corpus {result['corpus']['sha256'][:12]}. Command: `{result['command']}`."
    )


def describe_machine(machine: dict[str, Any]) -> str:
    """The processor that did the work, in a few words."""
    if machine["gpu"]:
        return str(machine["gpu"])
    threads = machine["threads"]
    return f"{machine['cpu']} ({machine['cpu_capability']}), {threads} thread{'s' * (threads != 1)}"


def render(result: Result) -> str:
    """Table, verdict and caption as Markdown."""
    parts = (markdown_table(result), verdict(result), disturbance(result), caption(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _ratio(ratio: float, better: str, worse: str) -> str:
    return f"{ratio:.1f}x {better}" if ratio >= 1 else f"{1 / ratio:.1f}x {worse}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.demo.report", description=__doc__)
    parser.add_argument("result", type=Path, help="the result.json of a demo run")
    print(render(json.loads(parser.parse_args().result.read_text())), end="")
