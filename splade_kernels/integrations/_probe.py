"""Checks by execution that a Transformer module returns what its decoder returns, and that both poolings agree.

Text would prove nothing: a collapsed model gives zeros for any text. So the decoder is replaced for a moment by a
stand-in that returns random values of many magnitudes, and those must come out of the Transformer module untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
from torch import Tensor, nn

from ._hand_off import is_partitioned, is_sharded

logger = logging.getLogger(__name__)

_BATCH, _LENGTH = 2, 7
_REAL_TOKENS_OF_LAST = 4
_LARGEST_LOGIT = 10.0


def skip_probe(modules: Iterable[nn.Module]) -> bool:
    """Whether the weights hold no values that this process could compute with; says so."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for reason, found in (
        ("on the meta device", any(parameter.is_meta for parameter in parameters)),
        ("partitioned by DeepSpeed ZeRO-3", any(is_partitioned(parameter) for parameter in parameters)),
        ("sharded", any(is_sharded(parameter) for parameter in parameters)),
    ):
        if found:
            logger.warning(
                "fuse did not compare the fused head with the stock one, because the weights are %s; "
                "fuse before that to have it checked.",
                reason,
            )
            return True
    return False


def probe_transformer(transformer: Transformer, decoder: nn.Linear) -> None:
    """Raise ``ValueError`` unless ``token_embeddings`` is what the decoder returned, logits or hidden states."""
    model = transformer.model
    vocab_size, hidden_size = decoder.weight.shape
    device = decoder.weight.device
    token_id = 1 if getattr(model.config, "pad_token_id", None) == 0 else 0
    # Flash attention takes no float32: such a model only ever runs under autocast.
    flash = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    autocast = flash and decoder.weight.dtype is torch.float32
    with _isolated(transformer, transformer.parameters(), device, autocast):
        for width in (vocab_size, hidden_size):
            magnitude = torch.logspace(-2, 4, _LENGTH).unsqueeze(1)
            values = (torch.randn(_BATCH, _LENGTH, width) * magnitude).to(device, decoder.weight.dtype)
            stand_in = _StandIn(values.clone())
            features = {
                "input_ids": torch.full((_BATCH, _LENGTH), token_id, device=device),
                "attention_mask": _attention_mask(device),
            }
            decoder.__dict__["forward"] = stand_in
            try:
                returned = transformer.forward(features)["token_embeddings"]
            except Exception as error:
                raise ValueError(
                    f"the model could not be run with its decoder's output replaced by a [{_BATCH}, {_LENGTH}, "
                    f"{width}] tensor, so its forward does something else with it: {error}"
                ) from error
            finally:
                del decoder.__dict__["forward"]
            expected_shape = (_BATCH, _LENGTH, hidden_size)
            if stand_in.input_shapes != [expected_shape]:
                raise ValueError(
                    f"the decoder must be applied once, to hidden states {expected_shape}, "
                    f"but it was applied to {stand_in.input_shapes}"
                )
            if not _untouched(returned, stand_in.output, values):
                raise ValueError(
                    "the model changes its logits after the decoder (scaled, capped, shifted or copied): "
                    "the fused head would leave that out"
                )


def probe_pooling(
    pooling: SpladePooling, decoder: nn.Linear, fused: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Raise ``ValueError`` unless the fused pooling of random hidden states agrees with the stock one."""
    weight, bias = decoder.weight, decoder.bias
    dimension = pooling.embedding_dimension
    parameters = [parameter for parameter in (weight, bias) if parameter is not None]
    with _isolated(pooling, parameters, weight.device):
        hidden_states = torch.randn(_BATCH, _LENGTH, weight.shape[1]).to(weight.device, weight.dtype)
        largest = nn.functional.linear(hidden_states, weight).abs().amax().clamp(min=1e-6)
        hidden_states = hidden_states * (_LARGEST_LOGIT / largest)
        try:
            logits = nn.functional.linear(hidden_states, weight, bias)
        except RuntimeError as error:
            dtypes = " and ".join(str(parameter.dtype) for parameter in parameters)
            raise ValueError(f"decoder: PyTorch cannot multiply its weight and bias, {dtypes}: {error}") from error
        mask = _attention_mask(weight.device)
        stock = type(pooling).forward(pooling, {"token_embeddings": logits.clone(), "attention_mask": mask})
        pooling.embedding_dimension = dimension
        ours = fused({"token_embeddings": hidden_states, "attention_mask": mask})
        pooling.embedding_dimension = dimension

        expected, actual = stock["sentence_embedding"].double(), ours["sentence_embedding"].double()
        # A dot of D products is off by at most about sqrt(D) roundings of its absolute sum in practice; the
        # activation is 1-Lipschitz; TF32 may be on for float32 on a GPU.
        absolute = nn.functional.linear(hidden_states.abs().float(), weight.abs().float()).amax(dim=1).double()
        product_error = 2.0**-10 if weight.is_cuda else torch.finfo(torch.float32).eps
        eps = max(torch.finfo(weight.dtype).eps, torch.finfo(logits.dtype).eps)
        rounding = 4 * eps * (logits.abs().amax(dim=1).double() + 1)
        bound = product_error * weight.shape[1] ** 0.5 * absolute + rounding
        if pooling.pooling_strategy == "sum":
            bound = bound * _LENGTH
        distance = (expected - actual).abs()
        if expected.shape != actual.shape or not bool((distance <= bound).all()):
            raise ValueError(
                f"the fused head differs from the stock one by {distance.max().item():.3g} on random hidden states, "
                f"more than rounding explains ({bound.max().item():.3g})"
            )


class _StandIn:
    """Takes the decoder's place: returns ``output`` and notes what it was given."""

    def __init__(self, output: Tensor) -> None:
        self.output = output
        self.input_shapes: list[tuple[int, ...]] = []

    def __call__(self, input: Tensor) -> Tensor:
        self.input_shapes.append(tuple(input.shape))
        return self.output


def _untouched(returned: Tensor, given: Tensor, values: Tensor) -> bool:
    """Same shape and values as ``values``; a result in memory of its own may only be a change of dtype.

    A factor of one or a bias of zero, as a fresh model has, changes no value yet: hence the look at the memory.
    """
    if returned.shape != values.shape:
        return False
    if returned.dtype == values.dtype and returned.data_ptr() != given.data_ptr():
        return False
    eps = max(torch.finfo(returned.dtype).eps, torch.finfo(values.dtype).eps)
    return torch.allclose(returned.double(), values.double(), rtol=2 * eps, atol=0)


def _attention_mask(device: torch.device) -> Tensor:
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.int64, device=device)
    mask[-1, _REAL_TOKENS_OF_LAST:] = 0
    return mask


@contextmanager
def _isolated(
    module: nn.Module, parameters: Iterable[Tensor], device: torch.device, autocast: bool = False
) -> Iterator[None]:
    """No gradients, evaluation mode, one thread; random state and every ``training`` flag as they were afterwards.

    Autocast is on if ``autocast`` says so, or if parameters of several dtypes can only be multiplied under it; the
    caller's own is left out.
    """
    dtypes = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    low = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.bfloat16)
    precision = torch.autocast(device.type, dtype=low, enabled=autocast or len(dtypes) > 1)
    training = {submodule: submodule.training for submodule in module.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), precision, _one_thread():
        for submodule in training:
            submodule.training = False
        try:
            yield
        finally:
            for submodule, mode in training.items():
                submodule.training = mode


@contextmanager
def _one_thread() -> Iterator[None]:
    """Start no threads for PyTorch's operations: they would not survive ``os.fork``, and a child would wait for them.

    Servers load a model once and fork their workers (gunicorn --preload, uwsgi). Loading starts no threads, so fusing
    starts none either. The setting is that of the process: a thread that computes for the first time meanwhile takes it
    over and keeps it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
