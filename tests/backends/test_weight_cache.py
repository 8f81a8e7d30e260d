"""What is kept between inference calls is used for the same contents of the same weight only."""

from __future__ import annotations

import gc
import importlib
import threading
import types
from collections.abc import Iterator

import numpy
import pytest
import torch
from torch import Tensor

from splade_kernels.backends import weight_cache


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    weight_cache._entries.clear()
    yield
    weight_cache._entries.clear()


def look(weight: Tensor, kind: str = "sum") -> float:
    """The sum of the weight, as the cache has it."""
    return weight_cache.cached(weight, kind, lambda: weight.detach().double().sum().item())


def test_made_once_for_the_same_contents():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    made = []
    for _ in range(3):
        weight_cache.cached(weight, "list", lambda: made.append(1))
    weight_cache.cached(weight.detach(), "list", lambda: made.append(1))
    assert len(made) == 1
    weight_cache.cached(weight, "other", lambda: made.append(1))
    assert len(made) == 2


def test_every_counted_write_is_seen():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    linear = torch.nn.Linear(3, 4)
    linear.weight = weight
    assert look(weight) == 12
    with torch.no_grad():
        weight.add_(1)
    assert look(weight) == 24
    with torch.no_grad():
        weight[0, 0] = 10
    assert look(weight) == 32
    with torch.inference_mode():
        weight.zero_()
    assert look(weight) == 0
    linear.load_state_dict({"weight": torch.full((4, 3), 2.0), "bias": torch.zeros(4)})
    assert look(weight) == 24
    linear.load_state_dict({"weight": torch.full((4, 3), 3.0), "bias": torch.zeros(4)}, assign=True)
    assert look(linear.weight) == 36
    assert look(weight) == 24
    assert len(weight_cache._entries) == 2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["single", "foreach", "fused"])
def test_steps_of_optimizers_are_seen(optimizer, options):
    weight = torch.nn.Parameter(torch.ones(4, 3))
    step = optimizer([weight], lr=0.5, **options)
    assert look(weight) == 12
    for _ in range(3):
        before = look(weight)
        weight.grad = torch.ones(4, 3)
        step.step()
        assert look(weight) != before
        assert look(weight) == weight.double().sum().item()


def test_views_dtypes_and_shapes_are_told_apart():
    weight = torch.arange(12.0).view(4, 3)
    views = [weight, weight[:2], weight[2:], weight.t()]
    assert [look(view) for view in views] == [66, 15, 51, 66]
    assert len(weight_cache._entries) == 4
    as_integers = weight.view(torch.int32)
    assert look(as_integers) == as_integers.double().sum().item()


def test_a_new_tensor_at_the_address_of_a_dead_one_is_another():
    memory = numpy.empty((64, 64), dtype=numpy.float32)
    for value in range(50):
        memory[:] = value
        weight = torch.from_numpy(memory)
        assert weight.data_ptr() == memory.ctypes.data
        assert weight._version == 0
        assert look(weight) == value * 4096
        del weight


def test_entries_of_dead_weights_are_dropped():
    weight = torch.ones(4, 3)
    look(weight)
    assert len(weight_cache._entries) == 1
    del weight
    gc.collect()
    other = torch.zeros(2)
    look(other)
    assert [entry[-1] for entry in weight_cache._entries.values()] == [0.0]


def test_inference_tensors_are_never_kept():
    with torch.inference_mode():
        weight = torch.ones(4, 3)
        assert look(weight) == 12
        weight.add_(1)
        assert look(weight) == 24
    assert look(weight) == 24
    assert not weight_cache._entries


@pytest.mark.parametrize("state", ["in_warmup", "in_recording", None])
def test_graphs_that_torch_compile_makes_are_known(state, monkeypatch):
    """Their memory is asked for before the stream is captured, and must hold nothing that outlives the graph."""
    trees = importlib.import_module("torch._inductor.cudagraph_trees")
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert isinstance(trees.CUDAGraphTreeManager.in_warmup, property)
    assert isinstance(trees.CUDAGraphTreeManager.in_recording, property)
    assert not weight_cache._is_for_a_graph(device)
    manager = types.SimpleNamespace(in_warmup=False, in_recording=False)
    if state:
        setattr(manager, state, True)
    monkeypatch.setattr(trees.get_container(0), "tree_manager", manager)
    assert weight_cache._is_for_a_graph(device) == (state is not None)


def test_normal_weights_are_kept_in_inference_mode():
    weight = torch.ones(4, 3)
    with torch.inference_mode():
        look(weight)
    assert len(weight_cache._entries) == 1


def test_the_oldest_of_many_is_dropped():
    weights = [torch.full((2,), float(i)) for i in range(9)]
    for weight in weights[:8]:
        look(weight)
    look(weights[0])
    look(weights[8])
    assert sorted(entry[-1] for entry in weight_cache._entries.values()) == [0, *range(4, 17, 2)]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 1000])
def test_uncounted_writes_to_all_of_a_weight_are_seen(size):
    weight = torch.nn.Parameter(torch.arange(3.0 * size).view(size, 3) + 1)
    writes = [
        lambda: weight.data.mul_(2),
        lambda: weight.data.copy_(weight.data.flip(1)),
        lambda: torch._foreach_mul_([weight.data], -1),
        lambda: weight.detach().numpy().fill(3),
        lambda: weight.data[0].fill_(7),
    ]
    for write in writes:
        before = look(weight), weight._version
        write()
        assert weight._version == before[1]
        assert look(weight) == weight.detach().double().sum().item()


def test_a_forgotten_weight_is_read_anew():
    weight, other = torch.ones(1000, 3), torch.ones(2)
    look(weight)
    look(weight[:2])
    look(other)
    weight.data[1] = 2
    assert look(weight) == 3000  # neither counted nor in the sample: the documented limit
    weight_cache.forget(weight)
    assert len(weight_cache._entries) == 1
    assert look(weight) == 3003


def test_threads_get_the_contents_they_asked_for():
    weights = [torch.full((8,), float(i)) for i in range(6)]
    wrong: list[float] = []

    def work(start: int) -> None:
        for i in range(300):
            value = (start + i) % 6
            if look(weights[value]) != 8 * value:
                wrong.append(value)
            if i % 50 == 0:
                weight_cache.forget(weights[value])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(weight_cache._entries) <= weight_cache.MAX_ENTRIES
