"""The public functions: documentation, validation of everything the host can see, dispatch."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .autograd import Flops, SpladePool
from .backends import BACKENDS
from .backends.pooling import ACTIVATION_FUNCTIONS, POOLING_STRATEGIES, check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["flops_loss", "sparsify", "splade_pool"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LARGEST = 2**31 - 1  # no size is larger
_FLOAT32 = torch.finfo(torch.float32)


def splade_pool(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    pooling_strategy: str = "max",
    activation_function: str = "relu",
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    screening: str | bool = "auto",
    backend: str = "auto",
) -> Tensor:
    """Fused SPLADE head: vocabulary projection, activation and masked pooling, without the logits.

    ``y[b, v] = act(max_s h[b, s] · W[v] + c[v])`` over the real tokens ``s``, with ``act = log1p ∘ relu`` or
    ``log1p ∘ log1p ∘ relu``; ``pooling_strategy="sum"``: ``y[b, v] = Σ_s act(h[b, s] · W[v] + c[v])``. The maximum is
    taken of dots summed in float32 (float64 for float64), in half precision too. Its gradient goes to the token that
    attains it (the lowest position on ties) and is exact and sparse. Outputs and gradients are bitwise repeatable, and
    the same for padded, packed and more-padded input. Second derivatives, forward mode and the transforms of
    ``torch.func`` raise.

    ``logit_scale`` and ``logit_softcap`` put ``z = logit_scale · x``, then ``z = logit_softcap · tanh(z /
    logit_softcap)``, between a logit ``x = h · W + c`` and ``act``, as the decoders of some language models do. Both
    are increasing and 0 at 0, so that they too run once per ``[b, v]``.

    Args:
        hidden_states: ``[B, S, D]`` padded, or packed ``[T, D]`` / ``[1, T, D]`` with ``cu_seqlens``; float32, float16,
            bfloat16 or float64; any strides.
        weight: ``[V, D]`` decoder weight, of the dtype of ``hidden_states`` unless under autocast.
        bias: ``[V]`` decoder bias, or None.
        attention_mask: ``[B, S]`` bool or integer; non-zero marks a real token, in any pattern. None: all are real.
        cu_seqlens: ``[B + 1]`` int32 or int64 cumulative lengths from 0 to ``T``; equal neighbours are empty sequences.
        max_seqlen: host-known bound on the length of a packed sequence, in tokens; default ``T``.
        pooling_strategy: ``"max"`` or ``"sum"``.
        activation_function: ``"relu"`` or ``"log1p_relu"``: relu, then one or two ``log1p``. An activation must be 0
            for ``x <= 0`` and increasing, which the maximum over raw dots, the sparse gradient and screening rest on;
            others are refused by name.
        logit_scale: for models that multiply their logits after the decoder: Cohere's ``logit_scale``, and one over
            Granite's ``logits_scaling``. A number above 0.
        logit_softcap: for models that cap their logits: Gemma 2's and Gemma 3's ``final_logit_softcapping``, a number
            above 0. None: no cap.
        screening: exact screening: int8 products with a certified error bound find the dots that can be the maximum
            of their pair and positive, and only those are computed in full precision. ``"auto"`` screens where a probe
            of this call's inputs shows that it pays, True always, False never. Values agree within the rounding of one
            float32 sum in another order. For ``pooling_strategy="max"`` only. "auto" needs the compiled operators or
            VNNI on a CPU, and on a GPU a checked-in measurement of its architecture that shows a gain: there is none
            yet, so "auto" is False there. Inference keeps the int8 weight, and may miss writes to a few rows of
            ``weight.data``, which PyTorch does not count. See docs/screening.md.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; ``SPLADE_KERNELS_BACKEND`` overrides ``"auto"``.

    Returns:
        Contiguous ``[B, V]`` in the dtype of ``hidden_states``; float32 under autocast, which leaves float64 inputs
        alone. A sequence without a real token is a row of zeros and has no gradient.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: a backend asked for by name cannot run here.

    Formal et al. 2021, "SPLADE v2", arXiv:2109.10086 (max); "SPLADE", arXiv:2107.05720 (sum); arXiv:2504.14839
    (log1p_relu).
    """
    screening = check_options(pooling_strategy, activation_function, screening, backend)
    logit_scale = _check_positive("logit_scale", logit_scale, "a number")
    softcap = 0.0 if logit_softcap is None else _check_positive("logit_softcap", logit_softcap, "a number or None")
    _check_tensor("hidden_states", hidden_states, _DTYPES)
    _check_tensor("weight", weight, _DTYPES, hidden_states.device)
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [V, D], got {_shape(weight)}")
    hidden_states, bound = _check_sequences(hidden_states, attention_mask, cu_seqlens, max_seqlen)
    size = hidden_states.shape[-1]
    if weight.shape[1] != size:
        raise ValueError(
            f"weight: expected [V, {size}] to match the hidden size of hidden_states, got {_shape(weight)}"
        )
    if bias is not None:
        _check_tensor("bias", bias, _DTYPES, hidden_states.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {_shape(bias)}")
    options = ops.PoolOptions(
        bound,
        pooling_strategy,
        activation_function,
        *_choose_dtypes(hidden_states, weight, bias),
        screening,
        backend,
        logit_scale,
        softcap,
    )
    _check_no_tangent("splade_pool", hidden_states, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden_states, weight, bias)):
        return SpladePool.apply(hidden_states, weight, bias, attention_mask, cu_seqlens, options)  # type: ignore[no-any-return,no-untyped-call]
    output: Tensor = ops.pool_forward(hidden_states, weight, bias, attention_mask, cu_seqlens, *options, False)[0]
    return output


def flops_loss(
    embeddings: Tensor, *, threshold: float | None = None, process_group: ProcessGroup | None = None
) -> Tensor:
    """FLOPS regulariser: ``Σ_v (mean_b y[b, v])²``, accumulated in at least float32.

    Args:
        embeddings: ``[B, V]`` non-negative, floating point.
        threshold: rows with at most this many non-zeros are zeroed first; the mean stays over all rows.
        process_group: None for this process's rows alone. A group: the value is that of all ranks' rows together (ranks
            may hold different numbers of rows), and the gradient is scaled so that averaging over ranks, as
            ``DistributedDataParallel`` does, gives the single-process gradient. One all-reduce forward, none backward.

    Returns:
        Scalar, float32 (float64 for float64 embeddings). NaN for no rows at all, as a mean over nothing is.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.

    Paria et al. 2020, "Minimizing FLOPs to Learn Efficient Sparse Representations", arXiv:2004.05665; threshold:
    arXiv:2504.14839.
    """
    _check_embeddings(embeddings)
    threshold = check_threshold(threshold)
    if process_group is not None and not hasattr(process_group, "allreduce"):
        raise TypeError(f"process_group: expected a ProcessGroup or None, got {type(process_group).__name__}")
    _check_no_tangent("flops_loss", embeddings)
    return Flops.apply(embeddings, threshold, process_group)  # type: ignore[no-any-return,no-untyped-call]


def sparsify(embeddings: Tensor, *, max_active_dims: int | None = None) -> Tensor:
    """Dense ``[B, V]`` embeddings to a sparse CSR tensor of exact size. Not differentiable: the result is detached.

    Args:
        embeddings: ``[B, V]``, floating point.
        max_active_dims: keep only each row's largest entries, at most this many; ties go to the lowest vocabulary id
            and NaN counts as the largest. None: all non-zeros.

    Returns:
        ``[B, V]`` sparse CSR with int64 indices, vocabulary ids ascending in each row, in the dtype of ``embeddings``
        and on their device, or on the CPU where PyTorch has no CSR tensors for it (MPS).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
    """
    _check_embeddings(embeddings)
    if max_active_dims is not None:
        max_active_dims = check_count("max_active_dims", max_active_dims, 1, "an int or None")
    crow, col, values = ops.sparsify(embeddings.detach(), max_active_dims)
    size, device = embeddings.shape, embeddings.device
    try:
        return torch.sparse_csr_tensor(crow, col, values, size=size, device=device, check_invariants=False)
    except NotImplementedError:  # MPS: pytorch#196192
        crow, col, values = crow.cpu(), col.cpu(), values.cpu()
        return torch.sparse_csr_tensor(crow, col, values, size=size, device="cpu", check_invariants=False)


def _check_sequences(
    hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor, int]:
    """Hidden states as ``[B, S, D]`` or ``[T, D]``, and the host-known bound on a sequence's length."""
    if cu_seqlens is None:
        if hidden_states.ndim != 3:
            raise ValueError(
                f"hidden_states: expected [B, S, D], or packed [T, D] with cu_seqlens, got {_shape(hidden_states)}"
            )
        if max_seqlen is not None:
            raise ValueError("max_seqlen: expected None without cu_seqlens, since the padded length is the bound")
        if attention_mask is not None:
            _check_mask(attention_mask, hidden_states)
        return hidden_states, hidden_states.shape[1]

    if attention_mask is not None:
        raise ValueError("attention_mask: expected None with cu_seqlens, since packed input holds real tokens only")
    _check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), hidden_states.device)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {_shape(cu_seqlens)}")
    if hidden_states.ndim == 3 and hidden_states.shape[0] == 1:
        hidden_states = hidden_states[0]
    if hidden_states.ndim != 2:
        raise ValueError(f"hidden_states: expected packed [T, D] or [1, T, D], got {_shape(hidden_states)}")
    if max_seqlen is None:
        return hidden_states, hidden_states.shape[0]
    return hidden_states, check_count("max_seqlen", max_seqlen, 0, "an int known to the host")


def _check_mask(attention_mask: Tensor, hidden_states: Tensor) -> None:
    if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():
        raise TypeError(
            f"attention_mask: expected bool or integer with non-zero for real tokens, got {attention_mask.dtype}; "
            "additive masks mean the opposite (0 for real tokens): pass `mask == 0`"
        )
    _check_tensor("attention_mask", attention_mask, (torch.bool, *_INTEGERS), hidden_states.device)
    if attention_mask.shape != (expected := hidden_states.shape[:2]):
        raise ValueError(
            f"attention_mask: expected shape {list(expected)} to match hidden_states, got {_shape(attention_mask)}"
        )


def _choose_dtypes(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """Dtype of the products and of the output."""
    device, dtype = hidden_states.device.type, hidden_states.dtype
    # Asking whether meta tensors are under autocast raises.
    autocast = device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if autocast and tensor.dtype == torch.float64:
            raise TypeError(f"{name}: expected no float64 under autocast unless hidden_states is, got float64")
        if not autocast and tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} to match hidden_states, got {tensor.dtype}")
    return (torch.get_autocast_dtype(device), torch.float32) if autocast else (dtype, dtype)


def _check_embeddings(embeddings: Tensor) -> None:
    _check_tensor("embeddings", embeddings, _DTYPES)
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings: expected shape [B, V], got {_shape(embeddings)}")


def check_count(name: str, value: Any, least: int, expected: str = "an int") -> int:
    """A whole number of at least ``least``, NumPy's too, cut to the largest size there can be."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value if isinstance(value, torch.SymInt) else min(int(value), _LARGEST)  # type: ignore[return-value]


def check_threshold(threshold: Any) -> float | None:
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
        raise TypeError(f"threshold: expected a number or None, got {type(threshold).__name__}")
    return float(threshold)


def _check_positive(name: str, value: Any, expected: str) -> float:
    """A real number above 0 that is finite and normal in float32, in which kernels are told it."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not _FLOAT32.tiny <= value <= _FLOAT32.max:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a finite number above 0, and in the range of float32, got {value}")
    return float(value)


def _check_no_tangent(name: str, *tensors: Tensor | None) -> None:
    """Inside the operators forward-mode derivatives would be lost, silently where nothing requires a gradient."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{name}: forward-mode derivatives are not implemented")


def check_options(
    pooling_strategy: str, activation_function: str, screening: str | bool = "auto", backend: str = "auto"
) -> str:
    """What to tell the operators of screening: ``"auto"``, ``"on"`` or ``"off"``."""
    check_choice("pooling_strategy", POOLING_STRATEGIES, pooling_strategy)
    check_choice("activation_function", ACTIVATION_FUNCTIONS, activation_function)
    check_choice("backend", ("auto", *BACKENDS), backend)
    if not isinstance(screening, bool) and not (isinstance(screening, str) and screening == "auto"):
        raise ValueError(f"screening: expected 'auto', True or False, got {screening!r}")
    if pooling_strategy != "max":
        if screening is True:
            raise ValueError(
                f"screening: expected 'auto' or False with pooling_strategy={pooling_strategy!r}, which needs every "
                "positive logit, got True"
            )
        return "off"
    return {"auto": "auto", True: "on", False: "off"}[screening]


def _check_tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, dtypes))}, got {value.dtype}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got a nested one: pack it, with cu_seqlens")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected on {device} like hidden_states, got {value.device}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
