"""A fused encoder where users run one: in threads, in forked and spawned workers, compiled or not, cold or warm."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from splade_kernels.integrations.sentence_transformers import fuse
from tests.st_models import TEXTS, gradients, sparse_encoder

# Of several shapes: what the first one leaves behind must not break the graph that the second one runs.
BATCHES = [TEXTS[:2], TEXTS[3:6]]
SECONDS = 240

Cell = tuple[str, str, str]
CELLS: list[Cell] = list(itertools.product(("stock", "fused"), ("cold", "warm"), ("eager", "compiled")))
# Runs with `make test`; each of the others takes seconds.
QUICK = (("fused", "cold", "compiled"), "thread")


def make_model(head: str, start: str) -> SparseEncoder:
    model = sparse_encoder(config_kwargs={"n_layers": 1})
    if head == "fused":
        fuse(model)
    if start == "warm":
        model.encode(TEXTS[:2])
    return model


def encode_and_train(model: SparseEncoder, mode: str) -> list[Tensor]:
    """Embeddings of each batch, before and after one step of gradient descent."""
    if mode == "compiled":
        model.compile(backend="eager", dynamic=True)
    results = [model.encode(batch, convert_to_sparse_tensor=False) for batch in BATCHES]
    step = dict(gradients(model, BATCHES[1]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 1e-3 * step[name]
    model.eval()
    return [*results, *(model.encode(batch, convert_to_sparse_tensor=False) for batch in BATCHES)]


def in_a_thread(model: SparseEncoder, mode: str) -> list[Tensor]:
    results: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: results.append(encode_and_train(model, mode)))
    thread.start()
    thread.join()
    (result,) = results
    return result


def fork(work: Callable[[], Any], path: Path) -> None:
    """``work()`` in a forked child, which leaves its result at ``path`` or is ended."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            torch.save(work(), path)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0 if path.exists() else 1)
    _, status = os.waitpid(child, 0)
    print(f"the child ended with {os.waitstatus_to_exitcode(status)}, {path.name}")


def fork_every_cell(folder: str) -> None:
    """The program of a server that loads and then forks its workers; one thread, so that a warm model may fork too."""
    torch.set_num_threads(1)
    for cell in CELLS:
        model = make_model(*cell[:2])
        fork(lambda model=model, mode=cell[2]: encode_and_train(model, mode), Path(folder, "-".join(cell)))


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], list[Tensor]]:
    folder = tmp_path_factory.mktemp("forked")
    program = (
        "import sys; from tests.integrations import test_st_processes; test_st_processes.fork_every_cell(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, folder], check=True, timeout=len(CELLS) * SECONDS)
    return lambda cell: torch.load(folder / "-".join(cell))


@pytest.fixture(scope="module")
def spawned() -> Callable[[Cell], list[Tensor]]:
    """One worker for all cells, which takes seconds to start; the models come to it by pickle."""
    with get_context("spawn").Pool(1) as pool:
        work = [(make_model(*cell[:2]), cell[2]) for cell in CELLS]
        results = dict(zip(CELLS, pool.starmap(encode_and_train, work, chunksize=1), strict=True))
    return results.__getitem__


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return encode_and_train(make_model("stock", "cold"), "eager")


@pytest.mark.parametrize(
    ("cell", "where"),
    [
        pytest.param(cell, where, id="-".join((*cell, where)), marks=[pytest.mark.slow] * ((cell, where) != QUICK))
        for cell, where in itertools.product(CELLS, ("process", "thread", "forked", "spawned"))
    ],
)
def test_encoding_and_training_equal_stock(
    cell: Cell, where: str, expected: list[Tensor], request: pytest.FixtureRequest
) -> None:
    head, start, mode = cell
    torch.compiler.reset()
    if where == "process":
        results = encode_and_train(make_model(head, start), mode)
    elif where == "thread":
        results = in_a_thread(make_model(head, start), mode)
    else:
        results = request.getfixturevalue(where)(cell)
    assert (expected[1] - expected[3]).abs().max() > 1e-4, "the step changes what is compared"
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dynamic", "most"), [(None, 2), pytest.param(True, 1, marks=pytest.mark.slow)])
def test_a_model_compiled_cold_needs_as_few_graphs_as_a_warm_one(dynamic: bool | None, most: int) -> None:
    model = fuse(sparse_encoder().eval())
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, dynamic=dynamic, fullgraph=True)

    def run() -> None:
        with torch.no_grad():
            for shape in [(2, 3), (3, 5), (5, 4), (4, 9), (7, 6)]:
                ids = torch.full(shape, 7)
                seen.append(model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"])

    seen: list[Tensor] = []
    run()
    other = threading.Thread(target=run)
    other.start()
    other.join()
    assert len(seen) == 10
    assert counter.frame_count == most


def fork_after(load: str, folder: str, path: str) -> None:
    """The program of a server with two threads that loads, forks, and encodes in the child."""
    torch.set_num_threads(2)
    model = SparseEncoder(folder, device="cpu")
    loaded = thread_count()
    if load == "fused":
        fuse(model)
    assert torch.get_num_threads() == 2
    # Threads that loaded weights may still be ending.
    assert thread_count() <= loaded
    fork(lambda: [model.encode(batch, convert_to_sparse_tensor=False) for batch in BATCHES], Path(path))


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("load", ["stock", "fused"])
def test_fusing_before_a_fork_is_as_harmless_as_loading(load: str, tmp_path: Path) -> None:
    """PyTorch's threads do not survive a fork; a child that inherits a started pool waits for its threads forever."""
    folder = tmp_path / "model"
    model = sparse_encoder()
    # Products and activations of this size are computed by all threads.
    model.transformers_model.resize_token_embeddings(30_000, mean_resizing=False)
    model.save_pretrained(str(folder))
    expected = [model.encode(batch, convert_to_sparse_tensor=False) for batch in BATCHES]
    program = (
        "import sys; from tests.integrations import test_st_processes; test_st_processes.fork_after(*sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", program, load, folder, tmp_path / "result"]
    subprocess.run(arguments, check=True, timeout=SECONDS)
    torch.testing.assert_close(torch.load(tmp_path / "result"), expected, rtol=1e-5, atol=1e-6)
