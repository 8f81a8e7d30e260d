"""What trainers ask of a SpladeEncoder."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from splade_kernels.integrations.transformers import SpladeEncoder
from tests.st_models import TEXTS, backbone, tokenizer


def test_labels_do_not_change_how_accumulated_losses_are_divided(tmp_path):
    class Regression(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            return (model(**inputs).sum(dim=1) - labels).pow(2).mean()

    batch = dict(tokenizer()(TEXTS[:8], padding=True, return_tensors="pt"))
    rows = [{**{name: value[row] for name, value in batch.items()}, "labels": torch.tensor(1.0)} for row in range(8)]
    logged = []
    for accumulated in (1, 4):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=8 // accumulated, logging_steps=1, use_cpu=True,
            gradient_accumulation_steps=accumulated, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        encoder = SpladeEncoder.from_pretrained(backbone("bert"))
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = Regression(model=encoder, args=arguments, train_dataset=rows)
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert logged[1]["loss"] == pytest.approx(logged[0]["loss"], rel=1e-4)
    assert logged[1]["grad_norm"] == pytest.approx(logged[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_both_names_of_checkpointing_take_their_options(name):
    encoder = SpladeEncoder.from_pretrained(backbone("bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the earlier name
        getattr(encoder, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    assert encoder.model.is_activation_checkpointing
