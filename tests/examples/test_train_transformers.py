from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from sentence_transformers import SparseEncoder  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from examples import train_transformers as example  # noqa: E402
from splade_kernels.integrations.transformers import SpladeEncoder  # noqa: E402
from tests.st_models import PAIRS, TEXTS, backbone, tokenizer  # noqa: E402

ROOT = Path(__file__).parents[2]
# FLOPS weights that are a part of the loss, and a learning rate that moves it: their equality is about something.
RUN = ["--batch-size=4", "--epochs=5", "--lr=1e-3", "--lambda-query=0.1", "--lambda-document=0.1", "--logging-steps=1"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"id": index, "query": query, "document": text} for index, (query, text) in enumerate(PAIRS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(autouse=True)
def one_thread_and_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    forget_accelerator()


def forget_accelerator() -> None:
    """Accelerate keeps precision and accumulation for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(pairs: Path, output: Path, *options: str, model: Path | None = None) -> dict[int, float]:
    forget_accelerator()
    argv = [pairs, "--model", model or backbone("bert"), "--output", output, *RUN, *options]
    return dict(example.main([str(argument) for argument in argv]))


@pytest.mark.parametrize(
    "options", [[], ["--accumulate=2"], ["--precision=bf16"]], ids=["float32", "accumulated", "bf16"]
)
def test_both_loops_have_the_same_losses(pairs: Path, tmp_path: Path, options: list[str]) -> None:
    trainer, loop = (train(pairs, tmp_path / name, f"--loop={name}", *options) for name in ("trainer", "accelerate"))
    assert len(loop) == (10 if "--accumulate=2" in options else 20)
    assert trainer == pytest.approx(loop, rel=1e-6)
    assert len(set(loop.values())) == len(loop)
    if "--precision=bf16" in options:
        full = train(pairs, tmp_path / "float32")
        assert trainer == pytest.approx(full, rel=2e-2)
        assert trainer != full


class StockEncoder(SpladeEncoder):
    """The head as it is defined, on the logits of the model."""

    def forward(self, attention_mask: torch.Tensor, **batch: Any) -> torch.Tensor:  # type: ignore[override]
        logits = self.model(attention_mask=attention_mask, **batch).logits
        return torch.log1p(torch.relu(logits.masked_fill(attention_mask.unsqueeze(-1) == 0, -torch.inf))).amax(dim=1)


def test_the_stock_head_has_the_same_losses(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = train(pairs, tmp_path / "fused")
    monkeypatch.setattr(example, "SpladeEncoder", StockEncoder)
    stock = train(pairs, tmp_path / "stock")
    assert len(stock) == 20
    assert fused == pytest.approx(stock, rel=1e-5)


@pytest.mark.parametrize("loop", ["trainer", "accelerate"])
def test_the_trained_folder_is_a_sentence_transformers_model(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    made: list[SpladeEncoder] = []

    class Kept(SpladeEncoder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(example, "SpladeEncoder", Kept)
    train(pairs, tmp_path, f"--loop={loop}", "--epochs=1", "--max-length=8")
    (encoder,) = made
    assert encoder.model.get_output_embeddings().weight is encoder.model.get_input_embeddings().weight
    folder = tmp_path / "model"
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == 8  # --max-length is saved
    with torch.no_grad():
        expected = encoder.eval()(**batch)
        untrained = SpladeEncoder.from_pretrained(backbone("bert")).eval()(**batch)
    assert (expected - untrained).abs().max() > 1e-3
    embeddings = SparseEncoder(str(folder), device="cpu").encode(TEXTS, convert_to_sparse_tensor=False)
    torch.testing.assert_close(embeddings, expected)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    whole = train(pairs, tmp_path / "whole", "--save-steps=6")
    checkpoint = tmp_path / "whole/checkpoint-6"  # in the middle of an epoch
    SparseEncoder(str(checkpoint), device="cpu")
    (tmp_path / "resumed").mkdir()
    checkpoint.rename(tmp_path / "resumed/checkpoint-6")
    state = json.loads((tmp_path / "resumed/checkpoint-6/trainer_state.json").read_text())
    state["log_history"] = []
    (tmp_path / "resumed/checkpoint-6/trainer_state.json").write_text(json.dumps(state))
    resumed = train(pairs, tmp_path / "resumed", "--resume")
    assert list(resumed) == list(range(7, 21))
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=1e-6)


@pytest.mark.parametrize("loop", ["trainer", "accelerate"])
def test_activation_checkpointing_changes_no_loss(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    checkpointed = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "transformers.modeling_utils.checkpoint",
        lambda *args, **kwargs: checkpointed.append(args) or checkpoint(*args, **kwargs),
    )
    plain = train(pairs, tmp_path / "plain", f"--loop={loop}", "--epochs=1")
    assert not checkpointed
    saving = train(pairs, tmp_path / "saving", f"--loop={loop}", "--epochs=1", "--activation-checkpointing")
    assert checkpointed
    assert saving == pytest.approx(plain, rel=1e-6)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        """After the second step the model is no longer what was evaluated best."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                model.get_submodule("model.bert").embeddings.word_embeddings.weight.data.mul_(-3)

    forget_accelerator()
    fast = tokenizer()
    encoder = SpladeEncoder.from_pretrained(backbone("bert"))
    data = datasets.Dataset.from_dict({"query": [q for q, _ in PAIRS], "document": [d for _, d in PAIRS]})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=8, report_to="none",
        remove_unused_columns=False, use_cpu=True, eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, prediction_loss_only=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = example.SpladeTrainer(
        loss=example.SpladeLoss(0.1, 0.1), model=encoder, args=arguments, train_dataset=data, eval_dataset=data,
        data_collator=lambda rows: example.tokenize(fast, rows), processing_class=fast, callbacks=[Spoil()],
    )  # fmt: skip
    trainer.train()
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(scores) == 3
    assert scores[2] > 1.01 * min(scores)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(scores), rel=1e-6)
    best = SpladeEncoder.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(value, best[name]) for name, value in encoder.state_dict().items())


def test_a_repeated_document_is_no_negative() -> None:
    embeddings = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    batch = {
        "query": {"index": [0, 1, 2]},
        "document": {"index": [0, 0, 2], "input_ids": torch.tensor([[5], [5], [7]])},
    }

    def encoder(index: list[int], input_ids: Any = None) -> torch.Tensor:
        return embeddings[index]

    loss = example.SpladeLoss(0.5, 0.25)
    scores = torch.tensor([[9.0, -torch.inf, 0.0], [-torch.inf, 3.0, 0.0], [0.0, 0.0, 1.0]])
    ranking = torch.nn.functional.cross_entropy(scores, torch.arange(3))
    flops = 0.5 * ((4 / 3) ** 2 + (1 / 3) ** 2) + 0.25 * (2**2 + (1 / 3) ** 2)
    for progress, share in ((0, 0.0), (1 / 6, 0.25), (1 / 3, 1.0), (1, 1.0)):
        torch.testing.assert_close(loss(encoder, batch, progress), ranking + share * flops)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings and a tokenizer without padding."""
    folder = tmp_path_factory.mktemp("llama")
    fast = tokenizer()
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=80, initializer_range=0.1, tie_word_embeddings=True,
        pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.eos_token, fast.pad_token = "[SEP]", None
    fast.save_pretrained(folder)
    return folder


def test_the_page_makes_a_causal_model_bidirectional_and_trains_it(
    pairs: Path, causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/training.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (name,) = re.findall(r'name = "(.*?)"', code)
    monkeypatch.chdir(tmp_path)
    exec(code.replace(name, str(causal)), {})
    (folder,) = re.findall(r"train_transformers pairs.jsonl --model (\S+)", page)
    losses = train(pairs, tmp_path / "run", "--epochs=1", model=Path(folder))
    assert len(losses) == 4
    embeddings = SparseEncoder(str(tmp_path / "run/model"), device="cpu").encode(TEXTS, convert_to_sparse_tensor=False)
    batch = AutoTokenizer.from_pretrained(tmp_path / "run/model")(TEXTS, padding=True, return_tensors="pt")
    encoder = SpladeEncoder.from_pretrained(tmp_path / "run/model")
    assert encoder.config.is_causal is False
    with torch.no_grad():
        torch.testing.assert_close(embeddings, encoder.eval()(**batch))
        encoder.model.config.is_causal = True
        assert not torch.allclose(embeddings, encoder(**batch), atol=1e-3)


def test_the_commands_of_the_page_are_understood() -> None:
    page = (ROOT / "docs/training.md").read_text() + (example.__doc__ or "")
    commands = re.findall(r"-m examples.train_transformers (pairs.jsonl.*)", page)
    assert len(commands) >= 6
    for command in commands:
        assert example.make_parser().parse_args(command.split()).pairs == Path("pairs.jsonl")
    with pytest.raises(SystemExit):
        example.main(["pairs.jsonl", "--loop=accelerate", "--resume"])


@pytest.mark.slow
def test_two_processes(pairs: Path, tmp_path: Path) -> None:
    """The processes stay in step, in both loops alike; BERT's buffers are what a broadcast would overwrite."""
    losses = {}
    for loop in ("trainer", "accelerate"):
        code = (
            "import json, os, sys; from pathlib import Path; from examples.train_transformers import main\n"
            "history = main(sys.argv[2:])\n"
            "if os.environ['RANK'] == '0': Path(sys.argv[1]).write_text(json.dumps(history))\n"
        )
        (tmp_path / "run.py").write_text(code)
        argv = [tmp_path / f"{loop}.json", pairs, "--model", backbone("bert"), "--output", tmp_path / loop]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*launch, tmp_path / "run.py", *argv, *RUN, "--batch-size=2", "--epochs=2", f"--loop={loop}"],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "HF_DATASETS_CACHE": str(tmp_path / "cache"),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses[loop] = dict(json.loads((tmp_path / f"{loop}.json").read_text()))
    assert len(losses["trainer"]) == 8
    assert losses["trainer"] == pytest.approx(losses["accelerate"], rel=1e-6)
