"""Decoding: best path across block borders, words and their times."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr.decoding import TokenSpan, best_of, words_from_tokens
from asr.decoding.greedy import GreedyDecoder

TOKENS = ("<blank>", " ", "a", "b")


def log_probs(path: list[int], probability: float = 0.7) -> np.ndarray:
    values = np.full((len(path), len(TOKENS)), np.log((1 - probability) / (len(TOKENS) - 1)), np.float32)
    values[np.arange(len(path)), path] = np.log(probability)
    return values


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 7), min_size=1, max_size=10))
def test_greedy_joins_repeats_and_drops_blanks_however_the_frames_are_cut(path: list[int], sizes: list[int]) -> None:
    decoder, frames = GreedyDecoder(), log_probs(path)
    position = 0
    while position < len(frames):
        for size in [*sizes, 1]:
            decoder.accept(frames[position : position + size])
            position += size
    found = [(span.token, span.start_frame, span.end_frame) for span in decoder.tokens()]

    expected, start = [], 0
    for token, run in groupby(path):
        end = start + len(list(run))
        if token:
            expected.append((token, start, end))
        start = end
    assert found == expected
    assert all(span.confidence == pytest.approx(0.7, abs=1e-6) for span in decoder.tokens())


def test_an_open_token_is_told_and_grows() -> None:
    decoder = GreedyDecoder()
    decoder.accept(log_probs([2, 2], 0.9))
    assert [(s.start_frame, s.end_frame) for s in decoder.tokens()] == [(0, 2)]
    decoder.accept(log_probs([2, 0], 0.6))
    (span,) = decoder.tokens()
    assert (span.start_frame, span.end_frame) == (0, 3)
    assert span.confidence == pytest.approx((0.9 + 0.9 + 0.6) / 3, abs=1e-6)


def test_what_is_written_only_grows_and_the_best_of_each_frame_may_be_known_before() -> None:
    one, other = GreedyDecoder(), GreedyDecoder()
    written = one.written
    for frames in (log_probs([2, 3, 3], 0.7), log_probs([3, 0, 1], 0.9), log_probs([0, 0])):
        before = written.copy()
        one.accept(frames)
        other.accept(frames, best_of(frames))
        assert one.written is written and written[: len(before)] == before
        assert one.tokens() == written + one.pending() == other.tokens()
    assert [s.token for s in written] == [2, 3, 1]


def test_a_copy_goes_its_own_way() -> None:
    decoder = GreedyDecoder()
    decoder.accept(log_probs([2, 3]))
    copy = decoder.copy()
    decoder.accept(log_probs([2, 0]))
    copy.accept(log_probs([3, 1]))
    assert [s.token for s in decoder.tokens()] == [2, 3, 2]
    assert [(s.token, s.end_frame) for s in copy.tokens()] == [(2, 1), (3, 3), (1, 4)]


def words(spans: list[TokenSpan], tokens: tuple[str, ...] = TOKENS, end: float = 100.0) -> list[tuple]:
    found = words_from_tokens(spans, tokens, start=10.0, end=end, frame=0.04, edge=0.25)
    return [(w.text, pytest.approx(w.start), pytest.approx(w.end), pytest.approx(w.confidence)) for w in found]


def test_words_are_parted_at_spaces_with_frame_exact_times() -> None:
    spans = [
        TokenSpan(1, 0, 2, 0.1), TokenSpan(2, 10, 11, 0.5), TokenSpan(3, 12, 15, 0.8),
        TokenSpan(1, 16, 17, 0.2), TokenSpan(1, 18, 19, 0.2), TokenSpan(2, 20, 21, 0.9),
    ]  # fmt: skip
    assert words(spans) == [
        ("ab", 10 + 10 * 0.04 - 0.25, 10 + 15 * 0.04 - 0.25, 0.4),
        ("a", 10 + 20 * 0.04 - 0.25, 10 + 21 * 0.04 - 0.25, 0.9),
    ]


def test_word_times_stay_within_their_segment_and_none_is_without_length() -> None:
    spans = [TokenSpan(2, 0, 2, 1.0), TokenSpan(1, 3, 4, 1.0), TokenSpan(3, 30, 40, 1.0)]
    assert [w[1:3] for w in words(spans, end=11.0)] == [(10.0, 10.02), (10 + 30 * 0.04 - 0.25, 11.0)]
    assert [w[1:3] for w in words([TokenSpan(2, 40, 41, 1.0)], end=11.0)] == [(10.98, 11.0)]
    assert [w[1:3] for w in words([TokenSpan(2, 40, 41, 1.0)], end=10.01)] == [(10.0, 10.01)]


def test_tokens_of_several_characters_and_scripts_without_spaces() -> None:
    tokens = ("<blank>", " th", "e ", "日", "本")
    spans = [TokenSpan(t, i, i + 1, 1.0) for i, t in enumerate([1, 2, 1, 2, 3, 4])]
    assert [w[0] for w in words(spans, tokens)] == ["the", "the", "日本"]
    assert words([]) == []
