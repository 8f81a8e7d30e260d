"""``SpladeEncoder`` from folders and into them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from splade_kernels.integrations import _folder
from splade_kernels.integrations.transformers import SpladeEncoder
from tests import without_package
from tests.integrations.test_st_causal import causal_encoder
from tests.lm_models import HEADS, batch, folder, language_model
from tests.st_models import TEXTS, sparse_encoder, tokenizer

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "masked": ("bert", {}),
    "causal": ("llama", {}),
    "bidirectional": ("llama", {"is_causal": False}),
}
WRITTEN = ("modules.json", "sentence_bert_config.json", "1_SpladePooling/config.json")


def embed(encoder: SpladeEncoder, side: str = "right") -> Tensor:
    with torch.no_grad():
        return encoder(**batch(TEXTS, side=side))


def encode(model: SparseEncoder) -> Tensor:
    return model.encode(TEXTS, batch_size=len(TEXTS), convert_to_sparse_tensor=False)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def contents(path: Path) -> dict[str, Any]:
    read = {name: json.loads((path / name).read_text()) for name in WRITTEN}
    # sentence-transformers adds the width once the model has run.
    read[WRITTEN[-1]].pop("embedding_dimension", None)
    return read


@pytest.mark.parametrize(("pooling_strategy", "activation_function"), HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_sentence_transformers_loads_what_was_saved(
    name: str, pooling_strategy: str, activation_function: str, tmp_path: Path
) -> None:
    family, config = MODELS[name]
    encoder = SpladeEncoder(
        language_model(family, **config), pooling_strategy=pooling_strategy, activation_function=activation_function
    )
    encoder.save_pretrained(tmp_path, tokenizer())
    expected = embed(encoder)
    assert_close(embed(encoder, "left"), expected) if family == "llama" else None
    loaded = SparseEncoder(str(tmp_path), device="cpu")
    assert_close(encode(loaded), expected)
    loaded.save_pretrained(str(tmp_path / "theirs"))
    assert contents(tmp_path / "theirs") == contents(tmp_path)
    again = SpladeEncoder.from_pretrained(tmp_path / "theirs")
    assert (again.pooling_strategy, again.activation_function) == (pooling_strategy, activation_function)
    assert torch.equal(embed(again), expected)


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_the_files_are_those_of_sentence_transformers(name: str, tmp_path: Path) -> None:
    model = sparse_encoder("bert") if name == "masked" else causal_encoder()
    model.save_pretrained(str(tmp_path / "theirs"))
    encoder = SpladeEncoder(language_model(MODELS[name][0]))
    encoder.save_pretrained(tmp_path / "ours", tokenizer())
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    ours, theirs = (
        json.loads((tmp_path / whose / "config_sentence_transformers.json").read_text()) for whose in ("ours", "theirs")
    )
    assert ours.items() <= theirs.items()
    # What it adds are versions and its defaults.
    assert {key for key in theirs if theirs[key] and key not in ours} <= {
        "__version__",
        "prompts",
        "similarity_fn_name",
    }
    assert not any(theirs["prompts"].values())


def test_gpt2_depends_on_the_side_of_the_padding(tmp_path: Path) -> None:
    """sentence-transformers pads causal models on the left and passes no positions, which GPT-2 counts."""
    encoder = SpladeEncoder(language_model("gpt2"))
    encoder.save_pretrained(tmp_path, tokenizer())
    loaded = encode(SparseEncoder(str(tmp_path), device="cpu"))
    assert (embed(encoder) - loaded).abs().max() > 1e-2
    assert_close(embed(encoder, "left"), loaded)


def test_the_tokenizer_is_found_where_the_model_came_from(tmp_path: Path) -> None:
    encoder = SpladeEncoder(language_model("bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.save_pretrained(tmp_path)
    assert_close(encode(SparseEncoder(str(tmp_path), device="cpu")), embed(encoder))


def test_without_a_tokenizer_there_is_one_warning_and_a_folder_for_transformers(tmp_path: Path) -> None:
    configuration = AutoConfig.from_pretrained(folder("bert")).to_dict()
    model = BertForMaskedLM(BertConfig(**configuration | {"_name_or_path": ""})).eval()
    assert model.name_or_path == ""
    encoder = SpladeEncoder(model, pooling_strategy="sum")
    with pytest.warns(UserWarning, match="without a tokenizer, for transformers alone") as warned:
        encoder.save_pretrained(tmp_path)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(**batch()).logits, model(**batch()).logits)


def test_a_class_of_ones_own_is_saved_as_what_it_derives_from(tmp_path: Path) -> None:
    class Mine(BertForMaskedLM):
        pass

    encoder = SpladeEncoder(Mine.from_pretrained(folder("bert")))
    encoder.save_pretrained(tmp_path)
    assert contents(tmp_path)["sentence_bert_config.json"]["transformer_task"] == "fill-mask"
    assert_close(encode(SparseEncoder(str(tmp_path), device="cpu")), embed(encoder))


@pytest.mark.slow
def test_saved_folders_load_without_this_package(tmp_path: Path) -> None:
    folders, expected = [], []
    for name, (family, config) in MODELS.items():
        encoder = SpladeEncoder(language_model(family, **config), pooling_strategy="sum")
        encoder.save_pretrained(tmp_path / name, tokenizer())
        folders.append(tmp_path / name)
        expected.append(embed(encoder))
    torch.testing.assert_close(without_package.encode(folders, TEXTS, tmp_path), expected, rtol=1e-5, atol=1e-6)


# from_pretrained


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", AutoModelForMaskedLM), ("xlm-roberta", AutoModelForMaskedLM), ("qwen3", AutoModelForCausalLM)],
)
def test_the_class_is_that_of_the_configuration(family: str, kind: Any) -> None:
    encoder = SpladeEncoder.from_pretrained(folder(family))
    assert type(encoder.model) is type(kind.from_pretrained(folder(family)))
    assert (encoder.pooling_strategy, encoder.activation_function) == ("max", "relu")
    assert not encoder.model.training


def test_other_architectures_are_named(tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.architectures: expected .*got \['BertModel'\]"):
        SpladeEncoder.from_pretrained(tmp_path)


def test_saved_options_unless_others_are_given(tmp_path: Path) -> None:
    encoder = SpladeEncoder(language_model("bert"), pooling_strategy="sum", activation_function="log1p_relu")
    encoder.save_pretrained(tmp_path)
    loaded = SpladeEncoder.from_pretrained(str(tmp_path), screening=False, backend="torch")
    assert (loaded.pooling_strategy, loaded.activation_function) == ("sum", "log1p_relu")
    assert (loaded.screening, loaded.backend) == (False, "torch")
    loaded = SpladeEncoder.from_pretrained(tmp_path, pooling_strategy="max")
    assert (loaded.pooling_strategy, loaded.activation_function) == ("max", "log1p_relu")
    loaded = SpladeEncoder.from_pretrained(tmp_path, activation_function="relu")
    assert (loaded.pooling_strategy, loaded.activation_function) == ("sum", "relu")
    with pytest.raises(ValueError, match="pooling_strategy"):
        SpladeEncoder.from_pretrained(tmp_path, pooling_strategy="mean")


def test_a_pooling_in_another_place_has_to_be_given(tmp_path: Path) -> None:
    """As in the folder of a Router, or of a dense model."""
    SpladeEncoder(language_model("bert")).save_pretrained(tmp_path)
    shutil.move(tmp_path / "1_SpladePooling", tmp_path / "document_1_SpladePooling")
    with pytest.raises(ValueError, match=r"expected 1_SpladePooling/config\.json beside modules\.json.*pass pooling_"):
        SpladeEncoder.from_pretrained(tmp_path, pooling_strategy="sum")
    given = SpladeEncoder.from_pretrained(tmp_path, pooling_strategy="sum", activation_function="relu")
    assert given.pooling_strategy == "sum"


@pytest.mark.parametrize("kind", ["Normalize", "SparseAutoEncoder"])
def test_modules_after_the_pooling_are_not_left_out_in_silence(kind: str, tmp_path: Path) -> None:
    transformer, pooling = sparse_encoder("bert")
    after = Normalize() if kind == "Normalize" else SparseAutoEncoder(len(tokenizer()), 16, k=4)
    SparseEncoder(modules=[transformer, pooling, after], device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=rf"modules\.json names [\w.]+\.{kind}, which .* leave out: pass pooling_"):
        SpladeEncoder.from_pretrained(tmp_path)
    assert_close(
        embed(SpladeEncoder.from_pretrained(tmp_path, pooling_strategy="max", activation_function="relu")),
        embed(SpladeEncoder(language_model("bert"))),
    )


def test_a_model_in_a_subfolder(tmp_path: Path) -> None:
    encoder = SpladeEncoder(language_model("bert"), pooling_strategy="sum")
    encoder.save_pretrained(tmp_path / "sub", tokenizer())
    language_model("llama").save_pretrained(tmp_path)
    loaded = SpladeEncoder.from_pretrained(tmp_path, subfolder="sub")
    assert type(loaded.model) is type(encoder.model)
    assert torch.equal(embed(loaded), embed(encoder))
    for name in WRITTEN:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.move(tmp_path / "sub" / name, tmp_path / name)
    assert torch.equal(embed(SpladeEncoder.from_pretrained(tmp_path, subfolder="sub")), embed(encoder))


def test_options_that_cannot_be_looked_for_have_to_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(_folder, "cached_file", unreachable)
    with pytest.raises(OSError, match=r"1_SpladePooling/config\.json: pass pooling_strategy.*no connection"):
        SpladeEncoder.from_pretrained(folder("bert"))
    SpladeEncoder.from_pretrained(folder("bert"), pooling_strategy="max", activation_function="relu")


def test_arguments_reach_the_model() -> None:
    encoder = SpladeEncoder.from_pretrained(folder("llama"), dtype=torch.bfloat16, attn_implementation="eager")
    assert encoder.model.dtype == torch.bfloat16
    assert encoder.config._attn_implementation == "eager"
    assert encoder(**batch()).dtype == torch.bfloat16
    config = AutoConfig.from_pretrained(folder("llama"), is_causal=False)
    assert getattr(config, "is_causal", None) is None, "transformers sets by keyword what the configuration has already"
    config.is_causal = False
    encoder = SpladeEncoder.from_pretrained(folder("llama"), config=config)
    assert_close(embed(encoder), embed(SpladeEncoder(language_model("llama", is_causal=False))))
