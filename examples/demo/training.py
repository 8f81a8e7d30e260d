"""One training run with the stock or the fused head: every step's loss and seconds, and the peak memory of a step.

Both runs load the same start and see the same pairs. A run that stops early follows the schedules of the full one: its
steps are the full run's first steps.
"""

from __future__ import annotations

import tempfile
import time
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
from examples.demo.settings import Settings
from splade_kernels.integrations.sentence_transformers import FlopsLoss, fuse

__all__ = ["train"]

# Short, so that most of the steps that both runs do use the full learning rate.
WARM_UP_STEPS = 5
LOGGED_STEPS = 5


class Stopwatch(TrainerCallback):
    """Seconds of every whole step (data, forward, backward, optimizer) and the peak memory of the shared ones.

    ``others`` holds how many processors other programs kept busy in each step: on a CPU, steps taken beside other work
    cannot be compared.

    Memory is measured from the end of the first step: by then the optimizer's state exists and the libraries have
    loaded everything, so the peak is what a step itself needs.
    """

    def __init__(self, settings: Settings, steps: int) -> None:
        self.settings = settings
        self.steps = steps
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
            self._memory = PeakMemory(torch.device(self.settings.device))
        if state.global_step == self.settings.stock_steps:
            self.peak_mib = self._memory.mib()
        if state.global_step == self.steps:
            control.should_training_stop = True
        self._last, self._last_cpu = self._now(), self._cpu_seconds()

    def _cpu_seconds(self) -> tuple[float, float]:
        """Processor seconds so far: of everybody on the machine, and of this process."""
        times, own = psutil.cpu_times(), self._process.cpu_times()
        return times.user + times.system, own.user + own.system

    def _now(self) -> float:
        if self.settings.device == "cuda":
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


def train(settings: Settings, head: str, pairs: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    """Trains the model in ``folder/start`` on ``pairs``; returns losses, seconds and peak memory.

    The stock head stops after ``stock_steps``. The fused one goes on to the end, and is saved in ``folder/trained``.
    """
    transformers_logging.disable_progress_bar()
    fused = head == "fused"
    steps = settings.steps if fused else settings.stock_steps
    model = SparseEncoder(str(folder / "start"), device=settings.device)
    regularizer = FlopsLoss if fused else StockFlopsLoss
    if fused:
        fuse(model)
    loss = SpladeLoss(
        model,
        loss=SparseMultipleNegativesRankingLoss(model),
        query_regularizer_weight=settings.query_regularizer_weight,
        document_regularizer_weight=settings.document_regularizer_weight,
        query_regularizer=regularizer(model),
        document_regularizer=regularizer(model),
    )
    stopwatch = Stopwatch(settings, steps)
    with tempfile.TemporaryDirectory() as output:
        trainer = RecordingTrainer(
            model=model,
            args=SparseEncoderTrainingArguments(
                output_dir=output,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                warmup_steps=WARM_UP_STEPS,
                batch_sampler=BatchSamplers.NO_DUPLICATES,
                seed=settings.seed,
                use_cpu=settings.device == "cpu",
                bf16=settings.bf16,
                logging_steps=LOGGED_STEPS,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict(pairs),
            loss=loss,
            callbacks=[SpladeRegularizerWeightSchedulerCallback(loss), stopwatch],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar(steps))
        trainer.train()
    if fused:
        model.save_pretrained(str(folder / "trained"), create_model_card=False)
    return {
        "losses": [value.item() for value in trainer.step_losses],
        "seconds": stopwatch.seconds,
        "others": stopwatch.others,
        "peak_mib": stopwatch.peak_mib,
    }
