"""One training step of a language model with a SPLADE head: its loss, its peak memory and its time.

The step is a forward and a backward of a loss as SPLADE models are trained with: in-batch dot products and FLOPS. Of
the three heads, ``none`` is no head: the loss is of the mean hidden state that the decoder would have got. ``stock``
computes the logits and pools them by sentence-transformers' ``SpladePooling``. ``fused`` is :class:`SpladeEncoder`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import memory
from bench.harness.timing import Sampler, interleave
from bench.inputs import language_models
from bench.inputs.language_models import Shape
from splade_kernels.memory_terms import Setup, Terms, step_terms

HEADS = ("none", "fused", "stock")
FLOPS_WEIGHT = 3e-5
# Tokens a text, at most, of the step before the measured one. In it libraries start their threads and allocate their
# workspaces, about 30 MiB on a CPU.
WARM_UP_LENGTH = 512
WATCH_SECONDS = 0.02
OVER_BUDGET = "over the budget"
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Job:
    """One measurement. ``budget``: bytes that the process may hold (on a GPU: that PyTorch may allocate)."""

    shape: Shape
    head: str
    checkpointing: bool = False
    optimizer: bool = False
    training: bool = True
    steps: int = 0
    device: str = "cpu"
    budget: float | None = None


# Measurements that the formula of splade_kernels.memory_terms is held against: short texts in large batches, long ones
# in small batches, all kinds of layers, both heads, with and without checkpointing, optimizer, padding and dropout, and
# inference.
FORMULA_CASES = (
    Job(Shape("bert", 4, 256, 1024, 4, 30522, 16, 64, dropout=0.0), "stock"),
    Job(Shape("bert", 4, 256, 1024, 4, 30522, 32, 128, dropout=0.0), "fused", optimizer=True),
    Job(Shape("bert", 6, 768, 3072, 12, 30522, 8, 64, dropout=0.0), "fused", optimizer=True),
    Job(Shape("bert", 6, 128, 512, 2, 5000, 8, 512, padded=True), "fused", checkpointing=True),
    Job(Shape("bert", 2, 128, 512, 4, 5000, 4, 512, attention="eager"), "fused"),
    Job(Shape("distilbert", 4, 256, 1024, 4, 30522, 64, 64), "fused", optimizer=True),
    Job(Shape("distilbert", 4, 256, 1024, 4, 30522, 64, 32), "stock", checkpointing=True),
    Job(Shape("distilbert", 4, 256, 1024, 4, 30522, 1, 512, dropout=0.0), "fused"),
    Job(Shape("modernbert", 6, 128, 256, 2, 5000, 32, 128, padded=True), "fused", optimizer=True),
    Job(Shape("modernbert", 6, 128, 256, 2, 5000, 32, 128), "stock"),
    Job(Shape("modernbert", 2, 256, 384, 4, 50368, 2, 2048), "fused", checkpointing=True),
    Job(Shape("modernbert", 2, 256, 384, 4, 50368, 1, 2048), "stock", checkpointing=True),
    Job(Shape("llama", 4, 256, 768, 4, 32000, 16, 256, padded=True), "fused"),
    Job(Shape("llama", 4, 256, 768, 4, 32000, 2, 1024), "fused", checkpointing=True, optimizer=True),
    Job(Shape("llama", 4, 256, 768, 4, 32000, 16, 128), "stock", checkpointing=True),
    Job(Shape("bert", 2, 256, 1024, 4, 30522, 32, 128), "fused", training=False),
    Job(Shape("bert", 2, 256, 1024, 4, 30522, 16, 128), "stock", training=False),
    Job(Shape("modernbert", 2, 256, 384, 4, 50368, 2, 2048), "fused", training=False),
)


def estimated(job: Job) -> Terms:
    """What the formula says of a job."""
    shape = job.shape
    setup = Setup(
        training=job.training,
        optimizer="adamw" if job.optimizer else None,
        attention=shape.attention or "sdpa",
        padded=shape.padded,
        device=job.device,
    )
    sizes = language_models.config(shape)
    return step_terms(sizes, shape.batch_size, shape.length, job.head, setup, checkpointing=job.checkpointing)


def measure(job: Job) -> dict[str, Any]:
    """Loss, peak and times of a job; for a fresh process.

    Returns:
        ``peak_bytes``: the largest amount of memory of a step above what was held before it, which is ``held_bytes``:
        parameters and, after a step of it, the optimizer's state. ``loss`` of that step. ``samples``: seconds of the
        ``steps`` further ones, and ``others``, as in :mod:`bench.harness.timing`.
    """
    device = torch.device(job.device)
    with _limited(job.budget, device):
        with memory.unpooled():
            step, batch, found = _prepare(job, device)
            found["samples"] = []
        if job.steps:
            sampler = Sampler([lambda: step(batch)], device, captured=False)
            timed = interleave({job.head: sampler}, 0, (job.steps, job.steps))[job.head]
            found |= {"samples": timed.samples, "median": timed.median, "clock": timed.clock, "others": timed.others}
    return found


def _prepare(
    job: Job, device: torch.device
) -> tuple[Callable[[dict[str, Tensor]], float], dict[str, Tensor], dict[str, Any]]:
    """The step, what to call it with, and what its first call shows: loss and memory."""
    cuda = device.type == "cuda"
    model = language_models.model(job.shape).to(device).train(job.training)
    if job.checkpointing:
        model.activation_checkpointing_enable()
    embed, regularise = _embedder(model, job.head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if job.optimizer else None

    def step(batch: dict[str, Tensor]) -> float:
        if not job.training:
            with torch.inference_mode():
                return float(embed(batch).mean())
        embeddings = embed(batch)
        loss = _loss(embeddings, regularise)
        del embeddings
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    short = replace(job.shape, length=min(WARM_UP_LENGTH, job.shape.length))
    step(language_models.batch(short, device))
    batch = language_models.batch(job.shape, device)
    states = [value for state in (optimizer.state.values() if optimizer else ()) for value in state.values()]
    held = memory.size_of((*model.parameters(), *model.buffers(), *states))
    memory.release() if cuda else memory.return_free_memory()
    before = memory.reset_peak(cuda)
    loss = step(batch)
    return step, batch, {"loss": loss, "peak_bytes": memory.peak(cuda) - before, "held_bytes": held}


def run(job: Job) -> dict[str, Any]:
    """:func:`measure` in a process of its own; where it passed the budget, ``status`` says so and nothing else is
    known."""
    try:
        return {"status": "ok", **memory.in_a_process(measure, job)}
    except (BrokenProcessPool, torch.cuda.OutOfMemoryError):
        if job.budget is None:
            raise
        return {"status": OVER_BUDGET}


def _embedder(model: Any, head: str) -> tuple[Callable[[dict[str, Tensor]], Tensor], Callable[[Tensor], Tensor]]:
    """From a batch to ``[B, V]`` embeddings, or the mean hidden state ``[B, D]``; and what regularises them."""
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    from splade_kernels import FlopsLoss
    from splade_kernels.integrations.transformers import SpladeEncoder

    def stock_flops(embeddings: Tensor) -> Tensor:  # as in sentence-transformers' FlopsLoss
        return embeddings.mean(dim=0).square().sum()

    causal = {"use_cache": False} if type(model).__name__.endswith("ForCausalLM") else {}
    if head == "fused":
        encoder = SpladeEncoder(model)
        return lambda batch: encoder(**batch), FlopsLoss()
    if head == "stock":
        pooling = SpladePooling("max").train(model.training)

        def pool(batch: dict[str, Tensor]) -> Tensor:
            features = {"token_embeddings": model(**batch, **causal).logits, "attention_mask": batch["attention_mask"]}
            embeddings: Tensor = pooling(features)["sentence_embedding"]
            return embeddings

        return pool, stock_flops
    decoder = model.get_output_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is decoder]
    model.set_submodule(name, nn.Identity())

    def mean(batch: dict[str, Tensor]) -> Tensor:
        hidden: Tensor = model(**batch, **causal).logits
        return hidden.mean(dim=1)

    return mean, stock_flops


def _loss(embeddings: Tensor, regularise: Callable[[Tensor], Tensor]) -> Tensor:
    """Every text's own embedding is the relevant one; the others of the batch are not."""
    scores = embeddings @ embeddings.t() / embeddings.shape[1] ** 0.5
    target = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, target) + FLOPS_WEIGHT * regularise(embeddings)


@contextmanager
def _limited(budget: float | None, device: torch.device) -> Iterator[None]:
    """End this process once it holds more than ``budget`` bytes; on a GPU, let PyTorch's allocator refuse them.

    A thread looks at the resident memory every ``WATCH_SECONDS``: a limit on addresses (``RLIMIT_AS``) would count what
    libraries reserve and never touch.
    """
    if budget is None:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.get_device_properties(0).total_memory)
        yield
        return
    finished = threading.Event()

    def watch() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not finished.wait(WATCH_SECONDS):
            if int(_STATM.read_text().split()[1]) * page > budget:
                os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
