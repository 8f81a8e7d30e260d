"""Checks by execution: a Transformer module returns what its decoder returns, and both poolings agree.

Encoding text would prove nothing: a collapsed model gives zeros for any text. So a stand-in for the decoder returns
random values of many magnitudes, and those must come out of the Transformer module untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
from torch import Tensor, nn
from torch.nn.functional import linear

from ._hand_off import is_partitioned, is_sharded

logger = logging.getLogger(__name__)

_BATCH, _LENGTH = 2, 7
_REAL_TOKENS_OF_LAST = 4
_LARGEST_LOGIT = 10.0


def skip_probe(modules: Iterable[nn.Module]) -> bool:
    """Whether this process lacks the values of the weights, so that there is nothing to compute with; says so."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for reason, found in (
        ("on the meta device", any(parameter.is_meta for parameter in parameters)),
        ("partitioned by DeepSpeed ZeRO-3", any(map(is_partitioned, parameters))),
        ("sharded", any(map(is_sharded, parameters))),
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
    config = transformer.model.config
    (vocab_size, hidden_size), device, dtype = decoder.weight.shape, decoder.weight.device, decoder.weight.dtype
    token_id = 1 if getattr(config, "pad_token_id", None) == 0 else 0
    # Flash attention takes no float32: such a model only ever runs under autocast.
    autocast = dtype is torch.float32 and "flash" in str(getattr(config, "_attn_implementation", ""))
    applied_to: list[tuple[int, ...]] = []
    with _isolated(transformer, transformer.parameters(), device, autocast):
        for width in (vocab_size, hidden_size):
            magnitude = torch.logspace(-2, 4, _LENGTH).unsqueeze(1)
            values = (torch.randn(_BATCH, _LENGTH, width) * magnitude).to(device, dtype)
            output = values.clone()
            ids = torch.full((_BATCH, _LENGTH), token_id, device=device)
            applied_to.clear()

            def stand_in(input: Tensor, output: Tensor = output) -> Tensor:
                applied_to.append(tuple(input.shape))
                return output

            decoder.__dict__["forward"] = stand_in
            try:
                returned = transformer.forward({"input_ids": ids, "attention_mask": _attention_mask(device)})
            except Exception as error:
                raise ValueError(
                    f"the model could not be run with its decoder's output replaced by a [{_BATCH}, {_LENGTH}, "
                    f"{width}] tensor, so its forward does something else with it: {error}"
                ) from error
            finally:
                del decoder.__dict__["forward"]
            if applied_to != [(_BATCH, _LENGTH, hidden_size)]:
                raise ValueError(
                    f"the decoder must be applied once, to hidden states {(_BATCH, _LENGTH, hidden_size)}, "
                    f"but it was applied to {applied_to}"
                )
            if not _untouched(returned["token_embeddings"], output, values):
                raise ValueError(
                    "the model changes its logits after the decoder (scaled, capped, shifted or copied): "
                    "the fused head would leave that out"
                )


def probe_pooling(
    pooling: SpladePooling, decoder: nn.Linear, fused: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Raise ``ValueError`` unless the fused pooling of random hidden states agrees with the stock one."""
    weight, bias, dimension = decoder.weight, decoder.bias, pooling.embedding_dimension
    parameters = [parameter for parameter in (weight, bias) if parameter is not None]
    with _isolated(pooling, parameters, weight.device):
        hidden_states = torch.randn(_BATCH, _LENGTH, weight.shape[1]).to(weight.device, weight.dtype)
        hidden_states = hidden_states * (_LARGEST_LOGIT / linear(hidden_states, weight).abs().amax().clamp(min=1e-6))
        try:
            logits = linear(hidden_states, weight, bias)
        except RuntimeError as error:
            dtypes = " and ".join(str(parameter.dtype) for parameter in parameters)
            raise ValueError(f"decoder: PyTorch cannot multiply its weight and bias, {dtypes}: {error}") from error
        mask = _attention_mask(weight.device)
        stock = type(pooling).forward(pooling, {"token_embeddings": logits.clone(), "attention_mask": mask})
        pooling.embedding_dimension = dimension
        ours = fused({"token_embeddings": hidden_states, "attention_mask": mask})
        pooling.embedding_dimension = dimension

        expected, actual = stock["sentence_embedding"].double(), ours["sentence_embedding"].double()
        # In practice a dot of D products is off by at most about sqrt(D) roundings of the sum of their magnitudes. The
        # activation is 1-Lipschitz. On a GPU TF32 may be on for float32.
        magnitudes = linear(hidden_states.abs().float(), weight.abs().float()).amax(dim=1).double()
        product_error = 2.0**-10 if weight.is_cuda else torch.finfo(torch.float32).eps
        eps = max(torch.finfo(weight.dtype).eps, torch.finfo(logits.dtype).eps)
        rounding = 4 * eps * (logits.abs().amax(dim=1).double() + 1)
        bound = product_error * weight.shape[1] ** 0.5 * magnitudes + rounding
        if pooling.pooling_strategy == "sum":
            bound = bound * _LENGTH
        distance = (expected - actual).abs()
        if expected.shape != actual.shape or not bool((distance <= bound).all()):
            raise ValueError(
                f"the fused head differs from the stock one by {distance.max().item():.3g} on random hidden states, "
                f"more than rounding explains ({bound.max().item():.3g})"
            )


def _untouched(returned: Tensor, output: Tensor, values: Tensor) -> bool:
    """Whether ``returned`` is ``output``, which held ``values``; in other memory it may only be a change of dtype.

    A factor of one or a bias of zero, as a fresh model has, changes no value yet: hence the look at the memory.
    """
    if returned.shape != values.shape or (returned.dtype == values.dtype and returned.data_ptr() != output.data_ptr()):
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
    """No gradients, evaluation mode, one thread; random state, ``training`` flags and threads are restored afterwards.

    The caller's autocast is off. Autocast is on if ``autocast`` says so, or where parameters of several dtypes can only
    be multiplied under it.

    One thread, because PyTorch's threads do not survive ``os.fork`` and a child would wait for them forever: servers
    load a model once and fork their workers (gunicorn --preload, uwsgi). Loading starts no threads, so neither does
    this. The setting is the process's: a thread that computes for the first time meanwhile takes it over and keeps it.
    """
    dtypes = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    low = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.bfloat16)
    precision = torch.autocast(device.type, dtype=low, enabled=autocast or len(dtypes) > 1)
    training = {submodule: submodule.training for submodule in module.modules()}
    threads = torch.get_num_threads()
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), precision:
        torch.set_num_threads(1)
        for submodule in training:
            submodule.training = False
        try:
            yield
        finally:
            for submodule, mode in training.items():
                submodule.training = mode
            torch.set_num_threads(threads)
