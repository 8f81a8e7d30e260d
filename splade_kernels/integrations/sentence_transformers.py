"""The fused SPLADE head inside a sentence-transformers ``SparseEncoder``.

    model = fuse(SparseEncoder("naver/splade-v3"))      # train, encode, save as before

``fuse`` replaces three ``forward`` methods on the instances and nothing else: classes, parameters, ``state_dict`` and
configuration stay, so what is saved loads without this package. While the Transformer module runs, its decoder hands
the hidden states through; the pooling then applies the decoder's weight and bias with
:func:`splade_kernels.splade_pool`, and ``[batch, seq, vocab]`` logits never exist. Called any other way, the decoder
is the ``nn.Linear`` it was. Fuse before ``torch.compile``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm
from sentence_transformers.sparse_encoder import SparseEncoder
from sentence_transformers.sparse_encoder import losses as sparse_losses
from sentence_transformers.sparse_encoder.modules import Router, SparseAutoEncoder, SpladePooling, Transformer
from torch import Tensor, nn

from ..functional import check_options, check_threshold, flops_loss, splade_pool
from ..modules import has_hooks
from ._encode import encode_sparse
from ._probe import is_sharded, probe_pooling, probe_transformer, skip_probe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FlopsLoss", "encode_sparse", "fuse", "unfuse"]

Features = dict[str, Any]
Model = TypeVar("Model", bound=nn.Module)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_UNFUSE_FIRST = "call unfuse(model) first, change the model, then fuse it again"


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
    ``token_embeddings`` holds hidden states instead of logits, and the embeddings are float32 under autocast.

    Args:
        model: a ``SparseEncoder``, or a module that contains one (a loss, a wrapper).
        screening: ``"auto"``, True or False: see :func:`splade_kernels.splade_pool`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: no ``SparseEncoder`` or ``SpladePooling`` in it, or the decoder is not a plain ``nn.Linear``.
        ValueError: the logits are changed, watched or used elsewhere, the backend is not torch, the model carries
            adapters or is quantised, it is fused in part only, or ``screening`` is none of these.
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
        pooling.__dict__["forward"].screening = screening
    return model


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`, in place: every forward that ``fuse`` installed is removed, any other one is left alone."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _FORWARDS):
            del module.__dict__["forward"]
    return model


class _HandOff(threading.local):
    """Whether the decoder hands its input through, in this thread.

    Copying or pickling makes a fresh one. A ``ContextVar`` would serve as well, but ``torch.compile`` cannot trace it.
    """

    active = False

    def __reduce__(self) -> tuple[type[_HandOff], tuple[()]]:
        return _HandOff, ()


class _DecoderForward:
    def __init__(self, decoder: nn.Linear) -> None:
        self.decoder = decoder
        self.hand_off = _HandOff()

    def __call__(self, input: Tensor) -> Tensor:
        if self.hand_off.active:
            return input
        return type(self.decoder).forward(self.decoder, input)


class _TransformerForward:
    def __init__(self, transformer: Transformer, decoder_forward: _DecoderForward) -> None:
        self.transformer = transformer
        self.decoder_forward = decoder_forward
        inner: Any = transformer.model
        self.around = _around(inner, decoder_forward.decoder)

    def __call__(self, features: Features, **kwargs: Any) -> Features:
        decoder = self.decoder_forward.decoder
        inner: Any = self.transformer.model
        if inner.get_output_embeddings() is not decoder:
            raise RuntimeError(
                f"the model's decoder is no longer the one that was fused (resized or replaced): {_UNFUSE_FIRST}"
            )
        for name, module in self.around.items():
            if has_hooks(module):
                raise RuntimeError(
                    f"{name}: has hooks that see the decoder's logits, added after fuse, which does not compute them: "
                    f"{_UNFUSE_FIRST}"
                )
        _check_device("input_ids", features.get("input_ids"), decoder.weight)
        hand_off = self.decoder_forward.hand_off
        before = hand_off.active
        hand_off.active = True
        try:
            return type(self.transformer).forward(self.transformer, features, **kwargs)
        finally:
            hand_off.active = before


class _PoolingForward:
    def __init__(self, pooling: SpladePooling, decoder: nn.Linear) -> None:
        self.pooling = pooling
        self.decoder = decoder
        self.screening: str | bool = "auto"

    def __call__(self, features: Features) -> Features:
        pooling, weight = self.pooling, self.decoder.weight
        hidden_states = features["token_embeddings"]
        self._check(hidden_states)
        layout: dict[str, Any]
        if "cu_seq_lens_q" in features:
            layout = {"cu_seqlens": features["cu_seq_lens_q"], "max_seqlen": features.get("max_length_q")}
        else:
            layout = {"attention_mask": features["attention_mask"]}
        features["sentence_embedding"] = splade_pool(
            hidden_states,
            weight,
            self.decoder.bias,
            pooling_strategy=pooling.pooling_strategy,
            activation_function=pooling.activation_function,
            screening=self.screening,
            **layout,
        )
        if pooling.embedding_dimension is None:
            pooling.embedding_dimension = weight.shape[0]
        return features

    def _check(self, hidden_states: Tensor) -> None:
        weight = self.decoder.weight
        if is_sharded(weight) or is_sharded(self.decoder) or weight.numel() == 0:
            raise RuntimeError(
                "the decoder's weight is sharded on its own: shard the whole SparseEncoder (layers first, "
                "then the SparseEncoder itself) so that its root keeps the weight gathered during forward"
            )
        if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[-1]:
            raise RuntimeError(
                f"token_embeddings: expected hidden states of width D for the decoder's weight [V, D] = "
                f"{list(weight.shape)}, got width {hidden_states.shape[-1]}. If embeddings were resized or an adapter "
                f"was added after fuse: {_UNFUSE_FIRST}"
            )
        _check_device("token_embeddings", hidden_states, weight)
        changed = _why_not_plain(self.decoder)
        if changed:
            raise RuntimeError(f"the decoder was changed after fuse ({changed}): {_UNFUSE_FIRST}")


_FORWARDS = (_DecoderForward, _TransformerForward, _PoolingForward)


@dataclass
class _Head:
    """One decoder with the Transformer modules that run it and the poolings that it feeds."""

    decoder: nn.Linear
    transformers: list[Transformer] = field(default_factory=list)
    poolings: list[SpladePooling] = field(default_factory=list)

    def modules(self) -> list[nn.Module]:
        return [self.decoder, *self.transformers, *self.poolings]

    def is_fused(self) -> bool:
        decoder_forward = self.decoder.__dict__.get("forward")
        transformers = [module.__dict__.get("forward") for module in self.transformers]
        poolings = [module.__dict__.get("forward") for module in self.poolings]
        return (
            isinstance(decoder_forward, _DecoderForward)
            and all(isinstance(f, _TransformerForward) and f.decoder_forward is decoder_forward for f in transformers)
            and all(isinstance(f, _PoolingForward) and f.decoder is self.decoder for f in poolings)
        )

    def check(self) -> None:
        for module in self.modules():
            forward = module.__dict__.get("forward")
            if isinstance(forward, _FORWARDS):
                raise ValueError(f"{type(module).__name__} is fused but the rest of its head is not: {_UNFUSE_FIRST}")
            if forward is not None:
                raise ValueError(f"{type(module).__name__} has an instance-level forward of its own: {forward!r}")
        weight = self.decoder.weight
        if weight.shape[0] == weight.shape[1]:
            raise ValueError(f"vocabulary and hidden size are both {weight.shape[0]}: logits look like hidden states")
        for pooling in self.poolings:
            if type(pooling).forward is not SpladePooling.forward:
                raise TypeError(f"expected a SpladePooling, got {type(pooling).__name__} with a forward of its own")

    def probe(self) -> None:
        if skip_probe(self.modules()):
            return
        for transformer in self.transformers:
            probe_transformer(transformer, self.decoder)
        for pooling in self.poolings:
            probe_pooling(pooling, self.decoder, _PoolingForward(pooling, self.decoder))

    def install(self) -> None:
        decoder_forward = _DecoderForward(self.decoder)
        self.decoder.__dict__["forward"] = decoder_forward
        for transformer in self.transformers:
            transformer.__dict__["forward"] = _TransformerForward(transformer, decoder_forward)
        for pooling in self.poolings:
            pooling.__dict__["forward"] = _PoolingForward(pooling, self.decoder)


def _find_heads(model: nn.Module) -> list[_Head]:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    encoders = [module for module in modules if isinstance(module, SparseEncoder)]
    if not encoders:
        raise TypeError(f"model: expected a SparseEncoder or a module that contains one, got {type(model).__name__}")
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
        raise TypeError(f"{type(encoders[0]).__name__} has no SpladePooling: there is no SPLADE head to fuse")

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
                f"{type(reader).__name__} may read the decoder's logits (token_embeddings) beside SpladePooling: "
                "a fused model does not compute them"
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
        raise TypeError(f"SpladePooling must be fed by a Transformer module, got {type(source).__name__}")
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
    if any(getattr(module, "peft_config", None) for module in inner.modules()):
        raise ValueError("the model carries PEFT adapters: merge them into the weights first")
    if getattr(inner, "is_quantized", False):
        raise ValueError("the model is quantised: fuse needs the floating-point decoder")
    decoder = inner.get_output_embeddings()
    if type(decoder) is not nn.Linear:
        raise TypeError(f"decoder: expected exactly torch.nn.Linear, got {type(decoder).__name__}")
    reason = _why_not_plain(decoder)
    if reason:
        raise ValueError(f"decoder: expected a plain nn.Linear, but it {reason}")
    for name, module in _around(inner, decoder).items():
        if has_hooks(module):
            raise ValueError(f"{name}: has hooks that see the decoder's logits, which a fused model does not compute")
    return decoder


def _around(inner: nn.Module, decoder: nn.Linear) -> dict[str, nn.Module]:
    """The modules inside of the model that contain the decoder, by name."""
    return {
        name: module
        for name, module in inner.named_modules()
        if name and module is not decoder and any(child is decoder for child in module.modules())
    }


def _why_not_plain(decoder: nn.Linear) -> str | None:
    if type(decoder) is not nn.Linear:
        return f"became {type(decoder).__name__}"
    if has_hooks(decoder):
        return "has hooks"
    weight = decoder.weight
    if weight.dtype not in _DTYPES or not (isinstance(weight, nn.Parameter) or is_sharded(weight)):
        return f"has a weight of type {type(weight).__name__}, {weight.dtype}"
    return None


def _check_device(name: str, tensor: Any, weight: Tensor) -> None:
    if isinstance(tensor, Tensor) and tensor.device != weight.device:
        raise RuntimeError(
            f"{name} is on {tensor.device}, the decoder's weight on {weight.device}. torch.nn.DataParallel replicas "
            "keep the first device's decoder: use torchrun (DistributedDataParallel), or one visible device"
        )
