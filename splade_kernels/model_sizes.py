"""The sizes of a language model that its memory depends on, from a configuration of transformers or by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .backends.pooling import check_choice
from .functional import check_count

# Three kinds of layers, by the first model that had them, and the types of transformers' models that are built of each.
BLOCKS: dict[str, tuple[str, ...]] = {
    # Normalised after each residual sum; query, key and value apart; two products with GELU between; a transform before
    # the decoder.
    "bert": ("bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet", "ernie"),
    # Normalised before; query, key and value in one product; rotary positions; a gated GELU; a transform.
    "modernbert": ("modernbert",),
    # RMS norms before; fewer keys and values than queries; rotary positions; a gated SiLU; no transform.
    "llama": ("llama", "qwen2", "qwen3", "mistral"),
}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What the memory of a model depends on.

    Attributes:
        block: ``"bert"``, ``"modernbert"`` or ``"llama"``, the kind of its layers.
        layers, hidden_size, intermediate_size, heads, vocab_size: as in its configuration.
        embedding_size: width of the token embeddings and of the decoder's input, where it is not ``hidden_size``.
        key_value_heads: where there are fewer than ``heads``.
        head_size: width of a head, where it is not ``hidden_size / heads``.
        positions: rows of learned position embeddings; 0 for rotary ones.
        window: tokens that a layer with local attention sees; 0: there are no such layers.
        local_layers: how many of the layers those are.
        dropout, attention_dropout: their rates.
        tied: whether the decoder's weight is that of the token embeddings.
    """

    block: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    vocab_size: int
    embedding_size: int | None = None
    key_value_heads: int | None = None
    head_size: int | None = None
    positions: int = 0
    window: int = 0
    local_layers: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    tied: bool = True

    def __post_init__(self) -> None:
        check_choice("block", BLOCKS, self.block)
        for name in ("layers", "hidden_size", "intermediate_size", "heads", "vocab_size"):
            check_count(name, getattr(self, name), 1)

    @classmethod
    def of(cls, model: Any) -> ModelSizes:
        """From sizes, a mapping of their names, or a configuration of transformers (or a model that has one).

        Raises:
            ValueError: a name is not one of the attributes, or the model's type is in none of the kinds of layers.
            TypeError: ``model`` is none of these.
        """
        if isinstance(model, ModelSizes):
            return model
        if isinstance(model, Mapping):
            names = [field.name for field in fields(cls)]
            if unknown := sorted(set(model) - set(names)):
                raise ValueError(f"model: expected sizes among {', '.join(names)}, got {', '.join(unknown)}")
            if missing := [name for name in names[:6] if name not in model]:
                raise ValueError(f"model: expected the sizes {', '.join(names[:6])}, got none of {', '.join(missing)}")
            return cls(**model)
        config = getattr(model, "config", model)
        if not hasattr(config, "model_type"):
            raise TypeError(
                f"model: expected ModelSizes, a mapping or a configuration of transformers, got {type(model).__name__}"
            )
        return cls._of_config(config)

    @classmethod
    def _of_config(cls, config: Any) -> ModelSizes:
        kind = config.model_type
        block = next((name for name, kinds in BLOCKS.items() if kind in kinds), None)
        if block is None:
            known = ", ".join(name for kinds in BLOCKS.values() for name in kinds)
            raise ValueError(
                f"model: expected one of the types {known}, got {kind!r}: give its sizes, with the kind of layers that "
                "it has as 'block'"
            )

        def first(*names: str, default: Any = None) -> Any:
            found = (getattr(config, name, None) for name in names)
            return next((value for value in found if value is not None), default)

        window = first("sliding_window", default=0)
        types = first("layer_types") or (["sliding_attention"] * config.num_hidden_layers if window else [])
        local = sum(kind == "sliding_attention" for kind in types)
        if block == "modernbert":  # to either side
            window *= 2
        return cls(
            block=block,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=first("hidden_dim", "intermediate_size"),
            heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            embedding_size=first("embedding_size"),
            key_value_heads=first("num_key_value_heads"),
            head_size=first("head_dim"),
            positions=config.max_position_embeddings if block == "bert" else 0,
            window=window,
            local_layers=local,
            dropout=first("hidden_dropout_prob", "dropout", "mlp_dropout", default=0.0),
            attention_dropout=first("attention_probs_dropout_prob", "attention_dropout", default=0.0),
            tied=bool(first("tie_word_embeddings", default=True)),
        )

    @property
    def width(self) -> int:
        """Of the token embeddings and of the decoder's input, ``E``."""
        return self.embedding_size or self.hidden_size

    @property
    def attention_width(self) -> int:
        """Of all queries together, ``A``."""
        return self.heads * self.head_size if self.head_size else self.hidden_size

    @property
    def key_value_width(self) -> int:
        """Of all keys together, ``K``."""
        return self.attention_width * (self.key_value_heads or self.heads) // self.heads

    @property
    def layer_parameters(self) -> int:
        """Of one layer: ``2·D·A + 2·D·K + 2·D·I``, or ``3·D·I`` where the feed-forward is gated; without vectors."""
        products = 2 if self.block == "bert" else 3
        attention = 2 * self.hidden_size * (self.attention_width + self.key_value_width)
        return attention + products * self.hidden_size * self.intermediate_size

    @property
    def parameters(self) -> int:
        """Of the whole model: its layers, ``(V + positions)·E``, the transform ``D·E`` before the decoder, ``E·D``
        where the widths differ, and ``V·E`` again where the decoder has a weight of its own. Vectors are left out, but
        for the decoder's bias."""
        hidden, width, vocab_size = self.hidden_size, self.width, self.vocab_size
        embeddings = (vocab_size + self.positions) * width + (width * hidden if width != hidden else 0)
        transform = 0 if self.block == "llama" else hidden * width + vocab_size
        decoder = 0 if self.tied else vocab_size * width
        return self.layers * self.layer_parameters + embeddings + transform + decoder
