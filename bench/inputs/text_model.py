"""A small SPLADE model trained on text, for what random numbers cannot show: the margins of real logits.

    python -m bench.screening_model --data DIR [--output outputs/screening-model]

``--data`` holds ``vocab.txt`` (bert-base-uncased) and ``squad/`` in BEIR's layout: ``corpus.jsonl``, ``queries.jsonl``,
``qrels/train.tsv`` and ``qrels/test.tsv``. The demo's model (2 layers, 128 wide, V 30522, tied decoder) is trained
through the demo's trainer with the fused head; model and unseen passages, those of the articles held out for testing,
are written to ``--output``. The benchmarks that need them leave themselves out where that folder is absent.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "outputs" / "screening-model"
HIDDEN_SIZE = 128
MAX_LENGTH = 128
STEPS = 300
BATCH_SIZE = 16
LEARNING_RATE = 7.5e-4
# Less regularised than the demo's, for the share of active terms that large SPLADE models have: 1 to 2 % of the words.
QUERY_WEIGHT, DOCUMENT_WEIGHT = 4e-4, 2e-4
SEED = 0
# Of the queries of the held-out articles, every fourth is searched with.
SEARCHED_EVERY = 4


def why_not() -> str | None:
    """Why there is no trained model to take inputs from, or None."""
    if (FOLDER / "passages.json").is_file():
        return None
    return "no trained model here: python -m bench.screening_model --data DIR makes it"


def build(data: Path, output: Path, steps: int = STEPS, hidden_size: int = HIDDEN_SIZE) -> dict[str, Any]:
    """Train, and write ``model/``, ``passages.json`` and ``training.json`` to ``output``; returns the last one."""
    from examples.beir import read_beir
    from examples.demo.model import build_model
    from examples.demo.vocabulary import build_tokenizer

    words = (data / "vocab.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = build_tokenizer({word: i for i, word in enumerate(words)}, MAX_LENGTH)
    squad = read_beir(data / "squad")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        start, pairs = Path(name) / "start", Path(name) / "pairs.json"
        build_model(tokenizer, hidden_size, MAX_LENGTH, SEED).save_pretrained(str(start), create_model_card=False)
        queries, passages = zip(*squad.pairs("train"), strict=True)
        pairs.write_text(json.dumps({"query": queries, "passage": passages}))
        losses = _train(start, pairs, output / "model", steps)
    unseen = dict.fromkeys(passage for _, passage in squad.pairs("test"))
    record = {"steps": steps, "seed": SEED, "first_loss": losses[0], "last_loss": losses[-1]}
    record |= _search(squad, output / "model", len(words))
    (output / "training.json").write_text(json.dumps(record) + "\n")
    # Last: what it holds is what makes the folder complete.
    (output / "passages.json").write_text(json.dumps(list(unseen)))
    return record


def _train(start: Path, pairs: Path, output: Path, steps: int) -> list[float]:
    """Losses of the demo's trainer, which writes the model to ``output``."""
    from examples.demo.training import TrainingJob, train

    job = TrainingJob(
        head="fused",
        start=str(start),
        pairs=str(pairs),
        steps=steps,
        shared_steps=steps,
        schedule_steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        query_regularizer_weight=QUERY_WEIGHT,
        document_regularizer_weight=DOCUMENT_WEIGHT,
        seed=SEED,
        device="cpu",
        bf16=False,
        record="",
        save=str(output),
    )
    losses: list[float] = train(job)["losses"]
    return losses


def _search(squad: Any, folder: Path, vocab_size: int) -> dict[str, float]:
    """nDCG@10 of unseen articles' queries over their passages; a model that learned nothing has noise for margins."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator

    from splade_kernels.integrations.sentence_transformers import fuse

    relevant = {query: set(found) for query, found in list(squad.relevant["test"].items())[::SEARCHED_EVERY]}
    corpus = {name: squad.corpus[name] for found in squad.relevant["test"].values() for name in found}
    queries = {name: squad.queries[name] for name in relevant}
    evaluator = SparseInformationRetrievalEvaluator(queries, corpus, relevant, batch_size=BATCH_SIZE, write_csv=False)
    metrics = evaluator(fuse(SparseEncoder(str(folder), device="cpu")))
    share = float(metrics["corpus_active_dims"]) / vocab_size
    return {"ndcg@10": float(metrics["dot_ndcg@10"]), "passage_active_share": share}


def training_record() -> dict[str, Any]:
    """What :func:`build` wrote of the model: steps, seed, losses, nDCG@10, share of active words in a passage."""
    record: dict[str, Any] = json.loads((FOLDER / "training.json").read_text())
    return record


def describe(record: dict[str, Any]) -> str:
    """One sentence for a document."""
    seed = f", seed {record['seed']}" if "seed" in record else ""
    return (
        f"The model on text: {record['steps']} steps{seed}; over unseen passages nDCG@10 {record['ndcg@10']:.3f}, "
        f"{record['passage_active_share']:.2%} of the words active in a passage."
    )


@cache
def passages() -> list[str]:
    texts: list[str] = json.loads((FOLDER / "passages.json").read_text())
    return texts


def load(device: torch.device | str = "cpu") -> Any:
    """The trained model as a stock ``SparseEncoder``."""
    from sentence_transformers import SparseEncoder

    return SparseEncoder(str(FOLDER / "model"), device=str(device)).eval()


def decoder_inputs(lengths: Tensor, length: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the decoder gets for unseen passages, and its parameters: ``(hidden [B, S, D], weight [V, D], bias [V])``.

    The b-th text is the next passage of at least ``lengths[b]`` tokens, cut to that many. Of the vocabulary its first
    ``vocab_size`` words.

    Raises:
        ValueError: there are too few such passages.
    """
    model = load()
    tokens = iter(model.tokenizer(passages(), truncation=True, max_length=length)["input_ids"])
    chosen: list[list[int]] = []
    for wanted in lengths.tolist():
        ids = next((ids for ids in tokens if len(ids) >= wanted), None)
        if ids is None:
            raise ValueError(f"expected {len(lengths)} passages of up to {length} tokens, found {len(chosen)}")
        chosen.append([*ids[: wanted - 1], ids[-1]])
    batch = model.tokenizer.pad({"input_ids": chosen}, padding="max_length", max_length=length, return_tensors="pt")
    language_model = model.transformers_model
    decoder = language_model.get_output_embeddings()
    seen: list[Tensor] = []
    handle = decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        language_model(**batch)
    handle.remove()
    return seen[0], decoder.weight.detach()[:vocab_size], decoder.bias.detach()[:vocab_size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with vocab.txt and squad/")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    record = build(args.data, args.output, args.steps)
    print(f"{record}; written to {args.output}")


if __name__ == "__main__":
    main()
