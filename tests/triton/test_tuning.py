"""Which configuration a kernel gets: the table, the file that can replace it, GPUs that nobody has measured.

Architectures are given as numbers, so no GPU is asked. What the tuner does with times is tested on made-up ones.
"""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch

import splade_kernels as sk

pytest.importorskip("triton")
from bench import tune
from bench.jobs import candidates
from splade_kernels.backends.triton import launch, tuning
from tests.triton import tables

BF16 = (torch.bfloat16, "ieee")
CONFIG = {"block_v": 64, "block_t": 128, "block_k": 32, "num_warps": 4, "num_stages": 2}
SHAPE = {"kind": "maximum", "architecture": 86, "dtype": "bfloat16", "hidden_size": 768, "vocab_size": 30522}
ENTRY = SHAPE | {"config": CONFIG}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """What is read and said once a process, once a test; no table ships."""
    monkeypatch.delenv(tuning.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "none")
    once = (tuning._read_environment, tuning._warn_unknown, tuning.shipped_table)
    for cached in once:
        cached.cache_clear()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32
    for cached in once:
        cached.cache_clear()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """As if tables shipped for all architectures."""
    monkeypatch.setattr(tuning, "FOLDER", tables.write(tmp_path))


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    def write(content: object) -> None:
        path = tmp_path / "result.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(path))

    return write


def test_known_architectures_get_the_default_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arch in tuning.ARCHITECTURES:
            for dtype, precision in (BF16, (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
                name = "tf32" if precision == "tf32" else str(dtype).removeprefix("torch.")
                assert tuning.matmul_config(arch, 768, 30522, dtype, precision) == tuning.default_config(arch, name)
    assert tuning.matmul_config(90, 768, 30522, *BF16).tma
    assert not tuning.matmul_config(120, 768, 30522, *BF16).tma


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_every_kernel_takes_what_ships_for_it(arch, shipped):
    for shape, config in tables.table(arch).items():
        key = (arch, shape.hidden_size, shape.vocab_size, *BF16)
        if isinstance(config, tuning.MatmulConfig):
            assert tuning.matmul_config(*key, kind=shape.kind) == config
            default = tuning.default_config(arch, "float16", shape.kind)
            assert tuning.matmul_config(*key[:3], torch.float16, "ieee", shape.kind) == default != config
        else:
            choose = tuning.weight_config if shape.kind == "backward-weight" else tuning.hidden_config
            assert choose(*key) == config
            assert choose(*key[:3], torch.float16, "ieee") != config


def test_the_users_table_comes_before_what_ships(shipped, user_file):
    user_file({"table": [ENTRY]})
    assert tuning.matmul_config(86, 768, 30522, *BF16) == tuning.MatmulConfig(**CONFIG)
    assert tuning.hidden_config(86, 768, 30522, *BF16) == tuning.HiddenConfig(2, 4, 512, 2)


def test_in_the_interpreter_no_table_is_asked(shipped, user_file):
    user_file("no table")
    assert tuning.matmul_config(0, 768, 30522, *BF16) == tuning._INTERPRETED
    assert tuning.weight_config(0, 768, 30522, *BF16) == tuning.default_weight_config(768)


def test_an_unknown_architecture_gets_the_safe_configuration_and_one_message():
    with pytest.warns(UserWarning, match=r"sm_87 .*python -m bench\.tune") as caught:
        for _ in range(3):
            assert tuning.matmul_config(87, 768, 30522, *BF16) == tuning._SAFE
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="sm_103"):
        assert tuning.matmul_config(103, 768, 30522, *BF16) == tuning._SAFE


def test_the_nearest_tuned_shape_is_taken_and_kind_and_dtype_must_match(monkeypatch):
    small, wide = (tuning.MatmulConfig(**CONFIG | {"group_v": group}) for group in (3, 5))
    table = {
        tuning.Shape("maximum", 86, "bfloat16", 768, size): found for size, found in ((30522, small), (250002, wide))
    }
    monkeypatch.setattr(tuning, "shipped_table", lambda arch: table)
    assert tuning.matmul_config(86, 1024, 50368, *BF16) == small
    assert tuning.matmul_config(86, 768, 151936, *BF16) == wide
    assert tuning.matmul_config(86, 768, 30522, torch.float16, "ieee") == tuning.default_config(86, "float16")
    assert tuning.matmul_config(80, 768, 30522, *BF16) == tuning.default_config(80, "bfloat16")
    assert tuning.matmul_config(86, 768, 30522, *BF16, kind="int8") == tuning.default_config(86, "bfloat16", "int8")


def test_the_users_file_comes_first_and_is_read_once(user_file, monkeypatch):
    user_file({"table": [ENTRY]})
    wanted = tuning.MatmulConfig(**CONFIG)
    assert tuning.matmul_config(86, 768, 30522, *BF16) == wanted
    user_file("no longer a table")
    assert tuning.matmul_config(86, 768, 30522, *BF16) == wanted
    assert tuning.matmul_config(0, 768, 30522, *BF16) == tuning._INTERPRETED


def test_the_users_file_silences_the_message_for_its_architecture(user_file):
    user_file({"table": [ENTRY | {"architecture": 87}]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.matmul_config(87, 768, 30522, *BF16) == tuning.MatmulConfig(**CONFIG)


def test_a_file_for_another_gpu_is_an_error(user_file):
    user_file({"table": [ENTRY]})
    with pytest.raises(ValueError, match=r"SPLADE_KERNELS_CONFIG: expected .* sm_90, .* got those for \[86\]"):
        tuning.matmul_config(90, 768, 30522, *BF16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "86"}, "table[0].architecture: expected a positive integer, got '86'"),
        ({"dtype": "float32"}, "table[0].dtype: expected one of"),
        (
            {"kind": "max"},
            "table[0].kind: expected one of ('maximum', 'sum', 'int8', 'backward-weight', 'backward-hidden')",
        ),
        ({"kind": []}, "table[0].kind: expected one of"),
        ({"vocab_size": 0}, "table[0].vocab_size: expected a positive integer, got 0"),
        ({"hidden_size": True}, "table[0].hidden_size: expected a positive integer, got True"),
        ({"config": None}, "table[0].config: expected an object, got None"),
        (
            {"config": CONFIG | {"block_t": 512}},
            "config.block_t: expected at most 256, got 512",
        ),
        (
            {"config": CONFIG | {"block_t": 96}},
            "config.block_t: expected a power of two of at least 16, got 96",
        ),
        ({"config": CONFIG | {"block_k": 8}}, "table[0].config.block_k: expected a power of two of at least 16, got 8"),
        ({"config": CONFIG | {"num_warps": 64}}, "table[0].config.num_warps: expected a power of two up to 32, got 64"),
        ({"config": CONFIG | {"num_stages": 0}}, "table[0].config.num_stages: expected a positive integer, got 0"),
        ({"config": CONFIG | {"tma": 1}}, "table[0].config.tma: expected true or false, got 1"),
        ({"config": CONFIG | {"tma": True}}, "table[0].config.tma: expected false, since sm_86"),
        ({"config": CONFIG | {"warps": 4}}, "table[0].config.warps: expected one of the fields"),
        ({"config": CONFIG | {"order": "rows"}}, "config.order: expected one of ('strips', 'runs'), got 'rows'"),
        ({"config": CONFIG | {"order": "runs"}}, "config.order: expected 'strips', since without tma"),
        ({"config": CONFIG | {"epilogue_slices": 3}}, "config.epilogue_slices: expected one of (1, 2, 4), got 3"),
        ({"config": CONFIG | {"epilogue_slices": True}}, "config.epilogue_slices: expected one of (1, 2, 4), got True"),
        (
            {"config": CONFIG | {"epilogue_slices": 4, "block_t": 32}},
            "config.epilogue_slices: expected at most 2, so that a part of a tile holds a group of 16 tokens, got 4",
        ),
        ({"config": CONFIG | {"partials": 1}}, "table[0].config.partials: expected true or false, got 1"),
        ({"config": CONFIG | {"programs": 3}}, "config.programs: expected 0, since the grid follows the GPU, got 3"),
        *(
            (
                {"kind": "int8", "config": CONFIG | {"block_k": size}},
                "config.block_k: expected 32, the least of an int8",
            )
            for size in (16, 256)
        ),
        (
            {"kind": "int8", "config": CONFIG | {"partials": True}},
            "config.partials: expected False, since int8 kernels",
        ),
        ({"kind": "sum", "config": CONFIG | {"resident": 2}}, "config.resident: expected 1, since sum kernels have no"),
        ({"kind": "backward-weight"}, "table[0].config.block_t: expected one of the fields ['block_d', 'block_v'"),
        (
            {"kind": "backward-weight", "config": {"block_v": 12, "block_d": 64, "num_warps": 4}},
            "table[0].config.block_v: expected a power of two of at least 1, got 12",
        ),
        (
            {"kind": "backward-hidden", "config": {"rows": 2, "block_d": 64, "num_warps": 4}},
            "table[0].config.entries: expected a power of two of at least 1, got None",
        ),
        ({"config": {"block_v": 64}}, "table[0].config.block_t: expected a power of two of at least 16, got None"),
    ],
)
def test_a_wrong_field_is_named(user_file, change, message):
    user_file({"table": [ENTRY | change]})
    with pytest.raises(ValueError) as caught:
        tuning.matmul_config(86, 768, 30522, *BF16)
    assert message in str(caught.value)
    assert str(caught.value).startswith(tuning.ENVIRONMENT_VARIABLE)


@pytest.mark.parametrize("content", ["not json", {"rows": []}, [1], {"table": [3]}])
def test_a_file_that_is_no_table_is_an_error(user_file, content):
    user_file(content)
    with pytest.raises(ValueError, match="SPLADE_KERNELS_CONFIG"):
        tuning.matmul_config(86, 768, 30522, *BF16)


def test_a_file_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "/nowhere/result.json")
    with pytest.raises(ValueError, match="SPLADE_KERNELS_CONFIG: cannot read /nowhere/result.json"):
        tuning.matmul_config(86, 768, 30522, *BF16)


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_an_entry_of_every_kind_is_read_as_it_was_written(arch):
    table = tables.table(arch)
    written = json.loads(json.dumps([tuning.entry(*item) for item in table.items()]))
    assert tuning.parse_table({"table": written}) == table
    assert {shape.kind for shape in table} == {*tuning.KINDS}


def test_the_tournament_keeps_the_fast_and_the_shipped_configuration():
    seconds = {"shipped": 1.0, **{f"c{i}": 0.5 + i / 10 for i in range(10)}}
    ran = []

    def time_once(config: str) -> float:
        ran.append(config)
        return seconds[config]

    times = tune.tournament([*seconds], "shipped", time_once, ((2, 3), (4, 1)))
    assert {config: len(samples) for config, samples in times.items()} == {
        **{f"c{i}": 4 if i < 3 else 2 for i in range(10)},
        "shipped": 4,
    }
    assert ran[: 2 * len(seconds)] == [*seconds] * 2  # interleaved
    assert tune.choose(times, "shipped") == ("c0", 0.5)


def test_what_is_checked_is_specialised_like_what_is_timed(monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "step", lambda question, *_, **__: seen.append(question.vocab_size) or (lambda c: ()))
    for vocab_size in (30522, 151936, 40, 32):
        tune.disagreement(tuning.Shape("maximum", 86, "bfloat16", 32, vocab_size), None, "cpu")
    assert seen == [4099, 4112, 40, 32]


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_every_candidate_and_refinement_is_one_that_the_table_takes(arch):
    for dtype in candidates.DTYPES:
        for kind in tuning.KINDS:
            shape = tuning.Shape(kind, arch, dtype, 768, 30522)
            for best in candidates.candidates(shape):
                refined = candidates.refinements(best, kind)
                assert refined[0] == best
                for config in refined:
                    assert tuning.parse_table({"table": [tuning.entry(shape, config)]}) == {shape: config}
                if kind == "maximum":
                    assert {config.partials for config in refined} == {False, True}
                    assert {config.order for config in refined} == ({"strips", "runs"} if best.tma else {"strips"})
                elif isinstance(best, tuning.MatmulConfig):
                    regrouped = {dataclasses.replace(config, group_v=8) for config in refined}
                    assert regrouped == {dataclasses.replace(best, group_v=8)}


def test_a_lead_within_the_margin_changes_nothing():
    assert tune.choose({"shipped": [1.0] * 3, "other": [0.99] * 3}, "shipped") == ("shipped", 1.0)
    assert tune.choose({"shipped": [1.0] * 3, "other": [0.9]}, "shipped") == ("shipped", 1.0)


@pytest.mark.parametrize("kind", tuning.KINDS)
def test_a_right_candidate_agrees_and_a_wrong_one_is_seen(kind, monkeypatch):
    if sk.available_backends()["triton"] != "available":
        pytest.skip(sk.available_backends()["triton"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    question = tuning.Shape(kind, 86, "bfloat16", 32, 40)
    monkeypatch.setattr(tune, "CHECKED_LOAD", tune.Load(2, 20))
    if kind.startswith("backward"):
        first = candidates.shipped(question)
        smaller = {"block_v": 8} if kind == "backward-weight" else {"rows": 2, "entries": 4}
        other = dataclasses.replace(first, **smaller)
    else:
        # 32 is the least depth of an int8 product on a GPU.
        first, other = tuning.MatmulConfig(32, 32, 32, 4, 1), tuning.MatmulConfig(16, 64, 64, 4, 1)
    monkeypatch.setattr(tune, "shipped", lambda question: first)
    assert tune.disagreement(question, other, device) is None

    right = tune.step

    def wrong(*arguments, **options):
        run = right(*arguments, **options)

        def run_wrong(config):
            results = run(config)
            if config != first:
                results[0 if kind != "backward-weight" else 1].view(-1)[7] += 1
            return results

        return run_wrong

    monkeypatch.setattr(tune, "step", wrong)
    assert "differs by" in tune.disagreement(question, other, device)


def test_the_message_comes_from_inside_the_operator_where_nothing_is_traced(monkeypatch):
    if sk.available_backends()["triton"] != "available":
        pytest.skip(sk.available_backends()["triton"])
    monkeypatch.setattr(launch, "architecture", lambda device: 87)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden_states, weight = torch.randn(2, 5, 16, device=device), torch.randn(40, 16, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def pool(hidden_states: torch.Tensor) -> torch.Tensor:
        return sk.splade_pool(hidden_states, weight, backend="triton")

    with pytest.warns(UserWarning, match="sm_87") as caught:
        outputs = [pool(hidden_states) for _ in range(2)]
    assert sum("sm_87" in str(warning.message) for warning in caught) == 1
    torch.testing.assert_close(outputs[0], sk.reference.splade_pool(hidden_states, weight), rtol=1e-4, atol=1e-4)


def test_measuring_drops_what_is_unusable_and_takes_the_fastest(monkeypatch):
    question = tuning.Shape("maximum", 86, "bfloat16", 32, 40)
    first = candidates.shipped(question)
    fast, spilling, wrong = (dataclasses.replace(first, num_warps=warps) for warps in (1, 2, 4))
    regrouped = dataclasses.replace(fast, group_v=16)
    milliseconds = {first: 2.0, fast: 1.0, regrouped: 0.5}
    monkeypatch.setattr(tune, "candidates", lambda question: [first, fast, spilling, wrong])
    monkeypatch.setattr(tune, "side_by_side", lambda work, tasks: [work(*task) for task in tasks])
    monkeypatch.setattr(tune, "examine", lambda question, config: ([], ["spills"] if config == spilling else []))
    monkeypatch.setattr(tune, "disagreement", lambda question, config, device: "differs" if config == wrong else None)
    monkeypatch.setattr(tune, "loads", lambda question: {"tiny": tune.Load(2, 20)})
    monkeypatch.setattr(tune, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(tune, "_milliseconds", lambda run, config, flush: milliseconds.get(config, 9.0))
    kept = []
    best, rows = tune.measure(question, "cpu", lambda *what: kept.append(what))
    assert best == regrouped
    # After the candidates were admitted, after the first tournament, at the end.
    assert [found for found, _ in kept] == [first, fast, regrouped]
    assert [len(known) for _, known in kept] == [2, 4, len(rows)]
    dropped = {row["config"]["num_warps"]: row["dropped"] for row in rows if "dropped" in row}
    assert dropped == {2: ["spills"], 4: ["differs"]}
    timed = [(row["config"], row["time_over_shipped"]) for row in rows if "time_over_shipped" in row]
    assert (dataclasses.asdict(regrouped), 0.25) in timed
    assert (dataclasses.asdict(first), 1.0) in timed
    assert rows[-1]["chosen"] and rows[-1]["shipped_milliseconds"] == {"tiny": 2.0}


def test_the_written_result_is_a_file_that_the_package_takes(monkeypatch, tmp_path, user_file):
    best, backward = tuning.MatmulConfig(**CONFIG), tuning.HiddenConfig(2, 4, 512, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("bench.harness.result_file.describe", lambda: {"device": "GPU X"})
    monkeypatch.setattr(tune, "_architecture", lambda: 87)

    def measure(question, device, keep):
        config = best if question.kind == "maximum" else backward
        keep(config, [tune._row(question, config)] * 3)
        keep(config, [tune._row(question, config, chosen=True)])
        return config, []

    monkeypatch.setattr(tune, "measure", measure)
    path = tmp_path / "tuned.json"
    result = tune.main(["--output", str(path), "--kind", "maximum", "backward-hidden", "--dtype", "bfloat16", "tf32"])
    assert [row["kind"] for row in result["rows"]] == ["maximum"] * 8 + ["backward-hidden"] * 4
    user_file(json.loads(path.read_text()))
    for hidden_size, vocab_size in tune.SIZES:
        assert tuning.matmul_config(87, hidden_size, vocab_size, *BF16) == best
        assert tuning.hidden_config(87, hidden_size, vocab_size, *BF16) == backward
