"""What a fused decoder is: the ``nn.Linear`` that it was, with another ``forward`` on the instance.

Called by its model while a fused encoder runs, it returns its input, the hidden states. Called by the pooling with
``pooling=...``, it computes :func:`splade_kernels.splade_pool` of them with its weight and bias. Any other call gives
the logits.

The pooling calls the module instead of reading its parameters, so that whatever loads or gathers parameters around a
module's call (accelerate's offloading, DeepSpeed ZeRO-3) does so for the embeddings too.
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..functional import splade_pool
from ..modules import hooks_of, qualified_name, why_not_plain

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
    """Whether the decoder returns its input, in this thread. A copied or unpickled one starts afresh.

    ``torch.compile`` cannot trace a ``ContextVar``. Its graphs guard on the attributes that an instance has, so
    ``active`` exists from the start: added by the first call, it would invalidate the graph traced in that call.
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

    # Python's errors about wrong arguments then name the stock method, as without fuse.
    __call__.__qualname__ = nn.Linear.forward.__qualname__

    def _check(self, hidden_states: Tensor) -> None:
        weight = self.decoder.weight
        if is_partitioned(weight) and weight.numel() == 0:
            raise RuntimeError(
                "the decoder's weight is partitioned by DeepSpeed ZeRO-3, whose hooks did not gather it for this call: "
                "use deepspeed.zero.GatheredParameters(list(model.parameters()))"
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
        if error := why_not_plain(self.decoder, watching_hooks):
            raise RuntimeError(f"{error}. The decoder was changed after fuse: {UNFUSE_FIRST}")


def check_decoder(decoder: Any) -> nn.Linear:
    """The decoder, if it computes ``W h + c`` and nothing else.

    Raises:
        TypeError: it is not an ``nn.Linear``, or of a class derived from it.
        ValueError: hooks see its logits, or its weight is quantised.
    """
    if error := why_not_plain(decoder, watching_hooks):
        kind = qualified_name(type(decoder))
        remedy = next((f": {text}" for package, text in _REMEDIES.items() if kind.startswith(f"{package}.")), "")
        raise type(error)(f"{error}{remedy}")
    weight = decoder.weight
    if weight.dtype not in _DTYPES or not (type(weight) is nn.Parameter or is_sharded(weight)):
        raise ValueError(
            "decoder: expected a weight that is a floating-point nn.Parameter, "
            f"got {qualified_name(type(weight))}, {weight.dtype}"
        )
    return cast(nn.Linear, decoder)


def watching_hooks(module: nn.Module) -> list[str]:
    """Names of the hooks that may read the module's output; those of DeepSpeed only gather its parameters."""
    return [name for name in hooks_of(module) if not name.startswith("deepspeed.")]


def around(inner: nn.Module, decoder: nn.Linear) -> dict[str, nn.Module]:
    """The submodules of the model that contain the decoder, by name."""
    return {
        name: module
        for name, module in inner.named_modules()
        if name and module is not decoder and any(child is decoder for child in module.modules())
    }


def is_sharded(holder: Tensor | nn.Module) -> bool:
    return isinstance(holder, _SHARDED)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether the parameter is under DeepSpeed ZeRO-3, and so empty outside its module's calls."""
    return hasattr(parameter, "ds_id")


def check_device(name: str, tensor: Any, decoder: nn.Linear) -> None:
    """Raise where a replica of ``nn.DataParallel`` meets the parameters of the first device.

    The hooks of accelerate and of ZeRO-3 bring parameters and inputs together when the decoder itself is called.
    """
    weight = decoder.weight
    brought = "_hf_hook" in decoder.__dict__ or is_partitioned(weight)
    if isinstance(tensor, Tensor) and tensor.device != weight.device and not brought:
        raise RuntimeError(
            f"{name} is on {tensor.device}, the decoder's weight on {weight.device}. torch.nn.DataParallel replicas "
            "keep the first device's decoder: use torchrun (DistributedDataParallel), or one visible device"
        )
