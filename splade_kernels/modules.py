"""The functions as modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .functional import check_options, check_threshold, flops_loss, splade_pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FlopsLoss", "SpladeHead"]


class SpladeHead(nn.Module):
    """Decoder and SPLADE pooling in one: see :func:`splade_kernels.splade_pool` for formula, dtypes and errors.

    ``weight [V, D]`` and ``bias [V]`` have the names, shapes and initialisation of ``nn.Linear``'s.

    Args:
        hidden_size: ``D``.
        vocab_size: ``V``.
        bias: whether the decoder has a bias.
        pooling_strategy, activation_function, screening, backend: as in :func:`splade_pool`.
        device, dtype: of the new parameters.

    Raises:
        ValueError: an option has no such value, or ``screening=True`` with ``pooling_strategy="sum"``.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        bias: bool = True,
        *,
        pooling_strategy: str = "max",
        activation_function: str = "relu",
        screening: str | bool = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(pooling_strategy, activation_function, screening, backend)
        self.pooling_strategy = pooling_strategy
        self.activation_function = activation_function
        self.screening = screening
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, decoder: nn.Linear, **options: Any) -> SpladeHead:
        """A head that shares (ties) the Parameters of ``decoder``; nothing is copied.

        Args:
            decoder: ``nn.Linear`` from ``D`` to ``V``, such as the decoder of a masked-LM head.
            **options: ``pooling_strategy``, ``activation_function``, ``screening``, ``backend``.

        Raises:
            TypeError: ``decoder`` is not exactly an ``nn.Linear``; a derived class may compute more.
            ValueError: it has hooks, such as those of pruning and of the old weight normalisation.
        """
        if error := why_not_plain(decoder):
            raise error
        head = cls(decoder.in_features, decoder.out_features, device="meta", **options)
        head.weight, head.bias = cast(nn.Parameter, decoder.weight), decoder.bias
        return head.train(decoder.training)

    def reset_parameters(self) -> None:
        """Uniform in ``±1/sqrt(D)``, as ``nn.Linear``."""
        if self.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """``[B, V]`` embeddings of ``[B, S, D]`` padded or ``[T, D]`` packed hidden states."""
        return splade_pool(
            hidden_states,
            self.weight,
            self.bias,
            attention_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            pooling_strategy=self.pooling_strategy,
            activation_function=self.activation_function,
            screening=self.screening,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        size = f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, bias={self.bias is not None}"
        options = ("pooling_strategy", "activation_function", "screening", "backend")
        return ", ".join([size, *(f"{name}={getattr(self, name)!r}" for name in options)])


def hooks_of(module: nn.Module) -> list[str]:
    """Names of the functions that PyTorch calls before or after the module's forward or backward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [qualified_name(hook) for some in hooks if some for hook in some.values()]


def why_not_plain(decoder: Any, hooks_of: Callable[[nn.Module], list[str]] = hooks_of) -> TypeError | ValueError | None:
    """The error to raise where ``decoder`` may compute more than ``W h + c``, which a fused head would leave out."""
    if type(decoder) is not nn.Linear:
        return TypeError(f"decoder: expected exactly torch.nn.Linear, got {qualified_name(type(decoder))}")
    if hooks := hooks_of(decoder):
        return ValueError(f"decoder: expected an nn.Linear without hooks, got {', '.join(hooks)}")
    return None


def qualified_name(value: Any) -> str:
    """``torch.nn.modules.linear.Linear`` for a class or function; the name alone of a builtin."""
    holder = value if hasattr(value, "__qualname__") else type(value)
    module = getattr(value, "__module__", None) or type(value).__module__
    return str(holder.__qualname__) if module == "builtins" else f"{module}.{holder.__qualname__}"


class FlopsLoss(nn.Module):
    """FLOPS regulariser as a module: see :func:`splade_kernels.flops_loss`."""

    def __init__(self, threshold: float | None = None, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.threshold = check_threshold(threshold)
        self.process_group = process_group

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scalar loss of ``[B, V]`` embeddings."""
        return flops_loss(embeddings, threshold=self.threshold, process_group=self.process_group)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"
