"""Every kernel once on small odd shapes, under compute-sanitizer.

    python -m bench.sanitize --tool memcheck|racecheck|initcheck     # the sanitizer, running the next command
    python -m bench.sanitize                                         # the kernels alone

A GPU that does not support the sanitizer, and a machine without it, end with "not here" and exit status 77, since that
says nothing about the kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import splade_kernels as sk
from bench.harness import options
from bench.harness.environment import not_here

# (batch, length, hidden size, vocabulary): no power of two, one token, one sequence, a row stride no TMA can take.
SHAPES = ((3, 37, 40, 203), (1, 1, 33, 17), (5, 19, 72, 131))
TOOLS = ("memcheck", "racecheck", "initcheck")
ERRORS_FOUND = 9


def exercise(device: torch.device, dtype: torch.dtype) -> int:
    """Forward and backward of both poolings, padded and packed, FLOPS and sparsify, and inference with few active
    entries, which screening leaves to the exact kernel. Returns how many outputs were made."""
    count = sum(_exercise(*shape, pooling, device, dtype) for shape in SHAPES for pooling in ("max", "sum"))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


def _exercise(
    batch: int, length: int, hidden_size: int, vocab_size: int, pooling: str, device: torch.device, dtype: torch.dtype
) -> int:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    lengths = torch.randint(0, length + 1, (batch,), generator=generator)
    lengths[-1] = length
    mask = (torch.arange(length) < lengths[:, None]).to(device)
    leaves = draw(batch, length, hidden_size), draw(vocab_size, hidden_size), draw(vocab_size)
    packed = leaves[0].detach()[mask].requires_grad_()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
    screened = pooling == "max" and device.type == "cuda"  # in training, padded; packed unscreened
    outputs = [
        sk.splade_pool(*leaves, mask, pooling_strategy=pooling, screening=screened),
        sk.splade_pool(packed, *leaves[1:], cu_seqlens=cu_seqlens, max_seqlen=length, pooling_strategy=pooling),
    ]
    for output in outputs:
        sk.sparsify(output, max_active_dims=5)
        (output.float().sum() + sk.flops_loss(output, threshold=3)).backward()
    if pooling == "max":
        sparse = leaves[2].detach() - 3 * hidden_size**0.5
        for _ in range(2):  # the second one finds the weight quantised
            with torch.no_grad():
                outputs.append(sk.splade_pool(*leaves[:2], sparse, mask, screening=screened))
    return len(outputs)


def sanitize(tool: str) -> None:
    """This module under the sanitizer, its output as it comes; ends with the sanitizer's status, which is
    ``ERRORS_FOUND`` where it found something, or with 77 where it is not installed or the device refuses it."""
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    found = shutil.which("compute-sanitizer") or (str(places[-1]) if places else None)
    if found is None:
        not_here("compute-sanitizer is not installed")
    watched = [sys.executable, "-m", "bench.sanitize"]
    subprocess.run(watched, check=True)  # compiles the kernels, which takes many times as long under a sanitizer
    # PyTorch's caching allocator would place tensors side by side, where an out-of-bounds read goes unnoticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Libraries probe the driver for features; such calls fail without anything being wrong.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [found, "--tool", tool, *options, "--error-exitcode", str(ERRORS_FOUND), *watched]
    lines = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    output = "".join(lines)
    # Its own lines, not the program's.
    refused = re.search(r"^=+ .*(?:not supported|[Ff]ailed to initialize).*", output, re.MULTILINE)
    if refused and "ERROR SUMMARY" not in output:
        not_here(f"the device refuses compute-sanitizer: {refused.group()}")
    if "ERROR SUMMARY" not in output and process.returncode == 0:
        raise SystemExit(f"{tool}: expected a line with ERROR SUMMARY, found none")
    raise SystemExit(process.returncode)


def main() -> None:
    parser = options.plain(__doc__)
    parser.add_argument("--tool", choices=TOOLS)
    args = parser.parse_args()
    if args.tool:
        sanitize(args.tool)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(exercise(device, dtype), "outputs and their gradients")


if __name__ == "__main__":
    main()
