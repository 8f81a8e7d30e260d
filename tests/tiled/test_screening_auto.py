"""Which calls are screened on a CPU, with which kernels, and what is kept from one to the next."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import splade_kernels as sk
from bench.jobs.screening import survivors
from splade_kernels.backends import compiled, weight_cache
from splade_kernels.backends.tiled import screening, screening_plain
from tests import cpus, oracle
from tests.cpus import forget_answers
from tests.oracle import Case, make_case, new_call
from tests.screening_cases import assert_within_band, hopeless_case, need_compiled, pool, sparse_case, tail


def test_auto_screens_where_few_dots_are_left_and_stands_aside_elsewhere():
    need_compiled()
    sparse, hopeless = sparse_case(), hopeless_case()
    for case, screens in ((sparse, True), (hopeless, False)):
        assert torch.equal(pool(case, "auto"), pool(case, screens))
        assert not torch.equal(pool(case, True), pool(case, False)), "the two cannot be told apart"
        computed, pairs = survivors(case.hidden, case.weight, case.bias, case.mask)
        assert (computed < 0.02 * pairs) if screens else (computed > 0.5 * pairs)


def test_auto_depends_on_the_inputs_alone():
    sparse, hopeless = sparse_case(), hopeless_case()
    before = [pool(case, "auto") for case in (sparse, hopeless)]
    with torch.no_grad():
        for _ in range(2):
            for case, output in zip((sparse, hopeless), before, strict=True):
                assert torch.equal(pool(case, "auto"), output)


def test_auto_decides_alike_in_training_and_inference():
    for case in (sparse_case(), hopeless_case(), sparse_case((2, 9, 96, 700))):
        trained = pool(case, "auto")
        with torch.no_grad():
            assert torch.equal(pool(case, "auto"), trained)
        with torch.inference_mode():
            weight = case.weight.clone()
            assert torch.equal(pool(Case(case.hidden, weight, *tail(case)), "auto"), trained)


def test_the_quantised_weight_is_kept_for_inference_and_follows_the_weight(kernels, monkeypatch):
    made = []

    def counting(kernels: screening.Kernels) -> screening.Kernels:
        return screening.Kernels(kernels.name, lambda w: made.append(1) or kernels.prepare(w), kernels.maximise)

    if kernels == "compiled":
        counted = counting(screening.compiled_kernels())
        monkeypatch.setattr(screening, "compiled_kernels", lambda: counted)
    monkeypatch.setattr(screening, "PLAIN", counting(screening.PLAIN))
    case = make_case((3, 20, 16, 60))
    weight_cache.forget(case.weight)
    with torch.no_grad():
        first = pool(case, True)
        assert torch.equal(pool(case, True), first)
        assert len(made) == 1
        case.weight.mul_(-1)
        assert torch.equal(pool(case, True), pool(Case(case.hidden, case.weight.clone(), *tail(case)), True))
        assert not torch.equal(pool(case, True), first)
        last = pool(case, True)
    kept = len(made)
    assert torch.equal(pool(case, True), last), "training, which does not keep it"
    assert len(made) == kept


@pytest.mark.parametrize("largest_wrong", [1, 64, 4096])
def test_kernels_that_are_wrong_are_not_used(largest_wrong):
    def wrong(rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor, target: screening.Target) -> int:
        evaluated = real.maximise(rows, offsets, weight, bias, target)
        target.largest[1] += 0.1 if weight.shape[1] <= largest_wrong else 0
        return evaluated

    real = screening.PLAIN
    assert screening._agrees(real)
    assert not screening._agrees(screening.Kernels("wrong", real.prepare, wrong))


def test_every_instruction_set_of_csrc_is_in_the_table():
    need_compiled()
    source = (Path(__file__).parents[2] / "csrc/cpu/instruction_sets.h").read_text()
    assert re.findall(r"&(\w+)::instruction_set,", source) == list(screening.INSTRUCTION_SETS)
    names = screening._names()
    assert names == [name for name in screening.INSTRUCTION_SETS if name in names]
    assert screening.compiled_kernels().name in names
    weight = torch.ones(3, 8)
    for name in ("avx1024", "avx512_vnni" if "avx512_vnni" not in names else ""):
        with pytest.raises(RuntimeError, match=f"instruction_set: expected one that this CPU has, got '{name}'"):
            torch.ops.splade_kernels_csrc.quantise_words(weight, name)


X86, ARM = ["avx512_vnni", "avx_vnni", "avx2"], ["neon_i8mm", "neon_dotprod"]


@pytest.mark.parametrize(
    ("there", "capability", "expected"),
    [
        (X86, "AVX512", "avx512_vnni"),
        (X86[1:], "AVX512", "avx_vnni"),
        (X86, "AVX2", "avx_vnni"),
        (X86[::2], "AVX2", "avx2"),
        (X86, "DEFAULT", None),
        (X86, "NO AVX", None),
        ([], "AVX512", None),
        # What PyTorch says on Arm, with and without SVE.
        (ARM, "DEFAULT", "neon_i8mm"),
        (ARM, "SVE256", "neon_i8mm"),
        (ARM[1:], "DEFAULT", "neon_dotprod"),
        ([], "DEFAULT", None),
    ],
)
def test_pytorchs_limit_holds_for_the_compiled_kernels(there, capability, expected, monkeypatch):
    need_compiled()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(screening, "_names", lambda: there)
    monkeypatch.setattr(screening, "_agrees", lambda kernels: True)
    kernels, reason = screening.chosen_kernels.__wrapped__()
    assert (kernels and kernels.name) == expected
    if expected is None:
        assert ("this CPU has none of" in reason) == (not there)
    forbidden = there[: there.index(expected)] if expected else there
    said = f"{', '.join(forbidden)} is there, but PyTorch's limit (ATEN_CPU_CAPABILITY) is {capability}"
    assert (said in reason) == bool(forbidden)


def test_what_screens_is_named_with_the_reason(monkeypatch):
    """As available_backends() says it."""

    def said() -> str:
        forget_answers()
        return sk.available_backends()["screening"]

    monkeypatch.setattr(screening_plain, "int_mm_is_fast", functools.cache(lambda: False))
    try:
        if compiled.serves(torch.device("cpu")):
            monkeypatch.setattr(screening, "_names", lambda: ["avx2"])
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
            monkeypatch.setattr(screening, "_agrees", lambda kernels: True)
            assert said() == "avx2: the fastest instruction set with compiled kernels that this CPU has"
            monkeypatch.setattr(screening, "_agrees", lambda kernels: False)
            with pytest.warns(UserWarning, match="fail their self-test"):
                assert said().endswith("slow here: the compiled kernels for avx2 fail their self-test on this CPU")
        cpus.simulate("plain", monkeypatch)
        assert re.match("off unless screening=True, which is slow here: _csrc.so was not built", said())
        monkeypatch.setattr(screening_plain, "int_mm_is_fast", functools.cache(lambda: True))
        assert re.match("torch._int_mm, which is fast on this CPU: _csrc.so was not built", said())
    finally:
        monkeypatch.undo()
        forget_answers()


def test_the_default_device_does_not_matter_to_what_screens():
    before = sk.available_backends()["screening"]
    forget_answers()
    with torch.device("meta"):
        assert sk.available_backends()["screening"] == before


def test_the_share_that_pays_is_that_of_the_kernels(monkeypatch):
    need_compiled()
    case, kernels = sparse_case(), screening.compiled_kernels()
    unscreened = pool(case, False)
    assert not torch.equal(pool(case, "auto"), unscreened)
    monkeypatch.setattr(screening, "compiled_kernels", lambda: replace(kernels, paying_share=0.0))
    assert torch.equal(pool(case, "auto"), unscreened)


def test_compiled_kernels_that_are_wrong_are_left_out_with_a_warning(monkeypatch):
    need_compiled()
    case = sparse_case()
    monkeypatch.setattr(screening, "_agrees", lambda kernels: False)
    forget_answers()
    try:
        with pytest.warns(UserWarning, match="fail their self-test and are not used"):
            output = pool(case, "auto")
        # Unscreened, or with VNNI screened by torch._int_mm.
        assert_within_band(output, case)
        assert screening.compiled_kernels() is None
    finally:
        forget_answers()


HELD_BACK = [{"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ATEN_CPU_CAPABILITY": "default"}, {"ATEN_CPU_CAPABILITY": "avx2"}]


@pytest.mark.parametrize("environment", HELD_BACK, ids=str)
def test_a_cpu_held_back_gives_the_same_results(environment, tmp_path):
    case = sparse_case((4, 80, 64, 300))
    program = """
import sys, torch, splade_kernels as sk
hidden, weight, bias, path = torch.load(sys.argv[1]) + [sys.argv[2]]
torch.save([sk.splade_pool(hidden, weight, bias, screening=s, backend="torch") for s in (True, "auto", False)], path)
"""
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    torch.save([tensor.detach() for tensor in case.parameters()], inputs)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, inputs, outputs], env=os.environ | environment, check=True
    )
    exact, _ = oracle.reference_in_double(case)
    for output in torch.load(outputs):
        assert (output.double() - exact).abs().max() <= 2e-6


def single_tokens(active: Tensor) -> Case:
    """Sequences of one token, whose dots are computed for exactly the vocabulary entries that ``active`` marks."""
    case = make_case((8, 1, 16, len(active)), pattern="full")
    with torch.no_grad():
        case.bias.copy_(torch.where(active, 1e4, -1e4))
    return case


@pytest.mark.parametrize(
    ("words", "screened"),
    [
        (slice(None, None, 8), False),
        (slice(None, None, 32), True),
        # In the probe's last run only, and behind the first vocabulary entries only.
        (slice(-512, None), False),
        (slice(512, None), False),
    ],
    ids=str,
)
def test_auto_asks_words_from_all_over_the_vocabulary(words, screened, kernels, monkeypatch):
    active = torch.zeros(4096, dtype=torch.bool)
    active[words] = True
    case = single_tokens(active)
    computed, pairs = survivors(case.hidden, case.weight, case.bias, case.mask)
    assert computed == int(active.sum()) * 8 < pairs == 4096 * 8
    call = new_call(batch_size=8, screening="auto")
    monkeypatch.setattr(screening_plain, "int_mm_is_fast", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).int())
    asked = screening.screen(call, case.weight.detach(), case.bias.detach())
    assert asked.pays(case.hidden.detach()[:, 0], torch.arange(9)) is screened


def test_a_weight_used_in_two_dtypes_is_kept_for_each(kernels):
    case = sparse_case()
    with torch.no_grad():
        weight_cache.forget(case.weight)
        expected = pool(case, True)
        weight_cache.forget(case.weight)
        with torch.autocast("cpu", torch.bfloat16):
            pool(case, True)
        assert torch.equal(pool(case, True), expected)
        assert len([key for key in weight_cache._entries if key[1] == case.weight.data_ptr()]) == 2


def test_training_sees_and_forgets_what_was_written_without_being_counted(kernels):
    case = sparse_case()
    with torch.no_grad():
        before = pool(case, True)
    case.weight.data[1] = 10 * case.hidden.detach()[0, 0]  # not in the sample
    expected = pool(Case(case.hidden, case.weight.detach().clone(), *tail(case)), True)
    assert not torch.equal(before, expected)
    assert torch.equal(pool(case, True), expected)
    with torch.no_grad():
        assert torch.equal(pool(case, True), expected)
        case.weight.data.neg_()
        assert torch.equal(pool(case, True), pool(Case(case.hidden, case.weight.clone(), *tail(case)), True))


def test_screening_in_float64_says_that_it_is_slow(monkeypatch):
    monkeypatch.setattr(screening, "compiled_kernels", lambda: None)
    monkeypatch.setattr(screening_plain, "int_mm_is_fast", lambda: False)
    screening._warn_slow.cache_clear()
    case = make_case((1, 3, 4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool(case, "auto")
    with pytest.warns(UserWarning, match="screening=True takes several times longer .*pip install --no-build"):
        pool(case, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool(case, True)
