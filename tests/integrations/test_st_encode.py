"""``encode_sparse`` gives what the model's own methods give, as CSR."""

from __future__ import annotations

import queue

import pytest
import torch

from splade_kernels.integrations import _encode
from splade_kernels.integrations.sentence_transformers import encode_sparse, fuse
from tests.st_models import TEXTS, sparse_encoder


@pytest.fixture(scope="module")
def model():
    encoder = fuse(sparse_encoder("distilbert"))
    encoder.prompts = {"query": "what is ", "document": "the sea "}
    return encoder


def dense_of(batches) -> torch.Tensor:
    batches = list(batches)
    assert {batch.layout for batch in batches} == {torch.sparse_csr}
    return torch.cat([batch.to_dense() for batch in batches])


@pytest.mark.parametrize("task", ["query", "document", None])
def test_embeddings_are_those_of_the_models_method(model, task):
    method = {"query": model.encode_query, "document": model.encode_document, None: model.encode}[task]
    stock = method(TEXTS, batch_size=5, convert_to_sparse_tensor=False)
    assert (stock != 0).any(dim=1).all()
    assert torch.equal(dense_of(encode_sparse(model, TEXTS, task=task, batch_size=5)), stock)


def test_prompts_reach_the_model(model):
    stock = model.encode(TEXTS, prompt="why ", convert_to_sparse_tensor=False)
    assert torch.equal(dense_of(encode_sparse(model, TEXTS, prompt="why ")), stock)
    assert not torch.equal(dense_of(encode_sparse(model, TEXTS)), stock)


def test_long_input_comes_in_several_results_in_order(model, monkeypatch):
    monkeypatch.setattr(_encode, "BATCHES", 2)
    batches = list(encode_sparse(model, TEXTS, batch_size=3))
    assert [len(batch) for batch in batches] == [6] * (len(TEXTS) // 6) + [len(TEXTS) % 6]
    stock = model.encode(TEXTS, convert_to_sparse_tensor=False)
    assert torch.allclose(dense_of(batches), stock, atol=1e-5)


def test_max_active_dims(model, monkeypatch):
    stock = model.encode(TEXTS, convert_to_sparse_tensor=False)
    counts = (dense_of(encode_sparse(model, TEXTS, max_active_dims=4)) != 0).sum(dim=1)
    assert torch.equal(counts, (stock != 0).sum(dim=1).clamp(max=4))
    monkeypatch.setattr(model, "max_active_dims", 3)
    assert (dense_of(encode_sparse(model, TEXTS)) != 0).sum(dim=1).max() == 3
    assert (dense_of(encode_sparse(model, TEXTS, max_active_dims=5)) != 0).sum(dim=1).max() == 5


def test_nothing_to_encode(model):
    assert list(encode_sparse(model, [])) == []


def test_bad_arguments_are_named_at_the_call(model):
    with pytest.raises(ValueError, match="task: expected 'query', 'document' or None, got 'passage'"):
        encode_sparse(model, TEXTS, task="passage")
    with pytest.raises(TypeError, match="texts: expected a sequence of texts, got str"):
        encode_sparse(model, "one text")
    with pytest.raises(ValueError, match="max_active_dims: expected at least 1, got 0"):
        encode_sparse(model, ["a"], max_active_dims=0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        encode_sparse(model, TEXTS, batch_size=0)
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
        self.model, self.stops, self.sizes = model, 0, []
        self.queues = {"input": self, "output": queue.Queue(), "processes": [None] * len(devices)}

    def put(self, item):
        chunk_id, texts, options = item
        self.sizes.append(len(texts))
        try:
            result = self.model._inference(texts, device="cpu", **options)
        except Exception as error:
            result = error
        self.queues["output"].put([chunk_id, result])


@pytest.fixture
def pools(model, monkeypatch):
    """The pools that ``model`` has started, with four batches to a result."""
    started = []

    def start(devices=None):
        started.append(PoolInThisProcess(model, devices))
        return started[-1].queues

    def stop(queues):
        queues["input"].stops += 1

    monkeypatch.setattr(model, "start_multi_process_pool", start, raising=False)
    monkeypatch.setattr(model, "stop_multi_process_pool", stop, raising=False)
    monkeypatch.setattr(_encode, "BATCHES", 4)
    return started


@pytest.mark.parametrize("task", ["query", "document", None])
def test_several_devices_share_one_pool(model, pools, task):
    batches = encode_sparse(model, TEXTS, task=task, batch_size=2, device=["cpu", "cpu"])
    assert not pools  # not before a result is asked for
    several = dense_of(batches)
    (pool,) = pools
    assert pool.stops == 1
    assert pool.sizes == [2] * (len(TEXTS) // 2)
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
            next(batches)
    assert [pool.stops for pool in pools] == [1]


def test_a_pool_of_ones_own_keeps_running(model, pools):
    own = PoolInThisProcess(model, ["cpu"])
    for device in (None, ["cpu", "cpu"]):
        ours = dense_of(encode_sparse(model, TEXTS, batch_size=2, pool=own.queues, device=device))
        assert torch.allclose(ours, dense_of(encode_sparse(model, TEXTS)), atol=1e-5)
    assert not pools
    assert own.stops == 0
    assert own.sizes == [4] * (2 * len(TEXTS) // 4)


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
    list(encode_sparse(model, TEXTS[:texts], batch_size=2, device=["cpu"] * processes, chunk_size=chunk_size))
    assert pools[0].sizes == sizes


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


@pytest.mark.parametrize(("texts", "chunk"), [(1, 4), (9, 4), (33, 12), (64, 16)])
def test_processes_get_two_pieces_of_whole_batches(texts, chunk):
    """For two processes and batches of four; at most 16 batches are encoded at a time."""
    chunks = []

    def method(part: list[str], **options: object) -> torch.Tensor:
        chunks.append(options["chunk_size"])
        return torch.zeros(len(part), 5)

    options = {"batch_size": 4, "pool": {"processes": [None, None]}}
    assert sum(len(batch) for batch in _encode._batches(None, method, ["text"] * texts, None, options)) == texts
    assert chunks[0] == chunk
