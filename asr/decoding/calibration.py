"""From a decoder's words to what their readers expect: the times at which they sound, confidences that hold."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from asr.decoding import Word
from asr.errors import ModelError
from asr.files import write_atomically

CALIBRATION_FILE = "calibration.json"  # in the folder of a network
_LOWEST = 1e-10  # probability


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was fitted to one network and one way of decoding; the defaults change nothing.

    CTC writes a letter in the one or two frames in which it has heard enough of it. The first letter comes a constant
    time after the word's start, which differs from network to network. The last one is bound to the word's end less
    closely: that depends on how long the word seems to be, and on its letters, too.

    Attributes:
        start_shift: seconds that are added to the start of each word; below 0: earlier.
        end_shift: weights of what `length` gives, whose sum is added to the end; empty: the end stays.
        confidence: weights of what `evidence` gives, in a logistic function; empty: the decoder's confidence stays.
    """

    start_shift: float = 0.0
    end_shift: tuple[float, ...] = ()
    confidence: tuple[float, ...] = ()

    def apply(self, words: Sequence[Word], start: float, end: float) -> list[Word]:
        """The words of the segment [start, end), in seconds; none ends after the next begins."""
        if self == Calibration():
            return list(words)
        starts = [min(max(word.start + self.start_shift, start), end) for word in words] + [end]
        shifts = (length(words) @ self.end_shift).tolist() if self.end_shift and words else [0.0] * len(words)
        ends = [
            min(max(word.end + shift, begins), following)
            for word, shift, begins, following in zip(words, shifts, starts, starts[1:], strict=False)
        ]
        confidences = [word.confidence for word in words]
        if self.confidence and words:
            confidences = probability(evidence(words), np.array(self.confidence)).tolist()
        return [
            replace(word, start=s, end=e, confidence=c)
            for word, s, e, c in zip(words, starts, ends, confidences, strict=False)
        ]


def length(words: Sequence[Word]) -> np.ndarray:
    """How long words seem to be, (words, 3): 1, seconds from the first letter to the last, letters."""
    return np.array([(1.0, word.end - word.start, len(word.text)) for word in words])


def evidence(words: Sequence[Word]) -> np.ndarray:
    """What tells right words from wrong ones, (words, 4): 1, ln p, ln p of a letter, ln letters.

    p is the decoder's confidence, the product of the probabilities of the word's tokens.
    """
    logs = np.array([math.log(max(word.confidence, _LOWEST)) for word in words])
    letters = np.array([len(word.text) for word in words], np.float64)
    return np.stack([np.ones(len(words)), logs, logs / letters, np.log(letters)], axis=1)


def probability(evidence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Logistic function: (words, n), (n,) -> (words,) in [0, 1]."""
    return 1 / (1 + np.exp(-np.clip(evidence @ weights, -30, 30)))


def load_calibration(network: Path, decoding: str) -> Calibration:
    """What the folder of a network holds for a way of decoding; the default where it holds nothing.

    Raises:
        ModelError: the file is damaged.
    """
    values = _read(network / CALIBRATION_FILE).get(decoding, {})
    try:
        weights = {name: tuple(map(float, values.get(name, ()))) for name in ("end_shift", "confidence")}
        found = Calibration(**{**values, **weights})
        fits = len(found.end_shift) in (0, 3) and len(found.confidence) in (0, 4)
        fits = fits and all(map(math.isfinite, (found.start_shift, *found.end_shift, *found.confidence)))
    except (TypeError, ValueError, AttributeError):
        fits, found = False, Calibration()
    if not fits:
        raise ModelError(f"{network / CALIBRATION_FILE}: {decoding}: {values!r} is no calibration; fit it again")
    return found


def save_calibration(network: Path, decoding: str, calibration: Calibration) -> None:
    """Write a calibration into the folder of a network, beside those of other ways of decoding."""
    path = network / CALIBRATION_FILE
    write_atomically(path, json.dumps({**_read(path), decoding: asdict(calibration)}, indent=1) + "\n")


def _read(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); fit it again: `asr evaluate --calibrate`") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: is no calibration; fit it again: `asr evaluate --calibrate`")
    return values
