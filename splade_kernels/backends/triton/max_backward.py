"""Backward of maximum pooling: two sparse products over the active entries, without atomics, in a fixed order.

With ``g[b, v] = where(y <= 0, 0, dy · dact)`` and the row ``r[b, v]`` of h at which the maximum was attained:

    dW[v, :] = Σ_b g[b, v] · h[r[b, v], :]      dc[v] = Σ_b g[b, v]
    dh[n, :] = Σ g[b, v] · W[v, :]  over all (b, v) with r[b, v] = n     (:mod:`.grad_hidden`)

A program owns a block of dW and walks the batch in order. It looks at 16 sequences at a time and visits those with an
active entry in its block: few late in training, all of them early. Entries with ``g = 0`` are dropped, never
multiplied. ``g`` is recomputed where it is used: a few instructions instead of a float32 ``[B, V]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pooling import Gradients, PoolingCall
from . import launch, tuning
from .common import logit_gradient, narrow, widen
from .grad_hidden import sum_hidden
from .tuning import HiddenConfig, WeightConfig

# Sequences whose activity is tested at once, one bit each in an int32.
BLOCK_B = 16
# Uncapped, ptxas spills a few bytes to raise occupancy, or takes 169 registers where rows have no known alignment.
MAX_REGISTERS = 112


def max_pool_backward(
    call: PoolingCall,
    grad: Tensor,
    output: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_config: WeightConfig | None = None,
    hidden_config: HiddenConfig | None = None,
) -> Gradients:
    """As :func:`splade_kernels.backends.tiled.packed.max_pool_backward`.

    An argmax outside its sequence, which only wrong ``cu_seqlens`` on a device can cause, is left out of dh and dW.

    Args:
        weight_config: of the kernel of dW, by default what :mod:`.tuning` chooses.
        hidden_config: of the kernels of dh, likewise.
    """
    nothing = hidden.shape[0] == 0 or grad.numel() == 0
    create = torch.Tensor.new_zeros if nothing else torch.Tensor.new_empty
    grad_hidden = create(hidden, hidden.shape) if call.need_hidden else None
    grad_weight = create(weight, weight.shape) if call.need_weight else None
    grad_bias = create(bias, bias.shape) if call.need_bias and bias is not None else None
    if not nothing:
        problem = launch.problem(call, weight)
        entries = (grad, output.contiguous(), argmax.contiguous(), call.edges(hidden))
        if grad_hidden is not None:
            sum_hidden(call, hidden_config or tuning.hidden_config(*problem), *entries, weight, grad_hidden)
        if grad_weight is not None or grad_bias is not None:
            config = weight_config or tuning.weight_config(*problem)
            _sum_weight(call, config, *entries, hidden, grad_weight, grad_bias)
    return grad_hidden, grad_weight, grad_bias


def _sum_weight(
    call: PoolingCall,
    config: WeightConfig,
    grad: Tensor,
    output: Tensor,
    argmax: Tensor,
    edges: Tensor,
    hidden: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    vocab_size = output.shape[1]
    hidden_size = hidden.shape[1]
    blocks_d = 1 if grad_weight is None else max(1, triton.cdiv(hidden_size, config.block_d))
    tiles = {"BLOCK_B": BLOCK_B, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d, "num_warps": config.num_warps}
    tensors = grad, output, argmax, edges, hidden, grad_weight, grad_bias
    sizes = (*output.shape, hidden_size, *grad.stride(), *hidden.stride())
    _weight_kernel[(triton.cdiv(vocab_size, config.block_v), blocks_d)](
        *tensors, *sizes, **launch.activation_options(call), **tiles, maxnreg=MAX_REGISTERS
    )


@triton.jit(do_not_specialize=["batch_size", "stride_gb"], do_not_specialize_on_alignment=["grad_ptr"])
def _weight_kernel(
    grad_ptr,
    output_ptr,
    argmax_ptr,
    edge_ptr,
    hidden_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    batch_size,
    vocab_size,
    hidden_size,
    stride_gb,
    stride_gv,
    stride_hn,
    stride_hd,
    logit_scale,
    logit_softcap,
    LOGS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dW[v, :] = Σ_b g[b, v] · h[r[b, v], :]``, ``dc[v] = Σ_b g[b, v]``; either may be None."""
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_v = o_v < vocab_size
    m_d = o_d < hidden_size
    p_hidden = hidden_ptr + o_d.to(tl.int64)[None, :] * stride_hd
    # [BLOCK_V, BLOCK_D]
    weight_sum = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, batch_size, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B).to(tl.int64)
        m_b = (b < batch_size)[:, None] & m_v[None, :]
        p_output = output_ptr + b[:, None] * vocab_size + o_v[None, :]
        p_grad = grad_ptr + b[:, None] * stride_gb + o_v.to(tl.int64)[None, :] * stride_gv
        # [BLOCK_B, BLOCK_V]
        g = logit_gradient(p_grad, p_output, m_b, logit_scale, logit_softcap, LOGS)
        bias_sum += tl.sum(g, axis=0)
        if grad_weight_ptr is not None:
            active = tl.max((g != 0).to(tl.int32), axis=1)
            bits = tl.sum(active << tl.arange(0, BLOCK_B), axis=0)
            for i in range(0, BLOCK_B):
                if (bits >> i) & 1 != 0:
                    # The interpreter's loop counters are Python integers, which have no ``to``.
                    b_i = tl.full((), 0, tl.int64) + first + i
                    o_entry = b_i * vocab_size + o_v
                    p_grad_i = grad_ptr + b_i * stride_gb + o_v.to(tl.int64) * stride_gv
                    # [BLOCK_V]
                    p_output_i = output_ptr + o_entry
                    g_i = logit_gradient(p_grad_i, p_output_i, m_v, logit_scale, logit_softcap, LOGS)
                    position = tl.load(argmax_ptr + o_entry, mask=m_v, other=0).to(tl.int32)
                    start = tl.load(edge_ptr + b_i)
                    chosen = (g_i != 0) & (position >= 0) & (position < tl.load(edge_ptr + b_i + 1) - start)
                    p_row = p_hidden + (start + position).to(tl.int64)[:, None] * stride_hn
                    # [BLOCK_V, BLOCK_D]
                    h = widen(tl.load(p_row, mask=chosen[:, None] & m_d[None, :], other=0.0))
                    weight_sum += g_i[:, None] * h
    if grad_weight_ptr is not None:
        p_weight = grad_weight_ptr + o_v.to(tl.int64)[:, None] * hidden_size + o_d[None, :]
        tl.store(p_weight, narrow(weight_sum, grad_weight_ptr.dtype.element_ty), mask=m_v[:, None] & m_d[None, :])
    if grad_bias_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(grad_bias_ptr + o_v, narrow(bias_sum, grad_bias_ptr.dtype.element_ty), mask=m_v)
