"""What the tests of examples/train.py share: a small model, and a part of SQuAD in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.inputs import text_model
from examples.beir import read_beir

# Relative, as a user would name them.
DATA = Path(os.path.relpath(text_model.DATA))
PASSAGES = {"train": 12, "dev": 6, "test": 6}


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """No test of this folder may reach the hub, or wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def data() -> Path:
    """Whole collections, which are not part of the repository."""
    for needed in ("vocab.txt", "squad/corpus.jsonl", "scifact/corpus.jsonl"):
        if not (DATA / needed).is_file():
            pytest.skip(f"{DATA / needed} is not there")
    return DATA


@pytest.fixture(scope="session")
def tokenizer(data: Path) -> Any:
    tokenizer = pytest.importorskip("transformers").BertTokenizerFast(vocab=str(data / "vocab.txt"), do_lower_case=True)
    assert len(tokenizer) == 30522
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A DistilBERT whose head starts as the identity with a negative bias: a sparse lexical encoder, untrained."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer), dim=64, n_layers=2, n_heads=2, hidden_dim=128, initializer_range=0.05
    )
    model = transformers.DistilBertForMaskedLM(config)
    with torch.no_grad():
        model.vocab_transform.weight.copy_(torch.eye(64))
        model.vocab_projector.bias.fill_(-1.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def squad(tmp_path_factory: pytest.TempPathFactory, data: Path, tokenizer: Any) -> Path:
    """The first passages of each split of SQuAD, with all their questions."""
    folder = tmp_path_factory.mktemp("squad")
    (folder / "qrels").mkdir()
    whole = read_beir(data / "squad")
    passages: dict[str, None] = {}
    questions: dict[str, None] = {}
    for split, count in PASSAGES.items():
        chosen = list(dict.fromkeys(ids[0] for ids in whole.relevant[split].values()))[:count]
        rows = [(question, ids[0]) for question, ids in whole.relevant[split].items() if ids[0] in chosen]
        passages.update(dict.fromkeys(chosen))
        questions.update(dict.fromkeys(question for question, _ in rows))
        lines = ["query-id\tcorpus-id\tscore", *(f"{question}\t{passage}\t1" for question, passage in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    for name, ids, texts in (("corpus", passages, whole.corpus), ("queries", questions, whole.queries)):
        lines = [json.dumps({"_id": identifier, "text": texts[identifier]}) for identifier in ids]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        unknown = sum(tokenizer(texts[identifier])["input_ids"].count(tokenizer.unk_token_id) for identifier in ids)
        assert unknown == 0
    return folder
