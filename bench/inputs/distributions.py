"""Which entries are active and which tokens win: the inputs of the backward operator when it is measured alone.

Early in training everything is active and one token can win half of the vocabulary; a trained model has few active
terms a passage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.inputs.cases import Case, Precision

# Reported for real models at the start of training: the share of the vocabulary that one token wins.
HOT_SHARE = 0.46
TRAINED_TERMS = 200

Draw = tuple[Tensor, Tensor, Tensor]
# From lengths [B] and the vocabulary size: the winning positions and which entries are active, both [B, V].
Generate = Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]


def uniform(lengths: Tensor, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Everything active; every real token wins equally often."""
    share = torch.rand(len(lengths), vocab_size, generator=generator, device=lengths.device)
    return _position(share, lengths), torch.ones_like(share, dtype=torch.bool)


def zipf(lengths: Tensor, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Everything active; the k-th token of a sequence wins in proportion to 1/k (of a continuous k: log-uniform)."""
    share = torch.rand(len(lengths), vocab_size, generator=generator, device=lengths.device)
    rank = ((lengths[:, None] + 1.0) ** share - 1).long()
    return rank.clamp_(max=lengths[:, None] - 1), torch.ones_like(share, dtype=torch.bool)


def hot(lengths: Tensor, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Everything active; one token of each sequence wins ``HOT_SHARE`` of the vocabulary, the others share the rest."""
    position, active = uniform(lengths, vocab_size, generator)
    winner = torch.rand(len(lengths), 1, generator=generator, device=lengths.device)
    taken = torch.rand(position.shape, generator=generator, device=lengths.device) < HOT_SHARE
    return torch.where(taken, _position(winner, lengths), position), active


def trained(lengths: Tensor, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``TRAINED_TERMS`` random terms active in each sequence; every real token wins equally often."""
    position, _ = uniform(lengths, vocab_size, generator)
    order = torch.rand(position.shape, generator=generator, device=lengths.device)
    terms = order.topk(min(TRAINED_TERMS, vocab_size), dim=1).indices
    return position, torch.zeros_like(position, dtype=torch.bool).scatter_(1, terms, True)


def at_share(share: float, lengths: Tensor, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """This share of the entries active, at random; every real token wins equally often."""
    position, _ = uniform(lengths, vocab_size, generator)
    return position, torch.rand(position.shape, generator=generator, device=lengths.device) < share


DISTRIBUTIONS: dict[str, Generate] = {"uniform": uniform, "zipf": zipf, "hot": hot, "trained": trained}


def draw(generate: Generate, case: Case, precision: Precision, device: torch.device, seed: int = 0) -> Draw:
    """``(output, argmax, grad)`` as the forward would have left them: inactive entries have output 0 and argmax 0."""
    generator = torch.Generator(device).manual_seed(seed)
    lengths = case.draw_lengths().to(device)
    position, active = generate(lengths, case.vocab_size, generator)
    values = torch.rand(position.shape, generator=generator, device=device) * 1.5 + 0.01
    grad = torch.randn(position.shape, generator=generator, device=device)
    dtype = torch.int16 if case.length <= torch.iinfo(torch.int16).max else torch.int32
    return (
        torch.where(active, values, 0).to(precision.out_dtype),
        torch.where(active, position, 0).to(dtype),
        grad.to(precision.out_dtype),
    )


def _position(share: Tensor, lengths: Tensor) -> Tensor:
    return (share * lengths[:, None]).long().clamp_(max=lengths[:, None] - 1)
