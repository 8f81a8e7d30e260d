"""A WordPiece vocabulary that is the same on every run: sorted counts, ties broken by the text.

The ``tokenizers`` trainer walks hash maps and gives another vocabulary each time. Here the entries are, in order: the
special tokens, the characters (as a start and as a continuation ``##c``), the frequent whole words, the most frequent
beginnings and ends of words, and rare words up to the given size. Words are split by greedy longest match.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizerFast

__all__ = ["SPECIAL_TOKENS", "build_tokenizer", "build_vocabulary", "count_words", "unknown_share"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MIN_CHARACTER_COUNT = 2
MIN_WORD_COUNT = 3
WHOLE_WORD_SHARE = 0.7
LONGEST_WORD = 30


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Counts what BERT's own normalizer and pre-tokenizer call words (lower case, split at punctuation)."""
    normalizer, pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    return counts


def build_vocabulary(counts: Counter[str], size: int) -> dict[str, int]:
    """Exactly ``size`` entries, ids ascending; a text too small to fill them is padded with ``[unusedN]``.

    Args:
        counts: word counts, as :func:`count_words` gives them.
        size: number of entries.

    Raises:
        ValueError: ``size`` does not hold the special tokens and the characters.
    """
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    alphabet = [character for character in _ranked(characters) if characters[character] >= MIN_CHARACTER_COUNT]
    entries = dict.fromkeys((*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in alphabet)))
    if len(entries) > size:
        raise ValueError(f"size: expected at least {len(entries)} for this text's characters, got {size}")

    words = [word for word in _ranked(counts) if len(word) <= LONGEST_WORD]
    frequent = [word for word in words if counts[word] >= MIN_WORD_COUNT]
    # Pieces are counted over all words, because unseen words have the beginnings and ends of known ones, and get a
    # share of the entries: without them an unseen identifier would be split into single characters.
    room_for_words = int(WHOLE_WORD_SHARE * (size - len(entries)))
    for candidate in (*frequent[:room_for_words], *_ranked(_count_pieces(words, counts)), *words):
        if len(entries) == size:
            break
        entries.setdefault(candidate)
    for i in range(size - len(entries)):
        entries[f"[unused{i}]"] = None
    return {entry: i for i, entry in enumerate(entries)}


def build_tokenizer(vocabulary: dict[str, int], max_length: int) -> BertTokenizerFast:
    """The tokenizer over ``vocabulary``; refuses to return one that did not take the vocabulary."""
    tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=max_length)
    if len(tokenizer) != len(vocabulary):
        raise RuntimeError(f"tokenizer: expected {len(vocabulary)} entries, got {len(tokenizer)}")
    return tokenizer


def unknown_share(tokenizer: BertTokenizerFast, texts: list[str]) -> float:
    """The share of ``[UNK]`` among the tokens the model sees of ``texts``."""
    ids = tokenizer(texts, add_special_tokens=False, truncation=True)["input_ids"]
    tokens = sum(len(row) for row in ids)
    unknown = sum(row.count(tokenizer.unk_token_id) for row in ids)
    return float(unknown / max(1, tokens))


def _count_pieces(words: list[str], counts: Counter[str]) -> Counter[str]:
    pieces: Counter[str] = Counter()
    for word in words:
        for cut in range(2, len(word) - 1):
            pieces[word[:cut]] += counts[word]
            pieces[f"##{word[cut:]}"] += counts[word]
    return Counter({piece: count for piece, count in pieces.items() if count > 1})


def _ranked(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda entry: (-counts[entry], entry))
