"""Confidence: which words are right, calibration error and ROC area, the fit on half of the speakers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr.decoding import Word
from asr.decoding.calibration import evidence, probability
from asr.errors import ConfigError
from asr.manifest import Utterance
from asr.network import Segment, transcript_of
from pipelines.evaluate import Outcome
from pipelines.evaluate_confidence import Reliability, fit_confidence, judge, logistic


def words(text: str, confidence: float = 0.5) -> list[Word]:
    return [Word(text=w, start=i, end=i + 1, confidence=confidence) for i, w in enumerate(text.split())]


def test_words_are_judged_by_the_alignment() -> None:
    assert judge(words("the bat sat down on"), "The cat sat, on!") == [True, False, True, False, True]
    assert judge(words("well-known fact ..."), "well known facts") == [True, False, False]
    assert judge([], "nothing") == []
    assert judge(words("noise"), "") == [False]


def test_calibration_error_and_area_of_four_words() -> None:
    found = Reliability.of(np.array([0.95, 0.95, 0.35, 0.15]), np.array([True, False, True, False]))
    # bins: 0.95 against 1/2 (two words), 0.35 against 1, 0.15 against 0
    assert found.ece == pytest.approx((2 * 0.45 + 0.65 + 0.15) / 4)
    # of four pairs of a right and a wrong word: one tie, one lost, two won
    assert found.auroc == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    assert (found.words, found.right) == (4, 2)
    assert sum(n for *_, n in found.bins) == 4
    assert Reliability.of(np.array([1.0]), np.array([True])).auroc is None


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    confidences = np.array([c / 5 for c, _ in rows])
    right = np.array([r for _, r in rows])
    pairs = [(a > b) + (a == b) / 2 for a in confidences[right] for b in confidences[~right]]
    found = Reliability.of(confidences, right).auroc
    assert found == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_regression_finds_the_weights_that_made_the_data() -> None:
    rng = np.random.default_rng(0)
    features = np.stack([np.ones(20_000), rng.standard_normal(20_000)], axis=1)
    truth = np.array([0.5, -1.5])
    right = rng.random(20_000) < probability(features, truth)
    assert logistic(features, right) == pytest.approx(truth, abs=0.08)


def outcomes(speakers: int, seed: int = 0) -> list[Outcome]:
    """A decoder too sure of itself: words of confidence p are right with the probability p ** 2."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(speakers * 4):
        sure = rng.uniform(0.3, 1.0, 10)
        said = ["right" if rng.random() < p**2 else "other" for p in sure]
        found = [Word(text="right", start=j, end=j + 1, confidence=p) for j, p in enumerate(sure)]
        segment = Segment(text="right " * 10, start=0.0, end=10.0, words=tuple(found))
        row = Utterance(id=str(i), audio="/none", text=" ".join(said), speaker=f"s{i // 4}", where=f"m:{i}")
        made.append(Outcome(manifest="m", row=row, transcript=transcript_of([segment], 10.0)))
    return made


def test_what_is_fitted_on_half_of_the_speakers_holds_for_the_others() -> None:
    weights, before, after = fit_confidence(outcomes(200))
    assert before.ece > 0.15
    assert after.ece < 0.05
    assert after.auroc == pytest.approx(before.auroc, abs=0.02)
    assert before.words == after.words < 8000
    assert len(weights) == evidence(words("a")).shape[1]


def test_which_half_a_speaker_is_in_does_not_depend_on_the_others() -> None:
    some, all_of_them = outcomes(30), outcomes(60)
    assert fit_confidence(some)[1].words == fit_confidence([o for o in all_of_them if int(o.row.id) < 120])[1].words
    halves = fit_confidence(all_of_them)
    assert halves[1].words == fit_confidence(all_of_them[::-1])[1].words


def test_too_little_speech_is_refused() -> None:
    with pytest.raises(ConfigError, match="--calibrate"):
        fit_confidence(outcomes(2))
    with pytest.raises(ConfigError, match="--calibrate"):
        fit_confidence([])
