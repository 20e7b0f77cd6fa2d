"""From log-probabilities to tokens and words: what every decoder has in common."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

_HELD_SECONDS = 0.2  # a decoder may hold a word's last letter through the silence after it: no longer than this counts


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One written token: frames [start_frame, end_frame) and its mean probability over them."""

    token: int
    start_frame: int
    end_frame: int
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """One word with its start and end in seconds and a confidence in [0, 1].

    The confidence is the product of the probabilities of the word's tokens: the network's own belief that all
    of them are right; calibrated (asr.decoding.calibration), the probability that the word is right.
    """

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a segment may say; scores (natural log) compare within one segment."""

    tokens: tuple[TokenSpan, ...]
    score: float


Best = tuple[list[int], list[float]]  # the likeliest token of each frame, and its log-probability


def best_of(log_probs: np.ndarray) -> Best:
    """Those of (frames, vocabulary)."""
    return log_probs.argmax(axis=1).tolist(), log_probs.max(axis=1).tolist()


class Decoder(Protocol):
    """Searches the log-probabilities of one segment as they arrive; costs the same for every block.

    Attributes:
        written: the first of the best tokens, which stay what they are: this list only grows.
    """

    written: list[TokenSpan]

    @property
    def weighs(self) -> bool:
        """Whether texts are weighed at the end of a segment, which takes as long as some of its blocks."""
        ...

    def accept(self, log_probs: np.ndarray, best: Best | None = None) -> None:
        """Take the next frames, (frames, vocabulary), also none; the blank is token 0.

        `best` is `best_of(log_probs)` from a caller who has it: it is found at less cost for many streams at once.
        """
        ...

    def pending(self) -> list[TokenSpan]:
        """The best tokens that follow those written, as they look so far."""
        ...

    def tokens(self) -> list[TokenSpan]:
        """The best tokens so far, in order: those written and those pending."""
        ...

    def finish(self, again: np.ndarray | None = None, other: "Decoder | None" = None) -> list["Hypothesis"]:
        """End the segment; the best hypothesis first, at least one. Nothing follows.

        Args, for those who weigh texts:
            again: another reading of the same audio, at another pace for example: (frames, vocabulary).
            other: what read the same audio, but for a little at its ends, by another network.
        """
        ...

    def copy(self) -> "Decoder":
        """The decoder as it stands now: the two go separate ways."""
        ...


def words_from_tokens(
    spans: Iterable[TokenSpan], tokens: Sequence[str], *, start: float, end: float, frame: float, edge: float
) -> list[Word]:
    """Join tokens to words at the spaces, with times in seconds.

    Args:
        spans: of one segment, in order.
        tokens: the vocabulary; a token may hold several characters, and spaces at its borders.
        start, end: of the segment in the recording; word times are kept within.
        frame: seconds to a frame.
        edge: seconds of silence that were put before the segment.
    """
    words: list[Word] = []
    text, first, last, confidence = "", 0, 0, 1.0
    held = max(round(_HELD_SECONDS / frame), 1)

    def close() -> None:
        nonlocal text, confidence
        if text:
            begins, ends = (min(max(start + t * frame - edge, start), end) for t in (first, last))
            words.append(Word(text=text, start=begins, end=ends, confidence=confidence))
        text, confidence = "", 1.0

    for span in spans:
        token = tokens[span.token]
        if token.startswith(" "):
            close()
        if token.strip():
            first = first if text else span.start_frame
            last = min(span.end_frame, span.start_frame + held)
            text += token.strip()
            confidence *= span.confidence
        if token.endswith(" "):
            close()
    close()
    return with_length(words, start, end, frame / 2)


def with_length(words: list[Word], start: float, end: float, shortest: float) -> list[Word]:
    """Words at the edges of their segment [start, end), where its limits leave nothing of them, get some of it back."""
    found: list[Word] = []
    for word in reversed(words):
        ends = min(max(word.end, word.start + shortest), end)
        begins = max(min(word.start, ends - shortest), start)
        found.append(word if (begins, ends) == (word.start, word.end) else replace(word, start=begins, end=ends))
        end = begins
    return found[::-1]
