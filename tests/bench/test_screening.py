"""The screening benchmark on tiny shapes: its inputs' shares and margins, its checks, its model on text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import splade_kernels as sk
from bench import measure, report, screening_model
from bench.harness import environment, rows, steps, truth
from bench.harness.result_file import by_device
from bench.inputs import cases, text_model, variants
from bench.inputs.cases import PRECISIONS, SCREENING, Case
from bench.jobs import encode, screening
from splade_kernels.backends.tiled import screening as screening_backend
from tests.bench.synthetic import changed

CPU = torch.device("cpu")
FLOAT32 = PRECISIONS["float32"]
TINY = Case("tiny", 4, 24, hidden_size=16, vocab_size=300, lengths="ragged", active_share=0.02)


def logits(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """``[tokens, V]`` of the real tokens and ``[B, V]`` their maxima, in float64."""
    inputs = cases.make_inputs(case, FLOAT32, CPU)
    hidden, weight, bias = (leaf.detach().double() for leaf in inputs.leaves)
    parts = [rows[real != 0] @ weight.t() + bias for rows, real in zip(hidden, inputs.mask, strict=True)]
    return torch.cat(parts), torch.stack([part.amax(0) for part in parts])


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 1.0])
def test_the_share_of_active_pairs_is_the_one_asked_for(share):
    _, largest = logits(replace(TINY, active_share=share))
    # To the pair: the shift lies in the middle between two logits.
    assert int((largest > 0).sum()) == max(1, round(share * largest.numel()))


def test_the_margins_of_the_normal_case_are_those_of_its_description():
    case = replace(cases.for_device(SCREENING["sparse-normal"], CPU), vocab_size=3000)
    tokens, largest = logits(case)
    assert (case.batch_size, case.length, case.hidden_size) == (16, 128, 768)
    assert (largest > 0).double().mean().item() == pytest.approx(0.015, abs=1e-5)
    assert (tokens > 0).double().mean().item() == pytest.approx(0.00018, rel=0.1)
    assert (tokens.mean().item(), tokens.std().item()) == (pytest.approx(-3.6, abs=0.05), pytest.approx(1, abs=0.02))
    assert (largest.mean().item(), largest.std().item()) == (
        pytest.approx(-1.17, abs=0.02),
        pytest.approx(0.47, abs=0.01),
    )
    assert (largest.abs() < 0.1).double().mean().item() == pytest.approx(0.011, abs=0.002)
    padding = 1 - len(tokens) / (case.batch_size * case.length)
    assert padding == pytest.approx(1 / 3, abs=0.01)


def test_a_cpu_gets_the_shape_the_cases_name_and_every_case_is_planned():
    planned = dict(measure.plan("screening", measure.default_cases("screening", CPU), CPU))
    assert list(planned) == [*SCREENING, "encode-squad"]
    for name, case in planned.items():
        if name != "encode-squad":
            assert (case.batch_size, case.length, case.vocab_size) == (16, 128, 30522)
    assert planned["dense"].scaled_from == "B32 S256 D768 V30522"
    assert cases.for_device(SCREENING["dense"], torch.device("cuda")) is SCREENING["dense"]
    assert not set(SCREENING) & set(measure.default_cases("head", torch.device("cuda")))


@pytest.mark.parametrize("job", ["forward", "forward_backward"])
def test_screened_auto_and_unscreened_are_checked_and_timed(job, unweighed):
    measured = rows.run(screening.head(TINY, FLOAT32, job, CPU, variants.SCREENING), CPU, 0.01)
    by_name = {row.variant: row for row in measured}
    inference = ["screened-first", "matmul-real"] if job == "forward" else []
    assert list(by_name) == ["stock", "unscreened", "ours", "screened", *inference]
    for name, row in by_name.items():
        assert (row.status, row.active_share) == ("measured", pytest.approx(0.02, abs=1e-3))
        assert row.rounds >= 9
        if name in variants.OURS:
            assert row.repeatable
            assert row.errors["bands_from_truth"] < 1
            assert ("grad_weight_dot" in row.errors) == (job == "forward_backward")
    assert by_name["unscreened"].errors["bands_from_unscreened"] == 0


def test_the_weight_of_a_screened_step_is_measured_in_a_process_of_its_own():
    for name in variants.MODES:
        assert steps.weigher(TINY, FLOAT32, name, False, CPU) is not steps.unweighed
    assert steps.weigher(replace(TINY, name="share-5"), FLOAT32, "ours", False, CPU) is steps.unweighed


def test_one_lost_pair_is_red_however_small(unweighed):
    """The smallest active entry goes: the norm of the difference is far within the bound for norms."""
    case = replace(TINY, active_share=0.5)
    (job, _) = screening.head(case, FLOAT32, "forward", CPU, ["screened"])

    def lossy(output: torch.Tensor) -> tuple[torch.Tensor]:
        smallest = output.masked_fill(output == 0, torch.inf).amin()
        return (output.masked_fill(output == smallest, 0),)

    row = changed(job, lossy)
    assert row.errors["output"] < truth.BOUNDS["float32"]
    assert row.errors["bands_from_unscreened"] > 1
    assert row.status.startswith("red: beyond {'bands_from_unscreened': 1.0, 'bands_from_truth': 1.0}")


def test_a_wrong_gradient_of_screened_training_is_red(unweighed):
    (job,) = screening.head(TINY, FLOAT32, "forward_backward", CPU, ["screened"])
    output, hidden, weight, bias = job.steps()[0]()
    for wrong in ((hidden.roll(1, 0), weight, bias), (hidden, weight.roll(1, 0), bias), (hidden, weight, -bias)):
        assert max(job.check((output, *wrong)).values()) > 0.1
    assert max(job.check((output, hidden, weight, bias)).values()) < 1


@pytest.mark.parametrize(
    ("job", "name", "counted"),
    [("forward", "screened", 1), ("forward", "screened-first", 3), ("forward_backward", "screened", 0)],
)
def test_training_and_first_calls_quantise_the_weight_in_every_step(job, name, counted, unweighed, monkeypatch):
    plain = screening_backend.PLAIN
    made = screening.head(TINY, FLOAT32, job, CPU, [name])[0]
    (step,) = made.steps()
    prepare, maximise = (Mock(wraps=function) for function in (plain.prepare, plain.maximise))
    monkeypatch.setattr(screening_backend, "PLAIN", replace(plain, prepare=prepare, maximise=maximise))
    monkeypatch.setattr(screening_backend, "compiled_kernels", lambda: None)
    for _ in range(3):
        step()
    # Without a quantised weight at hand the kernels quantise it.
    given = [len(call.args) > 5 for call in maximise.call_args_list]
    assert (prepare.call_count, given) == (counted, [job == "forward"] * 3)


def test_points_of_the_curve_over_the_share_are_inference_alone():
    for name, case in SCREENING.items():
        found = measure.groups("screening", case, FLOAT32, CPU, variants.SCREENING)
        assert list(found) == ["forward", "forward_backward"][: 1 if name.startswith("share-") else 2]


def test_the_band_by_hand():
    inputs = cases.make_inputs(Case("b", 1, 3, hidden_size=4, vocab_size=2), FLOAT32, CPU)
    hidden = torch.tensor([[[3.0, 0, 0, 0], [0, 4.0, 0, 3.0], [100.0, 0, 0, 0]]])
    weight = torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 0.5]])
    inputs = replace(inputs, hidden=hidden, weight=weight, mask=torch.tensor([[1, 1, 0]]))
    allowed = truth.band(inputs, FLOAT32)
    # 4 · 2^-24 · √4 · 5 · 2 and a quarter of that: padding is no token.
    assert allowed.tolist() == [[80 * 2**-24, 20 * 2**-24]]
    found, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 30 * 2**-24]])
    assert truth.in_bands(found, other, allowed, FLOAT32) == pytest.approx(1.5, rel=1e-5)
    # An output of 1 is rounded by 2^-23 at most, twice.
    near = torch.tensor([[1 + 42 * 2**-23, 0.0]])
    assert truth.in_bands(near, other * torch.tensor([1, 0]), allowed, FLOAT32) == pytest.approx(1, rel=1e-5)
    nothing = torch.zeros(1, 2)
    assert truth.in_bands(nothing, nothing, 0 * allowed, FLOAT32) == 0
    assert truth.in_bands(nothing, nothing + 1e-30, 0 * allowed, FLOAT32) > 1
    coarse = truth.band(inputs, PRECISIONS["tf32"])
    assert coarse[0, 0].item() == pytest.approx((8 * 2**-24 + 2**-9) * 10)
    assert not truth.in_bands(found * torch.nan, other, allowed, FLOAT32) <= 1


def test_survivors_are_the_dots_that_the_backend_computes():
    """As many as ``maximise`` counts: everything where all bounds reach, none where relu cuts all."""
    inputs = cases.make_inputs(TINY, FLOAT32, CPU)
    (hidden, weight, bias), mask = (leaf.detach() for leaf in inputs.leaves), inputs.mask
    pairs = int(mask.sum()) * 300
    assert screening.survivors(hidden, weight, bias - 1000, mask) == (0, pairs)
    assert screening.survivors(hidden * 0 + 1, weight, None, mask)[1] == pairs
    computed, _ = screening.survivors(hidden, weight, bias, mask)
    active = (sk.splade_pool(hidden, weight, bias, mask) > 0).sum()
    assert active <= computed < pairs
    assert screening.head(TINY, FLOAT32, "forward", CPU, ["screened"])[0].row.survivors == computed / pairs


def test_the_flags_of_the_cpu_are_in_the_environment():
    flags = environment.describe()["cpu_flags"]
    assert flags == sorted(flags)
    if Path("/proc/cpuinfo").exists():
        # What this CPU has, and not what PyTorch is limited to.
        assert ("avx2" in flags) == torch.cpu._is_avx2_supported()
        assert ("avx512f" in flags) == torch.cpu._is_avx512_supported()
    assert not [flag for flag in flags if not flag.startswith(("avx", "amx", "fma"))]


def test_without_a_trained_model_its_cases_say_so(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(text_model, "FOLDER", tmp_path / "none")
    planned = {"trained-squad": SCREENING["trained-squad"], "tiny": TINY, "encode-squad": encode.SQUAD}
    result = measured("screening", planned)
    reason = "no trained model here: python -m bench.screening_model --data DIR makes it"
    names = ("trained-squad", "encode-squad")
    assert result["left_out"] == [{"case": name, "precision": "float32", "reason": reason} for name in names]
    inference, training = [*variants.SCREENING, "matmul-real"], ["stock", *variants.MODES]
    assert [row["variant"] for row in result["rows"]] == [*inference, *training]


WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model trained for two steps on words drawn at random."""
    for module in ("sentence_transformers", "datasets", "accelerate"):
        pytest.importorskip(module)
    from examples.demo.vocabulary import SPECIAL_TOKENS

    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("model")
    (data / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]) + "\n")
    (data / "squad/qrels").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    count = 40
    corpus = [{"_id": f"p{i}", "text": text(8 + i % 5)} for i in range(count)]
    queries = [{"_id": f"q{i}", "text": text(3)} for i in range(count)]
    for name, entries in (("corpus", corpus), ("queries", queries)):
        (data / f"squad/{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for split, ids in (("train", range(32)), ("test", range(32, count))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\tp{i}\t1" for i in ids)]
        (data / f"squad/qrels/{split}.tsv").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        record = screening_model.build(data, folder, steps=2, hidden_size=16)
        assert record["steps"] == 2
        assert 0 <= record["ndcg@10"] <= 1
        assert 0 < record["passage_active_share"] < 1
        patch.setattr(text_model, "FOLDER", folder)
        yield folder


def test_inputs_from_text_are_what_the_decoder_gets(trained):
    case = Case("text", 3, 8, hidden_size=16, vocab_size=65, lengths="ragged", from_text=True)
    assert text_model.why_absent(case) is None
    inputs = cases.make_inputs(case, FLOAT32, CPU)
    assert (inputs.hidden.shape, inputs.weight.shape, inputs.bias.shape) == ((3, 8, 16), (65, 16), (65,))
    assert inputs.mask.sum(1).tolist() == case.draw_lengths().tolist()
    model = text_model.load()
    tokens = iter(model.tokenizer(text_model.passages(), truncation=True, max_length=case.length)["input_ids"])
    for sequence, length in enumerate(case.draw_lengths().tolist()):
        # Of the next passage that is long enough, the first words; the separator ends the text.
        ids = next(ids for ids in tokens if len(ids) >= length)[:length]
        ids[-1] = model.tokenizer.sep_token_id
        with torch.no_grad():
            expected = model.transformers_model(input_ids=torch.tensor([ids])).logits[0]
        found = inputs.hidden[sequence, :length] @ inputs.weight.t() + inputs.bias
        assert (found.detach() - expected).abs().max() < 1e-5


def test_what_is_known_of_the_model_is_in_the_results_and_documents(trained, measured):
    record = text_model.training_record()
    assert (record["steps"], record["seed"]) == (2, 0)
    text = Case("text", 3, 8, hidden_size=16, vocab_size=65, lengths="ragged", from_text=True)
    told = f"2 steps, seed 0; over unseen passages nDCG@10 {record['ndcg@10']:.3f}"
    for subject, expected in ((text, record), (TINY, None)):
        content = measured("screening", {"one": subject}, "--variant=ours")
        assert content["provenance"][0].get("trained_model") == expected
        assert (told in report.render(by_device(content, "s.json"))) == (expected is not None)


def test_too_few_passages_are_an_error(trained):
    with pytest.raises(ValueError, match="expected 40 passages of up to 8 tokens, got 8"):
        text_model.decoder_inputs(torch.full((40,), 8), 8, 65)


def test_encode_runs_every_mode_on_the_same_texts(trained, monkeypatch):
    asked = []

    def recording(*arguments: object, **options: object) -> torch.Tensor:
        asked.append(options["screening"])
        return sk.reference.splade_pool(*arguments, **{k: v for k, v in options.items() if k != "screening"})

    jobs = encode.jobs(encode.Corpus("encode-squad", 6, 4), FLOAT32, CPU, [*variants.SCREENING, "compile"])
    assert [job.row.variant for job in jobs] == ["stock", *variants.MODES]
    measured = rows.run(jobs, CPU, 0)
    assert [row.status for row in measured] == ["measured"] * 4
    assert {row.texts for row in measured} == {6}
    assert 0 < measured[0].active_share < 1
    monkeypatch.setattr("splade_kernels.integrations._hand_off.splade_pool", recording)
    for name, value in (("unscreened", False), ("ours", "auto"), ("screened", True)):
        (step,) = next(job for job in jobs if job.row.variant == name).steps()
        asked.clear()  # what fuse probes
        step()
        # Two batches.
        assert asked == [value] * 2


def test_a_pair_that_encode_loses_is_red_however_small(trained):
    """Of the values beyond what summation orders explain, the smallest goes."""
    (job,) = encode.jobs(encode.Corpus("encode-squad", 6, 4), FLOAT32, CPU, ["screened"])

    def lossy(indices: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert job.check((indices, values))["bands_from_unscreened"] < 1
        kept = values != values[values > 1e-4].min()
        return indices[:, kept], values[kept]

    row = changed(job, lossy)
    assert row.status.startswith("red: beyond {'bands_from_unscreened': 1.0}")
