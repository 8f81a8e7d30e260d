"""The measuring core on tiny shapes: lengths, distributions, floors, checks that bite, clocks."""

from __future__ import annotations

import os
import statistics
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import measure, sanitize
from bench.harness import memory, roofline, rows, steps, timing, truth
from bench.harness.roofline import Machine, Work
from bench.harness.rows import Job, Row
from bench.inputs import cases, distributions, variants
from bench.inputs.cases import PRECISIONS, Case
from bench.jobs import operators as jobs
from tests.bench.synthetic import changed

CPU = torch.device("cpu")
TINY = Case("tiny", 4, 24, hidden_size=16, vocab_size=300, lengths="ragged")
FLOAT32, BFLOAT16 = PRECISIONS["float32"], PRECISIONS["bf16"]


def named(made: list[Job]) -> dict[str, Job]:
    return {job.row.variant: job for job in made}


@pytest.mark.parametrize("name", list(cases.CASES))
def test_lengths_are_drawn_within_the_case_and_repeat(name):
    case = cases.CASES[name]
    lengths = case.draw_lengths()
    assert torch.equal(lengths, case.draw_lengths())
    assert lengths.shape == (case.batch_size,)
    assert lengths.min() >= 1
    assert lengths.max() <= case.length


def test_gooaq_lengths_have_the_means_they_stand_in_for():
    for name, mean in (("gooaq-question", 14), ("gooaq-answer", 60)):
        lengths = cases.LENGTHS[name](20000, 256, torch.Generator().manual_seed(0)).float()
        assert abs(lengths.mean().item() - mean) < 1


def test_a_cpu_gets_the_batch_halved_then_the_length_and_says_so():
    scaled = cases.for_device(cases.CASES["splade-v3"], CPU)
    assert (scaled.batch_size, scaled.length, scaled.scaled_from) == (2, 256, "B320 S512 D768 V30522")
    assert 2 * 256 * 768 * 30522 <= cases.CPU_MULTIPLY_ADDS < 2 * 512 * 768 * 30522
    assert cases.for_device(cases.CASES["query"], CPU) is cases.CASES["query"]
    assert cases.for_device(cases.CASES["splade-v3"], torch.device("cuda")) is cases.CASES["splade-v3"]


@pytest.mark.parametrize(("generate", "active", "tolerance", "hottest"), [
    (distributions.uniform, 1, 0, 0.03),
    (distributions.hot, 1, 0, 0.46),
    (distributions.trained, 0.05, 1e-6, None),
    (partial(distributions.at_share, 0.05), 0.05, 0.01, None),
    (partial(distributions.at_share, 1.0), 1, 0, 0.03),
])  # fmt: skip
def test_distributions_have_the_shares_they_name(generate, active, tolerance, hottest):
    output, argmax, grad = distributions.draw(generate, Case("d", 3, 100, vocab_size=4000), BFLOAT16, CPU)
    assert (output.dtype, argmax.dtype, grad.dtype) == (torch.bfloat16, torch.int16, torch.bfloat16)
    assert (output > 0).float().mean().item() == pytest.approx(active, abs=tolerance)
    assert 0 <= int(argmax.min()) <= int(argmax.max()) < 100
    assert (argmax[output == 0] == 0).all()
    if hottest:
        counts = torch.stack([torch.bincount(row.long(), minlength=100) for row in argmax])
        assert (counts.amax(1) / 4000 - hottest).abs().max() < 0.03


def test_zipf_wins_in_proportion_to_one_over_the_rank():
    _, argmax, _ = distributions.draw(distributions.zipf, Case("z", 8, 100, vocab_size=20000), FLOAT32, CPU)
    counts = torch.bincount(argmax.flatten().long(), minlength=100).float()
    # The integral of 1/x from k to k + 1.
    expected = torch.log((torch.arange(100) + 2.0) / (torch.arange(100) + 1.0))
    assert (counts / counts.sum() - expected / expected.sum()).abs().max() < 0.005


def test_floors_by_hand():
    case = Case("f", 2, 8, hidden_size=4, vocab_size=10)
    # 2·16·4·10 operations; h 16·4, W 10·4, c 10 read and y 20 written, 2 bytes each.
    assert roofline.forward(case, BFLOAT16, 16) == Work(1280, (64 + 40 + 10 + 20) * 2)
    # Two gathers of 4 for each of 7 active entries; y, dy and a of 20 entries; h of 16 tokens, dh, W, dW, dc.
    assert roofline.backward(case, BFLOAT16, 7, 16) == Work(4 * 7 * 4, 20 * 6 + (16 + 16 + 20) * 4 * 2 + 20)
    machine = Machine(bytes_per_second=100, operations_per_second=1000)
    assert machine.seconds(Work(2000, 100)) == 2
    assert machine.seconds(Work(1000, 300)) == 3


def test_every_variant_is_checked_timed_and_repeats(unweighed):
    measured = rows.run(jobs.head(TINY, FLOAT32, "forward_backward", CPU, ["stock", "tiled", "ours"]), CPU, 0.01)
    by_name = {row.variant: row for row in measured}
    assert by_name["tiled"].status == "not here: for GPUs only"
    for name in ("stock", "ours"):
        row = by_name[name]
        assert (row.status, row.repeatable, row.clock) == ("measured", True, "perf_counter")
        assert row.rounds == len(row.samples) >= 9
        assert row.median == statistics.median(row.samples)
        assert set(row.errors) == {"output", "grad_bias", "grad_hidden_sum", "grad_hidden_dot", "grad_weight_dot"}
        assert max(row.errors.values()) < 1e-5
    assert by_name["ours"].real_tokens == int(TINY.draw_lengths().sum())


LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is in Linux's /proc")


@LINUX
def test_memory_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(memory, "PRELOAD", [])
    case = Case("memory", 8, 64, hidden_size=16, vocab_size=20000)
    # The step at hand is not called, and what this process holds does not count.
    extra = steps.weigher(case, FLOAT32, "unscreened", True, CPU)(lambda: pytest.fail("not this step"))
    assert 0 < extra < 8 * 64 * 20000 * 4, "less than the logits"


@LINUX
def test_extra_memory_of_stock_is_in_logits_whatever_was_freed_before(monkeypatch):
    case = Case("memory", 8, 64, hidden_size=16, vocab_size=500)
    make, pins = steps.make_inputs, []

    def leaving_freed_memory(*arguments: object) -> cases.Inputs:
        inputs = make(*arguments)
        # Too small to be mapped alone; the last one keeps the heap from shrinking by itself.
        blocks = [bytearray(100_000) for _ in range(400)]
        pins.append(blocks.pop())
        return inputs

    monkeypatch.setattr(steps, "make_inputs", leaving_freed_memory)
    extra = steps.host_extra_bytes(case, "float32", "stock", True)
    assert 0.5 < extra / (8 * 64 * 500 * 4) < 8


def test_extra_memory_is_never_negative(monkeypatch):
    monkeypatch.setattr(memory, "reset_peak", lambda cuda=False: 100)
    monkeypatch.setattr(memory, "peak", lambda cuda=False: 90)
    assert memory.host_extra_bytes(lambda: 5) == 0


def test_floors_are_timed_beside_the_forward():
    made = named(jobs.head(TINY, FLOAT32, "forward", CPU, ["ours"]))
    assert list(made) == ["ours", *variants.MATMULS]
    assert made["matmul-real"].row.real_tokens < made["matmul-padded"].row.real_tokens == 4 * 24
    (logits,) = made["matmul-real"].steps()[0]()
    assert logits.shape == (int(TINY.draw_lengths().sum()), 300)


@pytest.mark.parametrize("wrong", range(4))
def test_a_wrong_result_is_red_and_not_timed(wrong, unweighed):
    """The output, then each gradient, is off by a rotation of its rows: of the right size, at the wrong place."""
    (job,) = jobs.head(TINY, FLOAT32, "forward_backward", CPU, ["ours"])
    row = changed(job, lambda *found: [one.roll(1, 0) if i == wrong else one for i, one in enumerate(found)])
    assert row.status.startswith("red: beyond 0.001")
    assert row.median is None


def test_a_gradient_that_went_to_another_token_is_red():
    (job,) = jobs.head(TINY, FLOAT32, "forward_backward", CPU, ["ours"])
    (step,) = job.steps()
    output, hidden, *others = step()
    errors = job.check((output, hidden.roll(1, dims=1), *others))
    assert errors["grad_hidden_sum"] < 1e-5, "the sum over tokens does not see it"
    assert errors["grad_hidden_dot"] > 0.1


def test_a_status_says_what_is_wrong_and_the_others_are_measured():
    def fail(error: Exception) -> None:
        raise error

    counter = iter(range(10))
    steps = {
        "out of memory": lambda: fail(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
        "failed: ValueError: no such kernel": lambda: fail(ValueError("no such kernel")),
        "red: two runs differ": lambda: (torch.tensor(next(counter)),),
        "red: beyond 1.0: {'output': nan}": lambda: (torch.tensor(torch.nan),),
        "measured": lambda: (torch.tensor(1),),
    }
    made = [
        Job(Row("c", "s", "bf16", "forward", name), lambda step=step: [step], lambda found: {"output": found[0].item()})
        for name, step in steps.items()
    ]
    for job in made:
        job.bound, job.strict = 1.0, True
    assert [row.status for row in rows.run(made, CPU, 0.01)] == [*steps]


@pytest.mark.parametrize("distribution", list(distributions.DISTRIBUTIONS))
def test_the_backward_alone_is_held_against_its_definition(distribution):
    made = named(jobs.backward(TINY, FLOAT32, distribution, CPU))
    found = made["ours"].steps()[0]()
    errors = made["ours"].check(found)
    assert max(errors.values()) < 1e-5
    assert made["ours"].check((found[0].roll(1, 1), *found[1:]))["grad_hidden"] > 0.1


def test_flops_are_held_against_float64():
    for job in jobs.flops((30, 50), FLOAT32, "forward_backward", CPU):
        assert (job.row.operations, job.row.bytes) == (30 * 50, 30 * 50 * 4)
        value, gradient = job.steps()[0]()
        assert max(job.check((value, gradient)).values()) < 1e-6
        assert job.check((value * 1.01, gradient))["value"] == pytest.approx(0.01, rel=1e-3)


def test_the_truth_is_that_of_autograd():
    inputs = cases.make_inputs(TINY, FLOAT32, CPU)
    exact = truth.compute(inputs, FLOAT32)
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    logits = leaves[0] @ leaves[1].t() + leaves[2]
    output = logits.masked_fill(inputs.mask[..., None] == 0, -torch.inf).amax(1).relu().log1p()
    gradients = torch.autograd.grad(output, leaves, inputs.grad.double())
    assert max(truth.differences(exact, output.detach(), gradients, inputs).values()) < 1e-12


def test_rounds_are_interleaved_and_bounded():
    order: list[str] = []
    slept: list[float] = []

    def sleep() -> None:
        begin = time.perf_counter()
        time.sleep(0.05)
        slept.append(time.perf_counter() - begin)

    samplers = {name: timing.Sampler([lambda name=name: order.append(name), sleep], CPU) for name in "ab"}
    timed = timing.interleave(samplers, seconds=0, rounds=(3, 20))
    assert order == ["a", "b"] * 3
    assert [len(result.samples) for result in timed.values()] == [3, 3]
    # Two steps a sample, one of which sleeps.
    assert timed["a"].median >= sorted(slept[::2])[1] / 2
    assert min(timed["a"].samples) == pytest.approx(min(slept[::2]) / 2, rel=0.5)
    # Enough for quartiles unless said otherwise.
    assert len(timing.interleave({"a": timing.Sampler([lambda: None], CPU)}, seconds=0)["a"].samples) == 9


def test_stolen_processor_time_counts_as_that_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_STAT", tmp_path / "stat")

    def at(stolen: int) -> None:
        timing._STAT.write_text(f"cpu  100 20 30 9000 500 1 2 {stolen} 7 7\ncpu0 1 1 1 1 1 1 1 1 1 1\n")

    at(0)
    assert timing._processor_seconds() == 150 / os.sysconf("SC_CLK_TCK")

    # Two processors' worth of stolen time while the step ran.
    def step() -> None:
        begin = time.perf_counter()
        time.sleep(0.2)
        at(round(2 * (time.perf_counter() - begin) * os.sysconf("SC_CLK_TCK")))

    timed = timing.interleave({"a": timing.Sampler([step], CPU)}, seconds=0, rounds=(1, 1))
    assert timed["a"].others == pytest.approx(2, rel=0.3)


def test_the_command_writes_a_result_file(measured):
    result = measured("head", {"tiny": TINY}, "--variant=ours")
    assert (result["kind"], result["left_out"]) == ("head", [])
    (run,) = result["provenance"]
    options = "--device=cpu --precision=float32 --seconds=0 --variant=ours"
    assert run["command"] == f"python -m bench.measure head {options}"
    assert run["machine"]["float32"] == {"bytes_per_second": 1e10, "operations_per_second": 1e11}
    assert run["environment"]["packages"]["torch"] == torch.__version__
    assert {(row["job"], row["variant"], row["provenance"]) for row in result["rows"]} == {
        ("forward", "ours", 0),
        ("forward", "matmul-padded", 0),
        ("forward", "matmul-real", 0),
        ("forward_backward", "ours", 0),
    }


def test_a_job_begun_too_late_is_left_out(measured, monkeypatch):
    answers = iter([True, True, False])
    monkeypatch.setattr(measure, "measure", lambda *_: [])
    monkeypatch.setattr(measure.Budget, "has_time", lambda budget: next(answers))
    (left,) = measured("head", {"tiny": TINY}, "--budget=10")["left_out"]
    assert left == {"case": "tiny", "precision": "float32", "job": "forward_backward", "reason": "no time"}


def test_what_the_sanitizer_runs_computes():
    assert sanitize.exercise(CPU, torch.float32) == 18
