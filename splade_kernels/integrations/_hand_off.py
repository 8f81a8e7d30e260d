"""What a fused decoder is: it hands hidden states through, and computes the embeddings from them when asked to.

The decoder stays the ``nn.Linear`` it was; only ``forward`` on the instance changes. Called by the model while a fused
encoder runs, it returns its input. Called by the pooling with ``pooling=...``, it computes
:func:`splade_kernels.splade_pool` with its weight and bias. Any other call gives the logits.

The pooling calls the module instead of taking its parameters, so that whatever loads or gathers parameters around a
module's call and releases them afterwards does so here too: accelerate's offloading, DeepSpeed ZeRO-3.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import splade_pool
from ..modules import hooks_of, qualified_name

_SHARDED: tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    _SHARDED = (DTensor, FSDPModule)

UNFUSE_FIRST = "call unfuse(model) first, change the model, then fuse it again"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What to do about a decoder of another class, by the package that the class comes from.
_REMEDIES = {
    "peft": "a PEFT adapter is on it. Leave the decoder out of target_modules and modules_to_save, and embeddings that "
    "are its weight out of trainable_token_indices, or load the adapter with peft.PeftModel and put what its "
    "merge_and_unload() returns in place of the model",
    "bitsandbytes": "quantise the layers of the encoder only (llm_int8_skip_modules)",
    "torchao": "quantise the layers of the encoder only (filter_fn)",
    "torch.ao": "quantise the layers of the encoder only, not the decoder",
}


class HandOff(threading.local):
    """Whether the decoder hands its input through, in this thread.

    Copying or pickling makes a fresh one. A ``ContextVar`` would serve as well, but ``torch.compile`` cannot trace it.
    The attribute is the instance's from the start: graphs of ``torch.compile`` guard on which attributes an instance
    has, and one that the first call adds would make the graph traced in that call fail its own guards.
    """

    def __init__(self) -> None:
        self.active = False

    def __reduce__(self) -> tuple[type[HandOff], tuple[()]]:
        return HandOff, ()


class DecoderForward:
    """Takes the place of the decoder's ``forward``."""

    def __init__(self, decoder: nn.Linear) -> None:
        self.decoder = decoder
        self.hand_off = HandOff()

    def __call__(self, input: Tensor, *, pooling: dict[str, Any] | None = None) -> Tensor:
        if pooling is not None:
            self._check(input)
            return splade_pool(input, self.decoder.weight, self.decoder.bias, **pooling)
        if self.hand_off.active:
            return input
        return type(self.decoder).forward(self.decoder, input)

    # What Python names in the error about a wrong argument.
    __call__.__qualname__ = nn.Linear.forward.__qualname__

    def _check(self, hidden_states: Tensor) -> None:
        weight = self.decoder.weight
        if is_partitioned(weight) and weight.numel() == 0:
            raise RuntimeError(
                "the decoder's weight is partitioned by DeepSpeed ZeRO-3, whose hooks did not gather it for this call: "
                "call the model inside deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )
        if is_sharded(weight) or is_sharded(self.decoder) or weight.numel() == 0:
            raise RuntimeError(
                "the decoder's weight is sharded on its own: shard the whole SparseEncoder (layers first, "
                "then the SparseEncoder itself) so that its root keeps the weight gathered during forward"
            )
        if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[-1]:
            raise RuntimeError(
                f"token_embeddings: expected hidden states of width D for the decoder's weight [V, D] = "
                f"{list(weight.shape)}, got width {hidden_states.shape[-1]}. If embeddings were resized or an adapter "
                f"was added after fuse: {UNFUSE_FIRST}"
            )
        check_device("token_embeddings", hidden_states, self.decoder)
        changed = why_not_plain(self.decoder)
        if changed:
            raise RuntimeError(f"the decoder was changed after fuse (it {changed}): {UNFUSE_FIRST}")


def check_decoder(decoder: Any) -> nn.Linear:
    """The decoder, if its output is ``W h + c`` and nothing else.

    Raises:
        TypeError: it is no ``nn.Linear``, or of a class derived from it.
        ValueError: hooks see its logits, or its weight is quantised.
    """
    if type(decoder) is not nn.Linear:
        kind = qualified_name(type(decoder))
        remedy = next((f": {text}" for package, text in _REMEDIES.items() if kind.startswith(f"{package}.")), "")
        raise TypeError(f"decoder: expected exactly torch.nn.Linear, got {kind}{remedy}")
    reason = why_not_plain(decoder)
    weight_type = type(decoder.weight)
    if reason is None and not (weight_type is nn.Parameter or is_sharded(decoder.weight)):
        reason = f"has a weight of type {qualified_name(weight_type)}, as quantisation leaves it"
    if reason:
        raise ValueError(f"decoder: expected a plain nn.Linear, but it {reason}")
    return decoder


def why_not_plain(decoder: nn.Module) -> str | None:
    if type(decoder) is not nn.Linear:
        return f"became {qualified_name(type(decoder))}"
    hooks = watching_hooks(decoder)
    if hooks:
        return f"has hooks: {', '.join(hooks)}"
    weight = decoder.weight
    if weight.dtype not in _DTYPES or not (isinstance(weight, nn.Parameter) or is_sharded(weight)):
        return f"has a weight of type {qualified_name(type(weight))}, {weight.dtype}"
    return None


def watching_hooks(module: nn.Module) -> list[str]:
    """Names of the hooks that may look at what the module computes; those of DeepSpeed only gather its parameters."""
    names = [qualified_name(hook) for hook in hooks_of(module)]
    return [name for name in names if not name.startswith("deepspeed.")]


def around(inner: nn.Module, decoder: nn.Linear) -> dict[str, nn.Module]:
    """The modules inside of the model that contain the decoder, by name."""
    return {
        name: module
        for name, module in inner.named_modules()
        if name and module is not decoder and any(child is decoder for child in module.modules())
    }


def is_sharded(holder: Tensor | nn.Module) -> bool:
    return isinstance(holder, _SHARDED)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps this parameter, which is empty outside of its modules' calls."""
    return hasattr(parameter, "ds_id")


def weight_shape(decoder: nn.Linear) -> tuple[int, ...]:
    """``(V, D)``, of an empty parameter of ZeRO-3 too."""
    return tuple(getattr(decoder.weight, "ds_shape", decoder.weight.shape))


def check_device(name: str, tensor: Any, decoder: nn.Linear) -> None:
    """Raise where a replica of ``nn.DataParallel`` meets the parameters of the first one.

    accelerate's hooks and ZeRO-3's bring parameters and inputs together for the decoder's own call.
    """
    weight = decoder.weight
    brought = "_hf_hook" in decoder.__dict__ or is_partitioned(weight)
    if isinstance(tensor, Tensor) and tensor.device != weight.device and not brought:
        raise RuntimeError(
            f"{name} is on {tensor.device}, the decoder's weight on {weight.device}. torch.nn.DataParallel replicas "
            "keep the first device's decoder: use torchrun (DistributedDataParallel), or one visible device"
        )
