"""Long aligned utterances cut at their pauses: batches fill better, and CTC has less to find at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asr.training.shards import STATES

_PAUSE = 8  # frames of 10 ms: a silence between words in which an utterance may be cut


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an utterance: frames of 10 ms, and the words in it, each [start, end)."""

    start: int
    end: int
    first_word: int
    end_word: int


def pieces(labels: np.ndarray, phone_counts: Sequence[int], longest: float) -> list[Piece]:
    """Cut an utterance in pauses between its words, each piece as long as `longest` allows.

    Where there is no pause in time, a piece is longer.

    Args:
        labels: the aligned state of each frame (ShardDataset.alignment), (frames,); phone 0 is silence.
        phone_counts: of each word of the text.
        longest: seconds.

    Returns:
        What the utterance falls into, in order: one piece where nothing is to be cut, or where the words are not
        those of the alignment.
    """
    whole = [Piece(0, len(labels), 0, len(phone_counts))]
    entered = np.flatnonzero(np.diff(labels, prepend=-1) != 0)  # a state begins
    entered = entered[labels[entered] % STATES == 0]  # a phone begins, as its first state does
    spoken = labels[entered] >= STATES
    if int(spoken.sum()) != sum(phone_counts):
        return whole
    word_ends = np.cumsum(phone_counts)  # in phones
    limit = round(longest * 100)
    cuts: list[tuple[int, int]] = []  # frames in the middle of pauses, words before them
    ends = np.append(entered[1:], len(labels))
    phones = np.cumsum(spoken)
    for start, end, before, speech in zip(entered, ends, phones, spoken, strict=True):
        word = int(np.searchsorted(word_ends, before))
        between = 0 < before < word_ends[-1] and word_ends[word] == before
        if not speech and between and end - start >= _PAUSE:
            cuts.append((int(start + end) // 2, word + 1))
    found: list[Piece] = []
    start = first = 0
    for i, (cut, word) in enumerate(cuts):
        following = cuts[i + 1][0] if i + 1 < len(cuts) else len(labels)
        if following - start > limit:
            found.append(Piece(start, cut, first, word))
            start, first = cut, word
    return [*found, Piece(start, len(labels), first, len(phone_counts))]
