"""The compiled operators against PyTorch's own operations: the same bytes, for any strides and number of threads."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests import opcheck

import splade_kernels as sk
from splade_kernels import ops
from splade_kernels.backends import compaction, compiled

CUDA = compiled.why_not() is None and torch.cuda.is_available()
needs_compiled = pytest.mark.skipif(not compiled.serves(torch.device("cpu")), reason=f"csrc: {compiled.why_not()}")
devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="no CUDA device, or no CUDA build"))],
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def fallback(monkeypatch):
    """Calls a function of the module with the compiled operators out of sight."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "serves", lambda device: False)
            return function(*arguments)

    return call


def bucket_case(lengths, vocab_size, active=0.5, hot=0.0, dtype=torch.int16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    shape = (len(lengths), vocab_size)
    # One before the sequence and two behind it as well, which wrong edges on a device can bring.
    argmax = torch.rand(shape, generator=generator).mul(edges.diff()[:, None] + 3).floor().sub(1)
    argmax = torch.where(torch.rand(shape, generator=generator) < hot, 0, argmax).to(dtype)
    grad = torch.randn(shape, generator=generator)
    grad[torch.rand(shape, generator=generator) >= active] = 0
    grad[:, ::7] *= -1  # -0.0
    grad[:, 3::50] = math.nan
    return argmax, grad, edges, int(edges[-1])


CASES = {
    "random": lambda: bucket_case([5, 9, 1, 30], 701),
    "empty sequences": lambda: bucket_case([0, 4, 0, 0, 3, 0], 129),
    "nothing active": lambda: (
        bucket_case([4, 3], 100)[0],
        torch.zeros(2, 100),
        *bucket_case([4, 3], 9)[2:],
    ),
    "all active": lambda: bucket_case([17, 40], 5000, active=1),
    "one hot token": lambda: bucket_case([64, 500], 9000, active=1, hot=0.5),
    "sparse": lambda: bucket_case([300, 128], 30522, active=0.01),
    "int32, S > 32767": lambda: bucket_case([40000, 33000], 3000, dtype=torch.int32),
    "no sequence": lambda: (torch.zeros(0, 7, dtype=torch.int16), torch.zeros(0, 7), torch.zeros(1).long(), 0),
    "no vocabulary": lambda: (torch.zeros(2, 0, dtype=torch.int16), torch.zeros(2, 0), torch.arange(3), 2),
    "no row": lambda: (torch.zeros(2, 5, dtype=torch.int16), torch.ones(2, 5), torch.zeros(3).long(), 0),
}


def definition(argmax: Tensor, grad: Tensor, edges: Tensor, rows: int) -> dict[int, list[tuple[int, float]]]:
    """Each row with its (vocabulary entry, value) pairs, by a loop."""
    found: dict[int, list[tuple[int, float]]] = {}
    starts = (edges - edges[0]).tolist()
    for b, (positions, values) in enumerate(zip(argmax.tolist(), grad.tolist(), strict=True)):
        for word, (position, value) in enumerate(zip(positions, values, strict=True)):
            row = starts[b] + position
            if value != 0 and 0 <= position and row < starts[b + 1] and row < rows:
                found.setdefault(row, []).append((word, value))
    return dict(sorted(found.items()))


def entries_of(result: tuple[Tensor, Tensor, Tensor]) -> dict[int, list[tuple[int, float]]]:
    bounds, words, values = (tensor.cpu() for tensor in result)
    return {
        row: list(zip(words[begin:end].tolist(), values[begin:end].tolist(), strict=True))
        for row, (begin, end) in enumerate(bounds.tolist())
        if end > begin
    }


def assert_same_buckets(ours: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """Bounds, and every specified vocabulary entry and value, bit for bit."""
    ours, expected = (tuple(tensor.cpu() for tensor in result) for result in (ours, expected))
    assert torch.equal(ours[0], expected[0])
    specified = torch.zeros(len(ours[1]) + 1, dtype=torch.int32)
    ones = torch.ones(len(ours[0]), dtype=torch.int32)
    specified.index_add_(0, ours[0][:, 0], ones).index_add_(0, ours[0][:, 1], -ones)
    specified = specified.cumsum(0)[:-1] > 0
    assert torch.equal(ours[1][specified], expected[1][specified])
    assert torch.equal(ours[2].view(torch.int32)[specified], expected[2].view(torch.int32)[specified])


@pytest.mark.parametrize("name", CASES)
def test_the_fallback_is_the_definition(fallback, name):
    case = CASES[name]()
    bounds, words, values = result = fallback(compaction.bucket_by_token, *case)
    assert (bounds.dtype, words.dtype, values.dtype) == (torch.int64, torch.int32, torch.float32)
    assert bounds.shape == (case[3], 2)
    assert len(words) == len(values) == case[1].numel()
    assert str(entries_of(result)) == str(definition(*case))
    packed = torch.tensor(sorted(bounds[bounds[:, 0] < bounds[:, 1]].tolist())).view(-1, 2)
    same_sequence = packed[1:, 0] // max(case[1].shape[1], 1) == packed[:-1, 0] // max(case[1].shape[1], 1)
    assert torch.equal(packed[1:, 0][same_sequence], packed[:-1, 1][same_sequence])


@needs_compiled
@devices
@pytest.mark.parametrize("name", CASES)
def test_bucket_by_token(fallback, device, name):
    *tensors, rows = CASES[name]()
    tensors = [tensor.to(device) for tensor in tensors]
    expected = fallback(compaction.bucket_by_token, *tensors, rows)
    assert_same_buckets(compaction.bucket_by_token(*tensors, rows), expected)
    tensors[2] = tensors[2].to(torch.int32)
    assert_same_buckets(compaction.bucket_by_token(*tensors, rows), expected)


@needs_compiled
@devices
def test_bucket_by_token_of_any_strides(fallback, device):
    argmax, grad, edges, rows = CASES["random"]()
    expected = fallback(compaction.bucket_by_token, argmax, grad, edges, rows)
    wide = torch.zeros(4, 2 * 701 + 1)[:, 1::2].copy_(grad)
    for strided in (grad.t().contiguous().t(), wide):
        arguments = (
            argmax.t().contiguous().t().to(device),
            strided.to(device),
            edges.repeat_interleave(2)[::2].to(device),
        )
        assert_same_buckets(compaction.bucket_by_token(*arguments, rows), expected)
    constant = torch.ones(1, 1).expand(4, 701).to(device)
    expected = fallback(compaction.bucket_by_token, argmax.to(device), constant, edges.to(device), rows)
    assert_same_buckets(compaction.bucket_by_token(argmax.to(device), constant, edges.to(device), rows), expected)


@pytest.mark.parametrize("route", ["compiled", "fallback"])
def test_rows_count_from_the_first_edge_and_end_at_the_bound(fallback, route):
    if route == "compiled" and not compiled.serves(torch.device("cpu")):
        pytest.skip(f"csrc: {compiled.why_not()}")
    argmax, grad, edges, rows = CASES["random"]()
    call = (
        (lambda *a: compaction.bucket_by_token(*a))
        if route == "compiled"
        else (lambda *a: fallback(compaction.bucket_by_token, *a))
    )
    assert_same_buckets(call(argmax, grad, edges + 1000, rows), call(argmax, grad, edges, rows))
    cut = call(argmax, grad, edges, rows - 20)
    assert str(entries_of(cut)) == str(definition(argmax, grad, edges, rows - 20))
    longer = call(argmax, grad, edges, rows + 3)[0]
    assert torch.equal(longer[rows:], torch.zeros(3, 2, dtype=torch.int64))


@needs_compiled
@pytest.mark.parametrize(
    "edges", [[0, 4, 0, 4], [0, 9, 4, 6], [5, -(2**62), 2**62, 3], [-(2**63), 2**63 - 1, 0, 1], [0, 0, 0, 2**40]]
)
def test_wrong_edges_write_nothing_out_of_bounds(edges):
    argmax = torch.randint(-5, 100, (3, 64), dtype=torch.int32)
    bounds, words, _ = compaction.bucket_by_token(argmax, torch.ones(3, 64), torch.tensor(edges), 7)
    assert bounds.shape == (7, 2)
    assert bool(((bounds >= 0) & (bounds <= len(words))).all())


@needs_compiled
def test_one_thread_and_many_give_the_same_bytes():
    case = CASES["one hot token"]()
    embeddings = torch.randn(64, 3000).relu()

    def results():
        return *compaction.bucket_by_token(*case), *compaction.sparsify(embeddings, 100)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(4)
        many = results()
    finally:
        torch.set_num_threads(before)
    assert_same_buckets(many[:3], one[:3])
    assert all(torch.equal(a, b) for a, b in zip(many[3:], one[3:], strict=True))


def dense_case(dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(12, 433, generator=generator).mul(4).round().div(4)  # many ties
    embeddings[0] = 0
    embeddings[1] = 1
    embeddings[2] = -1
    embeddings[3, 10:40] = math.nan
    embeddings[3, 50:60] = -math.nan
    embeddings[4, :7] = math.inf
    embeddings[5] = embeddings[5].clamp(max=0)
    embeddings[6] = torch.randn(433, generator=generator)  # no ties
    embeddings[7:].clamp_(min=0)
    return embeddings.to(dtype)


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@needs_compiled
@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [None, 1, 7, 31, 200, 400, 432, 433, 9999])
def test_sparsify(fallback, device, dtype, count):
    embeddings = dense_case(dtype).to(device)
    for strided in (embeddings, embeddings.t().contiguous().t(), embeddings[:, ::2]):
        crow, col, values = compaction.sparsify(strided, count)
        expected = fallback(compaction.sparsify, strided, count)
        assert torch.equal(crow, expected[0])
        assert torch.equal(col, expected[1])
        assert torch.equal(as_bits(values), as_bits(expected[2]))


@needs_compiled
@devices
@pytest.mark.parametrize("count", [1, 5, 31, 200, 432, 433, 9999])
def test_mask_and_gather_with_room_to_spare_begin_like_sparsify(fallback, device, count):
    """The two steps that CUDA takes, which have a CPU implementation too."""
    embeddings = dense_case().to(device)
    counts, mask = torch.ops.splade_kernels_csrc.active_mask(embeddings, count)
    crow, col, values = fallback(compaction.sparsify, embeddings, count)
    assert torch.equal(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), crow)
    capacity = 12 * min(count, 433)
    ours = torch.ops.splade_kernels_csrc.gather_active(embeddings, crow, mask, capacity)
    assert len(ours[0]) == len(ours[1]) == capacity > len(col)
    assert torch.equal(ours[0][: len(col)], col)
    assert torch.equal(as_bits(ours[1][: len(col)]), as_bits(values))


@needs_compiled
def test_the_gather_stays_within_its_capacity():
    embeddings = torch.ones(3, 64)
    _, mask = torch.ops.splade_kernels_csrc.active_mask(embeddings, 64)
    for crow in ([0, 64, 128, 192], [-500, 64, 10**9, 0], [0, 0, 0, 0]):
        col, values = torch.ops.splade_kernels_csrc.gather_active(embeddings, torch.tensor(crow), mask, 70)
        assert len(col) == len(values) == 70


@needs_compiled
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("argmax: expected Short or Int, got Long", {0: lambda t: t.long()}),
        ("grad: expected float32", {1: lambda t: t.double()}),
        ("edges: expected Int or Long, got Float", {2: lambda t: t.float()}),
        (r"edges: expected shape \[n \+ 1\]", {2: lambda t: t[:-1]}),
        ("argmax, grad: expected equal shapes", {0: lambda t: t[:, :-1]}),
        ("rows: expected at least 0, got -1", {3: lambda rows: -1}),
    ],
)
def test_bad_arguments_of_the_operator_are_named(message, change):
    arguments = [change.get(i, lambda t: t)(argument) for i, argument in enumerate(CASES["random"]())]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.splade_kernels_csrc.bucket_by_token(*arguments)


@needs_compiled
def test_operators_are_registered_correctly():
    csrc = torch.ops.splade_kernels_csrc
    embeddings = dense_case().nan_to_num()
    counts, mask = csrc.active_mask(embeddings, 9)
    crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    opcheck(csrc.sparsify.default, (embeddings, 9))
    opcheck(csrc.active_mask.default, (embeddings, 9))
    opcheck(csrc.gather_active.default, (embeddings, crow, mask, int(crow[-1])))
    argmax = torch.zeros(2, 3, dtype=torch.int16)
    opcheck(csrc.bucket_by_token.default, (argmax, torch.ones(2, 3), torch.tensor([0, 2, 4]), 4))


@pytest.mark.parametrize("count", [None, 9])
def test_the_public_operator_is_registered_correctly_and_compiles(count):
    embeddings = dense_case().nan_to_num()
    opcheck(ops.sparsify, (embeddings, count))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled_sparsify = torch.compile(lambda x: ops.sparsify(x, count), fullgraph=True, backend="aot_eager")
        result = compiled_sparsify(embeddings)
    assert all(torch.equal(a, b) for a, b in zip(result, compaction.sparsify(embeddings, count), strict=True))


@needs_compiled
def test_gradients_are_the_same_with_and_without_but_for_rounding(fallback):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 8, generator=generator, requires_grad=True)
    weight = torch.randn(500, 8, generator=generator, requires_grad=True)
    mask = torch.arange(11) < torch.tensor([11, 4, 0])[:, None]
    output = sk.splade_pool(hidden, weight, attention_mask=mask, backend="torch")

    def gradients():
        return torch.autograd.grad(output.square().sum(), (hidden, weight), retain_graph=True)

    for ours, expected in zip(gradients(), fallback(gradients), strict=True):
        assert ours.abs().sum() > 0
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@needs_compiled
def test_a_library_of_another_version_is_left_out(monkeypatch):
    assert torch.ops.splade_kernels_csrc.schema_version() == compiled.SCHEMA_VERSION
    without = SimpleNamespace(screened_maximum=None, sparsify=None)
    other = SimpleNamespace(schema_version=lambda: compiled.SCHEMA_VERSION + 1)
    for library in (without, other):
        monkeypatch.setattr(torch.ops, "splade_kernels_csrc", library)
        assert compiled._load.__wrapped__("_csrc").startswith("_csrc.so is of another version; build it in a clone")
