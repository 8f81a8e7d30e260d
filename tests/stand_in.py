"""A CPU that stands in for a GPU: runs a command of bench on tiny shapes.

    TRITON_INTERPRET=1 python -m tests.stand_in -m bench.measure head --case dev ...

The commands, their options and what they write are those of :mod:`bench.gpu`; what is measured means nothing.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import time
from dataclasses import replace
from functools import partial

import torch

# Sizes on the command line, and what is appended to it.
SMALLER = {
    "--rows=420": "--rows=4",
    "--vocab-size=250002": "--vocab-size=97",
    "--active=250002": "--active=97",
    "768x30522": "32x40",
    "768x250002": "32x72",
    "1024x151936": "48x80",
}
MORE = {
    "bench.training": "--layers 1 --hidden-size 64 --vocab-size 300 --batch-size 2 --max-length 16 --timed-steps 1",
    "bench.numerics": "--batch-size 2 --vocab-size 64",
    "bench.compaction": "--length 8 --seconds 0",
    "bench.short_sequences": "--batch-size 2 --hidden-size 32 --vocab-size 64 --seconds 0",
}


def shrink() -> None:
    """Shapes, rounds and rates; memory is not weighed, which would take a process each."""
    from bench.harness import timing
    from bench.harness.steps import unweighed
    from bench.inputs import cases
    from bench.jobs import operators as jobs

    for table in (cases.CASES, cases.SCREENING):
        for name, case in table.items():
            smaller = {"batch_size": 2, "length": min(12, case.length), "hidden_size": 32, "vocab_size": 72}
            table[name] = replace(case, **smaller, on_cpu=None)
    timing.copy_rate = partial(timing.copy_rate, size=1 << 16)
    timing.matmul_rate = partial(timing.matmul_rate, size=64)
    timing.interleave = partial(timing.interleave, rounds=(2, 2))
    jobs.weigher = lambda *arguments: unweighed
    flops = jobs.flops
    jobs.flops = lambda shape, *arguments: flops((8, 64), *arguments)


def tune(tune: object) -> None:
    """Candidates run in the interpreter, in this process; times are the host's."""
    from bench.harness import result_file
    from splade_kernels.backends.triton.tuning import MatmulConfig

    first = MatmulConfig(32, 32, 16, 4, 1)

    def milliseconds(run, config, flush) -> float:
        begin = time.perf_counter()
        run(config)
        return 1e3 * (time.perf_counter() - begin)

    vars(tune).update(
        _architecture=lambda: 86,
        _milliseconds=milliseconds,
        _FLUSH_BYTES=1,
        CHECKED_LOAD=tune.Load(2, 10),
        FORWARD_LOADS={"2 x 12": tune.Load(2, 12)},
        ROUNDS=((2, 2), (3, 1)),
        shipped=lambda question: first,
        candidates=lambda question: [first, replace(first, block_v=16), replace(first, block_t=64)],
        verdict=lambda question, config, device: [],
        refinements=lambda best, kind: [best],
        side_by_side=lambda work, tasks: [work(*task) for task in tasks],
        measure=lambda question, device, keep, measure=tune.measure: measure(question, "cpu", keep),
    )
    torch.cuda.is_available = lambda: True
    result_file.describe = lambda: {"device": "stand-in", "gpu": True, "arch": 86}


def limits(limits: object) -> None:
    small = replace(limits.encoders.SIZES["distilbert"], layers=1, hidden_size=64, vocab_size=300)
    limits.encoders.SIZES["distilbert"] = small
    limits.hold_memory = lambda: 0.3
    limits.search = lambda job, resolution, may_go_on: {"attention": "sdpa", "optimizer": "adamw", "largest_pairs": 8}


def training(training: object) -> None:
    """All in this process."""
    training._run = lambda work, job: work(job)


def smoke(smoke: object) -> None:
    """Three, one of them not to be had on a CPU."""
    smoke.SMOKES = {name: smoke.SMOKES[name] for name in ("inference-bf16", "flops-bf16", "graph-bf16")}


def main() -> None:
    words = [SMALLER.get(word, word) for word in sys.argv[1:]]
    if words[0] != "-m":
        print("nothing to build for a stand-in")
        return
    name, options = words[1], [*words[2:], *MORE.get(words[1], "").split()]
    sys.argv = [name, *options]
    if not name.startswith("bench."):
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    shrink()
    module = importlib.import_module(name)
    patch = globals().get(name.removeprefix("bench."))
    if patch is not None:
        patch(module)
    module.main()


if __name__ == "__main__":
    main()
