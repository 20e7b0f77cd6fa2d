"""Best-path decoding: the likeliest token of every frame, repeats joined, blanks dropped."""

import math

import numpy as np

from asr.decoding import Hypothesis, TokenSpan

_BLANK = 0


class GreedyDecoder:
    """Greedy CTC search that continues across block borders (see asr.decoding.Decoder)."""

    def __init__(self) -> None:
        self._frames = 0
        self._written: list[TokenSpan] = []
        self._token = _BLANK  # of the run of equal frames that is still open
        self._start = 0
        self._sum = 0.0  # of the run's probabilities
        self._score = 0.0  # log-probability of the path

    def accept(self, log_probs: np.ndarray) -> None:
        """Take the next frames, (frames, vocabulary), also none."""
        best, values = log_probs.argmax(axis=1).tolist(), log_probs.max(axis=1).tolist()
        for token, value in zip(best, values, strict=True):
            if token != self._token:
                self._written += self._open()
                self._token, self._start, self._sum = token, self._frames, 0.0
            self._sum += min(math.exp(value), 1.0)
            self._score += value
            self._frames += 1

    def tokens(self) -> list[TokenSpan]:
        """The tokens so far, the open one included."""
        return self._written + self._open()

    def finish(self) -> list[Hypothesis]:
        """The tokens; their score is that of the best path."""
        return [Hypothesis(tuple(self.tokens()), self._score)]

    def copy(self) -> "GreedyDecoder":
        """The decoder as it stands now."""
        other = GreedyDecoder()
        other.__dict__.update(self.__dict__ | {"_written": self._written.copy()})
        return other

    def _open(self) -> list[TokenSpan]:
        if self._token == _BLANK:
            return []
        confidence = self._sum / (self._frames - self._start)
        return [TokenSpan(self._token, self._start, self._frames, confidence)]
