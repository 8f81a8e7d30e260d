"""The rest of splade_pool's contract: empty input, what is differentiated, errors, choice of backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy
import pytest
import torch
from torch.autograd import forward_ad

import splade_kernels as sk
from splade_kernels import ops
from splade_kernels.backends.selection import _why_not_triton, select
from tests import oracle
from tests.oracle import make_case


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("shape", [(0, 4, 8, 9), (2, 0, 8, 9), (2, 4, 0, 9), (2, 4, 8, 0), (0, 0, 8, 9)], ids=str)
def test_empty_dimensions(shape, pooling, backend, widest):
    case = make_case(shape, widest, pattern="full")
    expected, _ = oracle.reference_in_double(case, pooling_strategy=pooling)
    output = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, pooling_strategy=pooling, backend=backend)
    assert oracle.close(output.detach(), expected)
    for gradient, parameter in zip(
        torch.autograd.grad(output.sum(), case.parameters()), case.parameters(), strict=True
    ):
        assert gradient.shape == parameter.shape
        assert gradient.isfinite().all()
    if shape[1] == 0:
        assert (output == 0).all()


def test_packed_without_sequences_and_with_only_empty_ones(backend):
    weight, bias = torch.randn(9, 4, requires_grad=True), torch.ones(9)
    tokens = torch.empty(0, 4, requires_grad=True)
    none = sk.splade_pool(tokens, weight, bias, cu_seqlens=torch.tensor([0]), backend=backend)
    assert none.shape == (0, 9)
    two = sk.splade_pool(tokens, weight, bias, cu_seqlens=torch.tensor([0, 0, 0]), backend=backend)
    assert two.tolist() == [[0.0] * 9] * 2
    assert torch.autograd.grad(two.sum(), weight)[0].abs().sum() == 0


def test_an_empty_sequence_has_zeros_and_no_gradient(backend):
    hidden, weight, bias = torch.ones(2, 3, 4, requires_grad=True), torch.ones(5, 4), torch.ones(5, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    output = sk.splade_pool(hidden, weight, bias, mask, backend=backend)
    grad_hidden, grad_bias = torch.autograd.grad(output.sum(), (hidden, bias))
    assert (output[1] == 0).all()
    assert (grad_hidden[1] == 0).all()
    assert torch.allclose(grad_bias, torch.full((5,), 1 / 6))  # one sequence at x = 4 + 1: 1 / (1 + x)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("required", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
def test_gradients_only_for_what_requires_them(required, pooling, backend, widest, monkeypatch):
    case = make_case((3, 12, 8, 20), widest)
    _, expected = oracle.reference_in_double(case, pooling_strategy=pooling)
    asked: list[tuple[bool, ...]] = []
    real = ops.pool_backward

    def spy(*args: object) -> object:
        asked.append(tuple(map(bool, args[-3:])))  # type: ignore[arg-type]
        return real(*args)

    monkeypatch.setattr(ops, "pool_backward", spy)
    for tensor, need in zip(case.parameters(), required, strict=True):
        tensor.requires_grad_(bool(need))
    output = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, pooling_strategy=pooling, backend=backend)
    output.backward(case.grad)
    assert asked == [tuple(map(bool, required))]
    for tensor, exact, need in zip(case.parameters(), expected, required, strict=True):
        assert (tensor.grad is not None) == bool(need)
        if need:
            assert oracle.close(tensor.grad, exact)


def test_nothing_is_saved_where_nothing_is_differentiated(backend, monkeypatch):
    asked: list[object] = []
    real = ops.pool_forward

    def spy(*args: object) -> object:
        asked.append(args[-1])
        return real(*args)

    monkeypatch.setattr(ops, "pool_forward", spy)
    case = make_case((3, 12, 8, 20))
    with torch.no_grad():
        assert not sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, backend=backend).requires_grad
    with torch.inference_mode():
        sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, backend=backend)
    sk.splade_pool(case.hidden.detach(), case.weight.detach(), backend=backend)
    assert asked == [False, False, False]


def test_inference_gives_the_bits_of_training(backend):
    case = make_case((9, 40, 16, 300))
    trained = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, backend=backend)
    with torch.no_grad():
        inferred = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, backend=backend)
    assert torch.equal(trained, inferred)


def test_a_weight_used_twice_and_as_embedding_accumulates(backend, widest):
    weight = torch.randn(12, 6, dtype=widest, requires_grad=True)
    ids = torch.tensor([[1, 2, 3], [4, 5, 1]])

    def loss(pool: object) -> torch.Tensor:
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        return pool(hidden, weight).square().sum() + pool(hidden.flip(1) * 2, weight).sum()  # type: ignore[operator]

    ours = torch.autograd.grad(loss(lambda h, w: sk.splade_pool(h, w, backend=backend)), weight)[0]
    theirs = torch.autograd.grad(loss(sk.reference.splade_pool), weight)[0]
    assert oracle.close(ours, theirs.double())


def test_a_second_derivative_raises(backend):
    case = make_case((2, 5, 4, 6))
    output = sk.splade_pool(case.hidden, case.weight, case.bias, case.mask, backend=backend)
    gradient = torch.autograd.grad(output.sum(), case.hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="splade_pool: second derivatives are not implemented"):
        (gradient.square().sum() + case.hidden.sum()).backward()


def test_the_output_aliases_nothing(backend):
    case = make_case((2, 5, 4, 6), pattern="full")
    before = case.hidden.detach().clone(), case.weight.detach().clone()
    with torch.no_grad():
        output = sk.splade_pool(case.hidden, case.weight, case.bias, backend=backend)
        output.fill_(-1)
    assert torch.equal(case.hidden, before[0])
    assert torch.equal(case.weight, before[1])


HIDDEN, WEIGHT, BIAS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)
PACKED = torch.zeros(6, 4)


def cu(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "hidden_states: expected a tensor, got list", {"hidden_states": [[1.0]]}),
        (TypeError, "hidden_states: expected one of .*got torch.int64", {"hidden_states": HIDDEN.long()}),
        (TypeError, "hidden_states: expected a dense", {"hidden_states": HIDDEN.to_sparse()}),
        (ValueError, r"hidden_states: expected \[B, S, D\].*got \[6, 4\]", {"hidden_states": PACKED}),
        (ValueError, r"hidden_states: expected \[B, S, D\].*got \[1, 2, 3, 4\]", {"hidden_states": HIDDEN[None]}),
        (ValueError, r"weight: expected shape \[V, D\], got \[20\]", {"weight": WEIGHT.flatten()}),
        (ValueError, r"weight: expected \[V, 4\] to match.*got \[4, 5\]", {"weight": WEIGHT.t()}),
        (
            TypeError,
            "weight: expected torch.float32 to match hidden_states, got torch.float16",
            {"weight": WEIGHT.half()},
        ),
        (ValueError, "weight: expected on cpu like hidden_states, got meta", {"weight": WEIGHT.to("meta")}),
        (ValueError, r"bias: expected shape \[5\], got \[4\]", {"bias": torch.zeros(4)}),
        (TypeError, "bias: expected torch.float32 to match", {"bias": BIAS.double()}),
        (TypeError, "attention_mask: expected bool or integer.*additive", {"attention_mask": torch.zeros(2, 3)}),
        (TypeError, "attention_mask: expected a tensor, got list", {"attention_mask": [[1, 1, 1], [1, 1, 1]]}),
        (
            ValueError,
            r"attention_mask: expected shape \[2, 3\].*got \[2, 4\]",
            {"attention_mask": torch.ones(2, 4).bool()},
        ),
        *(
            (
                ValueError,
                rf"attention_mask: expected shape \[2, 3\].*got \[{batch}, 3\]",
                {"attention_mask": torch.ones(batch, 3).bool()},
            )
            for batch in (1, 3)
        ),
        (ValueError, "attention_mask: expected on cpu", {"attention_mask": torch.ones(2, 3, device="meta").bool()}),
        (
            ValueError,
            "attention_mask: expected None with cu_seqlens",
            {"hidden_states": PACKED, "cu_seqlens": cu(0, 6), "attention_mask": torch.ones(1, 6).bool()},
        ),
        (ValueError, "max_seqlen: expected None without cu_seqlens", {"max_seqlen": 3}),
        (
            TypeError,
            "cu_seqlens: expected one of .*got torch.float32",
            {"hidden_states": PACKED, "cu_seqlens": cu(0, 6).float()},
        ),
        (
            ValueError,
            r"cu_seqlens: expected shape \[B \+ 1\], got \[0\]",
            {"hidden_states": PACKED, "cu_seqlens": cu()},
        ),
        (
            ValueError,
            r"cu_seqlens: expected shape \[B \+ 1\], got \[1, 2\]",
            {"hidden_states": PACKED, "cu_seqlens": cu(0, 6)[None]},
        ),
        (ValueError, r"hidden_states: expected packed.*got \[2, 3, 4\]", {"cu_seqlens": cu(0, 6)}),
        (ValueError, "cu_seqlens: expected to start at 0, got 1", {"hidden_states": PACKED, "cu_seqlens": cu(1, 6)}),
        (
            ValueError,
            "cu_seqlens: expected to end at the number of tokens T=6, got 5",
            {"hidden_states": PACKED, "cu_seqlens": cu(0, 5)},
        ),
        (
            ValueError,
            "cu_seqlens: expected non-decreasing values, got 4 followed by 3 at index 2",
            {"hidden_states": PACKED, "cu_seqlens": cu(0, 4, 3, 6)},
        ),
        (
            ValueError,
            r"max_seqlen: expected at least the longest sequence \(4\), got 3",
            {"hidden_states": PACKED, "cu_seqlens": cu(0, 4, 6), "max_seqlen": 3},
        ),
        (
            TypeError,
            "max_seqlen: expected an int known to the host, got Tensor",
            {"hidden_states": PACKED, "cu_seqlens": cu(0, 6), "max_seqlen": torch.tensor(6)},
        ),
        (
            ValueError,
            "max_seqlen: expected at least 0, got -1",
            {"hidden_states": PACKED, "cu_seqlens": cu(0, 6), "max_seqlen": -1},
        ),
        (ValueError, "pooling_strategy: expected one of 'max', 'sum', got 'mean'", {"pooling_strategy": "mean"}),
        (
            ValueError,
            "activation_function: expected one of 'relu', .*'log1p_relu'.*, got 'gelu'",
            {"activation_function": "gelu"},
        ),
        (ValueError, "backend: expected one of 'auto', 'torch', 'triton', got 'cuda'", {"backend": "cuda"}),
        (ValueError, "screening: .*pooling_strategy='sum'", {"screening": True, "pooling_strategy": "sum"}),
        (ValueError, "screening: expected 'auto', True or False, got 'yes'", {"screening": "yes"}),
        (ValueError, "screening: expected 'auto', True or False, got array", {"screening": numpy.ones(2)}),
        (ValueError, "pooling_strategy: expected one of .*got array", {"pooling_strategy": numpy.ones(2)}),
        (
            TypeError,
            "hidden_states: expected a dense .*nested",
            {"hidden_states": torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)])},
        ),
    ],
)
def test_bad_input_is_named(error, message, arguments):
    valid = {"hidden_states": HIDDEN, "weight": WEIGHT, "bias": BIAS}
    with pytest.raises(error, match=message):
        sk.splade_pool(**(valid | arguments))


@pytest.mark.parametrize("bound", [numpy.int64(4), 2**70], ids=["NumPy's", "huge"])
def test_bounds_of_any_kind_and_size(bound, backend):
    case = make_case((2, 4, 4, 6), pattern="full")
    rows, cu_seqlens = case.packed()
    bounded = sk.splade_pool(rows, case.weight, cu_seqlens=cu_seqlens, max_seqlen=bound, backend=backend)
    assert torch.equal(bounded, sk.splade_pool(rows, case.weight, cu_seqlens=cu_seqlens, backend=backend))


def test_forward_mode_raises_whatever_requires_a_gradient():
    """It would be lost in the operator, silently where nothing does."""
    for weight in (torch.ones(6, 4), torch.ones(6, 4, requires_grad=True)):
        for options in ({}, {"screening": True}, {"pooling_strategy": "sum"}):
            for transform in (torch.func.jacfwd, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
                with pytest.raises(RuntimeError, match="splade_pool: forward-mode derivatives are not implemented"):
                    transform(lambda x: sk.splade_pool(x, weight, **options))(torch.ones(2, 3, 4))  # noqa: B023
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(weight.detach(), torch.ones(6, 4))
                with pytest.raises(RuntimeError, match="splade_pool: forward-mode"):
                    sk.splade_pool(torch.ones(2, 3, 4), dual, **options)
                sk.splade_pool(torch.ones(2, 3, 4), weight, **options)  # which has no tangent


def test_screening_can_be_off(backend):
    case = make_case((2, 5, 4, 6))
    on, off = (sk.splade_pool(case.hidden, case.weight, screening=s, backend=backend) for s in ("auto", False))
    assert torch.equal(on, off)


def test_backends_are_named_with_reasons():
    names = sk.available_backends()
    assert set(names) == {"torch", "triton", "csrc", "screening"}
    assert names["torch"] == "available"
    assert names["csrc"] == "available" or "was not built" in names["csrc"]
    assert names["triton"] == "available" or "no CUDA device" in names["triton"] or "not installed" in names["triton"]
    assert re.match(r"(avx|neon)\w+: the fastest |torch\._int_mm, which|off unless screening=True", names["screening"])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=inherited | environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def test_auto_is_torch_for_cpu_tensors_in_a_fresh_process():
    code = (
        "import torch, splade_kernels as sk; print(tuple(sk.splade_pool(torch.ones(1, 4, 8), torch.ones(16, 8)).shape))"
    )
    assert run_python(code).stdout.strip() == "(1, 16)"


def test_a_named_backend_that_cannot_run_raises_and_says_why():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: its kernels do not compute in float64"):
        if sk.available_backends()["triton"] == "available":
            sk.splade_pool(HIDDEN.double(), WEIGHT.double(), backend="triton")
        else:
            select("triton", HIDDEN.device, torch.float64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there, so Triton can run")
def test_without_a_gpu_triton_says_so_and_the_environment_variable_overrides_auto_only():
    code = """
import os, torch, splade_kernels as sk
h, w = torch.ones(1, 2, 3), torch.ones(4, 3)
for arguments, variable in (({"backend": "triton"}, ""), ({}, "triton"), ({}, "cuda")):
    os.environ["SPLADE_KERNELS_BACKEND"] = variable
    try:
        sk.splade_pool(h, w, **arguments)
    except Exception as error:
        print(type(error).__name__, error)
os.environ["SPLADE_KERNELS_BACKEND"] = "triton"
print(tuple(sk.splade_pool(h, w, backend="torch").shape))
"""
    lines = run_python(code).stdout.splitlines()
    cannot = "RuntimeError backend 'triton' cannot run: no CUDA device is available"
    assert lines[0].startswith(cannot)
    assert lines[1].startswith(cannot)
    assert lines[2] == "ValueError SPLADE_KERNELS_BACKEND: expected one of 'auto', 'torch', 'triton', got 'cuda'"
    assert lines[3] == "(1, 4)"


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [
        ("6.4", (9, 4), "its kernels are written for NVIDIA's GPUs, and this PyTorch is built for AMD's"),
        (None, (7, 5), "its kernels need compute capability 8.0, this GPU has 7.5"),
        (None, (8, 6), None),
    ],
)
def test_auto_takes_gpus_that_triton_kernels_are_not_for_to_torch(hip, capability, reason, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    device = torch.device("cuda", 0)
    assert _why_not_triton(device, torch.float32) == reason
    name = select("auto", device, torch.float32).__name__
    assert name == f"splade_kernels.backends.{'triton' if reason is None else 'tiled'}"


def test_import_is_silent_and_light():
    heavy = "sentence_transformers", "transformers", "datasets", "triton", "matplotlib"
    code = (
        "import os, sys; before = dict(os.environ); import splade_kernels; assert dict(os.environ) == before; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = run_python(code, PYTHONWARNINGS="error")
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
