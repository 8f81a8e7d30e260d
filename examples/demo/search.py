"""Retrieval on the held-out pairs: the model and BM25, scored by the same code, and a few questions answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bm25s
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator
from torch import Tensor

from examples.demo.corpus import Pair

__all__ = ["QUESTIONS", "answer", "build_evaluator", "encode_passages", "evaluate_bm25", "evaluate_model"]

QUESTIONS = (
    "How do I write an XML tree to a file?",
    "silence log messages below a level",
    "Which function splits a tensor into chunks?",
)
DEPTH = 100
# Splits identifiers at underscores; English stop words are dropped. The best for BM25 of the variants tried.
BM25_WORD = r"(?u)[^\W_]+"


def build_evaluator(pairs: Sequence[Pair], batch_size: int) -> SparseInformationRetrievalEvaluator:
    """Every held-out passage is the corpus; each query has one relevant passage, its own."""
    ids = [str(i) for i in range(len(pairs))]
    return SparseInformationRetrievalEvaluator(
        queries={i: pair.query for i, pair in zip(ids, pairs, strict=True)},
        corpus={i: pair.passage for i, pair in zip(ids, pairs, strict=True)},
        relevant_docs={i: {i} for i in ids},
        batch_size=batch_size,
        write_csv=False,
    )


def encode_passages(model: SparseEncoder, pairs: Sequence[Pair], batch_size: int) -> Tensor:
    """Sparse ``[pairs, vocab]`` embeddings of all passages."""
    embeddings: Tensor = model.encode_document(
        [pair.passage for pair in pairs],
        batch_size=batch_size,
        convert_to_sparse_tensor=True,
        save_to_cpu=True,
        show_progress_bar=True,
    )
    return embeddings


def evaluate_model(
    evaluator: SparseInformationRetrievalEvaluator, model: SparseEncoder, passages: Tensor
) -> dict[str, float]:
    """nDCG@10, MRR@10 and the mean number of active terms, given the corpus's embeddings."""
    metrics = evaluator(model, corpus_embeddings=passages)
    return {
        "ndcg@10": float(metrics["dot_ndcg@10"]),
        "mrr@10": float(metrics["dot_mrr@10"]),
        "query_active_terms": float(metrics["query_active_dims"]),
        "passage_active_terms": float(metrics["corpus_active_dims"]),
    }


def evaluate_bm25(evaluator: SparseInformationRetrievalEvaluator) -> dict[str, float]:
    """bm25s (its defaults) on the same pairs, its rankings scored by the evaluator's own metric code."""
    retriever = bm25s.BM25()
    retriever.index(_words(evaluator.corpus), show_progress=False)
    depth = min(DEPTH, len(evaluator.corpus))
    found, scores = retriever.retrieve(_words(evaluator.queries), k=depth, show_progress=False)
    rankings: list[object] = [
        [{"corpus_id": evaluator.corpus_ids[i], "score": float(s)} for i, s in zip(row, row_scores, strict=True)]
        for row, row_scores in zip(found, scores, strict=True)
    ]
    metrics = evaluator.compute_metrics(rankings)
    return {"ndcg@10": float(metrics["ndcg@k"][10]), "mrr@10": float(metrics["mrr@k"][10])}


def answer(
    model: SparseEncoder, pairs: Sequence[Pair], passages: Tensor, questions: Sequence[str], top_terms: int = 8
) -> list[dict[str, Any]]:
    """The best passage of each question, with the heaviest terms of both and those they share."""
    queries = model.encode_query(
        list(questions), convert_to_sparse_tensor=True, save_to_cpu=True, show_progress_bar=False
    )
    scores, best = model.similarity(queries, passages).max(dim=1)
    answers = []
    for position, (question, score, i) in enumerate(zip(questions, scores.tolist(), best.tolist(), strict=True)):
        query = queries[position]
        answers.append(
            {
                "question": question,
                "name": pairs[i].name,
                "passage": pairs[i].passage,
                "score": score,
                "question_terms": model.decode(query, top_k=top_terms),
                "passage_terms": model.decode(passages[i], top_k=top_terms),
                "matching_terms": model.decode(model.intersection(query, passages[i]), top_k=top_terms),
            }
        )
    return answers


def _words(texts: list[str]) -> Any:
    return bm25s.tokenize(texts, token_pattern=BM25_WORD, stopwords="en", show_progress=False)
