"""Calibration of words: shifts, pauses, confidences, and the file that keeps them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr.decoding import Word
from asr.decoding.calibration import (
    CALIBRATION_FILE,
    Calibration,
    evidence,
    load_calibration,
    probability,
    save_calibration,
)
from asr.decoding.sound import Levels, _percentile, levels_of, smooth, sounds
from asr.errors import ModelError
from asr.snapshot import Snapshot

RATE = 16_000


def word(start: float, end: float, text: str = "word", confidence: float = 0.5) -> Word:
    return Word(text=text, start=start, end=end, confidence=confidence)


def tone_and_silence(*seconds: float) -> np.ndarray:
    """Silence, sound, silence, ... of so many seconds, over faint noise."""
    noise = np.random.default_rng(0).standard_normal(round(sum(seconds) * RATE)) * 1e-3
    loud = np.concatenate([np.full(round(s * RATE), i % 2) for i, s in enumerate(seconds)])
    return (noise + 0.3 * loud * np.sin(np.arange(len(loud)) * 0.2)).astype(np.float32)


def test_without_a_calibration_words_stay_as_they_are() -> None:
    words = [word(0.1, 0.9), word(0.5, 2.0)]
    assert Calibration().apply(words, 0.0, 1.0) == words


def test_shifts_keep_words_in_order_and_in_their_segment() -> None:
    found = Calibration(start_shift=-0.2, end_shift=0.3).apply(
        [word(0.1, 0.2), word(0.5, 0.6), word(1.2, 1.3)], 0.0, 1.5
    )
    assert [(w.start, w.end) for w in found] == [
        (0.0, pytest.approx(0.3)),
        (pytest.approx(0.3), pytest.approx(0.9)),
        (pytest.approx(1.0), 1.5),
    ]
    assert [w.confidence for w in found] == [0.5] * 3


@given(
    st.lists(st.floats(0, 3), max_size=12),
    st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_whatever_was_fitted_words_follow_each_other_within_the_segment(
    edges: list[float], start_shift: float, end_shift: float, reach: float, seed: int
) -> None:
    edges = sorted(edges)  # as decoders give them: no word begins before the last one ends
    words = [word(*span) for span in zip(edges[::2], edges[1::2], strict=False)]
    rng = np.random.default_rng(seed)
    levels = np.repeat(rng.uniform(-80, -10, 20), 15).astype(np.float32)
    fitted = Calibration(start_shift=start_shift, end_shift=end_shift, reach=reach)
    found = fitted.apply(words, 0.0, 3.0, levels)
    times = [t for w in found for t in (w.start, w.end)]
    assert times == sorted(times)
    assert all(0.0 <= t <= 3.0 for t in times)
    assert [w.text for w in found] == [w.text for w in words]


def test_beside_a_pause_the_sound_tells_where_a_word_begins_and_ends() -> None:
    levels = levels_of(tone_and_silence(0.5, 0.4, 0.6, 0.3, 0.5))
    fitted = Calibration(start_shift=-0.1, end_shift=0.1, reach=0.2)
    # CTC wrote them late and short; the segment begins at 10 s
    found = fitted.apply([word(10.7, 10.75), word(11.68, 11.72)], 10.0, 12.3, levels)
    assert [(w.start, w.end) for w in found] == [
        (pytest.approx(10.5, abs=0.02), pytest.approx(10.9, abs=0.02)),
        (pytest.approx(11.5, abs=0.02), pytest.approx(11.8, abs=0.02)),
    ]


def test_a_faint_word_among_loud_ones_is_measured_against_its_own_pause() -> None:
    samples = tone_and_silence(0.5, 0.4, 0.6, 0.3, 0.6, 0.4, 0.5)
    faint = slice(round(1.3 * RATE), round(2.0 * RATE))
    samples[faint] *= 0.01  # 40 dB less: no sound at all beside the others
    first, second, third = Calibration(reach=0.2).apply(
        [word(0.6, 0.8), word(1.6, 1.7), word(2.5, 2.7)], 0.0, 3.3, levels_of(samples)
    )
    assert (second.start, second.end) == (pytest.approx(1.5, abs=0.02), pytest.approx(1.8, abs=0.02))
    assert (first.end, third.start) == (pytest.approx(0.9, abs=0.02), pytest.approx(2.4, abs=0.02))


def test_only_the_words_beside_a_pause_move_to_its_borders() -> None:
    levels = levels_of(tone_and_silence(0.5, 0.6, 0.5))
    fitted = Calibration(reach=0.3)
    found = fitted.apply([word(0.55, 0.6), word(0.7, 0.8), word(0.9, 0.95)], 0.0, 1.6, levels)
    assert [(w.start, w.end) for w in found] == [
        (pytest.approx(0.5, abs=0.02), 0.6),
        (0.7, 0.8),
        (0.9, pytest.approx(1.1, abs=0.02)),
    ]


def test_no_word_goes_on_behind_a_pause() -> None:
    levels = levels_of(tone_and_silence(0.5, 0.4, 1.0, 0.4, 0.5))
    (found,) = Calibration(reach=0.2).apply([word(0.5, 1.8)], 0.0, 2.8, levels)
    assert found.end == pytest.approx(0.9, abs=0.02)


def test_no_word_begins_in_a_pause() -> None:
    levels = levels_of(tone_and_silence(1.2, 0.4, 0.6, 0.4, 0.5))
    first, second = Calibration(reach=0.2).apply([word(0.0, 1.6), word(2.1, 2.6)], 0.0, 3.1, levels)
    assert first.start == pytest.approx(1.2, abs=0.02)
    assert second.start == pytest.approx(2.2, abs=0.02)
    (in_silence,) = Calibration(reach=0.2).apply([word(0.1, 0.6)], 0.0, 3.1, levels)
    assert in_silence.start == 0.1  # no sound begins in it


def test_two_words_share_no_border_and_each_takes_time() -> None:
    levels = levels_of(tone_and_silence(1.0, 0.4, 1.0))
    words = [word(0.9, 1.1), word(1.15, 1.2), word(1.2, 1.22), word(1.26, 1.3)]
    found = Calibration(start_shift=-0.06, end_shift=0.02, reach=0.3).apply(words, 0.0, 2.4, levels)
    assert found[0].start == pytest.approx(1.0, abs=0.02) and found[-1].end == pytest.approx(1.4, abs=0.02)
    assert all(w.end - w.start > 0.0499 for w in found)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))


def test_the_gap_of_a_plosive_and_a_click_are_no_borders() -> None:
    starts, ends = sounds(smooth(levels_of(tone_and_silence(0.5, 0.3, 0.07, 0.3, 0.5, 0.01, 0.5))))
    assert starts == pytest.approx([0.5], abs=0.02)
    assert ends == pytest.approx([1.17], abs=0.02)


def test_sound_that_goes_on_at_an_edge_has_no_border_there() -> None:
    starts, ends = sounds(smooth(levels_of(tone_and_silence(0.0, 0.5, 0.5, 0.5))))
    assert np.isnan(starts[0]) and np.isnan(ends[-1])
    assert starts[1] == pytest.approx(1.0, abs=0.02) and ends[0] == pytest.approx(0.5, abs=0.02)
    hiss = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.1
    assert [len(x) for x in sounds(smooth(levels_of(hiss)))] == [0, 0]


@given(st.lists(st.integers(0, 700), max_size=20), st.integers(0, 5))
def test_levels_do_not_depend_on_how_samples_come(sizes: list[int], seed: int) -> None:
    samples = np.random.default_rng(seed).standard_normal(5_000).astype(np.float32)
    levels, position = Levels(), 0
    for size in [*sizes, len(samples)]:
        levels.accept(samples[position : position + size])
        position += size
    first, second = levels.take(0.1), levels.take(1.0)
    assert np.array_equal(np.concatenate([first, second]), levels_of(samples))
    assert len(first) == 10


def test_a_long_segments_levels_are_kept_in_few_arrays() -> None:
    """Each one that is saved takes some 250 bytes, beside the 4 of a level."""
    samples = np.random.default_rng(0).standard_normal(30 * RATE).astype(np.float32)
    levels = Levels()
    for block in np.split(samples, 3_000):
        levels.accept(block)
    assert len(Snapshot.write(levels, {})) < 4 * 3_000 + 70 * 300
    assert np.array_equal(levels.take(30.0), levels_of(samples))


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=50), st.sampled_from([0.1, 0.98]))
def test_percentiles_are_numpys_bit_for_bit(values: list[float], part: float) -> None:
    assert _percentile(np.sort(values), part) == np.percentile(values, 100 * part)


def test_confidence_is_a_logistic_function_of_the_evidence() -> None:
    words = [word(0, 1, "abcd", 0.5), word(1, 2, "a", 1e-30)]
    weights = (0.3, 0.7, 0.5, 0.2, -0.1)
    found = Calibration(confidence=weights).apply(words, 0.0, 2.0)
    expected = 1 / (1 + np.exp(-(0.3 + 0.7 * 0.5 + 0.5 * np.log(0.5) + 0.2 * np.log(0.5) / 4 - 0.1 * np.log(4))))
    assert found[0].confidence == pytest.approx(expected)
    assert 0 <= found[1].confidence < found[0].confidence
    assert (found[0].start, found[0].end) == (0, 1)
    assert probability(evidence(words), np.array(weights)).tolist() == [w.confidence for w in found]


def test_a_calibration_is_kept_for_each_way_of_decoding(tmp_path: Path) -> None:
    greedy = Calibration(start_shift=-0.125, end_shift=0.0625, reach=0.25)
    beam = Calibration(confidence=(1.0, 2.0, 3.0, 4.5, -5.0))
    save_calibration(tmp_path, "greedy", greedy)
    save_calibration(tmp_path, "beam", beam)
    assert load_calibration(tmp_path, "greedy") == greedy
    assert load_calibration(tmp_path, "beam") == beam
    assert load_calibration(tmp_path / "none", "beam") == Calibration()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"greedy": {"confidence": [1, 2]}}', '{"greedy": {"shift": 1}}', '{"greedy": {"start_shift": NaN}}',
     '{"greedy": {"reach": "far"}}', '{"greedy": 3}'],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / CALIBRATION_FILE).write_text(text)
    with pytest.raises(ModelError, match=CALIBRATION_FILE):
        load_calibration(tmp_path, "greedy")
