"""What a CTC network says of given label sequences: their likelihood, and where their labels lie.

The forward and the Viterbi recursion of Graves et al. 2006, in numpy: recognition needs no torch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from asr.decoding import TokenSpan

_BLANK = 0
_LEAST = -40.0  # log-probabilities below are taken for it: so many frames' product is a number yet
_SCALED = 8  # frames
_NEVER = np.iinfo(np.int64).max


def log_likelihoods(readings: Sequence[np.ndarray], texts: Sequence[Sequence[Sequence[Sequence[int]]]]) -> np.ndarray:
    """The natural-log likelihood of each text, over all its alignments and all ways to write its words.

    Args:
        readings: log-probabilities, (frames, labels) each, the blank being label 0.
        texts: of each its words, of each word the ways to write it: labels, one at the least, without blanks.

    Returns:
        (readings, texts) float64; -inf for a text that needs more frames than there are.
    """
    nothing = readings[0].shape[1]  # behind the last label: one without probability
    chains = [_Chain.of(words, nothing) for words in texts]
    size, count = max((len(chain.labels) for chain in chains), default=0), len(chains)
    labels, soonest = np.full((size, count), nothing), np.full((size, count), _NEVER)
    for column, chain in enumerate(chains):
        labels[: len(chain.labels), column] = chain.labels
        soonest[: len(chain.labels), column] = chain.soonest
    may_skip = np.zeros((size, count))
    may_skip[2:] = (labels[2:] != _BLANK) & (labels[2:] != labels[:-2])
    first_frame = np.minimum.accumulate(soonest.min(axis=1, initial=_NEVER)[::-1])[::-1]
    jumps = np.array([(*jump, i) for i, chain in enumerate(chains) for jump in chain.jumps], np.int64).reshape(-1, 3)
    steps = _distinct(*((jumps[:, :2] + 2) * count + jumps[:, 2:]).T)

    start = np.zeros((size + 2, count))  # two states before the first that are never entered
    start[2:4] = 1.0
    first = jumps[jumps[:, 1] == 0]  # the other ways of first words
    start[first[:, 0] + 2, first[:, 2]] = 1.0
    last = np.zeros((size + 2, count))
    for column, chain in enumerate(chains):
        last[np.add(chain.ends, 2), column] = 1.0
    found = np.empty((len(readings), count))
    for row, log_probs in enumerate(readings):
        frames = len(log_probs)
        reached = np.searchsorted(first_frame, np.arange(frames), side="right")  # states that can be entered by then
        # Probabilities, with their sum set to 1 every few frames, cost less than a fifth of logarithms.
        probabilities = np.zeros((frames, nothing + 1))
        probabilities[:, :-1] = np.exp(np.maximum(log_probs, _LEAST), dtype=np.float64)
        alpha, total = start.copy(), np.zeros(count)
        of_all = alpha.reshape(-1)
        for t, frame in enumerate(probabilities):
            some = alpha[2 : reached[t] + 2]
            if t:
                entered = alpha[: reached[t]] * may_skip[: reached[t]]
                entered += alpha[1 : reached[t] + 1]
                jumped = [of_all[come] for _, come in steps]
                some += entered
                for (to, _), brought in zip(steps, jumped, strict=True):
                    of_all[to] += brought
            some *= frame.take(labels[: reached[t]])
            if t % _SCALED == _SCALED - 1:
                sums = some.sum(axis=0)
                with np.errstate(divide="ignore"):
                    total += np.log(sums)
                some /= np.where(sums > 0, sums, 1.0)
        ended = (alpha * last).sum(axis=0) if frames else np.array([float(not words) for words in texts])
        with np.errstate(divide="ignore"):
            found[row] = total + np.log(ended)
    return found


class _Chain(NamedTuple):
    """The states of a text in a row: a blank, and for each word its ways, one behind the other, and a blank.

    From a state one may go on to the next, and to the next but one where labels differ (the ways of a word have two
    states between them that nothing leaves), and by `jumps`, (to, from): around the other ways of a word.

    Attributes:
        soonest: the first frame in which each state may be.
        ends: the states that may be the last.
    """

    labels: list[int]
    soonest: list[int]
    jumps: list[tuple[int, int]]
    ends: list[int]

    @classmethod
    def of(cls, words: Sequence[Sequence[Sequence[int]]], nothing: int) -> "_Chain":
        labels, soonest, jumps = [_BLANK], [0], []
        before, lasts, needed = 0, [], 0  # the blank before a word, the last states of the ways of the one before that
        for ways in words:
            firsts, ends = [], []
            for way in ways:
                if firsts:
                    labels += [nothing, nothing]
                    soonest += [needed, needed]
                firsts.append(len(labels))
                written = [_BLANK] * (2 * len(way) - 1)
                written[::2] = way
                labels += written
                soonest += [needed + (i + 1) // 2 for i in range(len(written))]
                ends.append(len(labels) - 1)
            jumps += [(first, before) for first in firsts[1:]]
            jumps += [(to, come) for to in firsts for come in lasts if labels[to] != labels[come] and to != come + 2]
            before, lasts = len(labels), ends
            needed += min(map(len, ways))
            labels.append(_BLANK)
            soonest.append(needed)
            jumps += [(before, end) for end in ends[:-1]]
        return cls(labels, soonest, jumps, [before, *lasts])


def _distinct(to: np.ndarray, come: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Jumps in groups, in each of which no two end in one place."""
    order = np.argsort(to, kind="stable")
    to, come = to[order], come[order]
    nth = np.arange(len(to)) - np.searchsorted(to, to)
    return [(to[nth == n], come[nth == n]) for n in range(nth.max(initial=-1) + 1)]


def align(log_probs: np.ndarray, sequence: Sequence[int]) -> list[TokenSpan]:
    """Where the labels of a sequence lie on its likeliest alignment: a span for each.

    Args:
        log_probs: (frames, labels), the blank being label 0.
        sequence: labels without blanks, for which there must be frames enough.
    """
    (labels,), (skips,) = _states([sequence])
    size, frames = len(labels), len(log_probs)
    scores = np.asarray(log_probs, np.float64)[:, labels]
    best = np.full(size + 2, -np.inf)
    best[2:4] = scores[0, :2]
    came = np.zeros((frames, size), np.int8)  # steps back to the predecessor
    for t in range(1, frames):
        options = np.stack([best[2:], best[1:-1], np.where(skips, best[:-2], -np.inf)])
        came[t] = options.argmax(axis=0)
        best[2:] = options.max(axis=0) + scores[t]
    state = size - 1 if size == 1 or best[size + 1] >= best[size] else size - 2
    path = np.zeros(frames, np.int64)
    for t in range(frames - 1, -1, -1):
        path[t] = state
        state -= int(came[t, state])
    spans = []
    for i, label in enumerate(sequence):
        own = np.flatnonzero(path == 2 * i + 1)
        first, end = int(own[0]), int(own[-1]) + 1
        confidence = np.minimum(np.exp(scores[first:end, 2 * i + 1]), 1.0).mean()
        spans.append(TokenSpan(int(label), first, end, float(confidence)))
    return spans


def _states(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence with blanks around its labels, and where the blank before may be skipped: (sequences, n)."""
    labels = np.full((len(sequences), 2 * max(map(len, sequences), default=0) + 1), _BLANK, np.int64)
    for row, sequence in zip(labels, sequences, strict=True):
        row[1 : 2 * len(sequence) : 2] = sequence
    skips = np.zeros_like(labels, bool)
    skips[:, 2:] = (labels[:, 2:] != _BLANK) & (labels[:, 2:] != labels[:, :-2])
    return labels, skips
