"""What a CTC network says of given label sequences: their likelihood, and where their labels lie.

The forward and the Viterbi recursion of Graves et al. 2006, in numpy: recognition needs no torch.
"""

from collections.abc import Sequence

import numpy as np

from asr.decoding import TokenSpan

_BLANK = 0
_LEAST = -40.0  # log-probabilities below are taken for it: so many frames' product is a number yet
_SCALED = 8  # frames


def log_likelihoods(log_probs: np.ndarray, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """The natural-log likelihood of each label sequence, over all its alignments.

    Args:
        log_probs: (frames, labels), the blank being label 0.
        sequences: of labels, without blanks; also empty ones.

    Returns:
        (sequences,) float64; -inf for one that needs more frames than there are.
    """
    labels, skips = (np.ascontiguousarray(part.T) for part in _states(sequences))
    may_skip, size = skips.astype(np.float64), len(labels)
    ends = 2 * np.array([len(sequence) for sequence in sequences], np.int64)
    labels[np.arange(size)[:, None] > ends] = log_probs.shape[1]  # behind an end: a label without probability
    probabilities = np.zeros((len(log_probs), log_probs.shape[1] + 1))
    probabilities[:, :-1] = np.exp(np.maximum(log_probs, _LEAST), dtype=np.float64)

    # Probabilities, with their sum set to 1 every few frames, cost less than a fifth of logarithms.
    alpha = np.zeros((size + 2, len(sequences)))  # two states before the first that are never entered
    alpha[2:4] = 1.0
    total = np.zeros(len(sequences))
    for t, frame in enumerate(probabilities):
        reached = min(2 * t + 2, size)  # states that can be entered by now
        some = alpha[2 : reached + 2]
        if t:
            entered = alpha[:reached] * may_skip[:reached]
            entered += alpha[1 : reached + 1]
            some += entered
        some *= frame.take(labels[:reached])
        if t % _SCALED == _SCALED - 1:
            sums = some.sum(axis=0)
            with np.errstate(divide="ignore"):
                total += np.log(sums)
            some /= np.where(sums > 0, sums, 1.0)
    rows = np.arange(len(sequences))
    last = alpha[ends + 2, rows] + np.where(ends > 0, alpha[ends + 1, rows], 0.0)
    if not len(probabilities):
        last = (ends == 0).astype(np.float64)
    with np.errstate(divide="ignore"):
        return total + np.log(last)


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
