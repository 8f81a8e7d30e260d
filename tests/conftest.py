"""Fixtures for every test: the backends to run, and uninitialised memory that cannot pass for a result."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import splade_kernels as sk
from splade_kernels.backends import dispatch
from splade_kernels.backends.tiled import screening, screening_plain
from tests import cpus, interpreter
from tests.other_devices import other_device
from tests.screening_cases import need_compiled

# PyTorch's matmuls are deterministic on a GPU only with a fixed workspace, and raise without one in the tests.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Where there is a GPU, the backends made for one run on its tensors: the same tests on another device.
ACCELERATOR = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and sk.available_backends()["triton"] == "available"

# Tests that look at the operators from outside, slowly: they are the same for each route inside the torch backend.
OUTSIDE = ("test_opcheck", "test_compiled_without_graph_breaks_equals_eager_bit_for_bit")


def pytest_addoption(parser: pytest.Parser) -> None:
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in cpus.KINDS.items())
    parser.addoption("--cpu", action="append", choices=cpus.KINDS, default=[], help=f"CPU to simulate; {kinds}")
    count = "how many random cases of each kind the compiled screening kernels are tested with; the plain ones: 30%%"
    parser.addoption("--hostile-cases", type=int, default=300, help=count)


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported, which may ask what there is."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for kind in config.getoption("cpu"):
        cpus.simulate(kind, patch)
    cpus.forget_answers()
    if INTERPRETED:
        interpreter.remember(patch)


@pytest.fixture(params=["torch", "torch-device", "torch-other", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name to pass as ``backend=``. ``torch-device``: the torch backend without host syncs, as it runs on CUDA;
    ``torch-other``: as it runs on MPS and others, without the operations that PyTorch lacks there.

    The default device is the one that the backend is tested on, so tensors that a test makes are there.
    """
    if request.param == "torch-other":
        if request.node.originalname in OUTSIDE:
            pytest.skip("torch-device is tested")
        monkeypatch.setenv("SPLADE_KERNELS_BACKEND", "torch")
        with other_device(monkeypatch):
            yield "torch"
        return
    if request.param == "torch-device":
        monkeypatch.setattr(dispatch, "on_host", lambda tensor: False)
        monkeypatch.setattr(dispatch, "may_wait", lambda tensor: False)
    elif request.param == "triton":
        reason = sk.available_backends()["triton"]
        if reason != "available":
            pytest.skip(reason)
        if torch.float64 in request.node.callspec.params.values():
            pytest.skip("Triton's kernels do not compute in float64")
    name = request.param.removesuffix("-device")
    # What has no backend argument follows the environment.
    monkeypatch.setenv("SPLADE_KERNELS_BACKEND", name)
    if request.param == "torch" or ACCELERATOR == "cpu":
        yield name
        return
    torch.set_default_device(ACCELERATOR)
    yield name
    torch.set_default_device(None)


@pytest.fixture
def packs(backend: str) -> bool:
    """Whether the backend under test packs the real tokens, so that their rows do not depend on the padding."""
    return backend == "triton" or dispatch.on_host(torch.empty(0))


@pytest.fixture
def widest(request: pytest.FixtureRequest, backend: str) -> torch.dtype:
    """The dtype in which the backend under test comes closest to the definition."""
    return torch.float32 if backend == "triton" else torch.float64


@pytest.fixture
def on_accelerator() -> Iterator[None]:
    """Where there is a GPU, tensors that a test makes are on it."""
    torch.set_default_device(ACCELERATOR)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=["as NumPy", pytest.param("as a GPU", marks=pytest.mark.slow)])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Division, logarithm and exponential of the interpreter: NumPy's, or as approximate as a GPU's."""
    if request.param == "as a GPU":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("they are, where kernels are compiled")
        interpreter.approximate(monkeypatch)


@pytest.fixture(params=["compiled", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of screening: the compiled kernels, or the same in PyTorch; the torch backend on a CPU is what they belong to."""
    if request.param == "plain":
        monkeypatch.setattr(screening, "compiled_kernels", lambda: None)
        # Right on many CPUs on which it is too slow to be used.
        monkeypatch.setattr(screening_plain, "int_mm_is_fast", screening_plain.int_mm_is_right)
    else:
        need_compiled()
        assert screening.compiled_kernels() is not None, "the self-test refused the compiled kernels"
    return str(request.param)


@pytest.fixture(autouse=True)
def no_bfloat16_as_bits() -> Iterator[None]:
    """No kernel leaves a conversion of bfloat16, or an operation on it, to the interpreter, which gets them wrong."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            interpreter.forbid_bfloat16(patch)
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` is filled with NaN (integers: their maximum); operations without a deterministic form raise."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
