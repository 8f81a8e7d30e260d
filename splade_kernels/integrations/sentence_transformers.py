"""The fused SPLADE head inside a sentence-transformers ``SparseEncoder``.

    model = fuse(SparseEncoder("naver/splade-v3"))      # train, encode, save as before

``fuse`` replaces three ``forward`` methods on the instances and nothing else: classes, parameters, ``state_dict`` and
configuration stay, so what is saved loads without this package. While the Transformer module runs, its decoder hands
the hidden states through; the pooling then has the decoder compute :func:`splade_kernels.splade_pool` of them, and
``[batch, seq, vocab]`` logits never exist. Called any other way, the decoder is the ``nn.Linear`` it was. Fuse before
``torch.compile``. Beside other tools: docs/sentence-transformers.md.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from ._hand_off import (
    UNFUSE_FIRST,
    DecoderForward,
    around,
    check_decoder,
    check_device,
    watching_hooks,
    weight_shape,
)
from ._probe import probe_pooling, probe_transformer, skip_probe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FlopsLoss", "encode_sparse", "fuse", "unfuse"]

Features = dict[str, Any]
Model = TypeVar("Model", bound=nn.Module)


class FlopsLoss(sparse_losses.FlopsLoss):
    """FLOPS regulariser for ``SpladeLoss(document_regularizer=..., query_regularizer=...)``.

    ``Σ_v (mean_b y[b, v])²``, accumulated in float32; with ``threshold``, rows with at most that many non-zeros are
    zeroed first. Value and gradient equal those of the class it derives from.

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
    probed once on random hidden states, and changed only when all of them pass. Hooks on the decoder or on a module
    around it, which would see logits, are refused here and, where they are added later, by the forward. A model that is
    already fused is returned as it is, but for ``screening``. Once fused, ``SpladePooling.chunk_size`` has no effect,
    ``token_embeddings`` holds hidden states instead of logits, and the embeddings are float32 under autocast. The probe
    runs on one thread, so that the process may still be forked: fuse before other threads compute.

    Args:
        model: a ``SparseEncoder``, or a module that contains one (a loss, a wrapper).
        screening: ``"auto"``, True or False: see :func:`splade_kernels.splade_pool`. On a GPU "auto" does not screen
            yet.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: no ``SparseEncoder`` or ``SpladePooling`` in it, or the decoder is not a plain ``nn.Linear``, such as
            one that carries an adapter or is quantised.
        ValueError: the logits are changed, watched or used elsewhere, the backend is not torch, the model has been
            offloaded by accelerate, it is fused in part only, or ``screening`` is none of these.
    """
    heads = _find_heads(model)
    poolings = [pooling for head in heads for pooling in head.poolings]
    for pooling in poolings:
        check_options(pooling.pooling_strategy, pooling.activation_function, screening)
    if not all(head.is_fused() for head in heads):
        for head in heads:
            head.check()
        for head in heads:
            head.probe()
        for head in heads:
            head.install()
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
    def __init__(self, transformer: Transformer, decoder_forward: DecoderForward) -> None:
        self.transformer = transformer
        self.decoder_forward = decoder_forward
        inner: Any = transformer.model
        self.around = around(inner, decoder_forward.decoder)

    def __call__(self, features: Features, **kwargs: Any) -> Features:
        decoder = self.decoder_forward.decoder
        inner: Any = self.transformer.model
        if inner.get_output_embeddings() is not decoder:
            raise RuntimeError(
                f"the model's decoder is no longer the one that was fused (resized or replaced): {UNFUSE_FIRST}"
            )
        for name, module in self.around.items():
            if hooks := watching_hooks(module):
                raise RuntimeError(
                    f"{name}: has hooks that see the decoder's logits, added after fuse, which does not compute them: "
                    f"{', '.join(hooks)}; {UNFUSE_FIRST}"
                )
        check_device("input_ids", features.get("input_ids"), decoder)
        hand_off = self.decoder_forward.hand_off
        before = hand_off.active
        hand_off.active = True
        try:
            return type(self.transformer).forward(self.transformer, features, **kwargs)
        finally:
            hand_off.active = before

    __call__.__qualname__ = Transformer.forward.__qualname__


class _PoolingForward:
    def __init__(self, pooling: SpladePooling, decoder: nn.Linear) -> None:
        self.pooling = pooling
        self.decoder = decoder
        self.screening: str | bool = "auto"
        # Read once: a graph of torch.compile that read what its own first call changes would be traced twice.
        self.sets_dimension = pooling.embedding_dimension is None

    def __call__(self, features: Features) -> Features:
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError("ONNX has no operator for the fused head: call unfuse(model) before the export")
        pooling = self.pooling
        options: dict[str, Any] = {
            "pooling_strategy": pooling.pooling_strategy,
            "activation_function": pooling.activation_function,
            "screening": self.screening,
        }
        if "cu_seq_lens_q" in features:
            options |= {"cu_seqlens": features["cu_seq_lens_q"], "max_seqlen": features.get("max_length_q")}
        else:
            options |= {"attention_mask": features["attention_mask"]}
        embeddings: Tensor = self.decoder(features["token_embeddings"], pooling=options)
        features["sentence_embedding"] = embeddings
        if self.sets_dimension:
            pooling.embedding_dimension = embeddings.shape[1]
        return features

    __call__.__qualname__ = SpladePooling.forward.__qualname__


_FORWARDS = (DecoderForward, _TransformerForward, _PoolingForward)


@dataclass
class _Head:
    """One decoder with the Transformer modules that run it and the poolings that it feeds."""

    decoder: nn.Linear
    transformers: list[Transformer] = field(default_factory=list)
    poolings: list[SpladePooling] = field(default_factory=list)

    def modules(self) -> list[nn.Module]:
        return [self.decoder, *self.transformers, *self.poolings]

    def is_fused(self) -> bool:
        decoder_forward = _own_forward(self.decoder)
        transformers = [_own_forward(module) for module in self.transformers]
        poolings = [_own_forward(module) for module in self.poolings]
        return (
            isinstance(decoder_forward, DecoderForward)
            and all(isinstance(f, _TransformerForward) and f.decoder_forward is decoder_forward for f in transformers)
            and all(isinstance(f, _PoolingForward) and f.decoder is self.decoder for f in poolings)
        )

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
        vocab_size, hidden_size = weight_shape(self.decoder)
        if vocab_size == hidden_size:
            raise ValueError(f"vocabulary and hidden size are both {vocab_size}: logits look like hidden states")
        for pooling in self.poolings:
            if type(pooling).forward is not SpladePooling.forward:
                name = qualified_name(type(pooling))
                raise TypeError(f"expected a SpladePooling, got {name} with a forward of its own")

    def probe(self) -> None:
        if skip_probe(self.modules()):
            return
        for transformer in self.transformers:
            probe_transformer(transformer, self.decoder)
        self.decoder.__dict__["forward"] = DecoderForward(self.decoder)
        try:
            for pooling in self.poolings:
                probe_pooling(pooling, self.decoder, _PoolingForward(pooling, self.decoder))
        finally:
            del self.decoder.__dict__["forward"]

    def install(self) -> None:
        decoder_forward = DecoderForward(self.decoder)
        self.decoder.__dict__["forward"] = decoder_forward
        for transformer in self.transformers:
            transformer.__dict__["forward"] = _TransformerForward(transformer, decoder_forward)
        for pooling in self.poolings:
            pooling.__dict__["forward"] = _PoolingForward(pooling, self.decoder)


def _own_forward(module: nn.Module) -> Any:
    """The forward that was set on the instance, under accelerate's hooks if there are any; None for the class's own,
    which accelerate leaves on the instance when its hooks are removed."""
    forward = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    return None if forward == MethodType(type(module).forward, module) else forward


def _find_heads(model: nn.Module) -> list[_Head]:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    encoders = [module for module in modules if isinstance(module, SparseEncoder)]
    if not encoders:
        raise TypeError(
            f"model: expected a SparseEncoder or a module that contains one, got {qualified_name(type(model))}"
        )
    feeders: dict[SpladePooling, set[nn.Module | None]] = {}
    readers: list[tuple[nn.Module, nn.Module]] = []
    for path in (path for encoder in encoders for path in _paths(encoder.children())):
        source: nn.Module | None = None
        for module in path:
            if isinstance(module, SpladePooling):
                feeders.setdefault(module, set()).add(source)
            elif source is None or isinstance(module, Transformer):
                source = module
            elif not _reads_sentence_embedding(module):
                readers.append((source, module))
    if not feeders:
        raise TypeError(f"{qualified_name(type(encoders[0]))} has no SpladePooling: there is no SPLADE head to fuse")

    heads: dict[nn.Module, _Head] = {}
    for pooling, sources in feeders.items():
        fed_by = {_decoder_of(source): source for source in sources}
        if len(fed_by) > 1:
            raise ValueError("one SpladePooling is fed by several decoders: give each decoder one of its own")
        (decoder,) = fed_by
        head = heads.setdefault(decoder, _Head(decoder))
        head.poolings.append(pooling)
        head.transformers.extend(s for s in sources if isinstance(s, Transformer) and s not in head.transformers)
    for source, reader in readers:
        if any(source in head.transformers for head in heads.values()):
            raise ValueError(
                f"{qualified_name(type(reader))} may read the decoder's logits (token_embeddings) beside "
                "SpladePooling: a fused model does not compute them"
            )
    return list(heads.values())


def _paths(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Every sequence of modules that a batch can take, one for each route of each Router."""
    paths: list[list[nn.Module]] = [[]]
    for module in modules:
        if isinstance(module, Router):
            routes = [route for branch in module.sub_modules.values() for route in _paths(branch.children())]
            paths = [path + route for path in paths for route in routes]
        else:
            paths = [[*path, module] for path in paths]
    return paths


def _reads_sentence_embedding(module: nn.Module) -> bool:
    if isinstance(module, (Dropout, LayerNorm, SparseAutoEncoder)):
        return True
    return getattr(module, "module_input_name", None) == "sentence_embedding"


def _decoder_of(source: nn.Module | None) -> nn.Linear:
    """The decoder of the Transformer module ``source``, once everything about both is as ``fuse`` needs it."""
    if not isinstance(source, Transformer):
        raise TypeError(f"SpladePooling must be fed by a Transformer module, got {qualified_name(type(source))}")
    if source.backend != "torch":
        raise ValueError(f"backend: expected 'torch', got {source.backend!r}")
    if source.transformer_task != "fill-mask":
        raise ValueError(f"transformer_task: expected 'fill-mask', got {source.transformer_task!r}")
    outputs = {(params["method"], params["method_output_name"]) for params in source.modality_config.values()}
    if outputs != {("forward", "logits")} or source.module_output_name != "token_embeddings":
        raise ValueError(
            "the Transformer must write the logits of its model's forward to token_embeddings, "
            f"got {source.modality_config} into {source.module_output_name!r}"
        )
    inner: Any = source.model
    decoder = check_decoder(inner.get_output_embeddings())
    for name, module in around(inner, decoder).items():
        if hooks := watching_hooks(module):
            raise ValueError(
                f"{name}: has hooks that see the decoder's logits, which a fused model does not compute: "
                f"{', '.join(hooks)}"
            )
    return decoder
