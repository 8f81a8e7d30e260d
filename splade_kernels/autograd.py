"""Gradients: ``torch.autograd.Function`` over the operators. First derivatives only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops


class _FirstDerivative(torch.autograd.Function):
    """Returns gradients unchanged and raises if they are differentiated.

    ``once_differentiable`` looks at the incoming gradient alone: if that is a constant, gradients of
    ``create_graph=True`` have no graph, and a gradient penalty would silently be a constant. Here they depend on the
    inputs of the forward.
    """

    @staticmethod
    def forward(ctx: Any, name: str, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(gradient.view_as(gradient) for gradient in tensors[inputs:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"{ctx.name}: second derivatives are not implemented")


class SpladePool(torch.autograd.Function):
    """``splade_pool`` with its exact sparse gradient, computed only for what requires one.

    Its inputs are those of the operators: hidden states, weight, bias, attention mask, cumulative lengths; and options.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.options = inputs
        options: ops.PoolOptions = ctx.options
        # The gradient of the bias does not depend on which token attains the maximum.
        need_argmax = options.pooling_strategy == "max" and any(ctx.needs_input_grad[:2])
        if options.pooling_strategy == "max":
            # The backward takes the slope exp(-y) from y, whose rounding to half precision would be an error of it.
            options = options._replace(out_dtype=torch.promote_types(options.out_dtype, torch.float32))
        output, argmax = ops.pool_forward(*tensors, *options, need_argmax)
        ctx.save_for_backward(output, argmax, *tensors)
        # Not `to` alone: compiled by PyTorch 2.11, one that converts nothing of a saved output gives gradients of zero.
        return output if output.dtype == ctx.options.out_dtype else output.to(ctx.options.out_dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, argmax, *tensors = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        gradients = ops.pool_backward(grad, output, argmax, *tensors, *ctx.options, *need)
        if torch.is_grad_enabled():
            inputs = [tensor for tensor in (grad, *tensors[:3]) if tensor is not None]
            gradients = _FirstDerivative.apply("splade_pool", len(inputs), *inputs, *gradients)  # type: ignore[no-untyped-call]
        return *(gradient if n else None for gradient, n in zip(gradients, need, strict=True)), None, None, None


class Flops(torch.autograd.Function):
    """``Σ_v (mean_b y[b, v])²`` over the rows of every rank of ``process_group``.

    With a group the gradient is multiplied by the number of ranks, because data-parallel training averages over ranks.
    The column means are saved, so the backward needs no collective.
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
