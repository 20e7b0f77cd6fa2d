"""Texts that a segment may say, as numbers of words: where two differ, and how far all agree."""

from collections.abc import Mapping, Sequence

import numpy as np

_SHARPNESS = 0.3  # of the probabilities that scores stand for: as they are, the best text would be all but certain

Edit = tuple[int, int, tuple[int, ...]]  # the words from here to there are to be these


def differences(words: tuple[int, ...], other: tuple[int, ...]) -> list[Edit]:
    """The places in which another text differs, apart by words that both have."""
    from rapidfuzz.distance import Levenshtein

    blocks = Levenshtein.opcodes(words, other).as_matching_blocks()  # the last one is empty, at the ends
    ends = [(0, 0), *((block.a + block.size, block.b + block.size) for block in blocks)]
    return [
        (a, block.a, other[b : block.b])
        for (a, b), block in zip(ends[:-1], blocks, strict=True)
        if block.a > a or block.b > b
    ]


def edited(words: tuple[int, ...], edits: Sequence[Edit]) -> tuple[int, ...]:
    """A text with its places as these have them; of two that touch, as the first has it."""
    chosen: list[Edit] = []
    for edit in edits:
        if all(edit[1] < start or end < edit[0] for start, end, _ in chosen):
            chosen.append(edit)
    for start, end, instead in sorted(chosen, reverse=True):
        words = (*words[:start], *instead, *words[end:])
    return words


def agreement(words: Sequence[int], weighed: Mapping[tuple[int, ...], float]) -> list[float]:
    """For each word of a text, how much of the probability of all texts has it in its place.

    `weighed` has their scores (natural log). Wessel et al. 2001, "Confidence measures for large vocabulary continuous
    speech recognition", on N-best lists.
    """
    from rapidfuzz.distance import Levenshtein

    scores = np.array(list(weighed.values()))
    shares = np.exp(_SHARPNESS * (scores - scores.max()))
    shares /= shares.sum()
    found = np.zeros(len(words))
    for other, share in zip(weighed, shares.tolist(), strict=True):
        for block in Levenshtein.opcodes(words, other).as_matching_blocks():
            found[block.a : block.a + block.size] += share
    return np.minimum(found, 1.0).tolist()
