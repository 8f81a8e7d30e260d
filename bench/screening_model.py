"""Train the small SPLADE model on text that :mod:`bench.inputs.text_model` reads.

    python -m bench.screening_model --data DIR [--output outputs/screening-model]

``--data`` holds ``vocab.txt`` (bert-base-uncased) and ``squad/`` in BEIR's layout: ``corpus.jsonl``, ``queries.jsonl``,
``qrels/train.tsv`` and ``qrels/test.tsv``. The demo's model (2 layers, 128 wide, V 30522, tied decoder) is trained with
the demo's trainer and the fused head. ``--output`` gets the model and unseen passages, those of the articles held out
for testing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import options
from bench.inputs import text_model

MAX_LENGTH = 128
BATCH_SIZE = 16
LEARNING_RATE = 7.5e-4
# Less regularised than the demo's, for the share of active terms that large SPLADE models have: 1 to 2 %.
QUERY_WEIGHT, DOCUMENT_WEIGHT = 4e-4, 2e-4
SEED = 0
# Of the queries of the held-out articles, every fourth is searched with.
SEARCHED_EVERY = 4


def build(data: Path, output: Path, steps: int = 300, hidden_size: int = 128) -> dict[str, Any]:
    """Train, and write ``model/``, ``passages.json`` and ``training.json`` to ``output``; returns the last one."""
    from examples.beir import read_beir
    from examples.demo.model import build_model
    from examples.demo.settings import Settings
    from examples.demo.training import train
    from examples.demo.vocabulary import build_tokenizer

    words = (data / "vocab.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = build_tokenizer({word: i for i, word in enumerate(words)}, MAX_LENGTH)
    squad = read_beir(data / "squad")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = build_model(tokenizer, hidden_size, MAX_LENGTH, SEED)
        start.save_pretrained(str(folder / "start"), create_model_card=False)
        queries, passages = zip(*squad.pairs("train"), strict=True)
        settings = Settings(
            steps=steps,
            stock_steps=steps,
            batch_size=BATCH_SIZE,
            seed=SEED,
            device="cpu",
            bf16=False,
            learning_rate=LEARNING_RATE,
            query_regularizer_weight=QUERY_WEIGHT,
            document_regularizer_weight=DOCUMENT_WEIGHT,
        )
        losses = train(settings, "fused", {"query": list(queries), "passage": list(passages)}, folder)["losses"]
        shutil.copytree(folder / "trained", output / "model", dirs_exist_ok=True)
    unseen = dict.fromkeys(passage for _, passage in squad.pairs("test"))
    record = {"steps": steps, "seed": SEED, "first_loss": losses[0], "last_loss": losses[-1]}
    record |= _search(squad, output / "model", len(words))
    (output / "training.json").write_text(json.dumps(record) + "\n")
    # Written last, because this file is what marks the folder as complete.
    (output / "passages.json").write_text(json.dumps(list(unseen)))
    return record


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


def main() -> None:
    parser = options.plain(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with vocab.txt and squad/")
    parser.add_argument("--output", type=Path, default=text_model.FOLDER)
    args = parser.parse_args()
    print(f"{build(args.data, args.output)}; written to {args.output}")


if __name__ == "__main__":
    main()
