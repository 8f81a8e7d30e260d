"""The hand-off of the decoder, which every integration shares.

A fused decoder is the ``nn.Linear`` that it was, with another ``forward`` on the instance. Called by its model while a
fused encoder runs in this thread, it keeps its input, the hidden states, and returns ``[..., 0]`` in place of logits.
Called with ``pooling=...``, it computes :func:`splade_kernels.splade_pool` with its weight and bias. Any other call
gives the logits.

The pooling calls the module instead of reading its parameters, so that whatever loads or gathers parameters around a
module's call (accelerate's offloading, DeepSpeed ZeRO-3) does so for the embeddings too.

There is one such forward a decoder. Each encoder on the decoder is a user of it, and the last one to leave removes it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..functional import splade_pool
from ..modules import hooks_of, qualified_name, why_not_plain

_SHARDED: tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    _SHARDED = (DTensor, FSDPModule)

UNFUSE_FIRST = "call unfuse(model), or release() of a SpladeEncoder, first, change the model, then fuse it again"
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
# Names under which models' configurations hold what they do to their logits after the decoder.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
SCALES = ("logits_scaling", "logit_scale", "output_multiplier")
LOGIT_SETTINGS = (*SOFTCAPS, *SCALES)
T = TypeVar("T")
_users_lock = threading.RLock()  # a garbage collection may run a finalizer while its thread holds the lock


class Slot:
    """Whether the decoder keeps its input, and the input that it kept."""

    def __init__(self) -> None:
        self.active = False
        self.kept: Tensor | None = None


class HandOff(threading.local):
    """This thread's slot.

    ``torch.compile`` cannot trace a ``ContextVar``, and what compiled code writes to a thread-local object itself is
    lost (PyTorch 2.13): hence the slot. Its attributes exist from the start, because graphs guard on the attributes
    that an object has: added by the first call, they would invalidate the graph traced in that call.
    """

    def __init__(self) -> None:
        self.slot = Slot()


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the decoder: ``softcap · tanh(scale · x / softcap)``, or ``scale · x``.

    ``settings`` are the entries of its configuration that this was derived from, None where there is none.
    """

    config: Any
    settings: dict[str, Any]
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: Any) -> LogitTransform:
        """The identity, with the settings that this configuration has now."""
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        return LogitTransform(config, {name: getattr(config, name, None) for name in LOGIT_SETTINGS})

    def __str__(self) -> str:
        return f"scaled by {self.scale} and capped at {self.softcap}"

    def options(self) -> dict[str, Any]:
        """Arguments of :func:`splade_kernels.splade_pool`; none for the identity."""
        if self.scale == 1.0 and self.softcap is None:
            return {}
        return {"logit_scale": self.scale, "logit_softcap": self.softcap}

    def check(self) -> None:
        values = getattr(self.config, "__dict__", ())  # asking a configuration for what it lacks is slow
        for name, old in self.settings.items():
            if (old is not None or name in values) and (new := getattr(self.config, name, None)) != old:
                raise RuntimeError(
                    f"config.{name} was {old!r} when the model was fused and is {new!r} now: {UNFUSE_FIRST}"
                )


class DecoderForward:
    """Takes the place of the decoder's ``forward``."""

    def __init__(self, decoder: nn.Linear, transform: LogitTransform) -> None:
        self.decoder = decoder
        self.transform = transform
        self.hand_off = HandOff()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled decoder is the stock one until a copied encoder joins it."""
        return getattr, (self.decoder, "forward")

    def __call__(self, input: Tensor, *, pooling: dict[str, Any] | None = None) -> Tensor:
        if pooling is not None:
            # The second alone is slower to ask.
            if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # type: ignore[attr-defined,no-untyped-call]
                raise RuntimeError(f"ONNX has no operator for the fused head: {UNFUSE_FIRST}")
            self._check(input)
            return splade_pool(input, self.decoder.weight, self.decoder.bias, **pooling, **self.transform.options())
        slot = self.hand_off.slot
        if slot.active:
            if slot.kept is not None:
                raise RuntimeError(f"the model called its decoder twice in one forward: {UNFUSE_FIRST}")
            slot.kept = input
            return input.new_empty((*input.shape[:-1], 0))
        return type(self.decoder).forward(self.decoder, input)

    # Python's errors about wrong arguments then name the stock method, as without fuse.
    __call__.__qualname__ = nn.Linear.forward.__qualname__

    def collect(self, forward: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, Tensor]:
        """What ``forward`` returns with logits of width 0, and the hidden states that the decoder was given."""
        slot = self.hand_off.slot
        before = slot.active, slot.kept
        slot.active, slot.kept = True, None
        try:
            output = forward(*args, **kwargs)
            hidden_states = cast("Tensor | None", slot.kept)
        finally:
            slot.active, slot.kept = before
        if hidden_states is None:
            raise RuntimeError("the model did not call its decoder, or not by calling the module")
        return output, hidden_states

    def join(self, user: Any) -> None:
        """Count ``user`` as an encoder on this decoder, until it leaves or is garbage."""
        self._users.add(user)
        weakref.finalize(user, _remove_unused, weakref.ref(self)).atexit = False

    def leave(self, user: Any) -> None:
        with _users_lock:
            self._users.discard(user)
            _remove_unused(weakref.ref(self))

    def is_used(self) -> bool:
        return any(True for _ in self._users)

    def _check(self, hidden_states: Tensor) -> None:
        weight = self.decoder.weight
        if is_partitioned(weight) and weight.numel() == 0:
            raise RuntimeError(
                "the decoder's weight is partitioned by DeepSpeed ZeRO-3, whose hooks did not gather it for this call: "
                "use deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )
        if is_sharded(weight) or is_sharded(self.decoder) or weight.numel() == 0:
            raise RuntimeError(
                "the decoder's weight is sharded on its own: shard the whole SparseEncoder or SpladeEncoder (layers "
                "first, then itself) so that its root keeps the weight gathered during forward"
            )
        if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[-1]:
            raise RuntimeError(
                f"token_embeddings: expected hidden states of width D for the decoder's weight [V, D] = "
                f"{list(weight.shape)}, got width {hidden_states.shape[-1]}. If embeddings were resized or an adapter "
                f"was added after fuse: {UNFUSE_FIRST}"
            )
        check_device("token_embeddings", hidden_states, self.decoder)
        self.transform.check()
        if error := why_not_plain(self.decoder, watching_hooks):
            raise RuntimeError(f"{error}. The decoder was changed after fuse: {UNFUSE_FIRST}")


def join(decoder: nn.Linear, transform: LogitTransform, user: Any) -> DecoderForward:
    """Make ``user`` an encoder on the decoder, which gets its forward from the first one."""
    with _users_lock:
        forward = own_forward(decoder)
        if not isinstance(forward, DecoderForward):
            forward = DecoderForward(decoder, transform)
        check_transform(decoder, transform)
        forward.join(user)
        set_forward(decoder, forward)  # last: a garbage collection may have removed it with its last user
    return forward


def check_transform(decoder: nn.Linear, transform: LogitTransform) -> None:
    """Raise where another encoder on the decoder has its logits changed in another way."""
    forward = own_forward(decoder)
    if isinstance(forward, DecoderForward) and forward.transform.options() != transform.options():
        raise ValueError(
            f"another encoder on this decoder has its logits {forward.transform}, this one {transform}: release that "
            "one first, or give each model a decoder of its own"
        )


def _remove_unused(reference: weakref.ref[DecoderForward]) -> None:
    with _users_lock:
        forward = reference()
        if forward is not None and own_forward(forward.decoder) is forward and not forward.is_used():
            remove_forward(forward.decoder)


def own_forward(module: nn.Module) -> Any:
    """The forward set on the instance (the one under accelerate's hooks, where it has some), or None.

    The class's own method counts as None: accelerate leaves it on the instance when its hooks are removed.
    """
    forward = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    return None if forward == MethodType(type(module).forward, module) else forward


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["_old_forward" if "_hf_hook" in module.__dict__ else "forward"] = forward


def remove_forward(module: nn.Module) -> None:
    """Give the module its class's forward back."""
    if "_hf_hook" in module.__dict__:
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)  # what accelerate's hooks wrap
    else:
        module.__dict__.pop("forward", None)


@contextmanager
def temporary_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module has this ``forward`` meanwhile, and the one that it had before afterwards."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def check_free(module: nn.Module) -> None:
    """Raise unless the module's forward is its class's own and nothing wraps it."""
    name = qualified_name(type(module))
    if "_hf_hook" in module.__dict__:
        raise ValueError(
            f"{name} carries hooks of accelerate: load the model without device_map, or remove hooks that were "
            "added later with accelerate.hooks.remove_hook_from_module(model, recurse=True); fuse, then offload"
        )
    if (forward := own_forward(module)) is not None:
        raise ValueError(f"{name} has an instance-level forward of its own: {forward!r}")


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


def places(inner: nn.Module, decoder: nn.Linear) -> list[tuple[nn.Module, str]]:
    """The modules that hold the decoder, and as what."""
    return [(module, name) for module in inner.modules() for name, child in module._modules.items() if child is decoder]


def check_in_place(held: list[tuple[nn.Module, str]], decoder: nn.Linear) -> None:
    """Raise where another module was put in the decoder's place, as resizing embeddings and adding an adapter do."""
    for module, name in held:
        if module._modules.get(name) is not decoder:
            raise RuntimeError(f"the decoder is not the one that was fused (resized or replaced): {UNFUSE_FIRST}")


def read_by_hooks(modules: dict[str, nn.Module]) -> str | None:
    """Which of the modules around the decoder has hooks, to which the decoder's output is visible."""
    for name, module in modules.items():
        if hooks := watching_hooks(module):
            return f"{name}: has hooks that see the decoder's logits, which a fused model lacks: {', '.join(hooks)}"
    return None


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
    if not isinstance(tensor, Tensor) or tensor.device == weight.device:
        return
    if "_hf_hook" not in decoder.__dict__ and not is_partitioned(weight):
        raise RuntimeError(
            f"{name} is on {tensor.device}, the decoder's weight on {weight.device}. torch.nn.DataParallel replicas "
            "keep the first device's decoder: use torchrun (DistributedDataParallel), or one visible device"
        )
