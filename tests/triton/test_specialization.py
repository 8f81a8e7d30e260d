"""One compile for each model and dtype: batch and length must not show in any kernel's specialisation.

Without a GPU nothing can be launched, so launches are recorded and their keys computed as Triton would; with one, its
cache entries are counted. Either way 20 batches of one model must need what the first ones needed.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is specialised in a process with TRITON_INTERPRET=1"
)
triton = pytest.importorskip("triton")

import splade_kernels.backends.triton as backend  # noqa: E402
from splade_kernels.backends.triton import launch  # noqa: E402
from splade_kernels.backends.triton import pack as packing  # noqa: E402
from tests import oracle  # noqa: E402

HIDDEN, VOCAB = 64, 1002
BATCHES = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 1, 16, 32, 33, 1, 48, 9, 2, 64, 6)
SHAPES = list(zip(BATCHES, range(1, 240, 12), strict=True))
Keys = dict[str, set[str]]


# A GPU has one architecture of its own.
@pytest.fixture(params=["the GPU's"] if torch.cuda.is_available() else [86, 90])
def record(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Keys]:
    """Kernels seen so far, each with the keys that Triton would compile it for."""
    if torch.cuda.is_available():
        before = _cached()
        return lambda: {name: keys - before[name] for name, keys in _cached().items()}
    keys: Keys = defaultdict(set)
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    compiler = make_backend(GPUTarget("cuda", request.param, 32))

    def run(kernel: object, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        _, specialization, options = bind(*args, **kwargs, debug=False, instrumentation_mode="")
        keys[kernel.__name__].add(repr((specialization, sorted(options.items()))))

    def pack_nothing(*arguments: Any) -> Any:
        packed = launched(*arguments)
        for tensor in vars(packed).values():
            tensor.zero_()
        return packed

    monkeypatch.setattr(triton.JITFunction, "run", run)
    launched = packing._pack
    monkeypatch.setattr(packing, "_pack", pack_nothing)
    monkeypatch.setattr(launch, "architecture", lambda device: request.param)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 82)
    return lambda: keys


def _cached() -> Keys:
    found: Keys = {}
    for module in pkgutil.walk_packages(backend.__path__, f"{backend.__name__}."):
        for kernel in vars(importlib.import_module(module.name)).values():
            if isinstance(kernel, triton.JITFunction):
                caches = kernel.device_caches.values()
                found[kernel.__name__] = {str(key) for cache in caches for key in cache[0]}
    return found


def _run(batch: int, length: int, dtype: torch.dtype, pooling: str, layout: str, **changes: Any) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    mask, cu_seqlens = None, None
    if layout == "masked":
        mask = torch.ones(batch, length, dtype=torch.int64, device=device)
    if layout == "packed":
        cu_seqlens = torch.arange(batch + 1, device=device, dtype=torch.int32) * length
    call = oracle.new_call(
        batch_size=batch,
        attention_mask=mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=length,
        pooling_strategy=pooling,
        compute_dtype=dtype,
        out_dtype=dtype,
        screening="on" if pooling == "max" else "off",
        need_argmax=pooling == "max",
        need_hidden=True,
        need_weight=True,
        need_bias=True,
        **changes,
    )
    hidden, weight, bias = draw(batch * length, HIDDEN), draw(VOCAB, HIDDEN), draw(VOCAB)
    output, argmax = backend.POOLINGS[pooling].forward(call, hidden, weight, bias)
    grad = draw(batch, VOCAB)
    # Nothing was launched without a GPU: what would come out is replaced by something in range.
    backend.POOLINGS[pooling].backward(call, grad, output.zero_(), argmax.zero_(), hidden, weight, bias)
    backend.flops_sums(output, None)
    backend.flops_sums(output, 5.0)


@pytest.mark.parametrize("layout", ["padded", "masked", "packed"])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_twenty_shapes_compile_each_kernel_once(record, pooling, layout):
    for dtype in (torch.bfloat16, torch.float32):
        _run(3, 50, dtype, pooling, layout)
        _run(4, 40, dtype, pooling, layout)
    first = {name: set(keys) for name, keys in record().items()}
    if not torch.cuda.is_available():  # there what an earlier test compiled is not counted again
        assert any(first.values())
        assert ("_screen_kernel" in first) == (pooling == "max")
    for batch, length in SHAPES:
        _run(batch, length, torch.bfloat16, pooling, layout)
    grown = {name: len(keys - first[name]) for name, keys in record().items() if keys - first[name]}
    assert grown == {}


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_scale_and_soft_cap_are_not_compiled_into_a_kernel(record, pooling):
    def run(*numbers: float) -> None:
        scale, softcap = numbers
        _run(3, 50, torch.bfloat16, pooling, "padded", logit_scale=scale, logit_softcap=softcap)

    run(1.0, 0.0)
    plain = {name: set(keys) for name, keys in record().items()}
    run(0.0625, 30.0)
    first = {name: set(keys) for name, keys in record().items()}
    changed = {name for name, keys in first.items() if len(keys) > len(plain[name])}
    kernels = {"max": {"_finalise_kernel", "_gradient_kernel", "_weight_kernel"}}
    if not torch.cuda.is_available():
        assert changed == kernels.get(pooling, {"_sum_kernel", "_logit_grad_kernel"})
    for numbers in ((0.5, 50.0), (16.0, 1.0), (2.0, 16.0)):
        run(*numbers)
    assert {name for name, keys in record().items() if keys - first[name]} == set()
