"""Gradients: ``torch.autograd.Function`` over the operators. First derivatives only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops


class SpladePool(torch.autograd.Function):
    """``splade_pool`` with the gradient of §"Backward" in ``docs/mathematics.md``: only for what requires one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor:
        need_argmax = options[1] == "max"
        output, argmax = ops.pool_forward(
            hidden_states, weight, bias, attention_mask, cu_seqlens, *options, need_argmax
        )
        ctx.save_for_backward(output, argmax, hidden_states, weight, bias, attention_mask, cu_seqlens)
        ctx.options = options
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, argmax, hidden_states, weight, bias, attention_mask, cu_seqlens = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        gradients = ops.pool_backward(
            grad, output, argmax, hidden_states, weight, bias, attention_mask, cu_seqlens, *ctx.options, *need
        )
        grad_hidden, grad_weight, grad_bias = (g if n else None for g, n in zip(gradients, need, strict=True))
        return grad_hidden, grad_weight, grad_bias, None, None, None


class Flops(torch.autograd.Function):
    """``Σ_v (mean_b y[b, v])²`` over the rows of every rank of ``process_group``.

    With a group the gradient is scaled by the number of ranks: data-parallel training averages gradients over ranks, and
    the average of the scaled ones is the single-process gradient. The column means are saved, so the backward
    communicates nothing.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, threshold: float | None, process_group: Any) -> Tensor:
        sums, kept = ops.flops_forward(embeddings, threshold)
        rows: Tensor | int = embeddings.shape[0]
        ctx.scale = 2.0
        if process_group is not None:
            statistics = torch.cat([sums, sums.new_full((1,), rows)])
            torch.distributed.all_reduce(statistics, group=process_group)
            sums, rows = statistics[:-1], statistics[-1]
            ctx.scale *= torch.distributed.get_world_size(process_group)
        mean = sums / rows
        ctx.save_for_backward(mean / rows, kept)
        ctx.rows, ctx.dtype, ctx.threshold = embeddings.shape[0], embeddings.dtype, threshold
        return mean.square().sum()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        slope, kept = ctx.saved_tensors
        row = (slope * (grad * ctx.scale)).to(ctx.dtype)
        if ctx.threshold is None:
            return row.expand(ctx.rows, -1), None, None
        return torch.where(kept[:, None], row, 0), None, None
