"""Trains a SPLADE model with sentence-transformers through the fused head, and evaluates it.

The defaults repeat the run behind the model card ``tomaarsen/splade-distilbert-base-uncased-gooaq``: DistilBERT on
GooAQ, one epoch, batches of 32. ``--stock`` trains the same run with sentence-transformers' own head, to compare with.

    python -m examples.train
    python -m examples.train --data path/to/beir/folder --model path/to/model --max-length 128
    torchrun --nproc-per-node 2 -m examples.train
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset, load_dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sparse_encoder import losses
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator, SparseNanoBEIREvaluator
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from splade_kernels.integrations.sentence_transformers import FlopsLoss, fuse

if __package__:
    from .beir import InputError, read_beir
else:  # run as a file: this folder is on the path, the package around it is not
    from beir import InputError, read_beir  # type: ignore[no-redef]

HELD_OUT_PAIRS = 1000
# The seed of sentence-transformers' GooAQ examples, so that the same questions are held out.
HELD_OUT_SEED = 12
PACKAGES = ("splade-kernels", "torch", "triton", "sentence-transformers", "transformers", "accelerate", "datasets")

Evaluator = SparseInformationRetrievalEvaluator | SparseNanoBEIREvaluator


@dataclass(frozen=True)
class Task:
    """What to train on, how to choose the checkpoint (if at all), and what the final numbers come from."""

    train: Dataset
    final_evaluator: Evaluator
    best_evaluator: Evaluator | None = None
    held_out: Dataset | None = None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a SPLADE model through the fused head. The defaults are the GooAQ run of "
        "tomaarsen/splade-distilbert-base-uncased-gooaq.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="distilbert/distilbert-base-uncased", help="masked language model: hub name or local folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset",
        default="sentence-transformers/gooaq",
        help="question/answer pairs: hub name, or local folder that datasets.load_dataset reads (JSON, CSV, Parquet); "
        "a hub name is evaluated on NanoBEIR, a local folder on its own held-out pairs",
    )
    source.add_argument("--data", type=Path, metavar="DIR", help="local BEIR folder instead; evaluated on its dev/test")
    add("--output", type=Path, default=Path("outputs/train"), help="new folder for checkpoints, model and numbers")
    add("--stock", action="store_true", help="sentence-transformers' own head and FLOPS loss instead of the fused ones")
    add("--max-steps", type=_positive_int, help="stop after this many steps instead of one epoch")
    add("--batch-size", type=_positive_int, default=32, help="pairs per process and step")
    add("--cached", type=_positive_int, metavar="N", help="CachedSpladeLoss with mini-batches of N texts")
    add("--max-length", type=_positive_int, default=256, help="tokens per text")
    add("--lr", type=float, default=2e-5, help="peak learning rate")
    add("--lambda-query", type=float, default=5e-5, help="weight of the queries' FLOPS loss")
    add("--lambda-document", type=float, default=3e-5, help="weight of the passages' FLOPS loss")
    add("--threshold", type=_positive_int, help="FLOPS loss leaves out texts with at most this many active terms")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU that has it")
    add("--eval-steps", type=_positive_int, default=4000, help="evaluate and save this often, and at least once")
    add("--logging-steps", type=_positive_int, default=2000, help="log the mean loss this often, and at least once")
    add("--seed", type=int, default=42, help="order of the data, dropout")
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


@contextmanager
def _loading(option: str, name: str) -> Iterator[None]:
    """Turns a failed download into one sentence. What fails in a local folder keeps its own error."""
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise
        raise InputError(
            f"wanted {name!r} ({option}): no such local folder, and the Hugging Face hub did not give it "
            f"({str(error).splitlines()[0]}). Without the hub, --model takes a local folder, and --data a local BEIR "
            "folder or --dataset a local folder of question/answer pairs"
        ) from error


def load_model(name: str, max_length: int) -> SparseEncoder:
    with _loading("--model", name):
        model = SparseEncoder(name)
    if not any(isinstance(module, SpladePooling) for module in model.modules()):
        raise InputError(f"--model {name}: expected a masked language model or a SPLADE model, got {model}")
    model.max_seq_length = max_length
    return model


def beir_task(folder: Path, **options: Any) -> Task:
    """Trains on ``qrels/train.tsv``, chooses the checkpoint on ``dev`` if there is one, reports ``test``, else ``dev``.

    Passages of every split are searched. A test split never chooses a checkpoint: without ``dev`` the last one is kept.
    """
    beir = read_beir(folder)
    evaluators = {}
    for split in set(beir.relevant) - {"train"}:
        relevant = {query_id: set(corpus_ids) for query_id, corpus_ids in beir.relevant[split].items()}
        evaluators[split] = SparseInformationRetrievalEvaluator(
            beir.queries, beir.corpus, relevant, name=split, **options
        )
    if not evaluators:
        raise InputError(f"{folder / 'qrels'}: expected dev.tsv or test.tsv beside train.tsv, found neither")
    queries, passages = zip(*beir.pairs("train"), strict=True)
    train = Dataset.from_dict({"query": list(queries), "passage": list(passages)})
    final = evaluators["test" if "test" in evaluators else "dev"]
    return Task(train, final, best_evaluator=evaluators.get("dev"))


def pairs_task(name: str, **options: Any) -> Task:
    """Question/answer pairs from ``datasets``, of which 1,000 (a tenth, if that is less) are held out."""
    with _loading("--dataset", name):
        pairs = load_dataset(name, split="train")
    columns = ["question", "answer"]
    if missing := set(columns) - set(pairs.column_names):
        raise InputError(f"--dataset {name}: no column {sorted(missing)}, the columns are {pairs.column_names}")
    # A third column would be taken for a hard negative.
    pairs = pairs.select_columns(columns)
    if len(pairs) < 10:
        raise InputError(f"--dataset {name}: expected at least 10 pairs, got {len(pairs)}")
    split = pairs.train_test_split(test_size=min(HELD_OUT_PAIRS, len(pairs) // 10), seed=HELD_OUT_SEED)
    evaluator: Evaluator
    if Path(name).exists():
        evaluator = held_out_evaluator(split["test"], **options)
    else:
        with _loading("NanoBEIR, which a --dataset from the hub is evaluated on", "sentence-transformers/NanoBEIR-en"):
            evaluator = SparseNanoBEIREvaluator(**options)
    return Task(split["train"], evaluator, best_evaluator=evaluator, held_out=split["test"])


def held_out_evaluator(pairs: Dataset, **options: Any) -> SparseInformationRetrievalEvaluator:
    """Searches the held-out answers with the held-out questions; a text that occurs twice is one query or passage."""
    relevant: dict[str, set[str]] = {}
    for pair in pairs:
        relevant.setdefault(pair["question"], set()).add(pair["answer"])
    queries = {question: question for question in relevant}
    corpus = {answer: answer for answers in relevant.values() for answer in sorted(answers)}
    return SparseInformationRetrievalEvaluator(queries, corpus, relevant, name="held_out", **options)


def make_loss(model: SparseEncoder, arguments: argparse.Namespace) -> losses.SpladeLoss:
    """SPLADE's loss with the FLOPS regulariser of the chosen head.

    Under ``torchrun`` our FLOPS loss takes its mean over the global batch: the squares of every process' own mean
    average to more than the square of the global mean.
    """
    options: dict[str, Any] = {
        "loss": losses.SparseMultipleNegativesRankingLoss(model),
        "query_regularizer_weight": arguments.lambda_query,
        "document_regularizer_weight": arguments.lambda_document,
    }
    if arguments.stock:
        options["query_regularizer_threshold"] = options["document_regularizer_threshold"] = arguments.threshold
    else:
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        for side in ("query", "document"):
            options[f"{side}_regularizer"] = FlopsLoss(model, threshold=arguments.threshold, process_group=group)
    if arguments.cached is not None:
        return losses.CachedSpladeLoss(model, mini_batch_size=arguments.cached, **options)
    return losses.SpladeLoss(model, **options)


class StepMeter(TrainerCallback):
    """Time and peak memory of the training steps, without evaluation, saving and the first step, which compiles."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self.peak_bytes = 0
        self._start: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._start is None:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        first = state.global_step == 1
        self.steps += not first
        pause = control.should_evaluate or control.should_save or control.should_training_stop
        # A GPU runs steps asynchronously: synchronise only where the clock starts or stops.
        if (first or pause) and self._start is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
            now = time.perf_counter()
            self.seconds += 0.0 if first else now - self._start
            self._start = None if pause else now

    def summary(self) -> dict[str, Any]:
        speed = self.steps / self.seconds if self.seconds else None
        if torch.cuda.is_available():
            kind, peak = "CUDA memory allocated in training steps", self.peak_bytes
        else:
            kind, peak = "resident set of the whole process, evaluation included", _peak_resident_bytes()
        return {"steps_per_second": speed, "peak_memory_mib": round(peak / 2**20, 1), "peak_memory_of": kind}


def _peak_resident_bytes() -> int:
    import resource  # absent on Windows, where only the GPU's figure can be had

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one training and returns its summary, as written to ``train_summary.json`` by the first process."""
    output: Path = arguments.output
    if os.environ.get("RANK", "0") == "0" and output.is_dir() and any(output.iterdir()):
        raise InputError(f"--output {output}: expected a new or empty folder, this one holds another run")
    set_seed(arguments.seed)
    model = load_model(arguments.model, arguments.max_length)
    score = str(model.similarity_fn_name)
    options = {"batch_size": arguments.batch_size, "main_score_function": score}
    if arguments.data is not None:
        task = beir_task(arguments.data, **options)
    else:
        task = pairs_task(arguments.dataset, **options)

    bf16 = arguments.precision == "bf16" or (
        arguments.precision == "auto"
        and torch.cuda.is_available()
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    steps = arguments.max_steps or math.ceil(len(task.train) / (arguments.batch_size * world_size))
    best: dict[str, Any] = {}
    if task.best_evaluator is not None:
        metric = f"eval_{task.best_evaluator.name}_{score}_ndcg@10"
        best = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    training_arguments = SparseEncoderTrainingArguments(
        output_dir=str(output),
        num_train_epochs=1,
        max_steps=arguments.max_steps or -1,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        eval_strategy="steps" if best else "no",
        eval_steps=min(arguments.eval_steps, steps),
        save_steps=min(arguments.eval_steps, steps),
        save_total_limit=2,
        logging_steps=min(arguments.logging_steps, steps),
        seed=arguments.seed,
        **best,
    )
    if not arguments.stock:
        fuse(model)
    meter = StepMeter()
    trainer = SparseEncoderTrainer(
        model=model,
        args=training_arguments,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        # After the arguments, which start torch.distributed where torchrun asks for it.
        loss=make_loss(model, arguments),
        evaluator=task.best_evaluator,
        callbacks=[meter],
    )
    trainer.train()
    if not trainer.is_world_process_zero():
        return {}

    measured = meter.summary()
    metrics = task.final_evaluator(model, output_path=str(output / "eval"))
    model.save_pretrained(str(output / "model"))
    summary = {
        "head": "stock" if arguments.stock else "fused",
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine() + " CPU",
        "precision": "bf16" if bf16 else "fp32",
        "processes": world_size,
        "train_pairs": len(task.train),
        "steps": trainer.state.global_step,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        **measured,
        "metrics": metrics,
        "log_history": trainer.state.log_history,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
    }
    (output / "train_summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        summary = train(arguments)
    except InputError as error:
        parser.error(str(error))
    if summary:
        shown = ("head", "device", "precision", "steps", "steps_per_second", "peak_memory_mib", "peak_memory_of")
        for key in shown:
            print(f"{key:>17}: {summary[key]}")
        for key, value in summary["metrics"].items():
            if key.endswith(("ndcg@10", "mrr@10", "active_dims")):
                print(f"{key:>40}: {value:.4f}")
        print(f"{arguments.output / 'train_summary.json'} holds every number, {arguments.output / 'model'} the model")
    return summary


if __name__ == "__main__":
    main()
