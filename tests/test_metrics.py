"""Word and character error rates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr.metrics import ErrorCounts, align_words, count_errors
from asr.text import normalize

texts = st.lists(st.text("ab'", min_size=1, max_size=3), max_size=8).map(" ".join)


def edit_distance(a: list[str] | str, b: list[str] | str) -> int:
    """The textbook's table, independent of the aligner in use."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_each_kind_of_error_is_counted() -> None:
    counts = count_errors("the cat sat on the mat", "the hat sat on a the")
    assert (counts.words, counts.substitutions, counts.deletions, counts.insertions) == (6, 1, 1, 1)
    assert counts.word_errors == 3
    assert counts.wer == 0.5


def test_texts_are_compared_normalised() -> None:
    assert count_errors("Don’t STOP, please!", "don't stop please").word_errors == 0


def test_character_errors_include_spaces() -> None:
    counts = count_errors("ice cream", "icecream")
    assert (counts.characters, counts.character_errors) == (9, 1)
    assert counts.cer == pytest.approx(1 / 9)


def test_kana_without_spaces_is_scored_by_character() -> None:
    counts = count_errors("こんにちは", "こんばちは")
    assert (counts.words, counts.word_errors) == (1, 1)
    assert (counts.characters, counts.character_errors) == (5, 1)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer"),
    [("", "", 0.0), ("a b", "", 1.0), ("", "a", math.inf), ("...", "", 0.0)],
)
def test_empty_texts(reference: str, hypothesis: str, wer: float) -> None:
    assert count_errors(reference, hypothesis).wer == wer


@given(texts, texts)
def test_errors_are_the_edit_distance(reference: str, hypothesis: str) -> None:
    counts = count_errors(reference, hypothesis)
    reference, hypothesis = normalize(reference), normalize(hypothesis)
    assert counts.word_errors == edit_distance(reference.split(), hypothesis.split())
    assert counts.character_errors == edit_distance(reference, hypothesis)
    assert counts.words - counts.deletions + counts.insertions == len(hypothesis.split())


def test_counts_add_up_so_that_every_word_weighs_the_same() -> None:
    both = sum([count_errors("a b c d", "a b c"), count_errors("a", "b")], ErrorCounts())
    assert both == count_errors("a b c d", "a b c") + count_errors("a", "b")
    assert both.wer == 2 / 5


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_aligned_words_hold_both_texts_and_the_errors_counted(said: list[str], written: list[str]) -> None:
    pairs = align_words(" ".join(said), " ".join(written))
    assert [a for a, _ in pairs if a is not None] == said
    assert [b for _, b in pairs if b is not None] == written
    assert sum(a != b for a, b in pairs) == count_errors(" ".join(said), " ".join(written)).word_errors


def test_words_are_aligned_in_order() -> None:
    assert align_words("The cat sat, on it", "the bat on it now") == [
        ("the", "the"), ("cat", "bat"), ("sat", None), ("on", "on"), ("it", "it"), (None, "now"),
    ]  # fmt: skip
