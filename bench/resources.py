"""Compile every kernel in the default and all shipped configurations, without a GPU, and report what became of it.

    python -m bench.resources [--output RESULT.json] [--arch 86 --arch 90]

Registers a thread, spilled bytes (stack), shared memory, and the tensor-core, asynchronous-copy, atomic and store
instructions found in the machine code. It does not work in a process that has ``TRITON_INTERPRET`` set.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from bench.harness.options import plain
from bench.harness.result_file import write_text
from bench.jobs.compiled import Row, measure
from bench.jobs.kernels import cases
from splade_kernels.backends.triton.tuning import ARCHITECTURES


def report(architectures: tuple[int, ...] = ARCHITECTURES, processes: int | None = None) -> Iterator[Row]:
    """One row for every kernel, shipped configuration and architecture."""
    with ProcessPoolExecutor(processes) as pool:
        # Kernels do not pickle: a case travels as its number.
        numbers = [(arch, number) for arch in architectures for number, _ in enumerate(cases(arch))]
        yield from pool.map(_compile_numbered, *zip(*numbers, strict=True))


def _compile_numbered(arch: int, number: int) -> Row:
    return measure(next(itertools.islice(cases(arch), number, None)))


def main() -> None:
    parser = plain(__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--output", type=Path, help="write the rows as a list")
    args = parser.parse_args()
    rows = list(report(tuple(args.arch or ARCHITECTURES)))
    for row in rows:
        config = " ".join(f"{name.lower()}={value}" for name, value in row.config.items())
        instructions = " ".join(f"{name}:{count}" for name, count in row.instructions.items())
        print(
            f"{row.kernel:28} sm_{row.arch:<4}{row.dtype:9} {row.registers:4} registers {row.spill_bytes:4} spilled "
            f"{row.shared_bytes:7} shared  {instructions:40} {config}"
        )
    if args.output:
        keys = ("kernel", "arch", "dtype", "config", "registers", "spill_bytes", "shared_bytes", "instructions")
        lines = [json.dumps({key: getattr(row, key) for key in keys}) for row in rows]
        write_text(args.output, "[\n" + ",\n".join(lines) + "\n]\n")
    problems = [f"{row.kernel} sm_{row.arch} {row.dtype}: {problem}" for row in rows for problem in row.problems()]
    print(f"{len(rows)} compiled with torch {torch.__version__}, triton {triton.__version__}; {len(problems)} problems")
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
