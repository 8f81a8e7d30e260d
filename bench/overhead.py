"""What ``SpladeEncoder`` and ``fuse`` cost a call, beside the same computation by hand and in stock.

    python -m bench.overhead --output RESULT.json [--append] [--case bert ...] [--rounds 200]

The models have one narrow layer, so that what is added to a call shows. ``SpladeEncoder`` is compared with its model's
body and head transform and ``splade_pool`` called directly; in between, ``handed-over`` calls the model's own forward,
whose wrappers (output objects, configuration) are transformers' share of what is added. A fused ``SparseEncoder`` is
compared with the stock one. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import options
from bench.harness.result_file import Budget, Result, Row
from bench.tables.overhead import overhead_table
from splade_kernels import splade_pool

VOCABULARY, HIDDEN_SIZE, LENGTH = 100, 32, 8
Call = Callable[[], Tensor]


def tiny(architecture: str) -> Any:
    """A model of one layer with random weights."""
    import transformers

    model: Any
    size: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 80}
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    if architecture == "distilbert":
        size |= {"dim": HIDDEN_SIZE, "n_layers": 1, "n_heads": 2, "hidden_dim": 48}
        model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**size))
    elif architecture == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**size, **sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **sizes, num_key_value_heads=2))
    return model.eval()


def body(architecture: str, model: Any, **batch: Tensor) -> Any:
    """What the model gives to its decoder."""
    if architecture == "distilbert":
        hidden_states = model.distilbert(**batch).last_hidden_state
        return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_states)))
    if architecture == "bert":
        return model.cls.predictions.transform(model.bert(**batch).last_hidden_state)
    return model.model(**batch, use_cache=False).last_hidden_state


def calls(architecture: str) -> dict[str, Call]:
    """By variant; each is compared with the one before it."""
    from splade_kernels.integrations.transformers import SpladeEncoder

    model = tiny(architecture)
    decoder = model.get_output_embeddings()
    encoder = SpladeEncoder(model)
    ids = torch.arange(5, 5 + LENGTH).unsqueeze(0)
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    more = {"use_cache": False} if architecture == "llama" else {}

    def by_hand() -> Tensor:
        return splade_pool(body(architecture, model, **batch), decoder.weight, decoder.bias, mask)

    def handed_over() -> Tensor:
        assert encoder._hand_off is not None
        _, hidden_states = encoder._hand_off.collect(model, **batch, **more)
        return splade_pool(hidden_states, decoder.weight, decoder.bias, mask)

    return {"by-hand": by_hand, "handed-over": handed_over, "encoder": lambda: encoder(**batch)}


def sparse_calls() -> dict[str, Call]:
    """Stock and fused modules of sentence-transformers, without their tokenizer."""
    from sentence_transformers import SparseEncoder

    from bench.inputs import encoders
    from splade_kernels.integrations.sentence_transformers import fuse

    folder = encoders.build(encoders.Size("distilbert", 1, HIDDEN_SIZE, 1000), 2 * LENGTH)
    stock, fused = (SparseEncoder(str(folder), device="cpu").eval() for _ in range(2))
    fuse(fused)
    ids = torch.arange(5, 5 + LENGTH).unsqueeze(0)

    def call(model: nn.Module) -> Tensor:
        found: Tensor = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]
        return found

    return {"stock": lambda: call(stock), "fused": lambda: call(fused)}


CASES: dict[str, Callable[[], dict[str, Call]]] = {
    **{name: partial(calls, name) for name in ("distilbert", "bert", "llama")},
    "sentence-transformers": sparse_calls,
}


def measure(case: str, rounds: int) -> list[Row]:
    """All variants of a case, in interleaved rounds on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(case, rounds)
    finally:
        torch.set_num_threads(threads)


def _measure(case: str, rounds: int) -> list[Row]:
    with torch.no_grad():
        found = CASES[case]()
        first, *_ = found
        expected = found[first]()
        for name, call in found.items():
            exact = first == "by-hand"
            wrong = not torch.equal(call(), expected) if exact else not torch.allclose(call(), expected, atol=1e-6)
            if wrong:
                return [_row(case, name, f"red: differs from {first}")]
        for _ in range(10):
            for call in found.values():
                call()
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        for _ in range(rounds):
            for name, call in found.items():
                wall, processor = time.perf_counter(), time.thread_time()
                call()
                samples[name].append((time.thread_time() - processor, time.perf_counter() - wall))
    rows = []
    for name, taken in samples.items():
        row = _row(case, name, "measured")
        row |= {"median": statistics.median(wall for _, wall in taken), "rounds": rounds, "clock": "perf_counter"}
        pairs = list(zip(taken, samples[first], strict=True))
        for number, clock in enumerate(("added_cpu", "added_wall")):
            added = statistics.median(mine[number] - its[number] for mine, its in pairs)
            row[clock] = None if name == first else added
        rows.append(row)
    return rows


def _row(case: str, variant: str, status: str) -> Row:
    shape = f"1 layer, D{HIDDEN_SIZE}, one text of {LENGTH} tokens"
    return {"case": case, "shape": shape, "precision": "float32", "job": "call", "variant": variant, "status": status}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options.parser(__doc__, required=True)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args(arguments)
    result, budget = Result("overhead", "bench.overhead", args.output, append=args.append), Budget(args.budget)
    for case in args.case:
        result.attempt(budget, {"case": case, "precision": "float32", "job": "call"}, measure, case, args.rounds)
    result.finish("by-hand", "handed-over", "encoder", "stock", "fused")
    print(overhead_table(result.by_device()[-1]))
    return result.content


if __name__ == "__main__":
    main()
