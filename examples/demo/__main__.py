"""``python -m examples.demo``: train a small SPLADE model through the stock and the fused head, then search with it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.demo.report import disturbance, markdown_table, summarize, verdict
from examples.demo.settings import Settings

if TYPE_CHECKING:
    from transformers import BertTokenizerFast

    from examples.demo.corpus import Corpus

PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy", "bm25s")


def main() -> None:
    """Runs the demo and writes ``result.json``, ``loss.png`` and ``memory.png``."""
    arguments = _parse_arguments()
    # Nothing is downloaded, so nothing should wait for a network either.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # One device: without a launcher the trainer would spread a batch over all of them with nn.DataParallel.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    settings = Settings(
        steps=arguments.steps,
        stock_steps=min(arguments.stock_steps, arguments.steps),
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=arguments.device or _default_device(),
        bf16=arguments.bf16,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="splade-demo-") as folder:
        result = run(settings, Path(folder), arguments.save_model)
    result_path = arguments.output / "result.json"
    result_path.write_text(json.dumps(result, indent=1) + "\n")

    from examples.demo.figures import plot_losses, plot_memory

    plot_losses(result, arguments.output / "loss.png")
    plot_memory(result, arguments.output / "memory.png")
    _print_answers(result["answers"])
    print(f"\n{markdown_table(result)}\n\n{textwrap.fill(verdict(result), 118)}")
    if disturbance(result):
        print("\n" + textwrap.fill(disturbance(result), 118))
    print(f"\n{result['seconds']:.0f} s in all. Numbers: {result_path}. Pictures: loss.png and memory.png beside it.")


def run(settings: Settings, folder: Path, save_model: Path | None) -> dict[str, Any]:
    """All steps of the demo, with ``folder`` for what its processes hand each other."""
    started = time.perf_counter()
    from transformers.utils import logging as transformers_logging

    from examples.demo.corpus import build_corpus

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Sparse (invariant checks|CSR tensor support)")
    origin = {"machine": _machine(settings.device), "versions": _versions()}

    _announce(started, "Reading docstrings (standard library, torch, numpy, transformers)")
    corpus = build_corpus()
    print(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in corpus.counts.items()))

    _announce(started, f"Building a vocabulary of {settings.vocab_size:,} and a BERT with {settings.hidden_size} units")
    tokenizer, pairs = _build_start(settings, corpus, folder)

    from bench.harness.memory import in_a_process
    from examples.demo.memory import measure_head
    from examples.demo.training import train

    records = {}
    for head, steps in (("stock", settings.stock_steps), ("fused", settings.steps)):
        _announce(started, f"Training with the {head} head: {steps} steps of {settings.steps}, in a process of its own")
        records[head] = in_a_process(train, settings, head, pairs, folder)

    _announce(started, "Searching the held-out docstrings, before and after training")
    retrieval, answers = _search(settings, corpus, folder)
    if save_model is not None:
        shutil.copytree(folder / "trained", save_model, dirs_exist_ok=True)

    _announce(started, f"Measuring the head's memory at lengths {', '.join(map(str, settings.memory_lengths))}")
    memory = {head: in_a_process(measure_head, settings, head) for head in ("stock", "fused")}

    return {
        "command": "python -m " + " ".join(["examples.demo", *sys.argv[1:]]),
        "seconds": time.perf_counter() - started,
        **origin,
        "settings": asdict(settings),
        "corpus": _describe_corpus(corpus, tokenizer),
        "summary": summarize(records["stock"], records["fused"]),
        "retrieval": retrieval,
        "answers": answers,
        "memory": {
            "lengths": settings.memory_lengths,
            "batch_size": settings.memory_batch_size,
            "hidden_size": settings.memory_hidden_size,
            "vocab_size": settings.vocab_size,
            **memory,
        },
        "training": records,
    }


def _build_start(settings: Settings, corpus: Corpus, folder: Path) -> tuple[BertTokenizerFast, dict[str, list[str]]]:
    """Writes the model that both runs start from; returns its tokenizer and the training pairs."""
    from examples.demo.model import build_model
    from examples.demo.vocabulary import build_tokenizer, build_vocabulary, count_words

    counts = count_words(text for pair in corpus.train for text in (pair.query, pair.passage))
    tokenizer = build_tokenizer(build_vocabulary(counts, settings.vocab_size), settings.max_length)
    model = build_model(tokenizer, settings.hidden_size, settings.max_length, settings.seed)
    model.save_pretrained(str(folder / "start"), create_model_card=False)
    pairs = {"query": [pair.query for pair in corpus.train], "passage": [pair.passage for pair in corpus.train]}
    return tokenizer, pairs


def _search(settings: Settings, corpus: Corpus, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from sentence_transformers import SparseEncoder

    from examples.demo.search import QUESTIONS, answer, build_evaluator, encode_passages, evaluate_bm25, evaluate_model
    from splade_kernels.integrations.sentence_transformers import fuse

    evaluator = build_evaluator(corpus.held_out, settings.batch_size)
    retrieval: dict[str, Any] = {"bm25": evaluate_bm25(evaluator)}
    for name, start in (("before", "start"), ("after", "trained")):
        model = fuse(SparseEncoder(str(folder / start), device=settings.device))
        passages = encode_passages(model, corpus.held_out, settings.batch_size)
        retrieval[name] = evaluate_model(evaluator, model, passages)
    return retrieval, answer(model, corpus.held_out, passages, QUESTIONS)


def _describe_corpus(corpus: Corpus, tokenizer: BertTokenizerFast) -> dict[str, Any]:
    from examples.demo.vocabulary import unknown_share

    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    held_out = [text for pair in corpus.held_out for text in (pair.query, pair.passage)]
    return {
        "sha256": corpus.sha256,
        "counts": corpus.counts,
        "held_out_shared_shingles": corpus.held_out_shared_shingles,
        "vocabulary_sha256": hashlib.sha256("\n".join(entry for entry, _ in vocabulary).encode()).hexdigest(),
        "held_out_unknown_share": unknown_share(tokenizer, held_out),
    }


def _machine(device: str) -> dict[str, Any]:
    import torch

    from bench.harness.environment import cpu_name

    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device == "cuda" else None,
        "system": platform.platform(terse=True),
    }


def _versions() -> dict[str, str]:
    import splade_kernels

    own = {"python": platform.python_version(), "splade-kernels": splade_kernels.__version__}
    return own | {name: version(name) for name in PACKAGES}


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _print_answers(answers: list[dict[str, Any]]) -> None:
    def terms(weighted: list[tuple[str, float]]) -> str:
        return "  ".join(f"{term} {weight:.2f}" for term, weight in weighted)

    print("\nThree questions to the trained model, over the held-out docstrings")
    for found in answers:
        print(f"\n  {found['question']}")
        print(f"    best passage  {found['name']} (score {found['score']:.2f})")
        print(textwrap.indent(textwrap.fill(textwrap.shorten(found["passage"], 300), 100), " " * 18))
        for label in ("question_terms", "passage_terms", "matching_terms"):
            print(f"    {label.replace('_', ' '):<15}{terms(found[label])}")


def _announce(started: float, what: str) -> None:
    print(f"\n[{time.perf_counter() - started:4.0f} s] {what}", flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder for numbers and pictures")
    parser.add_argument("--steps", type=int, default=300, help="training steps (%(default)s)")
    parser.add_argument("--stock-steps", type=int, default=16, help="steps also done stock, to compare (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs in a batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the start and of the data order (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--save-model", type=Path, help="also keep the trained model in this folder")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("the demo measures memory through /proc, which only Linux has")
    if arguments.steps < 2 or arguments.stock_steps < 2:
        parser.error("--steps and --stock-steps: expected at least 2")
    return arguments


if __name__ == "__main__":
    main()
