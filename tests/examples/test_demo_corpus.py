"""The demo's corpus: what is a pair, what is dropped, and that nothing held out was trained on."""

from __future__ import annotations

import sys
from textwrap import dedent

import pytest

from examples.demo import corpus
from examples.demo.corpus import deduplicate, docstrings, is_held_out, shared_shingles, shingles, split, to_pair

REST = "The rest says in a few more words than twelve what this is for and how it is used."


def test_docstrings_are_read_by_ast_and_never_run() -> None:
    source = dedent(
        '''
        """Module summary."""
        raise RuntimeError("imported")

        class Reader:
            """Reads things."""

            def close(self):
                """Closes it."""

            def _hidden(self):
                """Private."""

        async def fetch():
            """Fetches it."""
            def inner():
                """Nested."""

        def bare():
            pass
        '''
    )
    assert list(docstrings(source, "pkg.mod")) == [
        ("pkg.mod", "Module summary."),
        ("pkg.mod.Reader", "Reads things."),
        ("pkg.mod.fetch", "Fetches it."),
        ("pkg.mod.Reader.close", "Closes it."),
    ]


def test_source_that_does_not_parse_has_no_docstrings() -> None:
    assert list(docstrings("def broken(:", "pkg.mod")) == []
    assert list(docstrings("x = '\0'", "pkg.mod")) == []


def test_pair_is_name_and_summary_against_the_rest() -> None:
    pair = to_pair("pkg.mod", "pkg.mod.close", f"Close the\n  open file.\n\n{REST}\n\nMore.")
    assert pair is not None
    assert pair.query == "pkg.mod.close Close the open file."
    assert pair.passage == f"{REST} More."


@pytest.mark.parametrize(
    "summary",
    [
        "relu(input, inplace=False) -> Tensor",
        "torch.fft.fft(input, n=None, dim=-1)",
        "Args: the input tensor and the output tensor",
        "input (Tensor): the input tensor to read",
        "dtype : data-type, optional, of the result",
        "`mask` (`torch.Tensor`, *optional*): which tokens to read",
        ":param path: the path to read from",
        "Too short",
        " ".join(["word"] * 41),
    ],
)
def test_signatures_arguments_and_lengths_are_no_summaries(summary: str) -> None:
    assert to_pair("m", "m.f", f"Close the open file.\n\n{REST}") is not None
    assert to_pair("m", "m.f", f"{summary}\n\n{REST}") is None


@pytest.mark.parametrize("summary", ["Return the sum of a (possibly empty) list.", "Note that: this closes the file."])
def test_prose_with_brackets_and_colons_is_a_summary(summary: str) -> None:
    assert to_pair("m", "m.f", f"{summary}\n\n{REST}") is not None


def test_a_passage_needs_twelve_words() -> None:
    assert to_pair("m", "m.f", "Close the open file.\n\n" + "word " * 11) is None
    assert to_pair("m", "m.f", "Close the open file.\n\n" + "word " * 12) is not None


def test_deduplication_looks_at_the_first_twenty_words() -> None:
    opening = " ".join(f"w{i}" for i in range(20))
    texts = [f"{opening} one", f"{opening.upper()} two", " ".join(f"w{i}" for i in range(19)) + " other three"]
    pairs = [to_pair("m", f"m.f{i}", f"Close the open file.\n\n{text}") for i, text in enumerate(texts)]
    kept = deduplicate(pair for pair in pairs if pair is not None)
    assert [pair.name for pair in kept] == ["m.f0", "m.f2"]


def test_shared_shingles_is_the_share_of_own_five_grams() -> None:
    seen = shingles("a b c d e f")
    assert seen == {tuple("abcde"), tuple("bcdef")}
    assert shared_shingles("a b c d e x", seen) == 0.5
    assert shared_shingles("A, b. C d e!", seen) == 1.0
    assert shared_shingles("x y", seen) == 0.0


def test_split_keeps_modules_whole_and_drops_copies() -> None:
    modules = [f"pkg.mod{i}" for i in range(60)]
    held_modules = [module for module in modules if is_held_out(module)]
    train_modules = [module for module in modules if not is_held_out(module)]
    assert 1 <= len(held_modules) <= 15

    def text(stem: str) -> str:
        return "Close the open file.\n\n" + " ".join(f"{stem}{i}" for i in range(40))

    found = [(module, f"{module}.f{n}", text(f"{module}x{n}x")) for module in modules for n in range(2)]
    # A copy of a training passage behind an opening of its own escapes deduplication, not the 5-gram check.
    head = "Close the open file.\n\n" + " ".join(f"new{i}" for i in range(20))
    copied = " ".join(f"{train_modules[0]}x0x{i}" for i in range(40))
    found.append((held_modules[0], f"{held_modules[0]}.copy", f"{head} {copied}"))

    result = split(found)
    assert {pair.module for pair in result.train} == set(train_modules)
    assert {pair.module for pair in result.held_out} == set(held_modules)
    assert result.counts["held_out_candidates"] == 2 * len(held_modules) + 1
    assert result.counts["held_out"] == len(result.held_out) == 2 * len(held_modules)
    assert result.held_out_shared_shingles == 0.0
    assert split(found).sha256 == result.sha256
    assert split(found[1:]).sha256 != result.sha256


@pytest.mark.slow
def test_the_standard_library_is_read_without_importing_it() -> None:
    loaded = set(sys.modules)
    result = corpus.build_corpus(["stdlib"])
    assert set(sys.modules) <= loaded
    assert result.counts["docstrings"] > 3000
    assert result.counts["unique"] > 800
    # A tenth of the modules, which is not a tenth of the pairs: modules differ in size.
    assert 0.03 < len(result.held_out) / result.counts["unique"] < 0.25
    assert not {pair.module for pair in result.train} & {pair.module for pair in result.held_out}
    assert not {pair.passage for pair in result.train} & {pair.passage for pair in result.held_out}


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        corpus.build_corpus(["no_such_package"])
