"""The fused SPLADE head inside a sentence-transformers ``SparseEncoder``.

    model = fuse(SparseEncoder("naver/splade-v3"))      # train, encode, save as before

``fuse`` replaces ``forward`` on three instances and nothing else: classes, parameters, ``state_dict`` and configuration
stay, so a saved model loads without this package. While the Transformer module runs, its decoder returns the hidden
states; the pooling then has the decoder compute :func:`splade_kernels.splade_pool` of them, and ``[batch, seq, vocab]``
logits never exist. Called any other way, the decoder is the ``nn.Linear`` that it was. docs/sentence-transformers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm
from sentence_transformers.sparse_encoder import SparseEncoder
from sentence_transformers.sparse_encoder import losses as sparse_losses
from sentence_transformers.sparse_encoder.modules import Router, SparseAutoEncoder, SpladePooling, Transformer
from torch import Tensor, nn

from ..functional import check_options, check_threshold, flops_loss
from ..modules import qualified_name
from ._encode import encode_sparse
from ._hand_off import UNFUSE_FIRST, DecoderForward, HandOff, around, check_decoder, check_device, watching_hooks
from ._probe import probe_pooling, probe_transformer, skip_probe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FlopsLoss", "encode_sparse", "fuse", "unfuse"]

Features = dict[str, Any]
Model = TypeVar("Model", bound=nn.Module)


class FlopsLoss(sparse_losses.FlopsLoss):
    """FLOPS regulariser for ``SpladeLoss(document_regularizer=..., query_regularizer=...)``.

    ``Σ_v (mean_b y[b, v])²``, accumulated in float32. Value and gradient equal those of the class it derives from.

    Args:
        model: the ``SparseEncoder`` being trained.
        threshold: rows with at most this many non-zero entries count as zero rows.
        process_group: take the mean over the batches of all ranks of this group; ``None`` means this process's batch.

    References:
        Paria et al. 2020, arXiv:2004.05665; Geng et al. 2025, arXiv:2504.14839 (threshold).
    """

    def __init__(
        self, model: SparseEncoder, threshold: float | None = None, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__(model, threshold=check_threshold(threshold))
        self.process_group = process_group

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        return flops_loss(embeddings, threshold=self.threshold, process_group=self.process_group)

    def get_config_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold}


def fuse(model: Model, *, screening: str | bool = "auto") -> Model:
    """Give every SPLADE head in ``model`` the fused forward, in place.

    Each fill-mask ``Transformer`` that feeds a ``SpladePooling``, directly or in a route of a ``Router``, is checked,
    and probed once on random hidden states; nothing changes unless all pass. Of a fused model only ``screening`` is
    set. Once fused, ``SpladePooling.chunk_size`` has no effect, ``token_embeddings`` holds hidden states instead of
    logits, and embeddings are float32 under autocast. Fuse before ``torch.compile``, and before other threads compute:
    the probe runs on one thread, so that the process may still be forked.

    Args:
        model: a ``SparseEncoder``, or a module that contains one (a loss, a wrapper).
        screening: ``"auto"``, True or False: see :func:`splade_kernels.splade_pool`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: no ``SparseEncoder`` or ``SpladePooling`` in it, or a decoder that is no plain ``nn.Linear``
            (quantised, or with an adapter).
        ValueError: the logits are changed, read by hooks or used elsewhere, the backend is not torch, the model has
            been offloaded by accelerate, it is fused in part only, or ``screening`` is none of these.
    """
    heads = _find_heads(model)
    poolings = [pooling for head in heads for pooling in head.poolings]
    for pooling in poolings:
        check_options(pooling.pooling_strategy, pooling.activation_function, screening)
    if not all(head.is_fused() for head in heads):
        for step in (_Head.check, _Head.probe, _Head.install):
            for head in heads:
                step(head)
    for pooling in poolings:
        _own_forward(pooling).screening = screening
    return model


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`, in place: every forward that ``fuse`` installed is removed, any other one is left alone."""
    for module in model.modules():
        if not isinstance(_own_forward(module), _FORWARDS):
            continue
        if "_hf_hook" in module.__dict__:
            module.__dict__["_old_forward"] = MethodType(type(module).forward, module)  # what accelerate's hooks wrap
        else:
            del module.__dict__["forward"]
    return model


class _TransformerForward:
    def __init__(self, transformer: Transformer, decoder: nn.Linear, hand_off: HandOff) -> None:
        self.transformer = transformer
        self.decoder = decoder
        self.hand_off = hand_off
        inner: Any = transformer.model
        self.around = around(inner, decoder)

    def __call__(self, features: Features, **kwargs: Any) -> Features:
        inner: Any = self.transformer.model
        if inner.get_output_embeddings() is not self.decoder:
            raise RuntimeError(f"the decoder is not the one that was fused (resized or replaced): {UNFUSE_FIRST}")
        if reason := _read_by_hooks(self.around):
            raise RuntimeError(f"{reason}. They were added after fuse: {UNFUSE_FIRST}")
        check_device("input_ids", features.get("input_ids"), self.decoder)
        before = self.hand_off.active
        self.hand_off.active = True
        try:
            return type(self.transformer).forward(self.transformer, features, **kwargs)
        finally:
            self.hand_off.active = before

    __call__.__qualname__ = Transformer.forward.__qualname__


class _PoolingForward:
    def __init__(self, pooling: SpladePooling, decoder: Callable[..., Tensor], hand_off: HandOff) -> None:
        self.pooling = pooling
        self.decoder = decoder
        self.hand_off = hand_off
        self.screening: str | bool = "auto"
        # Read once: if torch.compile traced a read of what the first call changes, it would trace that call twice.
        self.sets_dimension = pooling.embedding_dimension is None

    def __call__(self, features: Features) -> Features:
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError("ONNX has no operator for the fused head: call unfuse(model) before the export")
        options: dict[str, Any] = {
            "pooling_strategy": self.pooling.pooling_strategy,
            "activation_function": self.pooling.activation_function,
            "screening": self.screening,
        }
        if "cu_seq_lens_q" in features:
            options |= {"cu_seqlens": features["cu_seq_lens_q"], "max_seqlen": features.get("max_length_q")}
        else:
            options["attention_mask"] = features["attention_mask"]
        embeddings: Tensor = self.decoder(features["token_embeddings"], pooling=options)
        features["sentence_embedding"] = embeddings
        if self.sets_dimension:
            self.pooling.embedding_dimension = embeddings.shape[1]
        return features

    __call__.__qualname__ = SpladePooling.forward.__qualname__


_FORWARDS = (DecoderForward, _TransformerForward, _PoolingForward)


@dataclass
class _Head:
    """One decoder, with the Transformer modules that run it and the poolings that it feeds, as ordered sets."""

    decoder: nn.Linear
    transformers: dict[Transformer, None] = field(default_factory=dict)
    poolings: dict[SpladePooling, None] = field(default_factory=dict)

    def modules(self) -> list[nn.Module]:
        return [self.decoder, *self.transformers, *self.poolings]

    def is_fused(self) -> bool:
        forwards = [_own_forward(module) for module in self.modules()]
        return all(isinstance(own, _FORWARDS) for own in forwards) and len({own.hand_off for own in forwards}) == 1

    def check(self) -> None:
        for module in self.modules():
            forward = _own_forward(module)
            name = qualified_name(type(module))
            if isinstance(forward, _FORWARDS):
                raise ValueError(f"{name} is fused but the rest of its head is not: {UNFUSE_FIRST}")
            if "_hf_hook" in module.__dict__:
                raise ValueError(
                    f"{name} carries hooks of accelerate: load the model without device_map, or remove hooks that were "
                    "added later with accelerate.hooks.remove_hook_from_module(model, recurse=True); fuse, then offload"
                )
            if forward is not None:
                raise ValueError(f"{name} has an instance-level forward of its own: {forward!r}")
            if isinstance(module, SpladePooling) and type(module).forward is not SpladePooling.forward:
                raise TypeError(f"expected a SpladePooling, got {name} with a forward of its own")
        weight: Any = self.decoder.weight
        vocab_size, hidden_size = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 empties the weight
        if vocab_size == hidden_size:
            raise ValueError(f"vocabulary and hidden size are both {vocab_size}: logits look like hidden states")

    def probe(self) -> None:
        if skip_probe(self.modules()):
            return
        for transformer in self.transformers:
            probe_transformer(transformer, self.decoder)
        forward = DecoderForward(self.decoder)
        for pooling in self.poolings:
            probe_pooling(pooling, self.decoder, _PoolingForward(pooling, forward, forward.hand_off))

    def install(self) -> None:
        forward = DecoderForward(self.decoder)
        self.decoder.__dict__["forward"] = forward
        for transformer in self.transformers:
            transformer.__dict__["forward"] = _TransformerForward(transformer, self.decoder, forward.hand_off)
        for pooling in self.poolings:
            pooling.__dict__["forward"] = _PoolingForward(pooling, self.decoder, forward.hand_off)


def _own_forward(module: nn.Module) -> Any:
    """The forward set on the instance (the one under accelerate's hooks, where it has some), or None.

    The class's own method counts as None: accelerate leaves it on the instance when its hooks are removed.
    """
    forward = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    return None if forward == MethodType(type(module).forward, module) else forward


def _find_heads(model: nn.Module) -> list[_Head]:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    encoders = [module for module in modules if isinstance(module, SparseEncoder)]
    if not encoders:
        name = qualified_name(type(model))
        raise TypeError(f"model: expected a SparseEncoder or a module that contains one, got {name}")
    heads: dict[nn.Module, _Head] = {}
    fed_by: dict[nn.Module, nn.Linear] = {}
    readers: list[tuple[nn.Module, nn.Module]] = []
    for path in (path for encoder in encoders for path in _paths(encoder.children())):
        source: nn.Module | None = None
        for module in path:
            if isinstance(module, SpladePooling):
                transformer, decoder = _check_source(source)
                if fed_by.setdefault(module, decoder) is not decoder:
                    raise ValueError("one SpladePooling is fed by several decoders: give each decoder one of its own")
                head = heads.setdefault(decoder, _Head(decoder))
                head.transformers[transformer] = head.poolings[module] = None
            elif source is None or isinstance(module, Transformer):
                source = module
            elif not _reads_sentence_embedding(module):
                readers.append((source, module))
    if not heads:
        raise TypeError(f"{qualified_name(type(encoders[0]))} has no SpladePooling: there is no SPLADE head to fuse")
    for source, reader in readers:
        if any(source in head.transformers for head in heads.values()):
            name = qualified_name(type(reader))
            raise ValueError(f"{name} may read the decoder's logits (token_embeddings), which a fused model lacks")
    return list(heads.values())


def _paths(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Every sequence of modules that a batch can take, one for each route of each Router."""
    paths: list[list[nn.Module]] = [[]]
    for module in modules:
        routes = [[module]]
        if isinstance(module, Router):
            routes = [route for branch in module.sub_modules.values() for route in _paths(branch.children())]
        paths = [path + route for path in paths for route in routes]
    return paths


def _reads_sentence_embedding(module: nn.Module) -> bool:
    reads = getattr(module, "module_input_name", None)
    return reads == "sentence_embedding" or isinstance(module, (Dropout, LayerNorm, SparseAutoEncoder))


def _check_source(source: nn.Module | None) -> tuple[Transformer, nn.Linear]:
    """The Transformer module that feeds a pooling, and its decoder, if both are as ``fuse`` needs them."""
    if not isinstance(source, Transformer):
        raise TypeError(f"SpladePooling must be fed by a Transformer module, got {qualified_name(type(source))}")
    for name, expected in (("backend", "torch"), ("transformer_task", "fill-mask")):
        if (value := getattr(source, name)) != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {value!r}")
    outputs = {(params["method"], params["method_output_name"]) for params in source.modality_config.values()}
    if outputs != {("forward", "logits")} or source.module_output_name != "token_embeddings":
        raise ValueError(
            "the Transformer must write the logits of its model's forward to token_embeddings, "
            f"got {source.modality_config} into {source.module_output_name!r}"
        )
    inner: Any = source.model
    decoder = check_decoder(inner.get_output_embeddings())
    if reason := _read_by_hooks(around(inner, decoder)):
        raise ValueError(reason)
    return source, decoder


def _read_by_hooks(modules: dict[str, nn.Module]) -> str | None:
    """Which of the modules around the decoder has hooks, to which the decoder's output is visible."""
    for name, module in modules.items():
        if hooks := watching_hooks(module):
            return f"{name}: has hooks that see the decoder's logits, which a fused model lacks: {', '.join(hooks)}"
    return None
