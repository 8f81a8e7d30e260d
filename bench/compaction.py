"""The compaction operators against PyTorch's: ``to_sparse_csr``, ``topk``, ``sort``.

    python -m bench.compaction [--device cpu|cuda] [--rows 1024 --vocab-size 30522 --active 200] [--output RESULT.json]

Compiled and PyTorch's results are checked against each other, bit for bit, before anything is timed. Times are medians
of interleaved runs. ``read`` is the sum of the embeddings: their one trip through memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness.environment import command, describe, not_here
from bench.harness.result_file import write
from bench.harness.timing import copy_rate
from splade_kernels.backends import compaction, compiled

Result = tuple[Tensor, ...]
# What the compiled operators are held against. The sort of all keys is what the sparse backward does without them.
RIVALS = {
    "sparsify": ("to_sparse_csr",),
    "sparsify_k": ("topk",),
    "bucket": ("bucket_sort", "bucket_nonzero_sort"),
}


def pytorch(function: Callable[..., Result], *arguments: Any) -> Result:
    """The function with the compiled operators out of sight."""
    with mock.patch.object(compaction, "is_compiled", lambda device: False):
        return function(*arguments)


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings with ``active`` entries a row, winners spread over ``length`` tokens, and edges."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.rows, args.vocab_size)
    embeddings = torch.zeros(shape)
    for row in embeddings:
        ids = torch.randperm(args.vocab_size, generator=generator)[: args.active]
        row[ids] = torch.rand(len(ids), generator=generator) + 0.1
    argmax = torch.randint(0, args.length, shape, generator=generator, dtype=torch.int16)
    edges = torch.arange(args.rows + 1) * args.length
    return embeddings.to(args.device), argmax.to(args.device), edges.to(args.device)


def nonzero_then_sort(argmax: Tensor, grad: Tensor, edges: Tensor) -> Result:
    """Vocabulary ids and values by token where the host may count the active entries first: what a CPU did before."""
    entries = (grad != 0).view(-1).nonzero().squeeze(1)
    sequence = entries.div(grad.shape[1], rounding_mode="floor")
    _, order = torch.sort(edges[sequence] + argmax.view(-1)[entries], stable=True)
    return entries.remainder(grad.shape[1])[order], grad.view(-1)[entries[order]]


def steps(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    embeddings, argmax, edges = inputs(args)
    bucket = (argmax, embeddings, edges, args.rows * args.length)
    return {
        "read": lambda: embeddings.sum(),
        "sparsify": lambda: compaction.sparsify(embeddings, None),
        "to_sparse_csr": lambda: embeddings.to_sparse_csr(),
        "sparsify_k": lambda: compaction.sparsify(embeddings, args.k),
        "topk": lambda: embeddings.topk(args.k, dim=1),
        "sparsify_k_pytorch": lambda: pytorch(compaction.sparsify, embeddings, args.k),
        "bucket": lambda: compaction.bucket_by_token(*bucket),
        "bucket_sort": lambda: pytorch(compaction.bucket_by_token, *bucket),
        "bucket_nonzero_sort": lambda: nonzero_then_sort(argmax, embeddings, edges),
    }


def check(args: argparse.Namespace) -> None:
    """Compiled against PyTorch, everything that is specified."""
    embeddings, argmax, edges = inputs(args)
    csr = embeddings.to_sparse_csr()
    stock = (csr.crow_indices(), csr.col_indices(), csr.values())
    pairs: list[tuple[Result, Result]] = [(compaction.sparsify(embeddings, None), stock)]
    pairs.append((compaction.sparsify(embeddings, args.k), pytorch(compaction.sparsify, embeddings, args.k)))
    bucket = (argmax, embeddings, edges, args.rows * args.length)
    ours, theirs = compaction.bucket_by_token(*bucket), pytorch(compaction.bucket_by_token, *bucket)
    place = torch.arange(args.vocab_size, device=embeddings.device)
    specified = (place < (embeddings != 0).sum(dim=1, keepdim=True)).view(-1)
    pairs.append(
        ((ours[0], ours[1][specified], ours[2][specified]), (theirs[0], theirs[1][specified], theirs[2][specified]))
    )
    pairs.append(((ours[1][specified].long(), ours[2][specified]), nonzero_then_sort(argmax, embeddings, edges)))
    if not all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True)):
        raise SystemExit("the compiled operators and PyTorch's disagree")


def median_seconds(
    functions: dict[str, Callable[[], Any]], rounds: int, device: str, budget: float = float("inf")
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    end = time.monotonic() + budget
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > end:
            break
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    present = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=present, help="default: a GPU where there is one")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--active", type=int, default=200, help="entries of a row")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="rounds after it are not begun")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    if not compiled.serves(torch.device(args.device)):
        not_here(f"not compiled for {args.device}: {compiled.why_not()}")

    check(args)
    seconds = median_seconds(steps(args), args.rounds, args.device, args.budget_seconds)
    rows = [
        {"operation": name, "milliseconds": 1e3 * value, "against": rival, "ratio": rival and seconds[rival] / value}
        for name, value in seconds.items()
        for rival in RIVALS.get(name, (None,))
    ]
    result: dict[str, Any] = {
        "kind": "compaction",
        "command": command("bench.compaction"),
        "case": {key: value for key, value in vars(args).items() if key not in ("output", "budget_seconds")},
        "environment": describe(),
        "rows": rows,
    }
    if args.device == "cuda":
        # Position, gradient, word and value of every active entry: what a copy would move.
        moved = args.rows * (args.vocab_size * (2 + 4) + args.active * (4 + 4))
        result["bucket_bytes_per_second"] = moved / seconds["bucket"]
        result["copy_bytes_per_second"] = copy_rate(torch.device(args.device))
    if args.output:
        write(args.output, result)
    for row in rows:
        ratio = f"{row['ratio']:8.1f}x against {row['against']}" if row["against"] else ""
        print(f"{row['operation']:<20} {row['milliseconds']:9.2f} ms {ratio}")


if __name__ == "__main__":
    main()
