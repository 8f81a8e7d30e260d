"""Devices that are neither CPU nor CUDA: the operations that PyTorch may lack there are not called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import splade_kernels as sk
import splade_kernels.backends.tiled as torch_backend
from splade_kernels.backends import dispatch
from splade_kernels.backends.tiled import backward
from tests import oracle
from tests.oracle import make_case, new_call
from tests.other_devices import MISSING, other_device


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with other_device(monkeypatch):
        yield


def test_what_is_hidden_is_missing(other):
    """What the tests of this device rely on."""
    ones = torch.ones(3, 2)
    for call in (
        lambda: torch.segment_reduce(ones, "sum", lengths=torch.tensor([3])),
        lambda: F.embedding_bag(torch.tensor([0]), ones, torch.tensor([0]), mode="sum"),
        lambda: ones.cummax(0),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert torch.tensor([torch.nan, -1.0, 2.0]).relu_().tolist() == [0, 0, 2]
    assert not any(dispatch.has_kernel(operation, "cpu") for operation in MISSING)


def test_the_dispatcher_is_asked_for_the_kernels_of_the_device_itself():
    """The private-use device stands in for one of a PyTorch built with it: it is in every build, without kernels. A
    fallback for all operations, such as MPS has, is no kernel."""
    assert dispatch.has_kernel("segment_reduce", "cpu")
    assert not dispatch.has_kernel("cummax", "cpu"), "composite: its kernel has another name"
    dispatch.has_kernel.cache_clear()
    device, operation = torch._C._get_privateuse1_backend_name(), "_embedding_bag_forward_only"
    fallback, kernel = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    try:
        fallback.fallback(lambda *args, **kwargs: None, "PrivateUse1")
        assert not dispatch.has_kernel(operation, device)
        kernel.impl(operation, lambda *args: None, "PrivateUse1")
        assert not dispatch.has_kernel(operation, device), "asked once"
        dispatch.has_kernel.cache_clear()
        assert dispatch.has_kernel(operation, device)
    finally:
        fallback._destroy()
        kernel._destroy()
        dispatch.has_kernel.cache_clear()
    assert not dispatch.has_kernel(operation, device)


def test_every_operation_asked_for_is_one_of_pytorchs():
    """A name that PyTorch changes would turn the fast routes off everywhere, in silence."""
    assert all(dispatch.has_kernel(operation, "cpu") for operation in MISSING)


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 3, 9], [2, 7, 5, 99], [0, -4, 20, 3]], ids=str)
def test_edges_name_no_row_outside_whatever_they_are(cu_seqlens, other):
    values = torch.tensor(cu_seqlens)
    call = new_call(batch_size=3, cu_seqlens=values, max_seqlen=9)
    edges = call.edges(torch.empty(9, 1))
    assert edges.dtype == torch.int32
    assert edges[0] == 0
    assert bool((edges.diff() >= 0).all())
    assert int(edges[-1]) <= 9
    if cu_seqlens[-1] == 9:
        assert edges.tolist() == cu_seqlens


class Recorder(TorchDispatchMode):
    """Operations below the operators, and the dtypes they return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.add(func.name().removeprefix("aten::"))
        self.dtypes |= {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_nothing_is_computed_in_float64_which_mps_lacks(pooling, packed, dtype, other):
    case = make_case((4, 20, 8, 30), dtype, pattern="ragged")
    hidden, cu_seqlens = case.packed() if packed else (case.hidden.detach().flatten(0, 1), None)
    mask = None if packed else case.mask
    needs = {"need_argmax": pooling == "max", "need_hidden": True, "need_weight": True, "need_bias": True}
    lengths = {"attention_mask": mask, "cu_seqlens": cu_seqlens, "max_seqlen": 20}
    call = new_call(batch_size=4, **lengths, pooling_strategy=pooling, compute_dtype=dtype, out_dtype=dtype, **needs)
    tensors = hidden, case.weight.detach(), case.bias.detach()
    with Recorder() as recorder:
        output, argmax = torch_backend.POOLINGS[pooling].forward(call, *tensors)
        torch_backend.POOLINGS[pooling].backward(call, case.grad, output, argmax, *tensors)
        torch_backend.flops_sums(output, 3.0)
    assert {"mm", "where.self"} <= recorder.operations
    assert torch.float64 not in recorder.dtypes
    assert not recorder.operations & {"segment_reduce", "_embedding_bag_forward_only", "cummax", "relu_"}


def test_the_last_bag_of_cuda_is_no_longer_than_it_is(monkeypatch):
    """PyTorch's CUDA kernel of ``embedding_bag`` takes the last bag to the end of the indices, whatever the last offset
    says. The entries behind it are inactive: an infinity that only they name must not reach a gradient."""
    real, longest = F.embedding_bag, []

    def embedding_bag(index: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options.pop("include_last_offset")
        ends = torch.cat([offsets[1:-1], torch.tensor([len(index)])])
        longest.append(int((ends - offsets[:-1]).max()))
        return real(index, table, offsets[:-1], **options)

    monkeypatch.setattr(F, "embedding_bag", embedding_bag)
    monkeypatch.setattr(dispatch, "on_host", lambda tensor: False)
    monkeypatch.setattr(dispatch, "may_wait", lambda tensor: False)
    case = make_case((4, 6, 3, 400), bias=False, pattern="full")
    with torch.no_grad():
        case.hidden.abs_()
        case.weight.abs_().neg_()  # no logit is positive, but those of the last vocabulary entries
        case.weight[0] = -torch.inf
        case.weight[-3:].abs_()
    expected, gradients = oracle.reference_in_double(case)
    output = sk.splade_pool(case.hidden, case.weight, attention_mask=case.mask, backend="torch")
    assert oracle.close(output.detach(), expected)
    grad_hidden, grad_weight = torch.autograd.grad(output, (case.hidden, case.weight), case.grad)
    assert oracle.close(grad_weight[1:], gradients[1][1:])
    assert grad_weight[0].tolist() == [0, 0, 0]
    assert grad_hidden.isfinite().all()
    assert max(longest) <= backward.SPARE_BAG


def test_sparse_embeddings_are_on_the_cpu_where_the_device_has_no_csr(other, monkeypatch):
    real, devices = torch.sparse_csr_tensor, []

    def sparse_csr_tensor(*parts: torch.Tensor, device: Any, **options: Any) -> torch.Tensor:
        devices.append(device)
        if isinstance(device, torch.device):  # that of the embeddings
            raise NotImplementedError("Could not run 'new_compressed_tensor' from the 'mps:0' device.")
        return real(*parts, device=device, **options)

    monkeypatch.setattr(torch, "sparse_csr_tensor", sparse_csr_tensor)
    embeddings = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    assert torch.equal(sk.sparsify(embeddings).to_dense(), embeddings)
    assert sk.sparsify(embeddings, max_active_dims=1).values().tolist() == [2, 4]
    assert devices == [embeddings.device, "cpu"] * 2


def test_a_fused_model_encodes_and_trains_as_stock(other):
    models = pytest.importorskip("tests.st_models")
    fuse = pytest.importorskip("splade_kernels.integrations.sentence_transformers").fuse
    stock, fused = models.sparse_encoder("distilbert"), fuse(models.sparse_encoder("distilbert"))
    for step in range(2):
        for model in (stock, fused):
            model.eval()
        expected = stock.encode(models.TEXTS, convert_to_sparse_tensor=False)
        embeddings = fused.encode(models.TEXTS, convert_to_sparse_tensor=False)
        assert bool((expected > 0).any(dim=1).all())
        assert torch.allclose(embeddings, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(sk.sparsify(embeddings).to_dense(), embeddings)
        if step == 0:
            ours, theirs = (dict(models.gradients(model, models.TEXTS[:6])) for model in (fused, stock))
            assert ours.keys() == theirs.keys()
            assert any(bool(gradient.any()) for gradient in theirs.values())
            for name, gradient in ours.items():
                assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-5), name
            for model in (stock, fused):
                torch.optim.SGD(model.parameters(), 0.01).step()
            before = expected
    assert not torch.allclose(before, expected, rtol=1e-3), "the step moved nothing"
