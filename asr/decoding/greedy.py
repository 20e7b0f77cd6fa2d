"""Best-path decoding: the likeliest token of every frame, repeats joined, blanks dropped."""

import math

import numpy as np

from asr.decoding import Best, Decoder, Hypothesis, TokenSpan, best_of

_BLANK = 0


class GreedyDecoder:
    """Greedy CTC search that continues across block borders (see asr.decoding.Decoder)."""

    weighs = False

    def __init__(self) -> None:
        self.written: list[TokenSpan] = []
        self._frames = 0
        self._token = _BLANK  # of the run of equal frames that is still open
        self._start = 0
        self._sum = 0.0  # of the run's probabilities
        self._score = 0.0  # log-probability of the path

    def accept(self, log_probs: np.ndarray, best: Best | None = None) -> None:
        """Take the next frames, (frames, vocabulary), also none."""
        for token, value in zip(*(best or best_of(log_probs)), strict=True):
            if token != self._token:
                self.written += self.pending()
                self._token, self._start, self._sum = token, self._frames, 0.0
            self._sum += min(math.exp(value), 1.0)
            self._score += value
            self._frames += 1

    def pending(self) -> list[TokenSpan]:
        """The token of the run that is still open, if it is one."""
        if self._token == _BLANK:
            return []
        confidence = self._sum / (self._frames - self._start)
        return [TokenSpan(self._token, self._start, self._frames, confidence)]

    def tokens(self) -> list[TokenSpan]:
        """The tokens so far, the open one included."""
        return self.written + self.pending()

    def finish(self, again: np.ndarray | None = None, other: Decoder | None = None) -> list[Hypothesis]:
        """The tokens; their score is that of the best path."""
        return [Hypothesis(tuple(self.tokens()), self._score)]

    def copy(self) -> "GreedyDecoder":
        """The decoder as it stands now."""
        other = GreedyDecoder()
        other.__dict__.update(self.__dict__ | {"written": self.written.copy()})
        return other
