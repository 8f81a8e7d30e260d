"""The rival kernel of the benchmarks computes what the package's does, bit for bit."""

from __future__ import annotations

import pytest
import torch

import splade_kernels as sk
from tests import oracle
from tests.oracle import make_case

REASON = sk.available_backends()["triton"]
pytestmark = [pytest.mark.skipif(REASON != "available", reason=REASON), pytest.mark.usefixtures("on_accelerator")]


@pytest.mark.parametrize("need_argmax", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["ragged", "holes", "empty"])
def test_the_rival_returns_the_same_bits(pattern, dtype, need_argmax):
    from bench.inputs import rival
    from splade_kernels.backends import triton as package
    from splade_kernels.backends.triton.tuning import MatmulConfig

    case = make_case((5, 45, 24, 70), dtype, pattern=pattern)
    with torch.no_grad():
        case.hidden[-1, 20, 3] = torch.nan
    call = oracle.new_call(
        batch_size=5,
        attention_mask=case.mask,
        max_seqlen=45,
        compute_dtype=dtype,
        out_dtype=dtype,
        need_argmax=need_argmax,
    )
    tensors = [tensor.detach() for tensor in (case.hidden.flatten(0, 1), case.weight, case.bias)]
    ours = package.POOLINGS["max"].forward(call, *tensors)
    theirs = rival.max_pool_forward(call, *tensors, MatmulConfig(32, 32, 32, 4, 1, group_v=2))
    # D = 24 is one block of both, so that dots are summed in one order.
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.nan_to_num(nan=-1.0), two.nan_to_num(nan=-1.0))
    assert ours[0][-1].isnan().all() == case.mask[-1, 20]
