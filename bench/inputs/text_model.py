"""The small SPLADE model trained on text: what random numbers cannot show are the margins of real logits.

``python -m bench.screening_model`` trains it and writes it to ``FOLDER``, with unseen passages. The cases that need it
are left out where that folder is absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "outputs" / "screening-model"
# Text that lies beside the repository: ``vocab.txt`` and ``squad/``, as ``bench.screening_model --data`` takes them.
DATA = Path(__file__).parents[3] / "shared" / "data"
VOCABULARY = DATA / "vocab.txt"


def why_absent(subject: Any) -> str | None:
    """Why a case or corpus has no inputs here, or None."""
    if getattr(subject, "reads_data", False):
        missing = [path for path in (VOCABULARY, DATA / "squad" / "corpus.jsonl") if not path.is_file()]
        return f"no text here: expected {'/'.join(missing[0].parts[-3:])} beside the repository" if missing else None
    if not getattr(subject, "from_text", False) or (FOLDER / "passages.json").is_file():
        return None
    return "no trained model here: python -m bench.screening_model --data DIR makes it"


def note(subject: Any, run: dict[str, Any]) -> None:
    """Put what is known of the model into a run that measures on it."""
    if getattr(subject, "from_text", False):
        run["trained_model"] = training_record()


def training_record() -> dict[str, Any]:
    """Steps, seed, losses, nDCG@10 and the share of the vocabulary that is active in a passage."""
    record: dict[str, Any] = json.loads((FOLDER / "training.json").read_text())
    return record


def describe(runs: Iterable[dict[str, Any]]) -> list[str]:
    """One sentence for a document on each model that these runs measured on."""
    said = []
    for record in [run["trained_model"] for run in runs if "trained_model" in run]:
        seed = f", seed {record['seed']}" if "seed" in record else ""
        said.append(
            f"The model on text: {record['steps']} steps{seed}; over unseen passages nDCG@10 {record['ndcg@10']:.3f}, "
            f"{record['passage_active_share']:.2%} of the vocabulary active in a passage."
        )
    return list(dict.fromkeys(said))


def squad_passages() -> list[str]:
    """All passages of SQuAD, in the order of its file."""
    from examples.beir import read_beir

    return list(dict.fromkeys(read_beir(DATA / "squad").corpus.values()))


def passages() -> list[str]:
    texts: list[str] = json.loads((FOLDER / "passages.json").read_text())
    return texts


def load(device: torch.device | str = "cpu") -> Any:
    """The trained model as a stock ``SparseEncoder``."""
    from sentence_transformers import SparseEncoder

    return SparseEncoder(str(FOLDER / "model"), device=str(device)).eval()


def decoder_inputs(lengths: Tensor, length: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The decoder's input for unseen passages, and its parameters: ``(hidden [B, S, D], weight [V, D], bias [V])``.

    The b-th text is the next passage of at least ``lengths[b]`` tokens, cut to that many; the vocabulary is cut to its
    first ``vocab_size`` entries. Too few such passages are an error.
    """
    model = load()
    tokens = iter(model.tokenizer(passages(), truncation=True, max_length=length)["input_ids"])
    chosen: list[list[int]] = []
    for wanted in lengths.tolist():
        ids = next((ids for ids in tokens if len(ids) >= wanted), None)
        if ids is None:
            raise ValueError(f"expected {len(lengths)} passages of up to {length} tokens, got {len(chosen)}")
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
