"""The fused SPLADE head inside a sentence-transformers ``SparseEncoder``.

    model = fuse(SparseEncoder("naver/splade-v3"))      # train, encode, save as before

``fuse`` replaces ``forward`` on three instances and nothing else: classes, parameters, ``state_dict`` and configuration
stay, so a saved model loads without this package. While the Transformer module runs, its decoder keeps the hidden
states; the pooling then has the decoder compute :func:`splade_kernels.splade_pool` of them, and ``[batch, seq, vocab]``
logits never exist. Called any other way, the decoder is the ``nn.Linear`` that it was. docs/sentence-transformers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

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
    LogitTransform,
    around,
    check_decoder,
    check_device,
    check_free,
    check_in_place,
    check_transform,
    join,
    own_forward,
    places,
    read_by_hooks,
    remove_forward,
    set_forward,
)
from ._probe import probe_model, probe_pooling, why_no_probe

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

    Each ``Transformer`` with a masked or causal language model that feeds a ``SpladePooling``, directly or in a
    route of a ``Router``, is checked, and probed once on random logits; nothing changes unless all pass. Of a fused
    model only ``screening`` is set. Once fused, ``SpladePooling.chunk_size`` has no effect, ``token_embeddings`` holds
    hidden states instead of logits, and embeddings are float32 under autocast. Fuse before ``torch.compile``, and
    before other threads compute: the probe runs on one thread, so that the process may still be forked.

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
        own_forward(pooling).screening = screening
    return model


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`, in place: every forward that ``fuse`` installed is removed, any other one is left alone."""
    for module in model.modules():
        forward = own_forward(module)
        if isinstance(forward, (_TransformerForward, _PoolingForward)):
            remove_forward(module)
        if isinstance(forward, _TransformerForward):
            forward.hand_off.leave(forward)
    return model


class _TransformerForward:
    def __init__(self, transformer: Transformer, decoder: nn.Linear, transform: LogitTransform) -> None:
        self.transformer = transformer
        self.decoder = decoder
        self.transform = transform
        inner: Any = transformer.model
        self.around = around(inner, decoder)
        self.places = places(inner, decoder)
        self.hand_off = join(decoder, transform, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.hand_off = join(self.decoder, self.transform, self)

    def __call__(self, features: Features, **kwargs: Any) -> Features:
        check_in_place(self.places, self.decoder)
        if reason := read_by_hooks(self.around):
            raise RuntimeError(f"{reason}. They were added after fuse: {UNFUSE_FIRST}")
        check_device("input_ids", features.get("input_ids"), self.decoder)
        if features.get("logits_to_keep", 0) != 0:
            raise ValueError(f"logits_to_keep: expected 0, for all tokens, got {features['logits_to_keep']}")
        features, hidden_states = self.hand_off.collect(
            type(self.transformer).forward, self.transformer, features, **kwargs
        )
        features["token_embeddings"] = hidden_states
        return features

    __call__.__qualname__ = Transformer.forward.__qualname__


class _PoolingForward:
    def __init__(self, pooling: SpladePooling, decoder: Callable[..., Tensor]) -> None:
        self.pooling = pooling
        self.decoder = decoder
        self.screening: str | bool = "auto"
        # Read once: if torch.compile traced a read of what the first call changes, it would trace that call twice.
        self.sets_dimension = pooling.embedding_dimension is None

    def __call__(self, features: Features) -> Features:
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


_FORWARDS = (_TransformerForward, _PoolingForward)


@dataclass
class _Head:
    """One decoder, with the Transformer modules that run it and the poolings that it feeds, as ordered sets."""

    decoder: nn.Linear
    transformers: dict[Transformer, None] = field(default_factory=dict)
    poolings: dict[SpladePooling, None] = field(default_factory=dict)
    transform: LogitTransform | None = None

    def is_fused(self) -> bool:
        forwards = [own_forward(module) for module in (*self.transformers, *self.poolings)]
        return all(isinstance(own, _FORWARDS) and own.decoder is self.decoder for own in forwards)

    def check(self) -> None:
        for module in (self.decoder, *self.transformers, *self.poolings):
            forward = own_forward(module)
            if isinstance(forward, _FORWARDS):
                name = qualified_name(type(module))
                raise ValueError(f"{name} is fused but the rest of its head is not: {UNFUSE_FIRST}")
            if not isinstance(forward, DecoderForward):  # that of a SpladeEncoder on the same decoder is shared
                check_free(module)
            if isinstance(module, SpladePooling) and type(module).forward is not SpladePooling.forward:
                name = qualified_name(type(module))
                raise TypeError(f"expected a SpladePooling, got {name} with a forward of its own")

    def probe(self) -> None:
        for transformer in self.transformers:
            inner: Any = transformer.model

            def run(input_ids: Tensor, attention_mask: Tensor, transformer: Transformer = transformer) -> Any:
                features = {"input_ids": input_ids, "attention_mask": attention_mask, **_of_task(transformer)}
                return transformer.forward(features)["token_embeddings"]

            transform = probe_model(transformer, inner.config, self.decoder, run)
            if self.transform is not None and self.transform != transform:
                raise ValueError("the models around one decoder scale or cap its logits differently: copy the decoder")
            self.transform = transform
        assert self.transform is not None
        check_transform(self.decoder, self.transform)
        if why_no_probe([self.decoder]) is None:
            plain = DecoderForward(self.decoder, LogitTransform.of(None))
            for pooling in self.poolings:
                probe_pooling(pooling, self.decoder, _PoolingForward(pooling, plain))

    def install(self) -> None:
        assert self.transform is not None
        for transformer in self.transformers:
            set_forward(transformer, _TransformerForward(transformer, self.decoder, self.transform))
        for pooling in self.poolings:
            set_forward(pooling, _PoolingForward(pooling, self.decoder))


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


def _of_task(transformer: Transformer) -> dict[str, Any]:
    """What ``preprocess`` adds to the features for the module's task."""
    return {"logits_to_keep": 0} if transformer.transformer_task == "text-generation" else {}


def _check_source(source: nn.Module | None) -> tuple[Transformer, nn.Linear]:
    """The Transformer module that feeds a pooling, and its decoder, if both are as ``fuse`` needs them."""
    if not isinstance(source, Transformer):
        raise TypeError(f"SpladePooling must be fed by a Transformer module, got {qualified_name(type(source))}")
    for name, expected in (("backend", ("torch",)), ("transformer_task", ("fill-mask", "text-generation"))):
        if (value := getattr(source, name)) not in expected:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, expected))}, got {value!r}")
    causal = source.transformer_task == "text-generation"
    for modality, params in source.modality_config.items():
        if params["method"] != "forward" or params["method_output_name"] not in ("logits", ("logits",), ["logits"]):
            raise ValueError(
                "modality_config: expected {'method': 'forward', 'method_output_name': 'logits'} for every modality, "
                f"got {params} for {modality!r}"
            )
    if source.module_output_name != "token_embeddings":
        raise ValueError(
            f"module_output_name: expected 'token_embeddings', got {source.module_output_name!r}"
            + ", which transformer_task='text-generation' gives without modality_config and module_output_name" * causal
        )
    if causal:
        kept = (source.processing_kwargs or {}).get("text", {}).get("logits_to_keep", 1)
        if kept != 0:
            raise ValueError(
                "processing_kwargs: expected {'text': {'logits_to_keep': 0}} for transformer_task='text-generation', "
                f"so that every token is pooled, got logits_to_keep={kept!r}"
            )
    inner: Any = source.model
    decoder = check_decoder(inner.get_output_embeddings())
    if reason := read_by_hooks(around(inner, decoder)):
        raise ValueError(reason)
    return source, decoder
