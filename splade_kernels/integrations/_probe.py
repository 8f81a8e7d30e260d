"""Checks by execution: what a model does to what its decoder returns, and whether both poolings agree.

Encoding text would prove nothing: a collapsed model gives zeros for any text. So a stand-in for the decoder returns
random values of many magnitudes, and those must come out of the model as they are, or scaled and capped as its
configuration says.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ._hand_off import (
    LOGIT_SETTINGS,
    SCALES,
    SOFTCAPS,
    LogitTransform,
    is_partitioned,
    is_sharded,
    temporary_forward,
)

logger = logging.getLogger(__name__)

_BATCH, _LENGTH = 2, 7
_REAL_TOKENS_OF_LAST = 4
_LARGEST_LOGIT = 10.0


def why_no_probe(modules: Iterable[nn.Module]) -> str | None:
    """Why this process lacks the values of the weights, so that there is nothing to compute with."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for reason, found in (
        ("on the meta device", any(parameter.is_meta for parameter in parameters)),
        ("partitioned by DeepSpeed ZeRO-3", any(map(is_partitioned, parameters))),
        ("sharded", any(map(is_sharded, parameters))),
    ):
        if found:
            return reason
    return None


def _assume_transform(config: Any, reason: str) -> LogitTransform:
    """What follows the decoder of a model that cannot be probed: nothing, where its configuration names nothing.

    Raises:
        ValueError: it names a soft cap or a scale, which the model may or may not apply.
    """
    transform = LogitTransform.of(config)
    for name, value in transform.settings.items():
        if value not in (None, 1):
            raise ValueError(
                f"config.{name} is {value!r}, and whether the model applies it cannot be checked, because its weights "
                f"are {reason}: fuse before that"
            )
    logger.warning(
        "fuse did not compare the fused head with the stock one, because the weights are %s; "
        "fuse before that to have it checked.",
        reason,
    )
    return transform


def probe_model(
    model: nn.Module, config: Any, decoder: nn.Linear, run: Callable[[Tensor, Tensor], Tensor]
) -> LogitTransform:
    """How the logits that ``run(input_ids, attention_mask)`` returns follow from what the decoder returned.

    Where this process lacks the weights' values, nothing is run, and the configuration may name no change of logits.

    Raises:
        ValueError: the model cannot be run so, does not apply its decoder once to all tokens, or changes the logits in
            a way that its configuration does not explain.
    """
    if reason := why_no_probe([model]):
        return _assume_transform(config, reason)
    (vocab_size, hidden_size), device, dtype = decoder.weight.shape, decoder.weight.device, decoder.weight.dtype
    mask = _attention_mask(device)
    ids = torch.full_like(mask, probe_token(config))
    applied_to: list[tuple[int, ...]] = []
    with isolated(model, model.parameters(), device, needs_autocast(config, decoder)):
        values = torch.rand(_BATCH, _LENGTH, vocab_size) + 1
        values = values * torch.randn_like(values).sign() * torch.logspace(-2, 3, _LENGTH).unsqueeze(1)
        values = values.to(device, dtype)
        output = values.clone()
        empty = values.new_empty((_BATCH, _LENGTH, 0))
        for stand_in in (output, empty):
            applied_to.clear()
            with _standing_in(decoder, stand_in, applied_to):
                try:
                    returned = run(ids, mask)
                except Exception as error:
                    raise ValueError(
                        f"the model could not be run with its decoder's output replaced by a {list(stand_in.shape)} "
                        f"tensor, so its forward does something else with it: {error}"
                    ) from error
            if not applied_to:
                raise ValueError(
                    "get_output_embeddings() was never called: the model computes its logits otherwise, such as from "
                    "that layer's weight, so there is no call that the hidden states could be taken from"
                )
            if applied_to != [(_BATCH, _LENGTH, hidden_size)]:
                raise ValueError(
                    f"the decoder must be applied once, to hidden states {(_BATCH, _LENGTH, hidden_size)}, "
                    f"but it was applied to {applied_to}"
                )
            if stand_in is output:
                transform = _find_transform(config, returned, output, values)
    return transform


def needs_autocast(config: Any, decoder: nn.Linear) -> bool:
    """Flash attention takes no float32: such a model only ever runs under autocast."""
    return decoder.weight.dtype is torch.float32 and uses_flash_attention(config)


def uses_flash_attention(config: Any) -> bool:
    """Whether sequences that follow one another in one row are kept apart; transformers tells by the name too."""
    return "flash" in str(getattr(config, "_attn_implementation", ""))


def probe_token(config: Any) -> int:
    """An id that is not the padding."""
    return 1 if getattr(config, "pad_token_id", None) == 0 else 0


@contextmanager
def _standing_in(decoder: nn.Linear, output: Tensor, applied_to: list[tuple[int, ...]]) -> Iterator[None]:
    """The decoder returns ``output`` in this thread; the shapes of its inputs are appended to ``applied_to``.

    Gradients are on from there until the end, and off then.
    """
    elsewhere, thread = decoder.forward, threading.get_ident()

    def stand_in(input: Tensor, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return elsewhere(input, **kwargs)
        applied_to.append(tuple(input.shape))
        torch.set_grad_enabled(True)  # from here on, whatever has trained parameters shows
        return output

    try:
        with temporary_forward(decoder, stand_in):
            yield
    finally:
        torch.set_grad_enabled(False)


def _find_transform(config: Any, returned: Tensor, output: Tensor, values: Tensor) -> LogitTransform:
    """The first of what the configuration may mean that turns ``values``, which ``output`` held, into ``returned``.

    A factor of one or a bias of zero, as a fresh model has, changes no value yet. So where the logits come back in
    other memory and no setting accounts for it, only a change of dtype is accepted.
    """
    identity = LogitTransform.of(config)
    caps, scales = ([identity.settings[name] for name in names] for names in (SOFTCAPS, SCALES))
    caps_tried = [None, *(float(cap) for cap in caps if _is_positive(cap))]
    scales_tried = [1.0, *(factor for scale in scales if _is_positive(scale) for factor in (1 / scale, float(scale)))]
    moved = returned.dtype == values.dtype and returned.data_ptr() != output.data_ptr()
    eps = max(torch.finfo(returned.dtype).eps, torch.finfo(values.dtype).eps)
    for cap, scale in itertools.product(caps_tried, scales_tried):
        if cap is None and scale == 1.0 and moved and 1.0 not in scales:
            continue
        expected = values.double() * scale
        if cap is not None:
            expected = cap * torch.tanh(expected / cap)
        if returned.shape == values.shape and torch.allclose(returned.double(), expected, rtol=8 * eps, atol=0):
            if returned.requires_grad:
                raise ValueError(
                    "the model applies parameters of its own to its logits after the decoder, and the fused head would "
                    "keep the values that they have now"
                )
            return replace(identity, scale=scale, softcap=cap)
    raise ValueError(f"{_what_follows(returned, values)}: the fused head would leave that out")


def _what_follows(returned: Tensor, values: Tensor) -> str:
    """What the model does after its decoder, as far as it shows, for a change that is no known one."""
    if returned.shape[-1] != values.shape[-1]:
        return (
            "get_output_embeddings() is not the last layer: from its output of shape "
            f"{list(values.shape)} the model computes logits of shape {list(returned.shape)}"
        )
    if returned.shape != values.shape:
        return f"the model returns {list(returned.shape)} of the {list(values.shape)} logits of its decoder"
    if torch.equal(returned, values):
        return (
            "the model changes its logits after the decoder. It returns equal values in new memory, as by an operation "
            "that has no effect yet, such as the addition of a bias that is still 0"
        )
    return (
        "the model changes its logits after the decoder, by something other than a scale or a soft cap that one of "
        f"config.{', config.'.join(LOGIT_SETTINGS)} names"
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def probe_pooling(pooling: Any, decoder: nn.Linear, fused: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Raise ``ValueError`` unless the fused pooling of random hidden states agrees with the stock one."""
    weight, bias = decoder.weight, decoder.bias
    parameters = [parameter for parameter in (weight, bias) if parameter is not None]
    with isolated(pooling, parameters, weight.device):
        hidden_states = torch.randn(_BATCH, _LENGTH, weight.shape[1]).to(weight.device, weight.dtype)
        hidden_states = hidden_states * (_LARGEST_LOGIT / linear(hidden_states, weight).abs().amax().clamp(min=1e-6))
        try:
            logits = linear(hidden_states, weight, bias)
        except RuntimeError as error:
            dtypes = " and ".join(str(parameter.dtype) for parameter in parameters)
            raise ValueError(f"decoder: PyTorch cannot multiply its weight and bias, {dtypes}: {error}") from error
        mask = _attention_mask(weight.device)
        stock = type(pooling).forward(pooling, {"token_embeddings": logits.clone(), "attention_mask": mask})
        ours = fused({"token_embeddings": hidden_states, "attention_mask": mask})

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


def _attention_mask(device: torch.device) -> Tensor:
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.int64, device=device)
    mask[-1, _REAL_TOKENS_OF_LAST:] = 0
    return mask


@contextmanager
def isolated(
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
    # BigBird exchanges its attention modules when a text is too short for sparse attention.
    before = [(submodule, dict(submodule.__dict__), dict(submodule._modules)) for submodule in module.modules()]
    threads = torch.get_num_threads()
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), precision:
        torch.set_num_threads(1)
        for submodule, _, _ in before:
            submodule.training = False
        try:
            yield
        finally:
            for submodule, attributes, children in before:
                submodule.__dict__.clear()
                submodule.__dict__.update(attributes)
                submodule._modules.clear()
                submodule._modules.update(children)
            torch.set_num_threads(threads)
