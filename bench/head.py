"""The head alone on a CPU: time and memory of one forward and backward, side by side in one run.

    python -m bench.head [--batch-size 16 --length 128 ...] [--output RESULT.json]

Stock is what sentence-transformers runs: ``nn.Linear`` to the vocabulary, then ``SpladePooling``. The bare matmul is
``h @ W.T`` of the real tokens alone, the floor of any head that computes every logit. Stock and fused are checked
against each other before anything is timed. Times are medians of interleaved runs. Extra memory is the peak resident
size of a fresh process above what it held with inputs, outputs and gradients allocated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import splade_kernels as sk
from bench.environment import describe
from bench.memory import peak, reset_peak

Step = Callable[[], tuple[Tensor, ...]]


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random normal hidden states with ragged lengths; the bias decides how many entries are active."""
    generator = torch.Generator().manual_seed(args.seed)
    hidden = torch.randn(args.batch_size, args.length, args.hidden_size, generator=generator)
    weight = torch.randn(args.vocab_size, args.hidden_size, generator=generator) / args.hidden_size**0.5
    bias = torch.full((args.vocab_size,), args.bias)
    mean = args.length * (1 - args.padding)
    spread = min(mean - 1, args.length - mean)
    lengths = torch.linspace(mean - spread, mean + spread, args.batch_size).round().long()
    mask = torch.arange(args.length) < lengths[torch.randperm(args.batch_size, generator=generator), None]
    grad = torch.randn(args.batch_size, args.vocab_size, generator=generator)
    dtype = getattr(torch, args.dtype)
    tensors = [tensor.to(dtype) for tensor in (hidden, weight, bias, grad)]
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2].requires_grad_(), mask, tensors[3]


def variants(args: argparse.Namespace) -> dict[str, tuple[Step, Step]]:
    """Name to (forward only, forward and backward)."""
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    hidden, weight, bias, mask, grad = inputs(args)
    packed = hidden.detach()[mask]
    stock_pooling = SpladePooling()

    def stock_forward() -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        features = stock_pooling({"token_embeddings": logits, "attention_mask": mask.long()})
        pooled: Tensor = features["sentence_embedding"]
        return pooled

    def fused_forward() -> Tensor:
        return sk.splade_pool(hidden, weight, bias, mask)

    def pair(forward: Callable[[], Tensor], module: torch.nn.Module | None = None) -> tuple[Step, Step]:
        def inference() -> tuple[Tensor, ...]:
            if module is not None:
                module.eval()
            with torch.no_grad():
                return (forward(),)

        def training() -> tuple[Tensor, ...]:
            if module is not None:
                module.train()
            output = forward()
            return output.detach(), *torch.autograd.grad(output, (hidden, weight, bias), grad)

        return inference, training

    def matmul() -> tuple[Tensor, ...]:
        return (packed @ weight.detach().t(),)

    return {"stock": pair(stock_forward, stock_pooling), "fused": pair(fused_forward), "matmul": (matmul, matmul)}


def check(steps: dict[str, tuple[Step, Step]]) -> dict[str, float]:
    """Largest difference of outputs and gradients between stock and fused, relative to the largest stock value."""
    names = ("output", "grad_hidden", "grad_weight", "grad_bias")
    errors = {}
    for name, ours, theirs in zip(names, steps["fused"][1](), steps["stock"][1](), strict=True):
        errors[name] = ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()
    bound = 1e-4 if steps["stock"][1]()[0].dtype == torch.float32 else 5e-2
    if not all(error <= bound for error in errors.values()):
        raise SystemExit(f"stock and fused disagree beyond {bound}: {errors}")
    return errors


def time_interleaved(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _peak(name: str, training: bool, args: argparse.Namespace, results: Any) -> None:
    step = variants(args)[name][training]
    small = argparse.Namespace(**{**vars(args), "batch_size": 2, "length": 16, "vocab_size": 512})
    variants(small)[name][training]()  # libraries and their pools, once
    before = reset_peak()
    kept = sum(tensor.numel() * tensor.element_size() for tensor in step())
    results.put(peak() - before - kept)


def extra_memory(name: str, training: bool, args: argparse.Namespace) -> int:
    """Bytes above inputs, outputs and gradients, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_peak, args=(name, training, args, results))
    process.start()
    peak: int = results.get()
    process.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--padding", type=float, default=1 / 3, help="share of the tokens that is padding")
    parser.add_argument("--bias", type=float, default=0.0, help="lower it for fewer active entries")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()

    steps = variants(args)
    result: dict[str, Any] = {
        "case": {key: value for key, value in vars(args).items() if key != "output"},
        "environment": describe(),
        "relative_error": check(steps),
        "active_share": (steps["fused"][0]()[0] > 0).float().mean().item(),
        "forward_seconds": time_interleaved({name: pair[0] for name, pair in steps.items()}, args.rounds),
        "forward_backward_seconds": time_interleaved({name: pair[1] for name, pair in steps.items()}, args.rounds),
    }
    for key, training in (("forward_extra_bytes", False), ("forward_backward_extra_bytes", True)):
        result[key] = {name: extra_memory(name, training, args) for name in ("stock", "fused")}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")

    print(f"active entries {result['active_share']:.1%}, relative error {result['relative_error']}")
    for key in ("forward", "forward_backward"):
        seconds, extra = result[f"{key}_seconds"], result[f"{key}_extra_bytes"]
        print(
            f"{key}: stock {seconds['stock']:.3f} s, fused {seconds['fused']:.3f} s, matmul {seconds['matmul']:.3f} s; "
            f"{seconds['stock'] / seconds['fused']:.2f}x faster than stock, "
            f"{seconds['fused'] / seconds['matmul']:.2f}x the bare matmul; extra memory "
            f"{extra['stock'] / 2**20:.0f} MiB stock, {extra['fused'] / 2**20:.0f} MiB fused"
        )


if __name__ == "__main__":
    main()
