"""How far the confidence of a word can be believed: measured, and fitted on half of the speakers."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from asr.decoding import Word
from asr.decoding.calibration import evidence, probability
from asr.errors import ConfigError
from asr.metrics import align_words
from asr.text import normalize
from pipelines.evaluate import Outcome

_BINS = 10
_RIDGE = 1e-5  # a word: keeps the weights finite where one of them alone parts right words from wrong ones
_STEPS = 50
_FEWEST_WORDS = 50  # to fit on, and to report on


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Confidences beside what came true.

    Attributes:
        words, right: how many words were recognized, and how many of them are right.
        ece: expected calibration error, over ten bins of equal width: the mean distance, a word, between the mean
            confidence of its bin and the share of right words there.
        auroc: area under the ROC curve: how probably a right word has a higher confidence than a wrong one; None
            without a right or without a wrong word.
        bins: (mean confidence, share of right words, words) of each bin with words.
    """

    words: int
    right: int
    ece: float
    auroc: float | None
    bins: tuple[tuple[float, float, int], ...]

    @classmethod
    def of(cls, confidences: np.ndarray, right: np.ndarray) -> "Reliability":
        """Confidences (words,) in [0, 1] and whether each word is right, bool (words,)."""
        place = np.minimum((confidences * _BINS).astype(int), _BINS - 1)
        bins = [
            (float(confidences[place == i].mean()), float(right[place == i].mean()), int((place == i).sum()))
            for i in np.unique(place)
        ]
        return cls(
            words=len(right),
            right=int(right.sum()),
            ece=sum(abs(confidence - share) * n for confidence, share, n in bins) / max(len(right), 1),
            auroc=_auroc(confidences[right], confidences[~right]),
            bins=tuple(bins),
        )

    def __str__(self) -> str:
        area = "not defined" if self.auroc is None else f"{self.auroc:.3f}"
        return (
            f"{self.words} words, {self.right} right: expected calibration error {self.ece:.3f}, "
            f"area under the ROC curve {area}"
        )


def judge(words: Sequence[Word], reference: str) -> list[bool]:
    """Whether each recognized word is right; one that is normalised to nothing is not."""
    parts = [normalize(word.text).split() for word in words]
    pairs = align_words(reference, " ".join(part for parts_of_word in parts for part in parts_of_word))
    right = iter([said == written for said, written in pairs if written is not None])
    return [all([next(right) for _ in parts_of_word]) if parts_of_word else False for parts_of_word in parts]


def judged(outcomes: Iterable[Outcome]) -> tuple[list[Word], np.ndarray, list[str]]:
    """All words recognized, whether each is right, bool (words,), and whose it is: a speaker, or else a row."""
    words: list[Word] = []
    right: list[bool] = []
    speakers: list[str] = []
    for outcome in outcomes:
        found = outcome.transcript.words if outcome.transcript else ()
        words += found
        right += judge(found, outcome.reference)
        speakers += [outcome.speaker or outcome.row.where] * len(found)
    return words, np.array(right, bool), speakers


def fit_confidence(outcomes: Sequence[Outcome]) -> tuple[tuple[float, ...], Reliability, Reliability]:
    """Fit on the words of one half of the speakers, as the decoder gives them.

    Returns:
        The weights for `asr.decoding.calibration.Calibration`, and how the words of the other half of the speakers
        fare without them and with them.

    Raises:
        ConfigError: too few words, or none of them right or wrong, in a half.
    """
    words, right, speakers = judged(outcomes)
    # Which half a speaker is in depends on the name alone: more data moves nobody.
    fitted = np.array([zlib.crc32(speaker.encode()) % 2 == 0 for speaker in speakers], bool)
    for name, half in (("fit on", fitted), ("report on", ~fitted)):
        if half.sum() < _FEWEST_WORDS or len(np.unique(right[half])) < 2:
            raise ConfigError(
                f"--calibrate: {half.sum()} words of half of the speakers to {name}, {right[half].sum()} of them "
                f"right: needs {_FEWEST_WORDS}, right and wrong ones; give more speech of more speakers"
            )
    seen = evidence(words)
    weights = logistic(seen[fitted], right[fitted])
    raw = np.array([word.confidence for word in words])
    before = Reliability.of(raw[~fitted], right[~fitted])
    return tuple(weights.tolist()), before, Reliability.of(probability(seen[~fitted], weights), right[~fitted])


def logistic(evidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Logistic regression by Newton's method: (words, n), bool (words,) -> weights (n,)."""
    weights = np.zeros(evidence.shape[1])
    ridge = _RIDGE * np.eye(evidence.shape[1]) * len(right)
    for _ in range(_STEPS):
        expected = probability(evidence, weights)
        gradient = evidence.T @ (right - expected) - ridge @ weights
        curvature = (evidence * (expected * (1 - expected))[:, None]).T @ evidence + ridge
        step = np.linalg.solve(curvature, gradient)
        weights += step
        if np.abs(step).max() < 1e-8:
            break
    return weights


def _auroc(right: np.ndarray, wrong: np.ndarray) -> float | None:
    if not len(right) or not len(wrong):
        return None
    ordered = np.sort(wrong)  # ties count half
    below, upto = np.searchsorted(ordered, right, "left"), np.searchsorted(ordered, right, "right")
    return float((below + upto).mean() / 2 / len(wrong))
