"""Everything that decides the demo's numbers, apart from the machine and the installed versions."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The fused head trains ``steps``; the stock head the first ``stock_steps`` of the same schedule."""

    steps: int
    stock_steps: int
    batch_size: int
    seed: int
    device: str
    bf16: bool
    max_length: int = 128
    vocab_size: int = 30522
    hidden_size: int = 128
    learning_rate: float = 5e-4
    query_regularizer_weight: float = 1e-3
    document_regularizer_weight: float = 1e-3
    memory_lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
    memory_batch_size: int = 8
    memory_hidden_size: int = 128
