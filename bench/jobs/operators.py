"""The jobs of one case in one precision, to be interleaved: head, backward operator, FLOPS regulariser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import splade_kernels as sk
from bench.harness import roofline, timing, truth
from bench.harness.rows import Job, Row
from bench.harness.steps import Step, Tensors, input_sets, train_or_infer, unweighed, weigh_on_gpu, weigher
from bench.inputs import distributions, variants
from bench.inputs.cases import Case, Inputs, Precision
from splade_kernels.ops import PoolOptions, pool_backward


class Head:
    """``forward`` or ``forward_backward`` of the head on one case: its inputs, their truth, and jobs of variants."""

    def __init__(self, case: Case, precision: Precision, job: str, device: torch.device) -> None:
        self.case, self.precision, self.device = case, precision, device
        self.training = job == "forward_backward"
        self.sets = input_sets(case, precision, device)
        self.exact = truth.compute(self.sets[0], precision)
        real = variants.tokens(case, padded=False)
        active = int((self.exact.output > 0).sum())
        works = [roofline.forward(case, precision, real)]
        if self.training:  # the argmax is written and read once
            works.append(roofline.backward(case, precision, active, real))
        operations, moved = map(sum, zip(*works, strict=True))
        row = Row(case.name, case.shape, precision.name, job, "", scaled_from=case.scaled_from, real_tokens=real)
        share = active / self.exact.output.numel()
        self.row = replace(row, operations=operations, bytes=moved, active_share=share)

    def steps(self, name: str) -> list[Step]:
        function = variants.VARIANTS[name].make(self.training)
        return [train_or_infer(function, inputs, self.precision, self.training) for inputs in self.sets]

    def check(self, found: Tensors) -> dict[str, float]:
        return truth.differences(self.exact, found[0], found[1:], self.sets[0])

    def variant(self, name: str, weighed: bool = True) -> Job:
        reason = variants.why_not(name, self.device, self.training)
        row = replace(self.row, variant=name, errors={}, status=f"not here: {reason}" if reason else "measured")
        weigh = weigher(self.case, self.precision, name, self.training, self.device) if weighed else unweighed
        bound = truth.BOUNDS[self.precision.name]
        job = Job(row, partial(self.steps, name), self.check, bound, name in variants.OURS, weigh)
        job.captured = variants.VARIANTS[name].captured(self.training, self.device)
        return job

    def floor(self, name: str) -> Job:
        tokens = variants.tokens(self.case, padded=name == "matmul-padded")
        row = replace(self.row, variant=name, errors={}, real_tokens=tokens)
        return Job(row, lambda: [variants.matmul(name, inputs, self.precision) for inputs in self.sets])


def head(case: Case, precision: Precision, job: str, device: torch.device, names: Sequence[str]) -> list[Job]:
    """The variants of ``forward`` or ``forward_backward``, and beside the forward its floors."""
    group = Head(case, precision, job, device)
    floors = () if group.training else variants.MATMULS
    return [*map(group.variant, names), *map(group.floor, floors)]


class Backward:
    """The backward alone on one distribution of winners: its inputs, their exact gradients, and jobs of variants."""

    def __init__(
        self, case: Case, precision: Precision, job: str, generate: distributions.Generate, device: torch.device
    ) -> None:
        self.case, self.precision, self.device = case, precision, device
        self.sets = input_sets(case, precision, device)
        self.drawn = [distributions.draw(generate, case, precision, device, seed) for seed in range(len(self.sets))]
        self.exact = truth.backward(*self.drawn[0], self.sets[0])
        real, active = variants.tokens(case, padded=False), int((self.drawn[0][0] > 0).sum())
        row = Row(case.name, case.shape, precision.name, job, "", scaled_from=case.scaled_from, real_tokens=real)
        self.row = replace(row, active_share=active / self.drawn[0][0].numel())
        self.forward = roofline.forward(case, precision, real)
        self.backward = roofline.backward(case, precision, active, real)

    def check(self, found: Tensors) -> dict[str, float]:
        """Relative distance of the gradients of hidden states, weight and bias, by name."""
        names = ("grad_hidden", "grad_weight", "grad_bias")
        return {name: truth.relative_distance(*pair) for name, *pair in zip(names, found, self.exact, strict=True)}

    def variant(
        self, name: str, make: Callable[[Inputs, distributions.Draw], Step], bound: float | None = None, **more: Any
    ) -> Job:
        """Steps that ``make`` gives; with a bound they return gradients, which are checked. ``more``: of the row."""
        row = replace(self.row, variant=name, errors={}, **more)
        job = Job(row, lambda: [make(*pair) for pair in zip(self.sets, self.drawn, strict=True)])
        if bound is not None:
            job.check, job.bound, job.weigh = self.check, bound, weigh_on_gpu(self.device)
        return job

    def ours(self, name: str, **more: Any) -> Job:
        bound = 1e-4 if self.precision.compute_dtype == torch.float32 else 1e-2
        job = self.variant(name, self.operator, bound, **self.backward._asdict(), **more)
        job.strict = True
        return job

    def beside(self, screening: str | bool = "auto") -> Job:
        """The training forward of the same shape, which keeps what the backward needs."""

        def make(inputs: Inputs, _: distributions.Draw) -> Step:
            def step() -> Tensors:
                with self.precision.forward(self.device):
                    return (sk.splade_pool(*inputs.leaves, inputs.mask, screening=screening).detach(),)

            return step

        return self.variant("training-forward", make, **self.forward._asdict())

    def operator(self, inputs: Inputs, drawn: distributions.Draw) -> Step:
        """The package's backward operator: gradients of hidden states, weight and bias."""
        output, argmax, grad = drawn
        options = PoolOptions(
            self.case.length, "max", "relu", self.precision.compute_dtype, self.precision.out_dtype,
            screening="off", backend="auto",
        )  # fmt: skip
        needs = dict.fromkeys(("need_hidden", "need_weight", "need_bias"), True)

        def gradients() -> Tensors:
            leaves = (leaf.detach() for leaf in inputs.leaves)
            found: Tensors = pool_backward(grad, output, argmax, *leaves, inputs.mask, None, *options, **needs)
            return found

        return gradients


def backward(case: Case, precision: Precision, distribution: str, device: torch.device) -> list[Job]:
    """The backward operator alone on one distribution, beside the training forward of the same shape."""
    generate = distributions.DISTRIBUTIONS[distribution]
    group = Backward(case, precision, f"backward-{distribution}", generate, device)
    return [group.ours("ours"), group.beside()]


def flops(shape: tuple[int, int], precision: Precision, job: str, device: torch.device) -> list[Job]:
    """The regulariser, as sentence-transformers computes it and ours."""
    rows, columns = shape
    training = job == "forward_backward"
    dtype = precision.out_dtype
    count = timing.rotation(rows * columns * dtype.itemsize, device)
    tensors = [torch.rand(rows, columns, device=device).sub_(0.9).relu_().to(dtype) for _ in range(count)]
    mean = torch.cat([part.sum(0, dtype=torch.float64)[None] for part in tensors[0].split(64)]).sum(0) / rows
    exact = (mean.square().sum(), (2 / rows * mean).expand(rows, -1))
    read = rows * columns * dtype.itemsize  # every embedding once
    row = Row("flops", f"B{rows} V{columns}", precision.name, job, "", operations=rows * columns, bytes=read)

    def stock(embeddings: Tensor) -> Tensor:
        return torch.sum(torch.mean(embeddings, dim=0) ** 2)

    def one(function: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensors:
        value = function(leaf)
        return (value.detach(), *torch.autograd.grad(value, leaf)) if training else (value,)

    def steps(function: Callable[[Tensor], Tensor]) -> list[Step]:
        return [partial(one, function, tensor.requires_grad_(training)) for tensor in tensors]

    def check(found: Tensors) -> dict[str, float]:
        errors = {"value": truth.relative_distance(found[0], exact[0])}
        return errors | ({"grad": truth.relative_distance(found[1][0], exact[1][0])} if training else {})

    bound, weigh = 1e-5 if dtype == torch.float32 else 2e-2, weigh_on_gpu(device)
    return [
        Job(replace(row, variant=name, errors={}), partial(steps, function), check, bound, name == "ours", weigh)
        for name, function in (("stock", stock), ("ours", sk.flops_loss))
    ]
