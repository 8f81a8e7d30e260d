"""One training run through ``SparseEncoderTrainer``, stock or fused, and what its steps cost.

The user's configuration: ``SpladeLoss`` around ``SparseMultipleNegativesRankingLoss``, AdamW, bf16 autocast, batches
without duplicates. Everything is the trainer's default unless a :class:`Job` says otherwise.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sparse_encoder import losses
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback

from bench.harness import memory
from bench.inputs import encoders
from bench.inputs.cases import GOOAQ_LENGTHS
from examples.demo.training import RecordingTrainer
from splade_kernels.integrations.sentence_transformers import FlopsLoss, fuse

LEARNING_RATE = 2e-5
QUERY_WEIGHT, DOCUMENT_WEIGHT = 5e-5, 3e-5
SEED = 42
# Kernels of one stream run one after the other, so a sum above the wall clock has counted something twice.
_CLOCK_TOLERANCE = 1.05


@dataclass(frozen=True)
class Job:
    """One run. ``active_terms``: see :func:`.encoders.load`; ``folder`` holds what :func:`.encoders.build` wrote."""

    folder: str
    head: str
    batch_size: int
    max_length: int
    lengths: str
    precision: str
    device: str
    active_terms: int | None = None
    gradient_checkpointing: bool = False
    warm_up_steps: int = 3
    timed_steps: int = 10
    profiled_steps: int = 3

    @property
    def steps(self) -> int:
        return self.warm_up_steps + self.timed_steps + self.profiled_steps


def load(job: Job) -> SparseEncoder:
    model = encoders.load(job.folder, job.max_length, job.device, job.active_terms)
    return fuse(model) if job.head == "fused" else model


def train(model: SparseEncoder, dataset: Dataset, job: Job, steps: int, *callbacks: TrainerCallback) -> Any:
    """Train ``model`` in place for ``steps`` steps; returns the trainer with its arguments and ``step_losses``."""
    on_device = job.device == "cuda"
    flops = FlopsLoss if job.head == "fused" else losses.FlopsLoss
    loss = losses.SpladeLoss(
        model,
        loss=losses.SparseMultipleNegativesRankingLoss(model),
        query_regularizer_weight=QUERY_WEIGHT,
        document_regularizer_weight=DOCUMENT_WEIGHT,
        query_regularizer=flops(model),
        document_regularizer=flops(model),
    )
    # Passed only where it is wanted, because transformers warns of the option.
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if job.gradient_checkpointing else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = SparseEncoderTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=job.batch_size,
            learning_rate=LEARNING_RATE,
            bf16=job.precision == "bf16",
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            seed=SEED,
            use_cpu=not on_device,
            dataloader_pin_memory=on_device,
            logging_steps=steps + 1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **checkpointing,
        )
        schedule = SpladeRegularizerWeightSchedulerCallback(loss)
        trainer = RecordingTrainer(
            model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[schedule, *callbacks]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def named(model: SparseEncoder, trainer: Any) -> dict[str, str]:
    """Choices of the libraries that the memory depends on."""
    inner: Any = model.transformers_model
    return {
        "attention": str(inner.config._attn_implementation),
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
    }


def step_losses(job: Job) -> list[float]:
    """Loss of every one of ``job.steps`` steps."""
    model = load(job)
    found = [loss.item() for loss in train(model, _dataset(model, job), job, job.steps).step_losses]
    del model
    memory.release()
    return found


def measure(job: Job) -> dict[str, Any]:
    """What the timed steps of a training of ``job.steps`` steps cost; running out of memory is a result, too."""
    row = asdict(job)
    del row["folder"]
    row |= {"pairs_per_batch": row.pop("batch_size"), "out_of_memory": True}
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        row |= _measure(job)
    # Not in a handler: there, the exception's frames still hold what the run allocated.
    memory.release()
    return row


def _measure(job: Job) -> dict[str, Any]:
    model = load(job)
    dataset = _dataset(model, job)
    tokens = [_tokens(model, dataset[name], job.batch_size) for name in GOOAQ_LENGTHS]
    active = {name: encoders.mean_active_terms(model, dataset[name]) for name in GOOAQ_LENGTHS}
    meter = StepMeter(job)
    trainer = train(model, dataset, job, job.steps, meter)
    return {
        **named(model, trainer),
        "out_of_memory": False,
        "wall_ms_per_step": round(statistics.median(meter.milliseconds()), 3),
        "wall_ms_of_every_step": [round(value, 3) for value in meter.milliseconds()],
        "gpu_ms_per_step": meter.device_milliseconds,
        "profiler_problem": meter.profiler_problem,
        "cpu_ms_per_step": None if meter.on_device else round(statistics.median(meter.processor_milliseconds()), 3),
        "peak_memory_mib": meter.peak_bytes / 2**20,
        "real_tokens_per_step": sum(real for real, _ in tokens),
        "padded_tokens_per_step": sum(padded for _, padded in tokens),
        "active_terms_before": active,
        "active_terms_after": {name: encoders.mean_active_terms(model, dataset[name]) for name in active},
    }


def _dataset(model: SparseEncoder, job: Job) -> Dataset:
    return encoders.pairs(job.steps * job.batch_size, job.lengths, job.max_length, len(model.tokenizer))


def _tokens(model: SparseEncoder, texts: list[str], batch_size: int) -> tuple[float, float]:
    """Real and padded tokens of an average batch, each padded to its longest text."""
    lengths = torch.tensor([len(ids) for ids in model.tokenizer(list(texts))["input_ids"]]).view(-1, batch_size)
    return lengths.sum(dim=1).float().mean().item(), (lengths.amax(dim=1) * batch_size).float().mean().item()


class StepMeter(TrainerCallback):
    """Warm-up steps, then timed steps, then steps under the profiler.

    On a GPU a step's time is the distance of two events recorded at the ends of steps. It includes time in which the
    device waits for the host, and measuring adds no synchronisation.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.on_device = job.device == "cuda"
        self.device_milliseconds: float | None = None
        self.profiler_problem: str | None = None
        self.peak_bytes = 0
        self._marks: list[Any] = []
        self._processor: list[float] = []
        self._profiler: profile | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done, job = state.global_step, self.job
        if done == job.warm_up_steps:
            self._synchronize()
            memory.reset_peak(self.on_device)
        if job.warm_up_steps <= done <= job.warm_up_steps + job.timed_steps:
            self._marks.append(torch.cuda.Event(enable_timing=True) if self.on_device else time.perf_counter())
            if self.on_device:
                self._marks[-1].record()
            self._processor.append(time.process_time())
        if done == job.warm_up_steps + job.timed_steps:
            self._synchronize()
            self.peak_bytes = memory.peak(self.on_device)
            if self.on_device and job.profiled_steps:
                self._profiler = profile(activities=[ProfilerActivity.CUDA])
                self._profiler.start()
                self._began = time.perf_counter()
        if done == job.steps and self._profiler is not None:
            self._synchronize()
            wall = 1e3 * (time.perf_counter() - self._began)
            self._profiler.stop()
            try:
                self.device_milliseconds = kernel_milliseconds(self._profiler.events(), wall) / job.profiled_steps
            except RuntimeError as error:  # the other figures of the run stand
                self.profiler_problem = str(error)

    def milliseconds(self) -> list[float]:
        pairs = itertools.pairwise(self._marks)
        return [start.elapsed_time(end) if self.on_device else 1e3 * (end - start) for start, end in pairs]

    def processor_milliseconds(self) -> list[float]:
        """Processor time of this process, all threads, which other programs do not stretch."""
        return [1e3 * (end - start) for start, end in itertools.pairwise(self._processor)]

    def _synchronize(self) -> None:
        if self.on_device:
            torch.cuda.synchronize()


def kernel_milliseconds(events: Any, wall_milliseconds: float) -> float:
    """Sum of the time of everything that ran on the device: kernels, copies, fills. Nothing, or more than fits the wall
    clock, is a ``RuntimeError``."""
    ran = [event for event in events if event.device_type.name != "CPU" and not event.is_user_annotation]
    total = sum(float(event.time_range.elapsed_us()) for event in ran) / 1e3
    if not 0 < total <= _CLOCK_TOLERANCE * wall_milliseconds:
        raise RuntimeError(
            f"profiler: expected between 0 and {wall_milliseconds:.1f} ms of device time, got {total:.1f} ms from "
            f"{len(ran)} events"
        )
    return total
