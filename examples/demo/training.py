"""One training run in a process of its own, so that its time and its peak memory are its alone.

``python -m examples.demo.training job.json`` loads the same start and the same pairs as its sibling, trains with the
stock or the fused head, and writes every step's loss and seconds. A run that stops early follows the schedule of the
full one: its steps are the full run's first steps.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import FlopsLoss as StockFlopsLoss
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.sparse_encoder.trainer import SparseEncoderTrainer
from sentence_transformers.sparse_encoder.training_args import SparseEncoderTrainingArguments
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from examples.demo.memory import PeakMemory
from splade_kernels.integrations.sentence_transformers import FlopsLoss, fuse

__all__ = ["TrainingJob", "train"]

# Short, so that most of the steps that stock and fused share move the weights at the full learning rate.
WARM_UP_STEPS = 5
LOGGED_STEPS = 5


@dataclass(frozen=True)
class TrainingJob:
    """One run. ``steps`` of the ``schedule_steps`` are trained; ``shared_steps`` are those that both runs do."""

    head: str
    start: str
    pairs: str
    steps: int
    shared_steps: int
    schedule_steps: int
    batch_size: int
    learning_rate: float
    query_regularizer_weight: float
    document_regularizer_weight: float
    seed: int
    device: str
    bf16: bool
    record: str
    save: str | None = None


class Stopwatch(TrainerCallback):
    """Seconds of every whole step (data, forward, backward, optimizer) and the peak memory of the shared ones.

    ``others`` holds how many processors the rest of the machine kept busy in each step: on a CPU, steps taken beside
    other work are not worth comparing.

    Memory counts from the end of the first step on: by then the optimizer's state exists and the libraries have loaded
    what they load late, so the peak is what a step needs for itself.
    """

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.seconds: list[float] = []
        self.others: list[float] = []
        self.peak_mib = 0.0
        self._process = psutil.Process()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last, self._last_cpu = self._now(), self._cpu_seconds()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = self._now() - self._last
        everybody, own = (now - before for now, before in zip(self._cpu_seconds(), self._last_cpu, strict=True))
        self.seconds.append(seconds)
        self.others.append(max(0.0, everybody - own) / seconds)
        if state.global_step == 1:
            self._memory = PeakMemory(torch.device(self.job.device))
        if state.global_step == self.job.shared_steps:
            self.peak_mib = self._memory.mib()
        if state.global_step == self.job.steps:
            control.should_training_stop = True
        self._last, self._last_cpu = self._now(), self._cpu_seconds()

    def _cpu_seconds(self) -> tuple[float, float]:
        """Processor seconds so far: of everybody on the machine, and of this process."""
        times, own = psutil.cpu_times(), self._process.cpu_times()
        return times.user + times.system, own.user + own.system

    def _now(self) -> float:
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class LossBar(ProgressCallback):
    """The trainer's progress bar over the steps of this run, with the loss beside it instead of log lines."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.reset(total=self._steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


class RecordingTrainer(SparseEncoderTrainer):
    """Keeps every step's loss at full precision; the trainer's own log averages and rounds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_losses: list[torch.Tensor] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.step_losses.append(loss.detach())
        return loss


def train(job: TrainingJob) -> dict[str, Any]:
    """Trains as ``job`` says; returns losses, seconds and peak memory."""
    model = SparseEncoder(job.start, device=job.device)
    regularizer = StockFlopsLoss
    if job.head == "fused":
        fuse(model)
        regularizer = FlopsLoss
    loss = SpladeLoss(
        model,
        loss=SparseMultipleNegativesRankingLoss(model),
        query_regularizer_weight=job.query_regularizer_weight,
        document_regularizer_weight=job.document_regularizer_weight,
        query_regularizer=regularizer(model),
        document_regularizer=regularizer(model),
    )
    stopwatch = Stopwatch(job)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RecordingTrainer(
            model=model,
            args=SparseEncoderTrainingArguments(
                output_dir=folder,
                max_steps=job.schedule_steps,
                per_device_train_batch_size=job.batch_size,
                learning_rate=job.learning_rate,
                warmup_steps=WARM_UP_STEPS,
                batch_sampler=BatchSamplers.NO_DUPLICATES,
                seed=job.seed,
                use_cpu=job.device == "cpu",
                bf16=job.bf16,
                logging_steps=LOGGED_STEPS,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict(json.loads(Path(job.pairs).read_text())),
            loss=loss,
            callbacks=[SpladeRegularizerWeightSchedulerCallback(loss), stopwatch],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar(job.steps))
        trainer.train()
    if job.save:
        model.save_pretrained(job.save, create_model_card=False)
    return {
        "losses": [value.item() for value in trainer.step_losses],
        "seconds": stopwatch.seconds,
        "others": stopwatch.others,
        "peak_mib": stopwatch.peak_mib,
    }


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    training_job = TrainingJob(**json.loads(Path(sys.argv[1]).read_text()))
    Path(training_job.record).write_text(json.dumps({**asdict(training_job), **train(training_job)}))
