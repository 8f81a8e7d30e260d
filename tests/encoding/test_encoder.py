"""``TextEncoder`` against the stock ``SparseEncoder``, and what it refuses."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding

from splade_kernels.encoding import loading
from splade_kernels.encoding.encoder import Encoded, TextEncoder, WeightError
from splade_kernels.encoding.errors import DataError, UsageError
from splade_kernels.encoding.options import EncoderOptions
from splade_kernels.encoding.output import SCHEMA
from tests.encoding.conftest import save
from tests.st_models import TEXTS, decoder_of, sparse_encoder

# Long ones among them, a blank one of each kind, and one text twice.
# log1p(9) in float32
TOP = float(torch.tensor(9.0).log1p())
MIXED = ["", *TEXTS, " ".join(TEXTS[:4]), " \n\t", " ".join(TEXTS[4:12]), TEXTS[3]]


def dense(found: Encoded, width: int) -> np.ndarray:
    out = np.zeros((len(found), width), np.float32)
    out[np.repeat(np.arange(len(found)), np.diff(found.offsets)), found.indices] = found.values
    assert np.count_nonzero(out) == len(found.values)
    return out


def rows(found: Encoded) -> list[tuple[list[int], list[float]]]:
    cuts = list(zip(found.offsets[:-1], found.offsets[1:], strict=True))
    return [(found.indices[a:b].tolist(), found.values[a:b].tolist()) for a, b in cuts]


def stock(folder: str, texts: list[str], *, query: bool = False, max_length: int | None = None, **call: Any) -> Any:
    """What the stock model returns, with zeros for blank texts."""
    model = SparseEncoder(folder, device="cpu")
    model.max_active_dims = None
    if max_length is not None:
        for module in model.modules():
            if getattr(module, "tokenizer", None) is not None:
                module.tokenizer.model_max_length = max_length
    method = model.encode_query if query else model.encode_document
    found = method(texts, convert_to_sparse_tensor=False, **call).numpy()
    found[[not text.strip() for text in texts]] = 0
    return found


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with its own limit of 6 terms, whose terms 40 to 79 always have one weight, the largest."""
    model = sparse_encoder()
    decoder = decoder_of(model)
    with torch.no_grad():
        decoder.weight = torch.nn.Parameter(decoder.weight.clone())
        decoder.weight[40:80] = 0
        decoder.bias[40:80] = 9.0
    language_model: Any = model.transformers_model
    language_model.config.tie_word_embeddings = False
    model.max_active_dims = 6
    return save(model, tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("prompt_name", [None, "long"])
@pytest.mark.parametrize("max_length", [None, 12])
def test_texts_are_encoded_as_the_stock_model_does(
    model_folder: str, query: bool, prompt_name: str | None, max_length: int | None
) -> None:
    """In the order of the texts, with the task's or the named prompt, and cut where the model would cut."""
    options = EncoderOptions(model_folder, query=query, prompt_name=prompt_name, max_length=max_length)
    encoder = TextEncoder(options)
    found = encoder(MIXED)
    expected = stock(model_folder, MIXED, query=query, prompt_name=prompt_name, max_length=max_length)
    np.testing.assert_allclose(dense(found, expected.shape[1]), expected, rtol=1e-5, atol=2e-6)
    assert encoder.vocabulary_size == expected.shape[1]
    assert encoder.prompt == SparseEncoder(model_folder).prompts[prompt_name or ("query" if query else "document")]
    assert (found.offsets.dtype, found.indices.dtype, found.values.dtype) == (np.int64, np.int32, np.float32)
    assert all((np.diff(ids) > 0).all() for ids, _ in rows(found))
    assert found.empty == 2 and found.offsets[0] == found.offsets[1] == 0
    limit = max_length or 64
    assert (encoder.max_length, encoder.dtype, encoder.device) == (limit, "float32", "cpu")
    lengths = [len(encoder.tokenizer.tokenize(f"{encoder.prompt}{text}")) + 2 for text in MIXED if text.strip()]
    assert found.truncated == sum(length > limit for length in lengths) > 0


def test_a_text_of_exactly_the_maximum_has_lost_nothing(model_folder: str) -> None:
    encoder = TextEncoder(EncoderOptions(model_folder, query=True))
    words = 64 - 2 - 2  # of the special tokens and the prompt
    exact = " ".join(["sea"] * words)
    assert encoder([exact]).truncated == 0
    assert encoder([exact, f"{exact} sea", f"{exact} sea"]).truncated == 2
    assert encoder.tokenizer.model_max_length == 64


def test_the_smaller_weights_go_first_and_ties_go_to_the_lowest_id(tied: str) -> None:
    """The model's own limit is the default; its method would choose among equal weights as it likes."""
    full = stock(tied, TEXTS)
    assert (full[:, 40:80] == TOP).all() and ((full > 0).sum(axis=1) > 50).all()
    own = TextEncoder(EncoderOptions(tied))
    assert own.max_active_dims == 6
    assert all(ids == [40, 41, 42, 43, 44, 45] and weights == [TOP] * 6 for ids, weights in rows(own(TEXTS)))
    for limit, weight in ((45, None), (45, 0.8), (45, TOP), (1000, 0.8)):
        encoder = TextEncoder(EncoderOptions(tied, max_active_dims=limit, min_weight=weight))
        for (ids, weights), row in zip(rows(encoder(TEXTS)), full, strict=True):
            order = [term for term in np.argsort(-row, kind="stable") if row[term] > 0]
            kept = [term for term in order if weight is None or row[term] >= weight][:limit]
            assert ids == sorted(kept)
            np.testing.assert_allclose(weights, row[ids], rtol=1e-5, atol=2e-6)


def test_a_weight_of_exactly_the_minimum_stays(tied: str) -> None:
    options = EncoderOptions(tied, max_active_dims=1000, min_weight=TOP)
    assert all(ids == list(range(40, 80)) for ids, _ in rows(TextEncoder(options)(TEXTS)))
    above = replace(options, min_weight=float(np.nextafter(np.float32(TOP), np.float32(10))))
    assert not len(TextEncoder(above)(TEXTS).indices)


def test_the_same_call_has_the_same_bits(model_folder: str) -> None:
    first, again = (TextEncoder(EncoderOptions(model_folder, batch_tokens=100)) for _ in range(2))
    found = [rows(encoder(MIXED)) for encoder in (first, first, again)]
    assert found[0] == found[1] == found[2]


def test_batches_are_of_so_many_tokens(model_folder: str) -> None:
    encoder = TextEncoder(EncoderOptions(model_folder, batch_tokens=100))
    shapes = []
    encoder.model[0].register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0]["input_ids"].shape))
    encoder(TEXTS)
    assert len(shapes) > 1 and all(batch * length <= 100 for batch, length in shapes)
    assert sum(batch for batch, _ in shapes) == len(TEXTS)


def test_blank_texts_are_not_run(model_folder: str) -> None:
    encoder = TextEncoder(EncoderOptions(model_folder))
    encoder.model[0].register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    for texts in ([], ["", " ", "\u3000\n"]):
        found = encoder(texts)
        assert found.offsets.tolist() == [0] * (len(texts) + 1)
        assert (found.empty, found.truncated, len(found.indices), len(found.values)) == (len(texts), 0, 0, 0)
        assert found.to_arrow([str(row) for row in range(len(texts))]).schema == SCHEMA


def test_an_arrow_table_holds_the_rows(model_folder: str) -> None:
    found = TextEncoder(EncoderOptions(model_folder))(MIXED)
    table = found.to_arrow([f"d{row}" for row in range(len(MIXED))])
    assert table.schema == SCHEMA
    assert table["id"].to_pylist() == [f"d{row}" for row in range(len(MIXED))]
    assert list(zip(table["indices"].to_pylist(), table["values"].to_pylist(), strict=True)) == rows(found)


def test_a_folder_of_splade_encoder_is_loaded(tmp_path: Path) -> None:
    from splade_kernels.integrations.transformers import SpladeEncoder
    from tests.st_models import backbone

    SpladeEncoder.from_pretrained(
        str(backbone("bert")), pooling_strategy="sum", activation_function="log1p_relu"
    ).save_pretrained(tmp_path)
    found = TextEncoder(EncoderOptions(str(tmp_path)))(MIXED)
    expected = stock(str(tmp_path), MIXED)
    np.testing.assert_allclose(dense(found, expected.shape[1]), expected, rtol=1e-5, atol=5e-6)


def test_each_task_takes_its_route(tmp_path: Path) -> None:
    """Queries go through a lookup that has no language model, with its own tokenizer and no special tokens."""
    document = sparse_encoder()
    static = SparseStaticEmbedding(tokenizer=document.tokenizer, frozen=True)
    with torch.no_grad():
        static.weight.copy_(torch.linspace(0.5, 2, len(static.weight)))
    model = SparseEncoder(modules=[Router.for_query_document([static], list(document.children()))], device="cpu")
    folder = save(model, tmp_path)
    long = " ".join(TEXTS)
    for query in (False, True):
        encoder = TextEncoder(EncoderOptions(folder, query=query, max_length=12))
        found = encoder([*MIXED, long])
        expected = stock(folder, [*MIXED, long], query=query, max_length=12)
        np.testing.assert_allclose(dense(found, expected.shape[1]), expected, rtol=1e-5, atol=2e-6)
        assert encoder.max_length == 12
        extra = 0 if query else 2
        lengths = [len(encoder.tokenizer.tokenize(text)) + extra for text in [*MIXED, long] if text.strip()]
        assert found.truncated == sum(length > 12 for length in lengths) > 0
    assert np.count_nonzero(expected[1]) == len(set(encoder.tokenizer.tokenize(MIXED[1])))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_loaded_as_such(model_folder: str, dtype: str) -> None:
    encoder = TextEncoder(EncoderOptions(model_folder, dtype=dtype))
    assert encoder.dtype == dtype and encoder.model.dtype == getattr(torch, dtype)
    found, expected = encoder(TEXTS), stock(model_folder, TEXTS)
    assert found.values.dtype == np.float32
    error = np.linalg.norm(dense(found, expected.shape[1]) - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 2e-2


def test_the_dtype_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.resolve_dtype("auto", "cpu") == "float32"
    for capability, expected in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert loading.resolve_dtype("auto", "cuda:0") == expected
        assert loading.resolve_dtype("float16", "cuda:0") == "float16"


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.resolve_device("auto") == loading.resolve_device("cpu") == "cpu"
    with pytest.raises(UsageError, match=r"device: expected one of the 0 CUDA devices .*, got 'cuda'"):
        loading.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [loading.resolve_device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
        "cpu",
    ]
    for name in ("cuda:2", "gpu", "cuda:x", ""):
        with pytest.raises(UsageError, match=f"device: expected .*, got {name!r}"):
            loading.resolve_device(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, "max_length: expected more than the 2 special tokens and at most 64, the model's own"),
        ({"max_length": 2}, "max_length: expected more than the 2 special tokens and at most 64"),
        ({"max_length": 0}, "max_length: expected an int of at least 1 or None, got 0"),
        ({"batch_tokens": 0}, "batch_tokens: expected an int of at least 1, got 0"),
        ({"batch_tokens": None}, "batch_tokens: expected an int of at least 1, got None"),
        ({"max_active_dims": True}, "max_active_dims: expected an int of at least 1 or None, got True"),
        ({"min_weight": float("nan")}, "min_weight: expected a finite number of at least 0 or None, got nan"),
        ({"min_weight": -1.0}, "min_weight: expected a finite number of at least 0 or None, got -1.0"),
        ({"dtype": "int8"}, "dtype: expected auto, float32, bfloat16, float16, got 'int8'"),
        ({"screening": "yes"}, "screening: expected auto, on, off, got 'yes'"),
        ({"prompt_name": "q"}, "prompt_name: expected one of 'query', 'document', 'long', got 'q'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused(model_folder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        TextEncoder(EncoderOptions(model_folder, **options))
    assert str(error.value).startswith(message) and error.value.status == 2


def test_screening_is_handed_on(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from splade_kernels.integrations import sentence_transformers as integration

    seen, fuse = [], integration.fuse
    monkeypatch.setattr(integration, "fuse", lambda model, *, screening: (seen.append(screening), fuse(model))[1])
    for name in ("auto", "on", "off"):
        TextEncoder(EncoderOptions(model_folder, screening=name))
    assert seen == ["auto", True, False]


def test_what_is_no_splade_model_is_refused(tmp_path: Path, model_folder: str) -> None:
    import huggingface_hub

    from tests.st_models import backbone

    dense_model = SentenceTransformer(modules=[Transformer(str(backbone())), Pooling(32)], device="cpu")
    dense_model.save_pretrained(str(tmp_path / "dense"), create_model_card=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for file in Path(model_folder).glob("*.json"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for name in ("dense", "empty", "broken", "missing"):
            with pytest.raises(DataError) as error:
                TextEncoder(EncoderOptions(str(tmp_path / name)))
            message = str(error.value)
            assert message.startswith(f"{tmp_path / name}: ") and "\n" not in message and error.value.status == 1


def test_a_weight_that_is_not_finite_is_an_error(model_folder: str) -> None:
    """Also where a minimum would drop it: NaN is not above any."""
    encoder = TextEncoder(EncoderOptions(model_folder, min_weight=0.1))
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            decoder_of(encoder.model).bias[17] = value
        with pytest.raises(WeightError) as error:
            encoder(["", "the sea", "the sky"])
        assert str(error.value) == f"text 1: expected finite weights, got {value} for vocabulary id 17"
        again = pickle.loads(pickle.dumps(error.value))  # engines send errors from process to process
        assert (again.row, str(again)) == (1, str(error.value))


def test_texts_are_str(model_folder: str) -> None:
    encoder = TextEncoder(EncoderOptions(model_folder))
    with pytest.raises(TypeError, match=r"texts: expected str, got NoneType at 1"):
        encoder(["a", None])  # type: ignore[list-item]


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    """transformers would fill it with random numbers, and say so in a table among its messages."""
    folder = Path(save(sparse_encoder(), tmp_path / "model"))
    (path,) = folder.rglob("model.safetensors")
    weights = load_file(path)
    kept = {name: weight for name, weight in weights.items() if "vocab_" not in name and "cls." not in name}
    assert 0 < len(kept) < len(weights)
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"the checkpoint lacks \d weights of \w+ForMaskedLM, which would be random: "):
        TextEncoder(EncoderOptions(str(folder)))
