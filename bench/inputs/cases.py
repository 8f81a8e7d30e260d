"""The named cases, the curves and the precisions: shapes and inputs of everything that is measured.

A case is added in one place: its line in :func:`_named` or :func:`_screening`, which says where it is shown.
GooAQ's questions have about 14 tokens and its answers about 60, in batches padded to 256: the lengths drawn here are a
stand-in with those means, not GooAQ itself, which is not downloaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.inputs import text_model

# Multiply-adds of one projection that a CPU is asked for.
CPU_MULTIPLY_ADDS = 1 << 34
MIN_BATCH = 2

# What a case can name in ``shown_in``: the default cases of `bench.measure head` on a CPU (others would be scaled to
# the shape of one of these), those of `backward` on a CPU and on a GPU, the README, the computed floors,
# `bench.margins`.
SHOWN_IN = ("cpu", "backward-cpu", "backward-gpu", "readme", "floors", "margins")
# Mean and standard deviation of the tokens of GooAQ's questions and answers.
GOOAQ_LENGTHS = {"question": (14.0, 4.0), "answer": (60.0, 20.0)}

LengthGenerator = Callable[[int, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape: ``[batch_size, length, hidden_size]`` times ``[vocab_size, hidden_size]``, and the lengths in it."""

    name: str
    batch_size: int
    length: int
    hidden_size: int = 768
    vocab_size: int = 30522
    lengths: str = "full"
    # Where it is shown and measured without being asked for, of SHOWN_IN.
    shown_in: tuple[str, ...] = ()
    # Cases with the same name here are batches of one step, which is reported as their sum.
    part_of: str | None = None
    # The share of (sequence, vocabulary entry) pairs that a shift of the bias makes active; None: as it was drawn.
    active_share: float | None = None
    # Hidden states, weight and bias are those of the model that bench.screening_model trains.
    from_text: bool = False
    # Batch and length on a CPU, where they are given rather than scaled.
    on_cpu: tuple[int, int] | None = None
    # The shape that this one was scaled from, which a CPU could not do.
    scaled_from: str | None = None

    @property
    def shape(self) -> str:
        return f"B{self.batch_size} S{self.length} D{self.hidden_size} V{self.vocab_size}"

    def draw_lengths(self) -> Tensor:
        """``[B]`` real tokens of each sequence; the same on every call."""
        generator = torch.Generator().manual_seed(self.batch_size * 1_000_003 + self.length)
        return LENGTHS[self.lengths](self.batch_size, self.length, generator)


def ragged_lengths(batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """Evenly from a third of the length to all of it, in random order: a third of the tokens is padding."""
    lengths = torch.linspace(length / 3, length, batch_size).round().long().clamp_(1, length)
    return lengths[torch.randperm(batch_size, generator=generator)]


def gamma_lengths(mean: float, deviation: float, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """Gamma-distributed, clamped to the padded length: the shape of text lengths, skewed to the right."""
    # A sum of exponentials is gamma of that order; torch's own sampler takes no generator.
    order = max(1, round((mean / deviation) ** 2))
    uniform = torch.rand(batch_size, order, generator=generator).clamp_min_(1e-6)
    return (-uniform.log().sum(dim=1) * mean / order).round().long().clamp_(1, length)


LENGTHS: dict[str, LengthGenerator] = {
    "full": lambda batch_size, length, _: torch.full((batch_size,), length),
    "ragged": ragged_lengths,
    **{f"gooaq-{name}": partial(gamma_lengths, *moments) for name, moments in GOOAQ_LENGTHS.items()},
}


def _named() -> Iterator[Case]:
    everywhere = ("cpu", "readme", "floors")
    yield Case("gooaq-question", 32, 256, lengths="gooaq-question", shown_in=everywhere, part_of="gooaq")
    yield Case("gooaq-answer", 32, 256, lengths="gooaq-answer", shown_in=everywhere, part_of="gooaq")
    # Each shape, where it is shown with all tokens real, and where ragged.
    both_backward = ("backward-cpu", "backward-gpu")
    shapes: list[tuple[Case, tuple[str, ...], tuple[str, ...]]] = [
        (Case("dev", 32, 128), (*everywhere, *both_backward), ("cpu", "readme")),
        (Case("splade-v3", 320, 512), ("readme", "floors", "backward-gpu"), ("cpu", "readme")),
        (Case("qwen", 16, 512, hidden_size=1024, vocab_size=151936), ("floors",), ("cpu",)),
        (Case("query", 64, 10), everywhere, ()),
        (Case("long", 8, 8192, vocab_size=50368), ("floors",), ("cpu",)),
        (Case("xlmr-16", 16, 256, vocab_size=250002), ("floors",), ("cpu", "readme")),
        *((Case(f"xlmr-{batch}", batch, 256, vocab_size=250002), (), ()) for batch in (64, 420)),
    ]
    for case, full, ragged in shapes:
        yield replace(case, shown_in=full)
        yield replace(case, name=f"{case.name}-ragged", lengths="ragged", shown_in=ragged)


def _screening() -> Iterator[Case]:
    shape = Case("", 32, 256, lengths="ragged", on_cpu=(16, 128))
    margins = replace(shape, shown_in=("margins",))
    yield replace(margins, name="trained-squad", length=128, hidden_size=128, from_text=True)
    yield replace(margins, name="sparse-normal", active_share=0.015)
    yield replace(margins, name="dense", active_share=1.0)
    for share in (0.001, 0.05, 0.5):
        yield replace(shape, name=f"share-{100 * share:g}", active_share=share)


CASES: dict[str, Case] = {case.name: case for case in _named()}
# The share of active pairs decides how much exact screening leaves to do: on random numbers and on text.
SCREENING: dict[str, Case] = {case.name: case for case in _screening()}
CURVES = {
    "S": [Case(f"curve-S-{length}", 8, length) for length in (32, 64, 128, 256, 512, 1024, 2048, 8192)],
    "V": [Case(f"curve-V-{size}", 8, 64, vocab_size=size) for size in (8192, 30522, 50368, 151936, 250002)],
    "B": [Case(f"curve-B-{batch}", batch, 10) for batch in (1, 4, 16, 64, 256, 1024, 4096)],
}
# Rows and columns of the FLOPS regulariser's cases.
FLOPS_SHAPES = ((32, 30522), (512, 30522), (4096, 30522), (420, 250002), (4096, 250002))
CPU_FLOPS_ELEMENTS = 1 << 27


def shown_in(place: str) -> list[Case]:
    """The cases that name a place, of :data:`SHOWN_IN`."""
    return [case for case in (CASES | SCREENING).values() if place in case.shown_in]


def for_device(case: Case, device: torch.device) -> Case:
    """The case itself on a GPU. On a CPU the shape it names for one, else one with at most ``CPU_MULTIPLY_ADDS``: the
    batch is halved, to no less than ``MIN_BATCH``, then the length; hidden size and vocabulary stay."""
    if device.type != "cpu":
        return case
    batch_size, length = case.on_cpu or (case.batch_size, case.length)
    scales, entries = case.on_cpu is None, case.hidden_size * case.vocab_size
    while scales and batch_size * length * entries > CPU_MULTIPLY_ADDS and (batch_size > MIN_BATCH or length > 1):
        if batch_size > MIN_BATCH:
            batch_size = max(MIN_BATCH, batch_size // 2)
        else:
            length //= 2
    if (batch_size, length) == (case.batch_size, case.length):
        return case
    return replace(case, batch_size=batch_size, length=length, scaled_from=case.shape)


@dataclass(frozen=True)
class Precision:
    """A dtype mode: what inputs and parameters are held in, what is multiplied, and the settings in force."""

    name: str
    dtype: torch.dtype
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    tf32: bool = False
    autocast: bool = False

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """TF32 on or off, for forward and backward."""
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        matmul.allow_tf32 = self.tf32
        try:
            yield
        finally:
            matmul.allow_tf32 = before

    def forward(self, device: torch.device) -> torch.autocast:
        """Autocast where the mode has it: around the forward alone, as in training. Its cache of cast weights is off,
        since every step casts a weight that has just been updated."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False)


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("float32", _F32, _F32, _F32),
        Precision("tf32", _F32, _F32, _F32, tf32=True),
        # Under autocast the layer before the decoder, a LayerNorm, returns float32.
        Precision("bf16-autocast", _F32, _BF16, _F32, autocast=True),
        Precision("bf16", _BF16, _BF16, _BF16),
        Precision("fp16", _F16, _F16, _F16),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Leaves that require a gradient, the mask, and the gradient that arrives at the output."""

    hidden: Tensor  # [B, S, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    mask: Tensor  # [B, S] int64, as a tokenizer makes it
    grad: Tensor  # [B, V]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias


def make_inputs(case: Case, precision: Precision, device: torch.device, seed: int = 0) -> Inputs:
    """Random normal hidden states and weights: dots of variance one, nearly every entry active. Padding holds numbers
    like any other token, as an encoder leaves it.

    With ``active_share`` the bias is shifted by one number, so that this share of the (sequence, vocabulary entry)
    pairs is active. At B16 S128, a third padding, with 1.5 % of the pairs active 0.018 % of all logits are positive;
    the logits of single tokens have mean -3.6 and deviation 1, and their maxima, one a pair, mean -1.17 and deviation
    0.47: 1.1 % of the pairs are within 0.1 of zero. These margins are the hard case: numbers without structure crowd
    where a trained model leaves a gap.

    With ``from_text`` they are a trained model's for unseen passages, each cut to the length that the case draws.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = precision.dtype) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return values.mul_(scale)

    positions = torch.arange(case.length, device=device)
    mask = (positions < case.draw_lengths().to(device)[:, None]).long()
    if case.from_text:
        given = text_model.decoder_inputs(case.draw_lengths(), case.length, case.vocab_size)
        hidden, weight, bias = (tensor.to(device, precision.dtype) for tensor in given)
    else:
        hidden = draw(case.batch_size, case.length, case.hidden_size)
        weight = draw(case.vocab_size, case.hidden_size, scale=case.hidden_size**-0.5)
        bias = draw(case.vocab_size, scale=0.1)
    if case.active_share is not None:
        bias -= _threshold(hidden, weight, bias, mask, case.active_share)
    grad = draw(case.batch_size, case.vocab_size, dtype=precision.out_dtype)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), mask, grad)


def _threshold(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, share: float) -> Tensor:
    """The number that this share of the pairs' largest logits exceeds."""
    columns = weight.float().t()
    tokens = [rows[real != 0].float() for rows, real in zip(hidden, mask, strict=True)]
    largest = torch.stack([(rows @ columns).amax(dim=0) for rows in tokens])
    ranked = (largest + bias.float()).flatten().sort(descending=True).values
    above = max(1, round(share * len(ranked)))
    below = ranked[above] if above < len(ranked) else ranked[-1] - (ranked[0] - ranked[-1]) / 100
    return ((ranked[above - 1] + below) / 2).to(bias.dtype)
