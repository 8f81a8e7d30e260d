"""How far one head's values, choice of tokens and gradients are from float64.

The truth is the definition at the operands as the head rounds them. Which token a head chooses is read from the
gradient of its weight, so that every head can be asked alike: if the arriving gradient is zero for all sequences but
one, row v of it is a multiple of the hidden state that was taken for the maximum of v.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench.harness import truth
from bench.harness.result_file import Row
from bench.inputs.cases import Case, Inputs, Precision, make_inputs
from bench.inputs.variants import VARIANTS

GRADIENTS = ("grad_hidden", "grad_weight", "grad_bias")
# Sequences whose tokens are asked for; each costs a backward.
PROBED = 2
ERRORS = ("output", "wrong_tokens", *GRADIENTS)


class Exact:
    """Inputs of a case and what float64 says of them."""

    def __init__(self, case: Case, precision: Precision, device: torch.device) -> None:
        self.inputs, self.precision = make_inputs(case, precision, device), precision
        hidden, weight, bias = (leaf.detach() for leaf in self.inputs.leaves)
        rounded = replace(
            self.inputs, hidden=hidden.to(precision.compute_dtype), weight=weight.to(precision.compute_dtype)
        )
        self.dots = rounded.hidden.double() @ rounded.weight.double().t()  # [B, S, V]
        self.dots.masked_fill_((self.inputs.mask == 0)[..., None], -torch.inf)
        self.largest, argmax = self.dots.max(dim=1)
        # A token this much below the maximum may be taken for it: two orders of float32 summation differ by as much.
        self.allowed = truth.band(self.inputs, precision)
        self.output = (self.largest + bias.double()).relu_().log1p_()
        self.gradients = truth.backward(self.output, argmax, self.inputs.grad, rounded)


def errors(exact: Exact, name: str, device: torch.device) -> Row:
    """The row of the head called ``name``.

    Its ``errors``: of the output and the gradients the relative distance ``‖x̂ - x‖ / ‖x‖``; ``wrong_tokens``, the share
    of active pairs of the first ``PROBED`` sequences and the vocabulary whose gradient goes to a token that does not
    attain the maximum, by more than the order of a float32 sum decides.
    """
    inputs, precision = exact.inputs, exact.precision
    with precision.settings():
        head = VARIANTS[name].make(True)
        with precision.forward(device):
            output = head(*inputs.leaves, inputs.mask)
        gradients = torch.autograd.grad(output, inputs.leaves, inputs.grad.to(output.dtype), retain_graph=True)
        wrong = active = 0
        for sequence in range(min(PROBED, len(output))):
            winners = _winners(output, sequence, inputs)
            pairs = (output[sequence] > 0) & (exact.output[sequence] > 0)
            attained = exact.dots[sequence].gather(0, winners[None])[0]
            misses = attained < exact.largest[sequence] - exact.allowed[sequence]
            wrong, active = wrong + int((misses & pairs).sum()), active + int(pairs.sum())
    found = {"output": truth.relative_distance(output.detach(), exact.output), "wrong_tokens": wrong / max(active, 1)}
    for one, mine, theirs in zip(GRADIENTS, gradients, exact.gradients, strict=True):
        found[one] = truth.relative_distance(mine, theirs)
    return {"status": "measured", "errors": found}


def _winners(output: Tensor, sequence: int, inputs: Inputs) -> Tensor:
    """``[V]`` the token of a sequence to which the gradient of each vocabulary entry goes."""
    grad = torch.zeros_like(output)
    grad[sequence] = 1
    (rows,) = torch.autograd.grad(output, inputs.weight, grad, retain_graph=True)
    tokens = inputs.hidden.detach()[sequence].float()
    cosines = rows.float() @ torch.nn.functional.normalize(tokens, dim=1).t()
    return cosines.masked_fill_(inputs.mask[sequence] == 0, -torch.inf).argmax(dim=1)
