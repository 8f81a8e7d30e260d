"""The training benchmark on tiny models: its check, its measurements, its arithmetic and its tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import limits, training
from bench.harness.result_file import by_device, load
from bench.inputs import encoders
from bench.jobs import training as training_run
from bench.jobs.training import Job
from bench.tables.training import limits_table, predictions, training_table
from tests.bench.synthetic import cells

VOCAB_SIZE, MAX_LENGTH = 300, 24
TINY = ["--layers", "1", "--hidden-size", "64", "--vocab-size", str(VOCAB_SIZE), "--batch-size", "4", "--max-length"]
TINY += [str(MAX_LENGTH), "--timed-steps", "2"]


@pytest.fixture(autouse=True)
def one_thread_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models this small only wait for a second thread."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def jobs() -> dict[str, Job]:
    """A job for each architecture, on a CPU."""
    made = {}
    for name, size in encoders.SIZES.items():
        folder = encoders.build(replace(size, layers=1, hidden_size=64, vocab_size=VOCAB_SIZE), MAX_LENGTH)
        made[name] = Job(
            folder, "fused", 4, MAX_LENGTH, "full", "fp32", "cpu",
            active_terms=20, warm_up_steps=1, timed_steps=3, profiled_steps=0,
        )  # fmt: skip
    return made


@pytest.mark.parametrize("architecture", encoders.SIZES)
def test_a_measured_run_says_what_was_run(jobs: dict[str, Job], architecture: str) -> None:
    row = training_run.measure(jobs[architecture])
    assert row["attention"] == "sdpa"
    assert row["optimizer"].startswith("adamw")
    assert row["real_tokens_per_step"] == row["padded_tokens_per_step"] == 2 * 4 * MAX_LENGTH
    assert len(row["wall_ms_of_every_step"]) == 3
    assert min(row["wall_ms_of_every_step"]) > 0
    assert row["wall_ms_per_step"] == pytest.approx(sorted(row["wall_ms_of_every_step"])[1], abs=1e-3)
    assert row["gpu_ms_per_step"] is None
    assert 0 < row["cpu_ms_per_step"]
    assert row["peak_memory_mib"] > 100
    # The mean over texts of the 20th largest dot is the threshold: about 20 words of each pass it.
    assert 10 < row["active_terms_before"]["answer"] < 40


def test_without_active_terms_nearly_every_word_is_active(jobs: dict[str, Job]) -> None:
    model = encoders.load(jobs["distilbert"].folder, MAX_LENGTH, "cpu", None)
    texts = encoders.pairs(8, "full", MAX_LENGTH, VOCAB_SIZE)["answer"]
    assert encoders.mean_active_terms(model, texts) > 0.95 * VOCAB_SIZE


def test_texts_have_the_lengths_and_ids_they_should(jobs: dict[str, Job]) -> None:
    vocab_size = 30522
    pairs = encoders.pairs(2000, "gooaq", 256, vocab_size)
    for name, (mean, deviation) in encoders.GOOAQ_LENGTHS.items():
        lengths = torch.tensor([len(text.split()) + 2.0 for text in pairs[name]])
        assert lengths.mean().item() == pytest.approx(mean, rel=0.05)
        assert lengths.std().item() == pytest.approx(deviation, rel=0.1)
        assert lengths.max() <= 256
    ids = torch.tensor([int(word[1:]) for text in pairs["answer"] for word in text.split()])
    assert ids.unique().numel() > 0.95 * vocab_size
    tokenizer = encoders.load(jobs["distilbert"].folder, MAX_LENGTH, "cpu", None).tokenizer
    (encoded,) = tokenizer(["w5 w299 w17"])["input_ids"]
    assert encoded == [tokenizer.cls_token_id, 5, 299, 17, tokenizer.sep_token_id]
    assert tokenizer.unk_token_id not in encoded


def test_a_run_writes_a_file_and_a_table_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_run", lambda work, job: work(job))
    path = tmp_path / "result.json"
    result = training.main(["--output", str(path), "--model", "distilbert", *TINY, "--case", "full-checkpointing"])
    assert json.loads(path.read_text()) == result
    assert result["kind"] == "training"
    (run,) = result["provenance"]
    assert run["environment"]["packages"]["torch"] == torch.__version__
    check = run["checks"]["distilbert"]["fp32"]
    assert len(check["stock_losses"]) == training.CHECK_STEPS
    assert check["largest_relative_difference"] <= check["tolerance"] == 1e-4
    columns = ("head", "lengths", "active_terms", "gradient_checkpointing")
    assert [tuple(row[name] for name in columns) for row in result["rows"]] == [
        ("stock", "full", None, True),
        ("fused", "full", None, True),
    ]
    assert result["left_out"] == []
    (shown,) = map(training_table, by_device(result, path.name))
    assert shown.count("distilbert, 1 layers, 64 wide, V 300") == 1
    assert "RTX 3090" not in shown
    # The first case is the seed's.
    asked = [tuple(map(case.get, ("lengths", "active_terms"))) for case in training.CASES.values()]
    assert asked == [("gooaq", training.SPARSE_TERMS), ("full", None), ("gooaq", None), ("full", None)]


def test_heads_that_disagree_are_not_timed(jobs: dict[str, Job], monkeypatch: pytest.MonkeyPatch) -> None:
    original = training_run.load

    def shifted(job: Job) -> object:
        model = original(job)
        if job.head == "fused":
            with torch.no_grad():
                model.transformers_model.get_output_embeddings().bias += 0.02
        return model

    monkeypatch.setattr(training_run, "load", shifted)
    monkeypatch.setattr(training, "_run", lambda work, job: work(job))
    with pytest.raises(SystemExit, match="disagree"):
        training.check(jobs["distilbert"])


def test_without_time_everything_is_named_as_left_out() -> None:
    result = training.main(["--model", "distilbert", *TINY, "--budget", "0"])
    assert result["rows"] == []
    assert result["left_out"] == [{"model": "distilbert", "reason": "no time"}]


def test_running_out_of_memory_is_a_result(jobs: dict[str, Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(training_run, "train", full)
    row = training_run.measure(jobs["distilbert"])
    assert row["out_of_memory"] is True
    assert "wall_ms_per_step" not in row


def event(microseconds: float, device: str = "CUDA", annotation: bool = False) -> SimpleNamespace:
    """What :func:`bench.jobs.training.kernel_milliseconds` reads of the profiler's events."""
    elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
    kind = SimpleNamespace(name=device)
    return SimpleNamespace(time_range=elapsed, device_type=kind, is_user_annotation=annotation)


def test_device_time_is_that_of_kernels_alone() -> None:
    events = [event(1000), event(500), event(9000, "CPU"), event(1500, annotation=True)]
    assert training_run.kernel_milliseconds(events, wall_milliseconds=2.0) == 1.5
    with pytest.raises(RuntimeError, match="got 1.5 ms from 2 events"):
        training_run.kernel_milliseconds(events, wall_milliseconds=1.0)
    with pytest.raises(RuntimeError, match="got 0.0 ms from 0 events"):
        training_run.kernel_milliseconds(events[2:], wall_milliseconds=2.0)


def test_the_profiler_gives_events_of_the_shape_that_is_read() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3).sum()
    event = profiler.events()[0]
    assert (event.device_type.name, event.is_user_annotation) == ("CPU", False)
    assert event.time_range.elapsed_us() >= 0


def seed_rows(**changes: object) -> list[dict[str, object]]:
    row = {
        **vars(encoders.SIZES["distilbert"]), "model": "distilbert", "lengths": "gooaq", "precision": "bf16",
        "gradient_checkpointing": False, "pairs_per_batch": 32, "max_length": 256, "device": "cuda",
        "out_of_memory": False, "active_terms": None, "gpu_ms_per_step": 50.0, "peak_memory_mib": 1.0,
        "run": {"environment": {"device": "GPU X"}},
    } | changes  # fmt: skip
    return [row | {"head": "stock", "wall_ms_per_step": 120.0}, row | {"head": "fused", "wall_ms_per_step": 60.0}]


def test_predicted_hours_are_steps_times_the_wall_clock() -> None:
    text = training_table({"rows": seed_rows()})
    assert "Predicted for GPU X, not run: 94,110 steps" in text
    assert "with every term active take 3.14 h stock and 1.57 h fused (2.00x)" in text


def test_steps_that_wait_for_the_host_predict_nothing() -> None:
    (text,) = predictions(seed_rows(gpu_ms_per_step=6.0))
    assert "not predicted for GPU X: the GPU computes for 5%, 10% of a step (stock, fused)" in text


@pytest.mark.parametrize(
    "change", [{"layers": 2}, {"device": "cpu"}, {"pairs_per_batch": 4}, {"lengths": "full"}, {"out_of_memory": True}]
)
def test_other_steps_predict_nothing(change: dict[str, object]) -> None:
    assert [*predictions(seed_rows(**change))] == []


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 9, 100, 421])
def test_the_largest_batch_is_found_to_within_the_resolution(limit: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    exact = limits.largest(fits, 8, 0.0, lambda: True)
    assert (exact.fits, exact.fails, exact.complete(0.0)) == (limit, limit + 1, True)
    assert len(tried) == len(set(tried)) <= 17
    rough = limits.largest(fits, 8, 0.05, lambda: True)
    assert rough.fits <= limit < rough.fails
    assert rough.fails - rough.fits <= max(1, 0.05 * rough.fits)


def test_a_search_that_ends_early_says_so() -> None:
    found = limits.largest(lambda size: True, 8, 0.03, iter([True, True, False]).__next__)
    assert (found.fits, found.fails, found.complete(0.03)) == (16, None, False)


def test_limits_need_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        limits.main([])


def test_the_table_of_limits() -> None:
    row = {
        "model": "xlm-roberta", "layers": 12, "vocab_size": 250002, "max_length": 256, "gradient_checkpointing": True,
        "attention": "sdpa", "optimizer": "adamw_torch_fused",
    }  # fmt: skip
    limit = {"total_gib": 24.0, "allowance_gib": 1.0, "precision": "bf16", "resolution": 0.03}
    rows = [row | {"head": "stock", "largest_pairs": 16}, row | {"head": "fused", "largest_pairs": 400}]
    text = limits_table({"rows": rows, "runs": [{"limit": limit, "environment": {"device": "GPU X"}}]})
    (line,) = cells(text, "xlm-roberta, 12 layers, V 250002")
    assert line[1:] == ["256", "on", "sdpa, adamw_torch_fused", "16", "400", "25.00x"]
    assert "24.0 GiB less 1.0 GiB" in text


def test_a_search_on_a_gpu_trains_until_memory_runs_out(jobs: dict[str, Job], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(model: object, dataset: object, job: Job, steps: int) -> object:
        trained.append((job.batch_size, len(dataset), job.gradient_checkpointing))
        if job.batch_size > 5:
            raise torch.cuda.OutOfMemoryError("full")
        return SimpleNamespace(args=SimpleNamespace(optim="adamw"))

    monkeypatch.setattr(limits, "train", train)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 20)
    found = limits.search(replace(jobs["distilbert"], batch_size=2, gradient_checkpointing=True), 0.0, lambda: True)
    assert trained == [(size, 2 * size, True) for size in (2, 4, 8, 6, 5)]
    assert (found["largest_pairs"], found["smallest_pairs_that_failed"]) == (5, 6)
    assert found["complete"] is True
    assert (found["attention"], found["optimizer"], found["peak_memory_mib_at_largest"]) == ("sdpa", "adamw", 3.0)


def test_limits_are_written_for_both_heads_of_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(job: Job, resolution: float, may_go_on: object) -> dict[str, object]:
        return {"attention": "sdpa", "optimizer": "adamw", "largest_pairs": 60 if job.head == "fused" else 20}

    monkeypatch.setattr(limits, "hold_memory", lambda: 0.3)
    monkeypatch.setattr(limits, "search", search)
    monkeypatch.setattr(encoders, "build", lambda size, max_length: "")
    path = tmp_path / "limits.json"
    result = limits.main(["--output", str(path), "--max-length", "64", "256"])
    assert json.loads(path.read_text()) == result
    assert len(result["rows"]) == 2 * 2 * 2 * 2
    (shown,) = by_device(result, path.name)
    assert [line[-3:] for name in encoders.SIZES for line in cells(limits_table(shown), name)] == [
        ["20", "60", "3.00x"]
    ] * 8


def test_the_checked_in_result_is_a_cpus_and_forecasts_nothing() -> None:
    (result,) = load([Path(__file__).parents[2] / "bench/results/training-cpu.json"])
    assert {row["device"] for row in result["rows"]} == {"cpu"}
    assert [*predictions(result["rows"])] == result["left_out"] == []
    assert len(training_table(result).splitlines()) == 2 + len(result["rows"]) // 2
    (run,) = result["runs"]
    assert run["command"].startswith("python -m bench.training")
    for check in run["checks"].values():
        assert check["fp32"]["largest_relative_difference"] <= training.TOLERANCE["fp32"]
