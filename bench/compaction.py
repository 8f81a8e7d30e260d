"""The compaction operators against PyTorch's: ``to_sparse_csr``, ``topk``, ``sort``.

    python -m bench.compaction [--device cpu|cuda] [--rows 1024 --vocab-size 30522 --active 200] [--output RESULT.json]

Compiled and PyTorch's results are compared bit for bit before anything is timed. Times are medians of interleaved
rounds. ``read`` is the sum of the embeddings: their one trip through memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import options, timing
from bench.harness.environment import not_here
from bench.harness.result_file import Result
from splade_kernels.backends import compaction, compiled

Tensors = tuple[Tensor, ...]
# Embeddings [B, V], the winning token of each entry, where the tokens of each sequence begin, and how many there are.
Inputs = tuple[Tensor, Tensor, Tensor, int]
# What the compiled operators are compared with. The sort of all keys is what the sparse backward does without them.
RIVALS = {"sparsify": ("to_sparse_csr",), "sparsify_k": ("topk",), "bucket": ("bucket_sort", "bucket_nonzero_sort")}
KEY = ("operation", "against", "case")


def inputs(args: argparse.Namespace) -> Inputs:
    """``active`` entries a row, whose winners are spread over ``length`` tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.rows, args.vocab_size)
    embeddings = torch.zeros(shape)
    for row in embeddings:
        ids = torch.randperm(args.vocab_size, generator=generator)[: args.active]
        row[ids] = torch.rand(len(ids), generator=generator) + 0.1
    argmax = torch.randint(0, args.length, shape, generator=generator, dtype=torch.int16)
    edges = torch.arange(args.rows + 1) * args.length
    return embeddings.to(args.device), argmax.to(args.device), edges.to(args.device), args.rows * args.length


def nonzero_then_sort(argmax: Tensor, grad: Tensor, edges: Tensor) -> Tensors:
    """Vocabulary ids and values by token, on a device whose host may wait to count the active entries first."""
    entries = (grad != 0).view(-1).nonzero().squeeze(1)
    sequence = entries.div(grad.shape[1], rounding_mode="floor")
    _, order = torch.sort(edges[sequence] + argmax.view(-1)[entries], stable=True)
    return entries.remainder(grad.shape[1])[order], grad.view(-1)[entries[order]]


def steps(embeddings: Tensor, argmax: Tensor, edges: Tensor, tokens: int, k: int) -> dict[str, Callable[[], Any]]:
    bucket = (argmax, embeddings, edges, tokens)
    return {
        "read": lambda: embeddings.sum(),
        "sparsify": lambda: compaction.sparsify(embeddings, None),
        "to_sparse_csr": lambda: embeddings.to_sparse_csr(),
        "sparsify_k": lambda: compaction.sparsify(embeddings, k),
        "topk": lambda: embeddings.topk(k, dim=1),
        "sparsify_k_pytorch": lambda: compaction.sparsify_in_pytorch(embeddings, k),
        "bucket": lambda: compaction.bucket_by_token(*bucket),
        "bucket_sort": lambda: compaction.bucket_in_pytorch(*bucket),
        "bucket_nonzero_sort": lambda: nonzero_then_sort(argmax, embeddings, edges),
    }


def compare(embeddings: Tensor, argmax: Tensor, edges: Tensor, tokens: int, k: int) -> list[tuple[Tensors, Tensors]]:
    """What is specified of the results of the compiled operators, and PyTorch's."""
    csr = embeddings.to_sparse_csr()
    place = torch.arange(embeddings.shape[1], device=embeddings.device)
    specified = (place < (embeddings != 0).sum(dim=1, keepdim=True)).view(-1)
    ours, theirs = (
        (bounds, ids[specified], values[specified])
        for bounds, ids, values in (
            function(argmax, embeddings, edges, tokens)
            for function in (compaction.bucket_by_token, compaction.bucket_in_pytorch)
        )
    )
    return [
        (compaction.sparsify(embeddings, None), (csr.crow_indices(), csr.col_indices(), csr.values())),
        (compaction.sparsify(embeddings, k), compaction.sparsify_in_pytorch(embeddings, k)),
        (ours, theirs),
        ((ours[1].long(), ours[2]), nonzero_then_sort(argmax, embeddings, edges)),
    ]


def main() -> None:
    parser = options.parser(__doc__, seconds=2.0)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--active", type=int, default=200, help="entries of a row")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--k", type=int, default=64)
    args = parser.parse_args()
    device = torch.device(args.device)
    if not compiled.serves(device):
        not_here(f"not compiled for {args.device}: {compiled.why_not()}")

    made = inputs(args)
    if not all(torch.equal(a, b) for pair in compare(*made, args.k) for a, b in zip(*pair, strict=True)):
        raise SystemExit("the compiled operators and PyTorch's disagree")
    case = f"B{args.rows} V{args.vocab_size} active {args.active} S{args.length} k{args.k}"
    result = Result("compaction", "bench.compaction", args.output, append=args.append, key=KEY)
    samplers = {name: timing.Sampler([step], device, captured=False) for name, step in steps(*made, args.k).items()}
    timed = timing.interleave(samplers, min(args.seconds, args.budget))
    seconds = {name: found.median for name, found in timed.items()}
    if args.device == "cuda":
        # Position, gradient, vocabulary id and value of every active entry: what a copy would move.
        moved = args.rows * (args.vocab_size * (2 + 4) + args.active * (4 + 4))
        result.run |= {"bucket_bytes_per_second": moved / seconds["bucket"]}
        result.run |= {"copy_bytes_per_second": timing.copy_rate(device)}
    for name, value in seconds.items():
        for rival in RIVALS.get(name, (None,)):
            ratio = rival and seconds[rival] / value
            row = {"case": case, "operation": name, "milliseconds": 1e3 * value, "against": rival, "ratio": ratio}
            result.add(row)
            print(f"{name:<20} {1e3 * value:9.2f} ms" + (f" {ratio:8.1f}x against {rival}" if ratio else ""))


if __name__ == "__main__":
    main()
