"""``estimate``: the formula of memory, its arguments and its table. Held against measurements in
``tests/examples/test_long_documents.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import splade_kernels as sk
from bench.inputs import language_models
from bench.inputs.language_models import Shape
from splade_kernels.memory import parse_bytes, table
from splade_kernels.memory_terms import Setup, step_terms
from splade_kernels.model_sizes import ModelSizes

SIZES = {
    "block": "bert", "layers": 6, "hidden_size": 768, "intermediate_size": 3072, "heads": 12, "vocab_size": 30522
}  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "llama"])
def test_parameters_are_those_of_the_model(family: str) -> None:
    shape = Shape(family, 3, 128, 384, 4, 1000, 1, 64)
    model = language_models.model(shape)
    found = ModelSizes.of(model.config)
    assert found.parameters == pytest.approx(sum(parameter.numel() for parameter in model.parameters()), rel=0.02)
    assert ModelSizes.of(model) == found


def test_the_widths_of_electra_and_qwen3() -> None:
    from transformers import ElectraConfig, Qwen3Config

    electra = ModelSizes.of(ElectraConfig(embedding_size=128, hidden_size=256))
    assert (electra.width, electra.attention_width) == (128, 256)
    qwen = ModelSizes.of(Qwen3Config(hidden_size=1024, head_dim=128, num_attention_heads=16, num_key_value_heads=8))
    assert (qwen.attention_width, qwen.key_value_width) == (2048, 1024)


def test_local_attention() -> None:
    from transformers import MistralConfig, ModernBertConfig

    modernbert = ModelSizes.of(ModernBertConfig(num_hidden_layers=6, local_attention=128))
    assert (modernbert.window, modernbert.local_layers) == (128, 4)
    mistral = ModelSizes.of(MistralConfig(num_hidden_layers=6, sliding_window=4096))
    assert (mistral.window, mistral.local_layers) == (4096, 6)
    assert ModelSizes.of(MistralConfig(sliding_window=None)).local_layers == 0


def test_the_batch_is_the_largest_that_fits() -> None:
    rows = sk.estimate(SIZES, "24GiB", lengths=(128, 2048), autocast=torch.bfloat16)
    assert [(row.length, row.head, row.checkpointing) for row in rows] == [
        (length, head, checkpointed)
        for length in (128, 2048)
        for head in ("stock", "fused")
        for checkpointed in (False, True)
    ]
    room = 23 * 2**30
    for row in rows:
        setup = Setup(autocast="bfloat16")
        needed = [
            step_terms(SIZES, row.batch + more, row.length, row.head, setup, checkpointing=row.checkpointing).peak
            for more in (0, 1)
        ]
        assert needed[0] == pytest.approx(row.bytes, abs=1)
        assert needed[0] <= room < needed[1]
    batches = {(row.length, row.head, row.checkpointing): row.batch for row in rows}
    for length in (128, 2048):
        assert batches[length, "fused", False] > batches[length, "stock", False]
        assert batches[length, "fused", True] > 4 * batches[length, "stock", True]


def test_where_not_even_one_text_fits() -> None:
    (row,) = sk.estimate(SIZES, "2GiB", lengths=(8192,), heads=("stock",), checkpointing=(True,))
    assert row.batch == 0
    assert row.bytes > 2**30


def test_inference_has_no_checkpointing_and_takes_less() -> None:
    (inference,) = sk.estimate(SIZES, "8GiB", lengths=(512,), heads=("fused",), training=False)
    training, _ = sk.estimate(SIZES, "8GiB", lengths=(512,), heads=("fused",))
    assert not inference.checkpointing
    assert inference.batch > training.batch


def test_eager_attention_keeps_squares_and_flash_none() -> None:
    terms = {
        attention: step_terms(SIZES, 2, 4096, "fused", Setup(attention=attention, padded=True))
        for attention in ("eager", "sdpa", "flash_attention_2")
    }
    assert terms["eager"].saved - terms["flash_attention_2"].saved == pytest.approx(6 * 12 * 2 * 4096**2 * 4, rel=0.05)
    assert terms["sdpa"].saved - terms["flash_attention_2"].saved == 6 * 2 * 4096**2 * 4 + 2 * 4096**2


def test_the_stock_head_holds_four_times_the_logits() -> None:
    terms = step_terms(SIZES, 4, 512, "stock", Setup())
    assert terms.head == pytest.approx(4 * 4 * 4 * 512 * 30522, rel=0.01)
    autocast = step_terms(SIZES, 4, 512, "stock", Setup(autocast="bfloat16"))
    assert autocast.head == pytest.approx(18 * 4 * 512 * 30522, rel=0.01)


def test_the_table() -> None:
    rows = sk.estimate(SIZES, "24GiB", lengths=(1024,), checkpointing=(True,))
    lines = table(rows).splitlines()
    assert lines[0] == "| length | stock, checkpointing | fused, checkpointing |"
    assert [int(cell.replace(",", "")) for cell in lines[2].strip("|").split("|")] == [
        1024,
        *(row.batch for row in rows),
    ]


def test_bytes() -> None:
    assert [parse_bytes("memory", text) for text in (7, "24GiB", "1.5 gib", "80GB", "12")] == [
        7, 24 * 2**30, 3 * 2**29, 80 * 10**9, 12
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": "much"}, "memory: expected bytes, or a text such as '24GiB', got 'much'"),
        ({"memory": -1}, "memory: expected bytes"),
        ({"lengths": (0,)}, "lengths: expected at least 1, got 0"),
        ({"heads": ("best",)}, "heads: expected one of 'stock', 'fused', got 'best'"),
        ({"dtype": torch.float64}, "dtype: expected one of .*, got 'float64'"),
        ({"autocast": "float32"}, "autocast: expected one of 'bfloat16', 'float16', got 'float32'"),
        ({"attention": "flex"}, "attention: expected one of .*, got 'flex'"),
        ({"optimizer": "sgd"}, "optimizer: expected one of 'adamw', got 'sgd'"),
        ({"device": "tpu"}, "device: expected one of 'cuda', 'cpu', got 'tpu'"),
        ({"model": SIZES | {"depth": 1}}, "model: expected sizes among .*, got depth"),
        ({"model": {"block": "bert"}}, "model: expected the sizes .*, got none of layers"),
        ({"model": SIZES | {"block": "t5"}}, "block: expected one of .*, got 't5'"),
        ({"model": SIZES | {"layers": 0}}, "layers: expected at least 1, got 0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": SIZES, "memory": "24GiB"} | change
    with pytest.raises(ValueError, match=message):
        sk.estimate(**arguments)


def test_a_model_of_an_unknown_type() -> None:
    from transformers import T5Config

    with pytest.raises(ValueError, match="model: expected one of the types bert, .*, got 't5'"):
        sk.estimate(T5Config(), "24GiB")
    with pytest.raises(TypeError, match="model: expected ModelSizes, a mapping or a configuration"):
        sk.estimate(3, "24GiB")
