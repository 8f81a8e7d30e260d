"""Random shapes, strides, offsets, masks and layouts against the definition; whole numbers, so that dots are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import splade_kernels as sk
from tests import oracle
from tests.oracle import ACTIVATIONS, Case, make_case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = ["ragged", "full", "left", "holes", "one", "empty"]


def strided(tensor: Tensor, draw: torch.Generator) -> Tensor:
    """The same values and sizes with other strides, in memory that begins and ends elsewhere and holds NaN between."""

    def pick(high: int) -> int:
        return int(torch.randint(high, (1,), generator=draw, device="cpu"))

    order = torch.randperm(tensor.dim(), generator=draw, device="cpu").tolist()
    sizes = [tensor.shape[axis] * (1 + pick(3)) + pick(3) for axis in order]
    begins = [pick(size - tensor.shape[axis] + 1) for axis, size in zip(order, sizes, strict=True)]
    buffer = torch.full(sizes, torch.nan if tensor.is_floating_point() else 1).to(tensor.dtype)
    for place, (axis, begin) in enumerate(zip(order, begins, strict=True)):
        step = max(1, (sizes[place] - begin) // max(tensor.shape[axis], 1))
        buffer = buffer[(slice(None),) * place + (slice(begin, begin + step * tensor.shape[axis], step),)]
    view = buffer.permute([order.index(axis) for axis in range(tensor.dim())])
    return view.copy_(tensor)


@pytest.mark.parametrize("seed", range(24))
def test_anything_a_caller_may_pass(seed, backend):
    draw = torch.Generator("cpu").manual_seed(seed)

    def pick(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (1,), generator=draw, device="cpu"))]

    shape = tuple(int(torch.randint(1, high, (1,), generator=draw, device="cpu")) for high in (7, 40, 36, 150))
    dtype = pick(*DTYPES)
    options = {"pooling_strategy": pick("max", "max", "sum"), "activation_function": pick(*ACTIVATIONS)}
    case = make_case(shape, dtype, pattern=pick(*PATTERNS), bias=pick(True, False), integers=True, seed=seed)
    exact, expected = oracle.reference_in_double(case, **options)

    parameters = [strided(tensor.detach(), draw).requires_grad_() for tensor in case.parameters()]
    hidden, weight, bias = (*parameters, None)[:3]
    mask = strided(case.mask.to(pick(torch.bool, torch.int64, torch.uint8)), draw)
    if pick(True, False):
        rows, cu_seqlens = case.packed()
        packed = strided(rows, draw).requires_grad_()
        bounds = {"cu_seqlens": cu_seqlens.to(pick(torch.int32, torch.int64))}
        if pick(True, False):
            bounds["max_seqlen"] = int(case.mask.sum(dim=1).max())
        output = sk.splade_pool(packed, weight, bias, **bounds, **options, backend=backend)
        parameters[0] = packed
        expected[0] = expected[0][case.mask]
    else:
        output = sk.splade_pool(hidden, weight, bias, mask, **options, backend=backend)
    gradients = torch.autograd.grad(output, parameters, strided(case.grad, draw))
    for ours, theirs in zip((output.detach(), *gradients), (exact, *expected), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        scale = max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
        # The activation, and g, are rounded to float32 before they are summed, results once to their dtype.
        assert oracle.largest_error(ours, theirs) <= (2 * torch.finfo(dtype).eps + 1e-5) * scale
    if backend == "triton":
        assert oracle.rounded_once(output.detach(), exact, 1e-5 * exact)


def test_the_strides_that_are_drawn_are_odd_ones():
    """What the test above relies on: other strides, offsets, and NaN in between."""
    draw = torch.Generator().manual_seed(0)
    case: Case = make_case((3, 5, 6, 40))
    views = [strided(case.hidden.detach(), draw) for _ in range(20)]
    assert all(torch.equal(view, case.hidden) for view in views)
    assert sum(not view.is_contiguous() for view in views) >= 15
    assert sum(view.storage_offset() > 0 for view in views) >= 10
    assert sum(view.stride(2) > 1 for view in views) >= 10
