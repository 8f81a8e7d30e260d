"""Every kernel against float64, each in a process of its own, up to eight side by side: is this GPU computing at all?

    python -m bench.smoke --output RESULT.json [--budget 40]
    python -m bench.smoke --only NAME          # in this process

A CUDA error stays with its process, so a kernel that faults does not take the others with it. Inputs are small
integers, whose products and sums are exact in every dtype and order: the token that attains a maximum is the same in
every precision, and gradients can be compared with float64 directly. A row says how far each result is from the
definition, in multiples of what its dtype allows, and whether a second run gave the same bits. Without a GPU the same
runs in Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import splade_kernels as sk
from bench.compaction import compare
from bench.harness.options import plain
from bench.harness.result_file import Result, reason
from bench.harness.truth import relative_distance
from bench.inputs import variants
from splade_kernels.backends import compiled
from splade_kernels.backends.triton import launch
from splade_kernels.backends.triton.max_forward import max_pool_forward
from splade_kernels.backends.triton.tuning import matmul_config

PROCESSES = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# One hidden size whose rows TMA can fetch, as those of models, and one for pointers; no tile divides the vocabulary.
# The interpreter takes a second for what a GPU does in microseconds.
HIDDEN_SIZE, ODD_HIDDEN_SIZE, VOCAB_SIZE = (768, 100, 1043) if DEVICE.type == "cuda" else (64, 36, 139)
LENGTHS = (40, 17, 0, 1)

Found = dict[str, tuple[Tensor, Tensor]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32, "tf32": torch.float32}


def draw(dtype: torch.dtype, hidden_size: int = HIDDEN_SIZE, lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    """Hidden states, weight, bias and mask; about half of the pairs are active. Padding holds NaN."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(DEVICE, dtype)

    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    hidden = whole(len(lengths), max(lengths), hidden_size)
    hidden[~mask.to(DEVICE)] = float("nan")
    weight = whole(VOCAB_SIZE, hidden_size)
    bias = whole(VOCAB_SIZE) - round(3 * hidden_size**0.5)
    return {"hidden_states": hidden, "weight": weight, "bias": bias, "attention_mask": mask.to(DEVICE)}


def widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def pooled(inputs: dict[str, Tensor], training: bool, function: Callable[..., Tensor], **options: Any) -> list[Tensor]:
    """The output, and in training the gradients of hidden states, weight and bias."""
    if not training:
        return [function(**inputs, **options)]
    leaves = [inputs[name].detach().requires_grad_() for name in ("hidden_states", "weight", "bias")]
    rest = {name: value for name, value in inputs.items() if name not in ("hidden_states", "weight", "bias")}
    output = function(*leaves, **rest, **options)
    grad = torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output).to(torch.bfloat16).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def pool(
    dtype: str, training: bool, hidden_size: int = HIDDEN_SIZE, lengths: Sequence[int] = LENGTHS, **options: Any
) -> Found:
    """``splade_pool`` against the float64 definition, twice: inference with screening keeps its quantised weight."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    inputs = draw(DTYPES[dtype], hidden_size, lengths)
    definition = {name: options[name] for name in ("pooling_strategy", "activation_function") if name in options}
    exact = pooled(widened(inputs), training, sk.reference.splade_pool, **definition)
    run = partial(pooled, inputs, training, sk.splade_pool, **{"backend": "triton", "screening": False, **options})
    return _twice(run, exact)


def persistent(dtype: str) -> Found:
    """The forward in a grid of so few programs that each walks many tiles, as one for a real vocabulary does."""
    inputs = draw(DTYPES[dtype])
    hidden, weight, bias, mask = inputs.values()
    call = variants.padded_call(mask, hidden.dtype, need_argmax=True)
    config = matmul_config(*launch.problem(call, weight))
    run = partial(max_pool_forward, call, hidden.flatten(0, 1), weight, bias)
    (output, argmax), expected = run(replace(config, programs=3)), run(config)
    exact = pooled(widened(inputs), False, sk.reference.splade_pool)
    return {"output": (output, exact[0]), **_same_bits([output, argmax], [*expected])}


def packed(dtype: str) -> Found:
    """Packed sequences give the bits of padded ones."""
    inputs = draw(DTYPES[dtype])
    padded = pooled(inputs, True, sk.splade_pool, backend="triton")
    mask = inputs.pop("attention_mask")
    inputs["hidden_states"] = inputs["hidden_states"][mask]
    edges = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    found = pooled(inputs, True, sk.splade_pool, cu_seqlens=edges, max_seqlen=max(LENGTHS), backend="triton")
    padded[1] = padded[1][mask]
    return _same_bits(found, padded)


def flops(dtype: str, threshold: int | None) -> Found:
    embeddings = pooled(draw(DTYPES[dtype]), False, sk.reference.splade_pool)[0]
    embeddings[1, 5:] = 0

    def run(tensor: Tensor) -> list[Tensor]:
        leaf = tensor.detach().requires_grad_()
        loss = sk.reference.flops_loss if tensor.dtype == torch.float64 else sk.flops_loss
        value = loss(leaf, threshold=threshold)
        return [value.detach(), *torch.autograd.grad(value, leaf)]

    return _twice(partial(run, embeddings), run(embeddings.double()))


def compacted() -> Found:
    """The compiled operators against PyTorch's, bit for bit."""
    if not compiled.serves(DEVICE):
        raise NotImplementedError(str(compiled.why_not()))
    embeddings = pooled(draw(torch.float32), False, sk.reference.splade_pool)[0]
    argmax = torch.arange(embeddings.numel(), device=DEVICE).view_as(embeddings).remainder(13).short()
    edges = torch.arange(len(embeddings) + 1, device=DEVICE) * 13
    mine, theirs = zip(*compare(embeddings, argmax, edges, 13 * len(embeddings), k=7), strict=True)
    return _same_bits([*itertools.chain(*mine)], [*itertools.chain(*theirs)])


def rival(dtype: str) -> Found:
    """The rival forward of the benchmarks (:mod:`bench.inputs.rival`) against the definition."""
    inputs = draw(DTYPES[dtype])
    exact = pooled(widened(inputs), False, sk.reference.splade_pool)
    return _twice(lambda: [variants.rival(False)(*inputs.values())], exact)


def captured(dtype: str) -> Found:
    """A CUDA graph of an inference call gives the bits of the call."""
    if DEVICE.type != "cuda":
        raise NotImplementedError("CUDA graphs need a CUDA device")
    inputs = draw(DTYPES[dtype])
    run = partial(pooled, inputs, False, sk.splade_pool, backend="triton", screening=False)
    eager = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    return _same_bits(found, eager)


def _twice(run: Callable[[], list[Tensor]], exact: list[Tensor]) -> Found:
    first, second = run(), run()
    names = ("output", "grad_hidden", "grad_weight", "grad_bias")
    found = {name: (value, truth) for name, value, truth in zip(names, first, exact, strict=False)}
    return found | {f"{name} again": (b.double(), a.double()) for name, a, b in zip(names, first, second, strict=False)}


def _same_bits(found: list[Tensor], other: list[Tensor]) -> Found:
    return {f"part {i} again": (a.double(), b.double()) for i, (a, b) in enumerate(zip(found, other, strict=True))}


def errors(found: Found) -> dict[str, float]:
    """Distance from the definition in multiples of what the dtype allows: its unit in the last place, and float32's
    arithmetic; of two results that must have the same bits, any distance is infinitely too much."""
    distances = {}
    for name, (value, exact) in found.items():
        distance = relative_distance(value, exact)
        allowed = 0.0 if name.endswith("again") else torch.finfo(value.dtype).eps + 1e-5
        distances[name] = distance / allowed if allowed else (0.0 if distance == 0 else float("inf"))
    return distances


SMOKES: dict[str, Callable[[], Found]] = {
    **{f"inference-{dtype}": partial(pool, dtype, False) for dtype in DTYPES},
    **{f"training-{dtype}": partial(pool, dtype, True) for dtype in DTYPES},
    "persistent-bf16": partial(persistent, "bf16"),
    "pointers-bf16": partial(pool, "bf16", True, ODD_HIDDEN_SIZE),
    # Two tokens a sequence win half of the vocabulary each.
    "long-runs-bf16": partial(pool, "bf16", True, lengths=(2, 1, 2)),
    "double-log-float32": partial(pool, "float32", True, activation_function="log1p_relu"),
    "screened-bf16": partial(pool, "bf16", False, screening=True),
    "screened-training-bf16": partial(pool, "bf16", True, screening=True),
    "screened-float32": partial(pool, "float32", False, screening=True),
    "sum-bf16": partial(pool, "bf16", True, pooling_strategy="sum"),
    "sum-float32": partial(pool, "float32", True, pooling_strategy="sum"),
    "torch-float32": partial(pool, "float32", True, backend="torch"),
    "packed-bf16": partial(packed, "bf16"),
    "flops-bf16": partial(flops, "bf16", None),
    "flops-threshold-float32": partial(flops, "float32", 30),
    "compaction": compacted,
    "rival-bf16": partial(rival, "bf16"),
    "graph-bf16": partial(captured, "bf16"),
}


def row(name: str) -> dict[str, Any]:
    """Run one in this process. ``status``: "passed", "wrong: …", "failed: …" or "not here: …"."""
    begin = time.monotonic()
    try:
        found = errors(SMOKES[name]())
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        wrong = {key: error for key, error in found.items() if not error <= 1}
        status = f"wrong: {wrong}" if wrong else "passed"
    except NotImplementedError as error:
        found, status = {}, f"not here: {error}"
    except Exception as error:  # whatever the device or a compiler raises is what is asked for
        found, status = {}, reason(error)
    return {"smoke": name, "status": status, "seconds": time.monotonic() - begin, "errors": found}


def run(names: Sequence[str], result: Result, seconds: float) -> None:
    """Each in a process of its own; a row is written when its process ends."""
    end = time.monotonic() + seconds

    def one(name: str) -> tuple[str | None, str]:
        """The status of a process that gave no row, or None, and its output; nothing where no time is left."""
        left = end - time.monotonic()
        if left <= 0:
            return None, ""
        command = [sys.executable, "-m", "bench.smoke", "--only", name]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=left)
        except subprocess.TimeoutExpired as late:
            return f"no answer after {seconds:.0f} s", (late.output or b"").decode(errors="replace")
        return f"failed: exit {done.returncode}", done.stdout

    with ThreadPoolExecutor(PROCESSES) as pool:
        futures = {pool.submit(one, name): name for name in names}
        for future in as_completed(futures):
            name, (status, output) = futures[future], future.result()
            if status is None:
                result.leave_out("no time", {"smoke": name})
                continue
            lines = [line for line in output.splitlines() if line.startswith('{"smoke"')]
            added = json.loads(lines[-1]) if lines else {"smoke": name, "status": status}
            result.add(added)
            print(f"{name:24} {added['status']}", flush=True)
            if not added["status"].startswith(("passed", "not here")):
                print(output, flush=True)
    result.write()


def main(options: Sequence[str] | None = None) -> None:
    parser = plain(__doc__)
    parser.add_argument("--output", type=Path, help="write the result as JSON, rewritten after every row")
    parser.add_argument("--budget", type=float, default=600.0)
    parser.add_argument("--only", choices=list(SMOKES), help="run one in this process and print its row")
    args = parser.parse_args(options)
    if args.only:
        print(json.dumps(row(args.only)))
        return
    result = Result("smoke", "bench.smoke", args.output)
    run(list(SMOKES), result, args.budget)
    bad = [one["smoke"] for one in result.rows if not one["status"].startswith(("passed", "not here"))]
    if bad or result.content["left_out"]:
        raise SystemExit(f"not passed: {bad}; left out: {result.content['left_out']}")


if __name__ == "__main__":
    main()
