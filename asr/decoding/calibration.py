"""From a decoder's words to what their readers expect: the times at which they sound, confidences that hold."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from asr.decoding import Word, with_length
from asr.decoding.sound import FRAME_SECONDS, smooth, sounds
from asr.errors import ModelError
from asr.files import write_atomically

CALIBRATION_FILE = "calibration.json"  # in the folder of a network
_LOWEST = 1e-10  # probability
_WEIGHTS = 5
_SHORTEST = 0.05  # seconds of a word


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was fitted to one network and one way of decoding; the defaults change nothing.

    CTC writes a letter in the one or two frames in which it has heard enough of it: how long after the word's start, or
    before its end, is much the same from word to word and differs from network to network. Beside a pause the sound
    itself tells where a word begins or ends.

    Attributes:
        start_shift, end_shift: seconds that are added to the start and the end of each word; below 0: earlier.
        reach: then they move to where a sound begins or ends after or before a pause, if that is at most so far, in
            seconds; and no word begins in a pause, or goes on behind one. What is sound and what is pause, the levels
            of the word and so many seconds on either side tell: words may differ in loudness, and rooms in noise.
        confidence: weights of what `evidence` gives, in a logistic function; empty: the decoder's confidence stays.
    """

    start_shift: float = 0.0
    end_shift: float = 0.0
    reach: float = 0.0
    confidence: tuple[float, ...] = ()

    def apply(self, words: Sequence[Word], start: float, end: float, levels: np.ndarray | None = None) -> list[Word]:
        """The words of the segment [start, end), in seconds; none ends after the next begins.

        Args:
            levels: of the segment's audio (asr.decoding.sound); None: words stay where the shifts put them.
        """
        if not words or self == Calibration():
            return list(words)
        shifted = [(word.start + self.start_shift, word.end + self.end_shift) for word in words]
        levels = smooth(levels) if levels is not None and self.reach else None
        borders = [self._borders(first, last, start, levels) for first, last in shifted]
        middles = [(first + last) / 2 for first, last in shifted]
        nexts = [*(first for first, _ in shifted[1:]), end]
        starts: list[float] = []
        for (time, last), (begins, after), before, following in zip(
            shifted, borders, [-math.inf, *middles[:-1]], nexts, strict=True
        ):
            # Nor does one begin in a pause: such a network may write its first letter long before it sounds.
            sound, silence = (min((e for e in edges if e > time), default=math.inf) for edges in (begins, after))
            latest = min(last, following) - _SHORTEST  # a border behind it is another word's
            in_pause = sound < min(silence, latest)
            found = sound if in_pause else _nearest([e for e in begins if before < e < latest], time, self.reach)
            earliest = starts[-1] + _SHORTEST if starts else start
            starts.append(max(min(max(found, earliest), end - _SHORTEST), start, *starts[-1:]))
        ends: list[float] = []
        for (_, time), (_, after), following, first, second in zip(
            shifted, borders, [*middles[1:], math.inf], starts, [*starts[1:], end], strict=True
        ):
            # A word does not go on behind a pause: a network that hears the future may keep its last letter until then.
            inside = [edge for edge in after if first + _SHORTEST < edge < time]
            near = [edge for edge in after if first + _SHORTEST < edge < following]
            found = inside[0] if inside else _nearest(near, time, self.reach)
            ends.append(min(max(found, first + _SHORTEST), second))
        confidences = [word.confidence for word in words]
        if self.confidence:
            confidences = probability(evidence(words), np.array(self.confidence)).tolist()
        timed = zip(words, starts, ends, confidences, strict=True)
        found = [replace(word, start=s, end=e, confidence=c) for word, s, e, c in timed]
        return with_length(found, start, end, _SHORTEST / 2)

    def _borders(
        self, first: float, last: float, start: float, levels: np.ndarray | None
    ) -> tuple[list[float], list[float]]:
        """Where sounds begin and end near a word, in seconds; `levels`, if known, are smoothed and begin at `start`."""
        if levels is None:
            return [], []
        low = max(round((first - start - self.reach) / FRAME_SECONDS), 0)
        high = max(round((last - start + self.reach) / FRAME_SECONDS), low)
        shift = start + low * FRAME_SECONDS
        begins, after = sounds(levels[low:high])
        return [shift + x for x in begins if not math.isnan(x)], [shift + x for x in after if not math.isnan(x)]


def _nearest(edges: Sequence[float], time: float, reach: float) -> float:
    """The nearest of `edges` if it is within reach; else `time` itself."""
    nearest = min(edges, key=lambda edge: abs(edge - time), default=time)
    return nearest if abs(nearest - time) <= reach else time


def evidence(words: Sequence[Word]) -> np.ndarray:
    """What tells right words from wrong ones, (words, 5): 1, p, ln p, ln p of a letter, ln letters.

    p is the decoder's confidence, the product of the probabilities of the word's tokens.
    """
    confidences = np.array([word.confidence for word in words])
    logs = np.log(np.maximum(confidences, _LOWEST))
    letters = np.array([len(word.text) for word in words], np.float64)
    return np.stack([np.ones(len(words)), confidences, logs, logs / letters, np.log(letters)], axis=1)


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
        found = Calibration(**{**values, "confidence": tuple(map(float, values.get("confidence", ())))})
        numbers = (found.start_shift, found.end_shift, found.reach, *found.confidence)
        fits = len(found.confidence) in (0, _WEIGHTS) and found.reach >= 0 and all(map(math.isfinite, numbers))
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
