"""The heads that are compared: each a function ``(hidden, weight, bias, mask) -> [B, V]``, made for one case.

Sparton (arXiv:2603.25011) is measured when it can be imported. Its adapter is written against the API of its
README: ``SpartonHead(vocab_size, hidden_dim, use_bias=True)``, its weight and bias, ``head(hidden, attention_mask)``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import splade_kernels as sk
from bench.inputs.cases import Case, Inputs, Precision
from splade_kernels.backends import pooling, weight_cache

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# The bare matmul writes its logits in slices of at most this size, so that there is a floor for every case.
MATMUL_SLICE_BYTES = 4 << 30


def stock(training: bool) -> Head:
    """As sentence-transformers runs it: the decoder, a Linear to the vocabulary, and then ``SpladePooling``."""
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    pool = SpladePooling().train(training)

    def head(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, weight, bias)
        output: Tensor = pool({"token_embeddings": logits, "attention_mask": mask})["sentence_embedding"]
        return output

    return head


def compiled(training: bool) -> Head:
    """``torch.compile`` of :func:`stock`, for this shape alone (others would count towards the limit of recompiles)."""
    torch._dynamo.reset()
    head: Head = torch.compile(stock(training), fullgraph=True, dynamic=False)
    return head


def ours(training: bool, first_call: bool = False, **options: Any) -> Head:
    """``first_call``: without the quantised weight that earlier inference calls cached."""

    def head(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        if first_call:
            weight_cache.forget(weight)
        return sk.splade_pool(hidden, weight, bias, mask, **options)

    return head


def sparton(training: bool) -> Head:
    from sparton import SpartonHead

    heads: dict[int, nn.Module] = {}

    def head(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        if id(weight) not in heads:
            with torch.device("meta"):
                fused = SpartonHead(weight.shape[0], weight.shape[1], use_bias=True)
            # As tie_weights does. A plain tensor may not replace a registered Parameter, so that is deleted first.
            del fused.weight, fused.bias
            fused.weight, fused.bias = weight, bias
            heads[id(weight)] = fused
        output: Tensor = heads[id(weight)](hidden, mask)
        return output

    return head


def padded_call(mask: Tensor, dtype: torch.dtype, **options: Any) -> pooling.PoolingCall:
    """What a backend is told of a padded call; unless ``options`` say otherwise, of the maximum of relu."""
    call = pooling.PoolingCall(
        batch_size=mask.shape[0],
        attention_mask=mask,
        cu_seqlens=None,
        max_seqlen=mask.shape[1],
        pooling_strategy="max",
        activation_function="relu",
        compute_dtype=dtype,
        out_dtype=dtype,
    )
    return replace(call, **options)


def rival(training: bool) -> Head:
    """One program per sequence (:mod:`.rival`), with the tiles of ours, fetched by pointers; forward only."""
    from bench.inputs.rival import max_pool_forward
    from splade_kernels.backends.triton.launch import problem
    from splade_kernels.backends.triton.tuning import matmul_config

    def head(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        cast = torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.get_autocast_dtype(hidden.device.type) if cast else hidden.dtype
        call = padded_call(mask, dtype, out_dtype=torch.float32 if cast else dtype)
        return max_pool_forward(call, hidden.flatten(0, 1), weight, bias, matmul_config(*problem(call, weight)))[0]

    return head


@dataclass(frozen=True)
class Variant:
    """``make(training)`` gives the head. ``on_cpu``: whether it means anything there. ``trains``: has a backward.
    ``keeps(device)``: whether inference there uses a quantised weight that an earlier call cached, which a CUDA graph
    would quantise again at every replay."""

    make: Callable[[bool], Head]
    on_cpu: bool = True
    trains: bool = True
    keeps: Callable[[torch.device], bool] = lambda device: False

    def captured(self, training: bool, device: torch.device) -> bool:
        """Whether a CUDA graph of it computes what a call does."""
        return training or not self.keeps(device)


def auto_may_screen(device: torch.device) -> bool:
    """Whether "ours" may screen on this device; on an unmeasured GPU it is "unscreened"."""
    if device.type != "cuda":
        return device.type == "cpu"
    from splade_kernels.backends.triton.launch import architecture
    from splade_kernels.backends.triton.tuning import screening_may_pay

    return screening_may_pay(architecture(device))


VARIANTS: dict[str, Variant] = {
    "stock": Variant(stock),
    "compile": Variant(compiled),
    # On a CPU this is what "ours" is.
    "tiled": Variant(partial(ours, backend="torch"), on_cpu=False),
    "sparton": Variant(sparton, on_cpu=False),
    "rival": Variant(rival, on_cpu=False, trains=False),
    "unscreened": Variant(partial(ours, screening=False)),
    # screening="auto": the inputs of the call decide; on a GPU a checked-in result of its architecture must allow it.
    "ours": Variant(ours, keeps=auto_may_screen),
    "screened": Variant(partial(ours, screening=True), keeps=lambda device: True),
    # Training caches nothing of the weight, so there every call is a first one.
    "screened-first": Variant(partial(ours, first_call=True, screening=True), trains=False),
}
HEADS = ("stock", "compile", "tiled", "sparton", "rival", "ours")
MODES: dict[str, str | bool] = {"unscreened": False, "ours": "auto", "screened": True}
OURS = (*MODES, "screened-first")
SCREENING = ("stock", *OURS)
# Floors, forward only: the bare product of all tokens and of the real ones.
MATMULS = ("matmul-padded", "matmul-real")


def why_not(name: str, device: torch.device, training: bool) -> str | None:
    """Why a variant cannot be measured here, or None."""
    if training and not VARIANTS[name].trains:
        return "forward only"
    if device.type == "cpu" and not VARIANTS[name].on_cpu:
        return "for GPUs only"
    package = {"sparton": "sparton", "stock": "sentence-transformers", "compile": "sentence-transformers"}.get(name)
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"the package {package} is not installed"
    return None


def matmul(name: str, inputs: Inputs, precision: Precision) -> Callable[[], tuple[Tensor]]:
    """``h @ W.T`` of operands already in the dtype of the products, into memory already there."""
    rows = inputs.hidden.detach().flatten(0, 1)
    if name == "matmul-real":
        rows = rows[inputs.mask.flatten() != 0]
    rows = rows.to(precision.compute_dtype)
    columns = inputs.weight.detach().to(precision.compute_dtype).t()
    step = max(1, MATMUL_SLICE_BYTES // (columns.shape[1] * rows.element_size()))
    buffer = rows.new_empty(min(step, len(rows)), columns.shape[1])

    def run() -> tuple[Tensor]:
        for part in rows.split(step):
            torch.mm(part, columns, out=buffer[: len(part)])
        return (buffer,)

    return run


def tokens(case: Case, padded: bool) -> int:
    """Rows that are multiplied."""
    return case.batch_size * case.length if padded else int(case.draw_lengths().sum())
