"""SPLADE training without sentence-transformers, in transformers' ``Trainer`` or in a loop with accelerate.

The pairs are the lines of a JSONL file, ``{"query": "...", "document": "..."}``. The other documents of a batch are
each query's negatives. Options default to those of the reference run in docs/training.md.

    python -m examples.train_transformers pairs.jsonl
    python -m examples.train_transformers pairs.jsonl --loop accelerate --precision bf16
    torchrun --nproc-per-node 2 -m examples.train_transformers pairs.jsonl
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, TrainingArguments, get_linear_schedule_with_warmup

from splade_kernels import FlopsLoss
from splade_kernels.integrations.transformers import SpladeEncoder

Losses = list[tuple[int, float]]
Options = argparse.Namespace


def tokenize(tokenizer: Any, pairs: list[dict[str, str]]) -> dict[str, Any]:
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    return {side: tokenizer([pair[side] for pair in pairs], **options) for side in ("query", "document")}


class SpladeLoss:
    """Cross-entropy of each query's dot products with the batch's documents, and FLOPS of queries and documents."""

    def __init__(self, lambda_query: float, lambda_document: float) -> None:
        self.lambda_query, self.lambda_document = lambda_query, lambda_document
        # The mean in the FLOPS loss is over the texts of all processes.
        self.flops = FlopsLoss(process_group=dist.group.WORLD if dist.is_initialized() else None)

    def __call__(self, encoder: nn.Module, batch: dict[str, Any], progress: float) -> Tensor:
        """``progress``: the share of the training that is done. The weights of FLOPS rise over its first third."""
        queries, documents = encoder(**batch["query"]), encoder(**batch["document"])
        ids = batch["document"]["input_ids"]
        repeated = (ids.unsqueeze(1) == ids).all(dim=-1).fill_diagonal_(False)  # is no negative
        scores = (queries @ documents.T).masked_fill(repeated, -torch.inf)
        ranking = cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        flops = self.lambda_query * self.flops(queries) + self.lambda_document * self.flops(documents)
        return ranking + min(1.0, 3 * progress) ** 2 * flops


class SpladeTrainer(Trainer):
    """Checkpoints are in the layout of sentence-transformers: ``SparseEncoder(checkpoint)`` loads them."""

    loss_is_scaled_for_ga = False  # it is a mean over its batch

    def __init__(self, *, loss: SpladeLoss, **options: Any) -> None:
        super().__init__(**options)
        self.loss = loss
        self.can_return_loss = True  # batches have no labels, and are evaluated nonetheless

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        progress = self.state.global_step / self.state.max_steps if model.training else 1.0
        loss = self.loss(model, inputs, progress)
        return (loss, {}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_state_dict(SpladeEncoder.from_pretrained(resume_from_checkpoint).state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def train_with_trainer(encoder: SpladeEncoder, tokenizer: Any, pairs: Dataset, options: Options) -> Losses:
    """Step and loss of every logging step."""
    arguments = TrainingArguments(
        output_dir=str(options.output),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        bf16=options.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing=options.activation_checkpointing,
        logging_steps=options.logging_steps,
        save_steps=options.save_steps,
        seed=options.seed,
        report_to="none",
        remove_unused_columns=False,  # "query" and "document" are no arguments of the model
        ddp_find_unused_parameters=False,
    )
    loss = SpladeLoss(options.lambda_query, options.lambda_document)  # after the arguments, which start processes
    trainer = SpladeTrainer(
        loss=loss,
        model=encoder,
        args=arguments,
        train_dataset=pairs,
        data_collator=partial(tokenize, tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model(str(options.output / "model"))
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def train_with_accelerate(encoder: SpladeEncoder, tokenizer: Any, pairs: Dataset, options: Options) -> Losses:
    """The same steps, written out."""
    accelerator = Accelerator(
        mixed_precision="bf16" if options.precision == "bf16" else "no",
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=options.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # as the Trainer does
    )
    if options.activation_checkpointing:
        encoder.activation_checkpointing_enable()
    loss_function = SpladeLoss(options.lambda_query, options.lambda_document)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=options.lr, weight_decay=0.0, fused=True)
    loader = DataLoader(pairs, options.batch_size, shuffle=True, collate_fn=partial(tokenize, tokenizer))
    model, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)
    steps = options.epochs * len(loader) // options.accumulate
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, steps)
    step, mean, history = 0, torch.zeros((), device=accelerator.device), []
    model.train()
    for epoch in range(options.epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_function(model, batch, step / steps)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            mean += loss.detach() / (options.accumulate * options.logging_steps)
            if accelerator.sync_gradients:
                scheduler.step()
                step += 1
                if step % options.logging_steps == 0:
                    history.append((step, accelerator.reduce(mean, "mean").item()))
                    accelerator.print(f"step {step} of {steps}: loss {history[-1][1]:.4f}")
                    mean.zero_()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output / "model", tokenizer)
    return history


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pairs", type=Path, help="JSONL file with the columns query and document")
    add("--model", default="distilbert/distilbert-base-uncased", help="masked or causal language model: hub or folder")
    add("--output", type=Path, default=Path("outputs/train_transformers"), help="checkpoints, and the model in model/")
    add("--loop", choices=("trainer", "accelerate"), default="trainer")
    add("--epochs", type=int, default=1)
    add("--batch-size", type=int, default=32, help="pairs per process and backward pass")
    add("--accumulate", type=int, default=1, help="backward passes per step")
    add("--max-length", type=int, default=256, help="tokens per text")
    add("--lr", type=float, default=2e-5, help="peak learning rate")
    add("--lambda-query", type=float, default=5e-5, help="final weight of the queries' FLOPS loss")
    add("--lambda-document", type=float, default=3e-5, help="final weight of the documents' FLOPS loss")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: mixed, weights stay float32")
    add("--activation-checkpointing", action="store_true", help="less memory, more time")
    add("--logging-steps", type=int, default=100)
    add("--save-steps", type=int, default=4000, help="steps between checkpoints (trainer)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output (trainer)")
    add("--seed", type=int, default=42, help="order of the data, dropout")
    return parser


def main(argv: Sequence[str] | None = None) -> Losses:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.resume and options.loop != "trainer":
        parser.error("--resume: expected --loop trainer, since the other loop writes no checkpoints")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.model_max_length = options.max_length  # is saved with it
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoder = SpladeEncoder.from_pretrained(options.model, dtype=torch.float32)
    # Whole steps only: a smaller batch has fewer negatives, and is another loss.
    a_step = options.batch_size * options.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    pairs = Dataset.from_json(str(options.pairs)).select_columns(["query", "document"])
    pairs = pairs.shuffle(options.seed).select(range(len(pairs) // a_step * a_step))
    set_seed(options.seed)
    loop = train_with_trainer if options.loop == "trainer" else train_with_accelerate
    return loop(encoder, tokenizer, pairs, options)


if __name__ == "__main__":
    main()
