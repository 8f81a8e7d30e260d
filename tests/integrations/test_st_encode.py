"""``encode_sparse`` gives what the model's own methods give, as CSR, in batches with little padding."""

from __future__ import annotations

import logging
import queue
import random

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding

from splade_kernels.integrations import _encode
from splade_kernels.integrations.sentence_transformers import encode_sparse, fuse
from tests.st_models import TEXTS, sparse_encoder

# Texts of 2 to 64 tokens in random order, half of short and half of long words: their characters tell little of their
# tokens. Some have equal lengths, and one is empty.
WORDS = sorted(set(" ".join(TEXTS).split()), key=lambda word: (len(word), word))
HALVES = (WORDS[: len(WORDS) // 2], WORDS[len(WORDS) // 2 :])
RAGGED = ["", *(" ".join(random.Random(n).choices(HALVES[n % 2], k=1 + n % 62)) for n in range(239))]
RAGGED = random.Random(0).sample(RAGGED, len(RAGGED))


@pytest.fixture(scope="module")
def model():
    encoder = fuse(sparse_encoder("distilbert"))
    encoder.prompts = {"query": "what is ", "document": "the sea "}
    return encoder


def dense_of(batches) -> torch.Tensor:
    batches = list(batches)
    assert {batch.layout for batch in batches} == {torch.sparse_csr}
    return torch.cat([batch.to_dense() for batch in batches])


def assert_same(batches, stock: torch.Tensor) -> None:
    """Text by text, within what another batch may do to the order of a sum."""
    assert (stock != 0).any()
    torch.testing.assert_close(dense_of(batches), stock, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("task", ["query", "document", None])
def test_embeddings_are_those_of_the_models_method(model, task):
    method = {"query": model.encode_query, "document": model.encode_document, None: model.encode}[task]
    assert_same(encode_sparse(model, RAGGED, task=task, batch_size=5), method(RAGGED, convert_to_sparse_tensor=False))


def test_prompts_reach_the_model(model):
    stock = model.encode(TEXTS, prompt="why ", convert_to_sparse_tensor=False)
    assert_same(encode_sparse(model, TEXTS, prompt="why "), stock)
    assert (dense_of(encode_sparse(model, TEXTS)) - stock).abs().max() > 0.01


def test_long_input_comes_in_several_results_in_order(model, monkeypatch):
    """Of two windows, the first with two whole results."""
    monkeypatch.setattr(_encode, "BATCHES", 2)
    monkeypatch.setattr(_encode, "WINDOW", 17)
    encoded = seen_batches(model, monkeypatch)
    batches = encode_sparse(model, TEXTS, batch_size=4)
    first = next(batches)
    assert sum(len(mask) for mask in encoded) == 16
    batches = [first, *batches]
    assert [len(batch) for batch in batches] == [8, 8, 8, 8]
    assert_same(batches, model.encode(TEXTS, convert_to_sparse_tensor=False))


def seen_batches(model, monkeypatch) -> list[torch.Tensor]:
    """The attention masks that reach the Transformer module from now on."""
    masks, forward = [], model[0].forward

    def noting(features, **kwargs):
        masks.append(features["attention_mask"])
        return forward(features, **kwargs)

    monkeypatch.setattr(model[0], "forward", noting)
    return masks


def padding(masks: list[torch.Tensor]) -> float:
    return sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks)


def test_little_of_a_batch_is_padding(model, monkeypatch):
    masks = seen_batches(model, monkeypatch)
    model.encode(RAGGED, batch_size=4)
    stock = padding(masks)
    masks.clear()
    list(encode_sparse(model, RAGGED, batch_size=4))
    ours = padding(masks)
    assert sum(len(mask) for mask in masks) == len(RAGGED)
    assert ours <= 1.03
    assert stock >= 1.05
    # As many batches as encode has, give or take what does not fit; none takes more tokens than an average one.
    mean = sum(int(mask.sum()) for mask in masks) / len(RAGGED)
    assert max(mask.numel() for mask in masks) <= 4 * mean
    assert len(masks) <= 1.25 * len(RAGGED) / 4


@pytest.mark.parametrize("prompt", [None, "why is the sea salty "])
@pytest.mark.parametrize("batch_tokens", [40, 128, 10_000])
def test_a_batch_keeps_to_its_tokens(model, monkeypatch, batch_tokens, prompt):
    """Those of the prompt too. At most four times batch_size texts; a text that is longer goes alone, at its length."""
    monkeypatch.setattr(model, "max_seq_length", 48)
    masks = seen_batches(model, monkeypatch)
    list(encode_sparse(model, RAGGED[:80], batch_size=8, batch_tokens=batch_tokens, prompt=prompt))
    assert all(mask.numel() <= batch_tokens or len(mask) == 1 for mask in masks)
    assert max(mask.shape[1] for mask in masks) == 48
    assert max(len(mask) for mask in masks) <= 32
    assert (max(len(mask) for mask in masks) == 32) is (batch_tokens == 10_000)


def test_without_tokens_of_a_transformer_batches_have_batch_size_texts(model, monkeypatch):
    """As for a static embedding: sorted by characters, as sentence-transformers does."""
    monkeypatch.setattr(_encode, "_count_tokens", lambda *arguments: None)
    masks = seen_batches(model, monkeypatch)
    ours = list(encode_sparse(model, RAGGED, batch_size=8, batch_tokens=1))
    assert [len(mask) for mask in masks] == [8] * (len(RAGGED) // 8)
    assert padding(masks) < 1.5
    assert_same(ours, model.encode(RAGGED, convert_to_sparse_tensor=False))


def test_a_static_route_is_not_tokenised_twice():
    document = sparse_encoder("distilbert")
    static = SparseStaticEmbedding(tokenizer=document.tokenizer, frozen=True)
    router = Router.for_query_document([static], list(document.children()))
    routed = fuse(SparseEncoder(modules=[router], device="cpu"))
    assert _encode._count_tokens(routed, TEXTS, "query", {}) is None
    lengths = [len(ids) for ids in document.tokenizer(TEXTS)["input_ids"]]
    assert _encode._count_tokens(routed, TEXTS, "document", {}) == lengths
    for task, method in (("query", routed.encode_query), ("document", routed.encode_document)):
        assert_same(encode_sparse(routed, TEXTS, task=task), method(TEXTS, convert_to_sparse_tensor=False))


def test_a_route_that_a_mapping_chooses_is_tokenised():
    document = sparse_encoder("distilbert")
    router = Router({"text": list(document.children())}, route_mappings={("query", None): "text"})
    routed = fuse(SparseEncoder(modules=[router], device="cpu"))
    lengths = [len(ids) for ids in document.tokenizer(TEXTS)["input_ids"]]
    assert _encode._count_tokens(routed, TEXTS, "query", {}) == lengths


@pytest.mark.parametrize(("level", "asked", "bars"), [("WARNING", True, 1), ("INFO", None, 1), ("INFO", False, 0)])
def test_one_progress_bar_over_all_texts(model, monkeypatch, capsys, level, asked, bars):
    """Asked for, or where the logger of sentence-transformers has it shown; none for each batch."""
    logger = logging.getLogger("sentence_transformers.sparse_encoder.model")
    monkeypatch.setattr(logger, "level", getattr(logging, level))
    logger.manager._clear_cache()
    list(encode_sparse(model, TEXTS, batch_size=4, show_progress_bar=asked))
    shown = capsys.readouterr().err
    assert sum(f"| {len(TEXTS)}/{len(TEXTS)} [" in line for line in shown.split("\n")) == bars
    assert "Batches" not in shown


def test_max_active_dims(model, monkeypatch):
    stock = model.encode(TEXTS, convert_to_sparse_tensor=False)
    counts = (dense_of(encode_sparse(model, TEXTS, max_active_dims=4)) != 0).sum(dim=1)
    assert torch.equal(counts, (stock != 0).sum(dim=1).clamp(max=4))
    monkeypatch.setattr(model, "max_active_dims", 3)
    assert (dense_of(encode_sparse(model, TEXTS)) != 0).sum(dim=1).max() == 3
    assert (dense_of(encode_sparse(model, TEXTS, max_active_dims=5)) != 0).sum(dim=1).max() == 5


@pytest.mark.parametrize("texts", [[], [""], ["why"], ["why", "why"]], ids=len)
def test_few_texts(model, texts):
    ours = list(encode_sparse(model, texts))
    assert sum(map(len, ours)) == len(texts)
    if texts:
        assert_same(ours, model.encode(texts, convert_to_sparse_tensor=False))


def test_bad_arguments_are_named_at_the_call(model):
    with pytest.raises(ValueError, match="task: expected 'query', 'document' or None, got 'passage'"):
        encode_sparse(model, TEXTS, task="passage")
    with pytest.raises(TypeError, match="texts: expected a sequence of texts, got str"):
        encode_sparse(model, "one text")
    with pytest.raises(ValueError, match="max_active_dims: expected at least 1, got 0"):
        encode_sparse(model, ["a"], max_active_dims=0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        encode_sparse(model, TEXTS, batch_size=0)
    with pytest.raises(ValueError, match="batch_tokens: expected at least 1, got 0"):
        encode_sparse(model, TEXTS, batch_tokens=0)
    with pytest.raises(TypeError, match="batch_tokens: expected an int or None, got float"):
        encode_sparse(model, TEXTS, batch_tokens=1.5)
    for wrong in ("3", None, 1.5):
        with pytest.raises(TypeError, match=f"batch_size: expected an int, got {type(wrong).__name__}"):
            encode_sparse(model, TEXTS, batch_size=wrong)
    with pytest.raises(ValueError, match=r"task: expected .*, got \['query'\]"):
        encode_sparse(model, TEXTS, task=["query"])
    with pytest.raises(TypeError, match="texts: expected a sequence of texts, got NoneType"):
        encode_sparse(model, None)
    with pytest.raises(TypeError, match="convert_to_tensor: expected it left out"):
        encode_sparse(model, TEXTS, convert_to_tensor=False)


class PoolInThisProcess:
    """Stands in for the processes of a pool: what is put into its input queue is computed there and then."""

    def __init__(self, model, devices):
        self.model, self.stops, self.sizes, self.batch_sizes = model, 0, [], []
        self.queues = {"input": self, "output": queue.Queue(), "processes": [None] * len(devices)}

    def put(self, item):
        chunk_id, texts, options = item
        self.sizes.append(len(texts))
        self.batch_sizes.append(options["batch_size"])
        try:
            result = self.model._inference(texts, device="cpu", **options)
        except Exception as error:
            result = error
        self.queues["output"].put([chunk_id, result])


@pytest.fixture
def pools(model, monkeypatch):
    """The pools that ``model`` has started, with four batches to a result, and two results to a window."""
    started = []

    def start(devices=None):
        started.append(PoolInThisProcess(model, devices))
        return started[-1].queues

    def stop(queues):
        queues["input"].stops += 1

    monkeypatch.setattr(model, "start_multi_process_pool", start, raising=False)
    monkeypatch.setattr(model, "stop_multi_process_pool", stop, raising=False)
    monkeypatch.setattr(_encode, "BATCHES", 4)
    monkeypatch.setattr(_encode, "WINDOW", 16)
    return started


@pytest.mark.parametrize("task", ["query", "document", None])
def test_several_devices_share_one_pool(model, pools, task):
    batches = encode_sparse(model, TEXTS, task=task, batch_size=2, device=["cpu", "cpu"])
    assert not pools  # not before a result is asked for
    several = dense_of(batches)
    (pool,) = pools
    assert pool.stops == 1
    assert sum(pool.sizes) == len(TEXTS)
    assert torch.allclose(several, dense_of(encode_sparse(model, TEXTS, task=task, batch_size=2)), atol=1e-5)


def test_one_device_and_no_texts_need_no_pool(model, pools):
    assert list(encode_sparse(model, [], device=["cpu", "cpu"])) == []
    assert len(list(encode_sparse(model, TEXTS, device="cpu"))) == 1
    assert not pools


@pytest.mark.parametrize("end", ["close", "drop", "exception", "unknown argument"])
def test_the_pool_is_stopped_however_the_results_end(model, pools, monkeypatch, end):
    if end == "unknown argument":
        with pytest.raises(ValueError, match="does not use"):
            next(encode_sparse(model, TEXTS, batch_size=2, device=["cpu"], no_such_argument=1))
        assert [pool.stops for pool in pools] == [1]
        return
    batches = encode_sparse(model, TEXTS, batch_size=2, device=["cpu", "cpu"])
    next(batches)
    assert [pool.stops for pool in pools] == [0]
    if end == "close":
        batches.close()
    elif end == "drop":
        del batches
    else:
        monkeypatch.setattr(model, "preprocess", None, raising=False)
        with pytest.raises(TypeError):
            list(batches)
    assert [pool.stops for pool in pools] == [1]


def test_a_pool_of_ones_own_keeps_running(model, pools):
    own = PoolInThisProcess(model, ["cpu"])
    for device in (None, ["cpu", "cpu"]):
        ours = dense_of(encode_sparse(model, TEXTS, batch_size=2, pool=own.queues, device=device))
        assert torch.allclose(ours, dense_of(encode_sparse(model, TEXTS)), atol=1e-5)
    assert not pools
    assert own.stops == 0
    assert sum(own.sizes) == 2 * len(TEXTS)


@pytest.mark.parametrize(
    ("processes", "texts", "chunk_size", "sizes"),
    [
        (1, 8, None, [4, 4]),
        (2, 8, None, [2, 2, 2, 2]),
        (5, 8, None, [2, 2, 2, 2]),
        (2, 3, None, [2, 1]),
        (2, 8, 3, [3, 3, 2]),
    ],
)
def test_a_process_gets_whole_batches_unless_told_otherwise(model, pools, processes, texts, chunk_size, sizes):
    """Of texts of the same length: so a batch is of two."""
    same = [TEXTS[0]] * texts
    list(encode_sparse(model, same, batch_size=2, device=["cpu"] * processes, chunk_size=chunk_size))
    assert pools[0].sizes == sizes


def test_batches_of_processes_keep_to_their_tokens(model, pools, monkeypatch):
    monkeypatch.setattr(_encode, "WINDOW", 1000)
    masks = seen_batches(model, monkeypatch)
    ours = dense_of(encode_sparse(model, RAGGED, batch_size=4, batch_tokens=128, device=["cpu", "cpu"]))
    assert all(mask.numel() <= 128 for mask in masks)
    assert padding(masks) < 1.1
    assert {1 < size <= 16 for size in pools[0].batch_sizes} == {True}
    assert max(pools[0].sizes) <= 16
    assert torch.allclose(ours, model.encode(RAGGED, convert_to_sparse_tensor=False), atol=1e-5)


@pytest.mark.slow
def test_two_processes(model, monkeypatch):
    """Real ones, each of which imports everything anew."""
    pools, start = [], type(model).start_multi_process_pool

    def start_and_keep(self, devices):
        pools.append(start(self, devices))
        return pools[-1]

    # Of the class: the processes get a copy of the model, with everything in it.
    monkeypatch.setattr(type(model), "start_multi_process_pool", start_and_keep)
    monkeypatch.setattr(_encode, "BATCHES", 2)
    batches = dense_of(encode_sparse(model, TEXTS[:12], batch_size=3, device=["cpu", "cpu"]))
    assert len(pools) == 1
    for process in pools[0]["processes"]:
        with pytest.raises(ValueError, match="closed"):
            process.is_alive()
    assert torch.allclose(batches, dense_of(encode_sparse(model, TEXTS[:12])), atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "batch_size", "batch_tokens", "pooled", "sizes"),
    [
        ([5] * 10, 4, None, False, [4, 4, 2]),
        ([9, 9, 6, 3, 3, 1, 1, 1, 1, 1], 2, 18, False, [2, 3, 5]),
        ([100, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2, 10, False, [1, 8, 1]),
        ([5] * 40, 2, None, True, [32, 8]),
        ([9] * 20 + [1] * 40, 2, 9, True, [16, 16, 28]),
    ],
    ids=["equal", "descending", "too long", "pool", "pool of unequal ones"],
)
def test_how_batches_are_cut(lengths, batch_size, batch_tokens, pooled, sizes):
    cut = list(_encode._sizes(lengths, batch_size, batch_tokens, pooled))
    assert [count for count, _ in cut] == sizes
    assert all(size == count for count, size in cut) is not pooled
