"""The demo's WordPiece vocabulary: exact size, reproducible across processes, few unknown tokens."""

from __future__ import annotations

import hashlib
import os
import random
import string
import subprocess
import sys
from collections import Counter

import pytest

from examples.demo.vocabulary import SPECIAL_TOKENS, build_tokenizer, build_vocabulary, count_words, unknown_share

TEXTS = [
    "Return the number of bytes written to the compressed archive.",
    "The archive is compressed, the bytes are counted: torch.nn.Conv2d(in_channels).",
    "Writing bytes to an archive that is not compressed returns the number of bytes.",
]


def _many_words(number: int) -> Counter[str]:
    generator = random.Random(0)
    return Counter(
        {"".join(generator.choices(string.ascii_lowercase, k=9)): generator.randint(1, 50) for _ in range(number)}
    )


@pytest.mark.parametrize("size", [120, 300, 30522])
def test_size_is_exact_and_ids_ascend(size: int) -> None:
    vocabulary = build_vocabulary(count_words(TEXTS), size)
    assert list(vocabulary.values()) == list(range(size))
    assert tuple(vocabulary)[:5] == SPECIAL_TOKENS


def test_full_size_from_enough_words_needs_no_padding() -> None:
    vocabulary = build_vocabulary(_many_words(40_000), 30522)
    assert len(vocabulary) == 30522
    assert not any(entry.startswith("[unused") for entry in vocabulary)
    pieces = sum(entry.startswith("##") for entry in vocabulary)
    assert pieces > 1000


def test_order_of_counting_does_not_matter() -> None:
    counts = _many_words(2000)
    shuffled = list(counts.items())
    random.Random(1).shuffle(shuffled)
    assert list(build_vocabulary(Counter(dict(shuffled)), 3000)) == list(build_vocabulary(counts, 3000))


def test_the_same_in_processes_with_other_hash_seeds() -> None:
    code = (
        "import hashlib; from examples.demo.vocabulary import *;"
        f"v = build_vocabulary(count_words({TEXTS!r}), 300);"
        "print(hashlib.sha256('|'.join(v).encode()).hexdigest())"
    )
    expected = hashlib.sha256("|".join(build_vocabulary(count_words(TEXTS), 300)).encode()).hexdigest()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert printed.stdout.strip() == expected, printed.stderr


def test_a_size_below_the_alphabet_raises() -> None:
    with pytest.raises(ValueError, match=r"size: expected at least \d+ .* got 20"):
        build_vocabulary(count_words(TEXTS), 20)


def test_tokenizer_takes_the_vocabulary_and_knows_the_text() -> None:
    tokenizer = build_tokenizer(build_vocabulary(count_words(TEXTS), 300), max_length=32)
    assert len(tokenizer) == 300
    assert tokenizer.tokenize("The Bytes") == ["the", "bytes"]
    unseen = tokenizer.tokenize("archives")
    assert len(unseen) > 1 and "".join(piece.removeprefix("##") for piece in unseen) == "archives"
    assert unknown_share(tokenizer, TEXTS) == 0.0
    assert unknown_share(tokenizer, ["the bytes ☃"]) == pytest.approx(1 / 3)
