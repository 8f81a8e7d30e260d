"""The encoder of a SPLADE model in int8 by ONNX Runtime, with this package's head on its hidden states.

The masked language model is exported without its decoder (``nn.Identity`` stands in its place), so what the session
returns are hidden states, and ``SpladeHead`` computes the embeddings from them: the logits never exist. Only the head
is exact. The int8 encoder is an approximation, and this program measures how good a one: its embeddings, and those of
ONNX Runtime's int8 with the decoder inside, are compared with the float32 model's, and searched with.

    python -m examples.onnx_encoder --model outputs/screening-model/model --data path/to/beir/folder
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator
from torch import Tensor, nn

from bench.harness.environment import command, describe
from bench.harness.result_file import write
from bench.inputs import text_model
from bench.tables.markdown import machine, replace_block, table
from examples.beir import BeirFolder, InputError, read_beir
from splade_kernels import SpladeHead, csr
from splade_kernels.integrations.sentence_transformers import encode_sparse, fuse, unfuse

INPUTS = ("input_ids", "attention_mask")
# Passages whose embeddings are compared entry by entry.
COMPARED = 512
DEPTH = 10
BEGIN, END = "<!-- onnx: python -m examples.onnx_encoder -->", "<!-- onnx end -->"
VARIANTS = {
    "torch": "float32 in PyTorch",
    "onnx-encoder-float32": "float32 encoder, exact head",
    "onnx-int8": "int8 with the decoder inside",
    "onnx-encoder": "int8 encoder, exact head",
}


class _Traced(nn.Module):
    """A masked language model as the exporter wants it: tensors in, one tensor out."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output: tuple[Tensor, ...] = self.language_model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=False
        )
        return output[0]


@contextmanager
def _without_decoder(language_model: Any) -> Iterator[None]:
    """In its place an identity, put there by name: the setter of some models wants a bias."""
    decoder = language_model.get_output_embeddings()
    (name,) = [name for name, module in language_model.named_modules() if module is decoder]
    language_model.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        language_model.set_submodule(name, decoder)


def export(model: SparseEncoder, path: Path, *, decoder: bool = False) -> None:
    """Write the model in float32, for any batch and length; without ``decoder`` it returns hidden states."""
    language_model = unfuse(model).eval().cpu().transformers_model
    features = model.preprocess(["a text", "another and longer one"])
    axes = {0: "batch", 1: "length"}
    traced = _Traced(language_model).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of shapes that the model checks
        # By tracing: the exporter that goes through torch.export makes the same products, in half a minute.
        options: dict[str, Any] = {
            "input_names": list(INPUTS),
            "output_names": ["output"],
            "dynamic_axes": dict.fromkeys([*INPUTS, "output"], axes),
            "dynamo": False,
        }
        arguments = tuple(features[name] for name in INPUTS)
        if decoder:
            torch.onnx.export(traced, arguments, str(path), **options)
        else:
            with _without_decoder(language_model):
                torch.onnx.export(traced, arguments, str(path), **options)


def quantise(source: Path, target: Path) -> None:
    """All products with weights in int8, a scale for each weight; activations are quantised as they come.

    Signed weights where the CPU has VNNI, which is fastest with those; without it their products are added in 16 bits,
    which saturate, so that weights are unsigned there, as ONNX Runtime advises.
    """
    signed = torch.cpu._is_vnni_supported()
    quantize_dynamic(source, target, weight_type=QuantType.QInt8 if signed else QuantType.QUInt8)


def serve(model: SparseEncoder, path: Path, *, decoder: bool = False) -> SparseEncoder:
    """Have ``model`` compute with the exported encoder, in place; its ``encode`` and ``encode_sparse`` stay.

    On the two instances ``forward`` is replaced, that of the Transformer module by the session's and, unless the
    ``decoder`` is in it, that of the pooling by an exact head with the model's own decoder.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    pooling: Any = model[1]

    def encoder(features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        (found,) = session.run(None, {name: features[name].numpy() for name in INPUTS})
        return features | {"token_embeddings": torch.from_numpy(found)}

    model[0].forward = encoder
    if not decoder:
        linear: Any = unfuse(model).transformers_model.get_output_embeddings()
        options_of_head = {name: getattr(pooling, name) for name in ("pooling_strategy", "activation_function")}
        head = SpladeHead.from_linear(linear, **options_of_head).float()

        def pool(features: dict[str, Any]) -> dict[str, Any]:
            embeddings = head(features["token_embeddings"], features["attention_mask"])
            return features | {"sentence_embedding": embeddings}

        pooling.forward = pool
    return model


def load(model: Path, name: str, folder: Path) -> SparseEncoder:
    """The model as the variant ``name``, with what has been exported to ``folder``."""
    loaded = SparseEncoder(str(model), device="cpu")
    if name == "torch":
        return fuse(loaded)
    file = {"onnx-encoder-float32": "encoder.onnx", "onnx-int8": "whole.int8.onnx", "onnx-encoder": "encoder.int8.onnx"}
    return serve(loaded, folder / file[name], decoder=name == "onnx-int8")


def export_all(model: Path, folder: Path) -> None:
    """Write the encoder, and the model with its decoder, in float32 and in int8."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = SparseEncoder(str(model), device="cpu")
    for name, decoder in (("encoder", False), ("whole", True)):
        export(loaded, folder / f"{name}.onnx", decoder=decoder)
        quantise(folder / f"{name}.onnx", folder / f"{name}.int8.onnx")


def compare(found: Tensor, exact: Tensor) -> dict[str, float]:
    """How far dense ``[B, V]`` embeddings are from exact ones: ``‖found - exact‖ / ‖exact‖`` over all, and the mean
    share that active terms of both have of those of either."""
    both, either = (found > 0) & (exact > 0), (found > 0) | (exact > 0)
    overlap = both.sum(dim=1) / either.sum(dim=1).clamp(min=1)
    return {
        "relative_error": float((found - exact).norm() / exact.norm()),
        "support_overlap": float(overlap.mean()),
    }


def ndcg(model: SparseEncoder, data: BeirFolder, split: str, passages: Tensor) -> float:
    """nDCG@10 of the split's queries over all passages, by the evaluator of sentence-transformers."""
    relevant = {query: set(found) for query, found in data.relevant[split].items()}
    queries = {name: data.queries[name] for name in relevant}
    ids = list(data.corpus)
    embedded = csr.join(encode_sparse(model, list(queries.values()), task="query"))
    scores, places = csr.search(embedded, passages, k=DEPTH)
    rankings = [
        [{"corpus_id": ids[place], "score": score} for place, score in zip(*row, strict=True)]
        for row in zip(places.tolist(), scores.tolist(), strict=True)
    ]
    evaluator = SparseInformationRetrievalEvaluator(queries, data.corpus, relevant, write_csv=False)
    return float(evaluator.compute_metrics(rankings)["ndcg@k"][DEPTH])


def measure(model: Path, data: BeirFolder, split: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each variant; the float32 encoder with the exact head is compared, but not searched with."""
    texts = list(data.corpus.values())
    exact, rows = None, []
    for name in VARIANTS:
        encoder = load(model, name, folder)
        some = csr.join(encode_sparse(encoder, texts[:COMPARED], task="document")).to_dense()
        exact = some if exact is None else exact
        row: dict[str, Any] = {"variant": name, **compare(some, exact), "ndcg@10": None}
        if name != "onnx-encoder-float32":
            passages = csr.join(encode_sparse(encoder, texts, task="document"))
            row["ndcg@10"] = ndcg(encoder, data, split, passages)
        print(row, flush=True)
        rows.append(row)
    return rows


def render(result: dict[str, Any]) -> str:
    """The table of a result, and where it comes from."""
    rows = [["", "relative error", "support overlap", "nDCG@10"]]
    for row in result["rows"]:
        searched = "-" if row["ndcg@10"] is None else f"{row['ndcg@10']:.3f}"
        error = f"{row['relative_error']:.1%}" if row["relative_error"] > 1e-4 else f"{row['relative_error']:.0g}"
        rows.append([VARIANTS[row["variant"]], error, f"{row['support_overlap']:.3f}", searched])
    environment, model = result["environment"], " ".join(text_model.describe([result]))
    note = (
        f"Error and overlap over the first {min(COMPARED, result['passages'])} of {result['passages']:,} passages, "
        f"nDCG@10 of {result['queries']} queries ({result['split']}) over all. {model} "
        f"{machine(environment)}; commit {environment['commit']}, `{result['command']}`."
    )
    return f"{table(rows)}\n\n{note}"


def block(result: Path) -> str:
    """What a document shows of a result file."""
    shown = render(json.loads(result.read_text())) if result.is_file() else "Not measured."
    return "\n\n".join([BEGIN, shown, END])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a SPLADE model (fill-mask, SpladePooling)")
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder to search in")
    parser.add_argument("--split", default="test", help="the queries: qrels/SPLIT.tsv (default: test)")
    parser.add_argument("--output", type=Path, default=Path("outputs/onnx"), help="gets the ONNX files and result.json")
    parser.add_argument("--document", type=Path, help="docs/onnx.md: write its block and docs/onnx/result.json too")
    args = parser.parse_args(arguments)
    data = read_beir(args.data)
    if args.split not in data.relevant:
        raise InputError(f"--split: expected one of {', '.join(data.relevant)}, got {args.split!r}")
    export_all(args.model, args.output)
    record = args.model.parent / "training.json"  # where bench.screening_model has trained it
    trained = {"trained_model": json.loads(record.read_text())} if record.is_file() else {}
    result = {
        "command": command("examples.onnx_encoder"),
        "environment": describe(),
        **trained,
        "split": args.split,
        "passages": len(data.corpus),
        "queries": len(data.relevant[args.split]),
        "rows": measure(args.model, data, args.split, args.output),
    }
    write(args.output / "result.json", result)
    print(render(result))
    if args.document:
        path = args.document.with_suffix("") / "result.json"
        write(path, result)
        args.document.write_text(replace_block(args.document.read_text(), block(path)))


if __name__ == "__main__":
    main()
