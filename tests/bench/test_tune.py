"""The tuner's candidates through the compiler, without a GPU. Nothing compiles in Triton's interpreter."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing compiles in a process with TRITON_INTERPRET=1"
)
pytest.importorskip("triton")

from bench import tune  # noqa: E402
from bench.jobs import candidates as tune_candidates  # noqa: E402
from splade_kernels.backends.triton.tuning import ARCHITECTURES, KINDS, MatmulConfig, Shape, default_config  # noqa: E402


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_candidates_are_distinct_and_begin_with_what_is_shipped(arch):
    for kind in KINDS:
        question = Shape(kind, arch, "bfloat16", 768, 30522)
        found = tune_candidates.candidates(question)
        assert found[0] == tune_candidates.shipped(question)
        assert len(set(found)) == len(found) > 15
    question = Shape("maximum", arch, "bfloat16", 768, 30522)
    descriptors = {config.tma for config in tune_candidates.candidates(question)}
    assert descriptors == ({False, True} if arch in (90, 100) else {False})


def test_a_dry_run_compiles_and_says_what_it_would_measure(capsys):
    options = "--dry-run --arch 86 --dtype bfloat16 --limit 1 --kind maximum backward-hidden".split()
    result = tune.main(options)
    kinds = {row["kind"]: row for row in result["rows"]}
    assert set(kinds) == {"maximum", "backward-hidden"}
    for row in kinds.values():
        assert row["dropped"] == []
        assert all(0 < need["registers"] <= 255 and need["spilled"] == 0 for need in row["compiled"])
    assert kinds["maximum"]["config"] == vars(default_config(86, "bfloat16"))
    printed = capsys.readouterr().out
    assert printed.count("would measure maximum") == len(tune.SIZES)
    assert "V 250002" in printed


@pytest.mark.parametrize(("config", "reasons"), [
    (MatmulConfig(128, 256, 32, 4, 6), ["spills", "shared memory"]),
    (MatmulConfig(96, 128, 32, 8, 3), ["does not compile"]),
], ids=str)  # fmt: skip
def test_a_candidate_that_spills_exceeds_shared_memory_or_does_not_compile_is_dropped(config, reasons):
    rows, problems = tune_candidates.examine(Shape("maximum", 86, "bfloat16", 768, 30522), config)
    assert all(any(reason in problem for problem in problems) for reason in reasons)
    assert (rows == []) == (reasons == ["does not compile"])


def test_without_a_gpu_it_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "--dry-run with --arch" in capsys.readouterr().err
