"""Gradients: ``torch.autograd.Function`` over the operators. First derivatives only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops


class _FirstDerivative(torch.autograd.Function):
    """Gradients as they are, but an error if they are differentiated.

    ``once_differentiable`` looks at the incoming gradient alone: with a constant one it lets ``create_graph=True``
    return gradients that a penalty would silently treat as constants. Here they hang on the inputs of the forward.
    """

    @staticmethod
    def forward(ctx: Any, name: str, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(gradient.view_as(gradient) for gradient in tensors[inputs:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"{ctx.name}: second derivatives are not implemented")


class SpladePool(torch.autograd.Function):
    """``splade_pool`` with its exact sparse gradient, computed only for what requires one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        options: ops.PoolOptions,
    ) -> Tensor:
        # The gradient of the bias alone asks for no token.
        need_argmax = options.pooling_strategy == "max" and any(ctx.needs_input_grad[:2])
        output, argmax = ops.pool_forward(
            hidden_states, weight, bias, attention_mask, cu_seqlens, *options, need_argmax
        )
        ctx.save_for_backward(output, argmax, hidden_states, weight, bias, attention_mask, cu_seqlens)
        ctx.options = options
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, argmax, hidden_states, weight, bias, attention_mask, cu_seqlens = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        gradients = ops.pool_backward(
            grad, output, argmax, hidden_states, weight, bias, attention_mask, cu_seqlens, *ctx.options, *need
        )
        if torch.is_grad_enabled():
            inputs = [tensor for tensor in (grad, hidden_states, weight, bias) if tensor is not None]
            gradients = _FirstDerivative.apply("splade_pool", len(inputs), *inputs, *gradients)  # type: ignore[no-untyped-call]
        grad_hidden, grad_weight, grad_bias = (g if n else None for g, n in zip(gradients, need, strict=True))
        return grad_hidden, grad_weight, grad_bias, None, None, None


class Flops(torch.autograd.Function):
    """``Σ_v (mean_b y[b, v])²`` over the rows of every rank of ``process_group``.

    With a group the gradient is scaled by the number of ranks: data-parallel training averages gradients over ranks,
    and the average of the scaled ones is the single-process gradient. The column means are saved, so the backward
    communicates nothing.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, threshold: float | None, process_group: Any) -> Tensor:
        sums, kept = ops.flops_sums(embeddings, threshold)
        statistics = torch.cat([sums, sums.new_full((1,), embeddings.shape[0])])
        ctx.scale = 1
        if process_group is not None:
            torch.distributed.all_reduce(statistics, group=process_group)
            ctx.scale = torch.distributed.get_world_size(process_group)
        loss, slope = ops.flops_value(statistics)
        ctx.save_for_backward(embeddings, slope, kept)
        ctx.threshold = threshold
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        embeddings, slope, kept = ctx.saved_tensors
        row = (slope * (grad * ctx.scale)).to(embeddings.dtype)
        if ctx.threshold is None:
            gradient = row.expand(embeddings.shape[0], -1)
        else:
            gradient = torch.where(kept[:, None], row, 0)
        if torch.is_grad_enabled():
            (gradient,) = _FirstDerivative.apply("flops_loss", 2, grad, embeddings, gradient)  # type: ignore[no-untyped-call]
        return gradient, None, None
