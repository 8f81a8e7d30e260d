"""flops_loss against the definition, sentence-transformers and, over ranks, the single-process run."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import splade_kernels as sk
from tests.oracle import largest_error

THRESHOLDS = [None, 0, 30, 1000]


def make_embeddings(
    rows: int, vocab_size: int = 400, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Rows with growing numbers of non-zeros, the first one empty."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, vocab_size, generator=generator)
    share = torch.linspace(0, 0.4, rows)[:, None]
    return torch.where(torch.rand(rows, vocab_size, generator=generator) < share, values, 0).to(dtype)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_definition_in_double(dtype, threshold):
    embeddings = make_embeddings(9, dtype=dtype).requires_grad_()
    exact_embeddings = embeddings.detach().double().requires_grad_()
    exact = sk.reference.flops_loss(exact_embeddings, threshold=threshold)
    (exact_gradient,) = torch.autograd.grad(exact, exact_embeddings)
    loss = sk.flops_loss(embeddings, threshold=threshold)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    wide = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == wide
    assert loss.shape == ()
    assert gradient.dtype == dtype
    assert largest_error(loss.detach(), exact.detach()) <= 4 * torch.finfo(wide).eps * exact.item()
    assert largest_error(gradient, exact_gradient) <= torch.finfo(dtype).eps * exact_gradient.abs().max().item() + 1e-12


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_equals_sentence_transformers(threshold):
    losses = pytest.importorskip("sentence_transformers.sparse_encoder.losses")
    embeddings = make_embeddings(12, 3000).requires_grad_()
    theirs = losses.FlopsLoss(model=None, threshold=threshold).compute_loss_from_embeddings(embeddings)
    ours = sk.flops_loss(embeddings, threshold=threshold)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, embeddings)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-6, atol=0)


def test_without_threshold_the_gradient_is_one_broadcast_row():
    embeddings = make_embeddings(50).requires_grad_()
    gradient = torch.autograd.grad(sk.flops_loss(embeddings), embeddings)[0]
    assert gradient.stride() == (0, 1)


def test_bitwise_repeatable():
    embeddings = make_embeddings(64, 30522)
    assert sk.flops_loss(embeddings).item() == sk.flops_loss(embeddings).item()


def test_autocast_does_not_round_the_statistics():
    embeddings = make_embeddings(16)
    with torch.autocast("cpu", torch.bfloat16):
        assert sk.flops_loss(embeddings).item() == sk.flops_loss(embeddings.clone()).item()
        inside = sk.flops_loss(embeddings)
    assert inside.item() == sk.flops_loss(embeddings).item()


def test_no_rows_is_nan_as_a_mean_over_nothing():
    assert sk.flops_loss(torch.zeros(0, 5)).isnan()


def test_module_is_the_function():
    embeddings = make_embeddings(7)
    assert sk.FlopsLoss(threshold=20)(embeddings).item() == sk.flops_loss(embeddings, threshold=20).item()
    assert "threshold=20" in repr(sk.FlopsLoss(threshold=20))


def test_a_second_derivative_raises():
    embeddings = make_embeddings(3).requires_grad_()
    gradient = torch.autograd.grad(sk.flops_loss(embeddings), embeddings, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="flops_loss: second derivatives are not implemented"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("error", "message", "embeddings", "threshold"),
    [
        (TypeError, "embeddings: expected a tensor, got float", 1.0, None),
        (TypeError, "embeddings: expected one of .*got torch.int64", torch.ones(2, 3).long(), None),
        (ValueError, r"embeddings: expected shape \[B, V\], got \[3\]", torch.ones(3), None),
        (TypeError, "embeddings: expected a dense", torch.ones(2, 3).to_sparse_csr(), None),
        (TypeError, "threshold: expected a number or None, got str", torch.ones(2, 3), "3"),
        (TypeError, "threshold: expected a number or None, got bool", torch.ones(2, 3), True),
    ],
)
def test_bad_input_is_named(error, message, embeddings, threshold):
    with pytest.raises(error, match=message):
        sk.flops_loss(embeddings, threshold=threshold)


def test_other_bad_input_is_named():
    with pytest.raises(TypeError, match="process_group: expected a ProcessGroup or None, got str"):
        sk.flops_loss(torch.ones(2, 3), process_group="gloo")
    with pytest.raises(TypeError, match="threshold: expected a number or None, got str"):
        sk.FlopsLoss("3")
    with pytest.raises(RuntimeError, match="flops_loss: forward-mode derivatives are not implemented"):
        torch.func.jvp(sk.flops_loss, (torch.ones(2, 3),), (torch.ones(2, 3),))


ROWS = (5, 2, 0)


def _rank(rank: int, world: int, store: str, threshold: float | None, results: multiprocessing.Queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 40, dtype=torch.float64))
    first = sum(ROWS[:rank])
    inputs = torch.randn(sum(ROWS), 6, dtype=torch.float64)[first : first + ROWS[rank]]
    embeddings = model(inputs).relu()
    loss = sk.flops_loss(embeddings, threshold=threshold, process_group=dist.group.WORLD)
    collectives = []
    real = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: collectives.append(args) or real(*args, **kwargs)
    torch.autograd.grad(loss, embeddings, retain_graph=True)
    during_backward = len(collectives)
    dist.all_reduce = real
    loss.backward()
    results.put((rank, loss.item(), model.module.weight.grad.tolist(), during_backward))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "threshold"),
    [(3, 18), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, None), (2, 18), (3, None)))],
)
def test_ranks_with_unequal_batches_give_the_single_process_value_and_gradient(tmp_path: Path, threshold, world):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(rank, world, str(tmp_path / "store"), threshold, results) for rank in range(world)]
    processes = [context.Process(target=_rank, args=a) for a in arguments]
    for process in processes:
        process.start()
    answers = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0

    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 40, dtype=torch.float64)
    inputs = torch.randn(sum(ROWS), 6, dtype=torch.float64)[: sum(ROWS[:world])]
    embeddings = layer(inputs).relu()
    kept = (embeddings != 0).sum(dim=1) > (threshold or 0)
    assert threshold is None or 0 < kept.sum() < len(kept), "the threshold must drop some rows and keep some"
    expected = sk.reference.flops_loss(embeddings, threshold=threshold)
    expected.backward()
    for _, value, gradient, during_backward in answers:
        assert value == pytest.approx(expected.item(), rel=1e-14)
        assert torch.allclose(torch.tensor(gradient, dtype=torch.float64), layer.weight.grad, rtol=1e-13, atol=1e-16)
        assert during_backward == 0
