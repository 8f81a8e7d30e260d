"""The memory of one step of a SPLADE model, term by term: a formula, of which nothing was measured on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .backends.pooling import check_choice
from .backends.tiled import packed
from .functional import check_count
from .model_sizes import ModelSizes

HEADS = ("stock", "fused")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
DTYPES = ("float32", "bfloat16", "float16")
# Tensors of all logits that sentence-transformers' SpladePooling holds at once, as measured on a CPU. Backward: those
# that log1p kept, their gradient, 1 + them, and the quotient. Inference: the logits, and the masked ones, which later
# operations overwrite.
STOCK_COPIES = {"training": 4, "inference": 2}
# The same under autocast in bytes an entry: relu's result in 16 bits, what log1p kept in 32, and three more in 32.
STOCK_AUTOCAST_BYTES = 2 + 4 * 4
# Outside of PyTorch's allocator on a GPU: the CUDA context, loaded kernels, libraries' workspaces. On a CPU: Python and
# the libraries, and what those allocate for their threads.
RESERVE = {"cuda": 1 << 30, "cpu": 1 << 29}
# Caps of the packed copy and of the keys of one slice of the batch, on a GPU.
SLICE_BYTES = 64 << 20
# Of an active entry in the index that orders the entries of the backward by token, on a GPU.
INDEX_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is run; see :func:`splade_kernels.estimate`."""

    dtype: str = "float32"
    autocast: str | None = None
    training: bool = True
    optimizer: str | None = "adamw"
    attention: str = "sdpa"
    padded: bool = True
    device: str = "cuda"

    def __post_init__(self) -> None:
        check_choice("dtype", DTYPES, self.dtype)
        if self.autocast is not None:
            check_choice("autocast", DTYPES[1:], self.autocast)
        if self.optimizer is not None:
            check_choice("optimizer", ("adamw",), self.optimizer)
        check_choice("attention", ATTENTIONS, self.attention)
        check_choice("device", tuple(RESERVE), self.device)

    @property
    def parameter_bytes(self) -> int:
        return _itemsize(self.dtype)

    @property
    def compute_bytes(self) -> int:
        """``c``: of an element of what products read and write."""
        return _itemsize(self.autocast or self.dtype)

    @property
    def norm_bytes(self) -> int:
        """``r``: of an element of what norms read."""
        return 4 if self.autocast else self.parameter_bytes

    @property
    def mask_bytes(self) -> int:
        """Of an element of a dropout mask: PyTorch keeps numbers on a CPU."""
        return self.compute_bytes if self.device == "cpu" else 1


class Terms(NamedTuple):
    """Bytes of one step, term by term; :func:`step_terms` says what each is. ``peak`` is the largest of the moments."""

    parameters: float
    optimizer: float
    gradients: float
    saved: float
    layer: float
    head: float
    peak: float


def step_terms(
    model: Any, batch: int, length: int, head: str, setup: Setup | None = None, *, checkpointing: bool = False
) -> Terms:
    """Bytes of one step with ``B`` texts of ``S`` tokens, ``N = B·S``.

    ``c`` and ``r`` are the bytes of an element that products read and that norms read: both those of ``dtype``, but
    under autocast 2 and 4. ``D``, ``I``, ``A``, ``K``, ``E``, ``V``: widths of the hidden states, the feed-forward, all
    queries, all keys, the embeddings; rows of the decoder.

    - ``parameters``: all of them; under autocast also their copies in its dtype, which live until the end of the step.
    - ``optimizer``: AdamW's two averages.
    - ``gradients``: one for each parameter. The decoder's exists first, the embeddings' last; where both have one
      weight, two gradients of it exist for a moment.
    - ``saved``: what the layers keep for the backward. In a layer of each kind, for each token:

      - bert: ``2·r·D`` (inputs of the norms) ``+ c·D`` (input of query, key and value; thrice under autocast)
        ``+ c·(A + 2·K) + c·A`` (these, and what attention returns) ``+ c·D + 2·c·I`` (feed-forward). Dropout keeps two
        masks of ``D``, in bytes on a GPU and in ``c`` on a CPU.
      - modernbert: ``2·r·D + 2·c·D`` (the norms' inputs and outputs) ``+ c·(A + 2·K) + c·(A + K)`` (before and after
        the rotation) ``+ c·A + 4·c·I``.
      - llama: ``2·(4 + r)·D`` (both RMS norms keep their input in float32, and its quotient by the norm)
        ``+ 2·c·D`` (their outputs; five under autocast) ``+ c·(A + 2·K)`` (``3·A`` beside a mask, which has keys and
        values repeated) ``+ c·A + 4·c·I``.

      Attention adds ``4·heads`` (the logarithm of its sum) a token. sdpa with a mask, for padding or for a local
      window, keeps it once as bytes ``B·S²`` for all layers, and in each layer as numbers, ``c·B·S²``. Eager attention,
      and sdpa with dropout on a CPU, keep ``heads·B·S²`` weights in float32, the same in ``c`` if that is smaller, and
      with dropout its mask and the product. flash_attention_2 keeps nothing of ``S²``.
      With checkpointing only ``r·D`` a layer and token is kept, and one layer at a time is computed again.
      Outside of the layers, for each token: ``r·D`` of the embeddings' norm; before the decoder its input ``c·E``, and
      of the transform and last norm ``(r + 2·c)·E`` for bert, ``2·(r + c)·D`` more for modernbert, ``(4 + r)·D`` for
      llama.
    - ``layer``: what the backward of one layer holds at its peak beside what was saved: the gradient of its output
      ``r·D``, and ``c·I`` (at least ``3·r·D``) for bert or ``2·c·I`` for the gated ones. In eager attention instead,
      if it is more, two times the weights (one with dropout), when what the feed-forward had saved is gone. In
      inference, what one layer holds: ``r·D + c·(2·A + 2·K + D)``, or ``2·r·D + 2·c·I`` (gated: ``4·c·I``).
    - ``head``, stock: four times the logits, ``4·c·B·S·V`` (18 bytes an entry under autocast, where log1p is float32);
      in inference twice. ``[B, V]``: three embeddings, an index of 8 bytes.
    - ``head``, fused on a GPU: y in float32, the index of the maximum (2 bytes to 32,767 tokens, else 4), and in the
      forward the packed copy and the keys of a slice, each ≤ 64 MiB; in the backward the gradient of y and the order of
      the entries, 8 bytes each. Under autocast, the decoder's copy is among the parameters.
    - ``head``, fused on a CPU: y and the index; in the forward the packed rows of a slice (4,096, or the longest text),
      twice, and the tile of dots (16 MiB, and a quarter of it for the maxima of its groups); in the backward the
      gradients of y and of the dots. In inference, the decoder in int8 for screening.
    - both heads, in the backward: the decoder's gradient ``V·E`` and that of its input.

    The peak is the largest of five moments: the head; the backward of the last layer, when all others are saved; that
    of the first layer, when the gradients of all others are there; the embeddings, when all gradients are there; and
    before all of them the making of masks: one for padding, ``B·S²``, beside the larger of ``2·B·S²`` and, for
    ModernBERT's window, two matrices of distances of 8 bytes, ``16·S²``.

    Raises:
        ValueError: an argument is not one of these.
    """
    sizes, setup = ModelSizes.of(model), setup or Setup()
    check_choice("head", HEADS, head)
    check_count("batch", batch, 1)
    check_count("length", length, 1)
    size, tokens, layers = setup.parameter_bytes, batch * length, sizes.layers
    parameters = sizes.parameters * (size + (setup.compute_bytes if setup.autocast else 0))
    in_head = _head(sizes, setup, batch, length, head)
    squares = _squares(sizes, setup, length)
    if not setup.training:
        of_squares = batch * (squares.shared + squares.largest + squares.working)
        layer = max(tokens * _layer_in_inference(sizes, setup) + of_squares, _making_masks(sizes, setup, batch, length))
        in_head += tokens * sizes.width * setup.compute_bytes
        return Terms(parameters, 0, 0, 0, layer, in_head, parameters + max(layer, in_head))

    optimizer = 2 * sizes.parameters * size if setup.optimizer else 0
    gradients, of_layer = sizes.parameters * size, sizes.layer_parameters * size
    decoder = sizes.vocab_size * sizes.width * size
    checkpoint, in_layer = tokens * sizes.hidden_size * setup.norm_bytes, tokens * _saved(sizes, setup)
    layer = max(tokens * _working_set(sizes, setup), batch * squares.working - tokens * _inner(sizes, setup))
    if checkpointing:
        layer += in_layer + batch * squares.largest - checkpoint
        kept = float(checkpoint)
    else:
        kept = in_layer + batch * squares.mean
    before, after = _outside(sizes, setup)
    outside = tokens * before + batch * squares.shared
    saved = outside + layers * kept
    moments = (
        saved + tokens * after + in_head,
        saved + decoder + layer,
        outside + kept + decoder + (layers - 1) * of_layer + layer,
        gradients + (decoder if sizes.tied else 0) + checkpoint,
        tokens * before + _making_masks(sizes, setup, batch, length),
    )
    peak = parameters + optimizer + max(moments)
    return Terms(parameters, optimizer, gradients, saved, layer, in_head, peak)


def _outside(sizes: ModelSizes, setup: Setup) -> tuple[float, float]:
    """Bytes a token kept outside of the layers: before them until the end of the backward, and after them."""
    norm, compute = setup.norm_bytes, setup.compute_bytes
    hidden, width = sizes.hidden_size, sizes.width
    masks = setup.mask_bytes * hidden if sizes.dropout else 0
    if sizes.block == "llama":
        return masks, compute * width + (4 + norm) * hidden
    if sizes.block == "modernbert":
        return norm * hidden + masks, compute * width + 2 * (norm + compute) * hidden
    return norm * width + masks, compute * width + (norm + 2 * compute) * width


def _saved(sizes: ModelSizes, setup: Setup) -> float:
    """Bytes a token kept by one layer, without those of the attention's squares."""
    norm, compute, cast = setup.norm_bytes, setup.compute_bytes, setup.autocast is not None
    hidden, inner, masks = sizes.hidden_size, sizes.intermediate_size, 2 * setup.mask_bytes * sizes.hidden_size
    queries, keys = sizes.attention_width, sizes.key_value_width
    sums = 4 * sizes.heads + (masks if sizes.dropout else 0)
    if sizes.block == "bert":
        inputs = 4 if cast else 2
        return sums + 2 * norm * hidden + compute * (inputs * hidden + 2 * queries + 2 * keys + 2 * inner)
    if sizes.block == "modernbert":
        return sums + 2 * norm * hidden + compute * (2 * hidden + 3 * queries + 3 * keys + 4 * inner)
    inputs = 5 if cast else 2
    repeated = queries if setup.padded else keys
    return sums + 2 * (4 + norm) * hidden + compute * (inputs * hidden + 2 * queries + 2 * repeated + 4 * inner)


def _inner(sizes: ModelSizes, setup: Setup) -> float:
    """Of what :func:`_saved` counts, that of the feed-forward, whose backward is over when that of attention begins."""
    return setup.compute_bytes * sizes.intermediate_size * (2 if sizes.block == "bert" else 4)


class _Squares(NamedTuple):
    """Bytes a text of what attention has of ``S × S``."""

    shared: float  # masks, for all layers
    mean: float  # kept by a layer, on average over the layers
    largest: float  # kept by the layer that keeps most
    working: float  # beside it, while that layer computes


def _squares(sizes: ModelSizes, setup: Setup, length: int) -> _Squares:
    square, compute = float(length) ** 2, setup.compute_bytes
    local = sizes.local_layers if length > sizes.window else 0
    masks = setup.padded + _has_local_mask(sizes, length)
    if setup.attention == "flash_attention_2":
        return _Squares(0, 0, 0, 0)
    drops = setup.training and sizes.attention_dropout > 0
    if setup.attention == "sdpa" and not (drops and setup.device == "cpu"):
        kept = compute * square
        share = 1.0 if setup.padded else local / sizes.layers
        return _Squares(masks * square, share * kept, kept if share else 0, 0)
    entry = 4 + (compute if compute < 4 else 0) + (setup.mask_bytes + compute if drops else 0)
    weights = sizes.heads * square
    return _Squares(masks * compute * square, weights * entry, weights * entry, (1 if drops else 2) * weights * 4)


def _making_masks(sizes: ModelSizes, setup: Setup, batch: int, length: int) -> float:
    """Bytes that transformers takes to make the masks, and they themselves."""
    local = _has_local_mask(sizes, length)
    if setup.attention == "flash_attention_2" or not (local or setup.padded):
        return 0
    distances = 16 if local and sizes.block == "modernbert" else 0
    return float(length) ** 2 * (setup.padded * batch + max(distances, 2 * batch))


def _has_local_mask(sizes: ModelSizes, length: int) -> bool:
    """ModernBERT makes one even where none of its layers has local attention."""
    return length > sizes.window > 0 and (sizes.local_layers > 0 or sizes.block == "modernbert")


def _working_set(sizes: ModelSizes, setup: Setup) -> float:
    """Bytes a token that the backward of one layer holds beside what was kept."""
    norm, compute = setup.norm_bytes * sizes.hidden_size, setup.compute_bytes * sizes.intermediate_size
    return norm + (max(compute, 3 * norm) if sizes.block == "bert" else 2 * compute)


def _layer_in_inference(sizes: ModelSizes, setup: Setup) -> float:
    """Bytes a token that one layer holds, in its attention or in its feed-forward, whichever is more."""
    norm, compute = setup.norm_bytes * sizes.hidden_size, setup.compute_bytes
    attention = norm + compute * (2 * sizes.attention_width + 2 * sizes.key_value_width + sizes.hidden_size)
    return max(attention, 2 * norm + _inner(sizes, setup))


def _head(sizes: ModelSizes, setup: Setup, batch: int, length: int, head: str) -> float:
    """Bytes of the head at its peak, and of the loss."""
    compute, tokens, width = setup.compute_bytes, batch * length, sizes.width
    vocabulary, pairs = sizes.vocab_size, batch * sizes.vocab_size
    gradients = vocabulary * width * setup.parameter_bytes + tokens * width * compute
    if head == "stock":
        logits = tokens * vocabulary
        if not setup.training:
            return STOCK_COPIES["inference"] * compute * logits + 2 * pairs * compute
        copies = STOCK_AUTOCAST_BYTES if setup.autocast else STOCK_COPIES["training"] * compute
        return max(copies * logits, compute * logits + gradients) + pairs * (3 * 4 + 8)
    forward, kept = _fused_buffers(sizes, setup, batch, length), 4 * pairs
    if not setup.training:
        return kept + forward
    kept += pairs * (2 if length < 1 << 15 else 4) + (compute * pairs if compute < 4 else 0)
    backward = pairs * (4 + (INDEX_BYTES if setup.device == "cuda" else 4)) + gradients
    return kept + max(forward, backward)


def _fused_buffers(sizes: ModelSizes, setup: Setup, batch: int, length: int) -> float:
    """Bytes of the buffers of the fused forward."""
    tokens, width, vocabulary = batch * length, sizes.width, sizes.vocab_size
    if setup.device == "cuda":
        slices = (tokens * width * setup.compute_bytes, 8 * batch * vocabulary)
        return sum(min(SLICE_BYTES, size) for size in slices)
    rows = max(length, min(tokens, packed.SLICE_ROWS))
    columns = min(vocabulary, packed.MAX_TILE_COLUMNS, max(packed.MIN_TILE_COLUMNS, packed.TILE_ELEMENTS // rows))
    tile = 4 * rows * columns * (1 + 2 / packed.ARGMAX_GROUP)
    quantised = 0 if setup.training else vocabulary * width  # screening keeps the decoder in int8
    return 2 * 4 * rows * width + tile + quantised


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
