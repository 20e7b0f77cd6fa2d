"""The search for the words of a lexicon, by labels of one kind: a time-synchronous beam over a tree of words.

Hypotheses are rows of arrays: all of them take each frame together.
"""

from typing import NamedTuple

import numpy as np

from asr.decoding.language_model import Scorer

BLANK = 0
IMPOSSIBLE = -1e4  # instead of minus infinity, where a pronunciation has more phones than there are frames
THRESHOLD = 15.0  # hypotheses so far (natural log) behind the best are dropped
LIKELIEST = 10  # labels that are tried at a frame: a third of the work, and no more errors (docs/trials.md)
_NONE = -1


class Lexicon:
    """A tree of words, spelled in labels of one kind, and how to search in it.

    On the way to their end, words count as likely as the likeliest that a hypothesis can still become (Ortmanns et al.
    1997): that is taken back when the word is known.

    Args:
        labels: of all spellings, one after the other, (all labels,).
        lengths: of each spelling, (spellings,). Those with common beginnings stand together: they are sorted, by
            whatever order of labels.
        words: what each spells, (spellings,).
        scores: of each word by itself, base 10.
        columns: of the log-probabilities, those of the labels; the blank is the first.
        silence: a label that may stand between words, any number of times; None: there is none.
        beam: hypotheses that are kept.
        lm_weight, word_score: see BeamConfig.
    """

    def __init__(
        self,
        labels: np.ndarray,
        lengths: np.ndarray,
        words: np.ndarray,
        scores: np.ndarray,
        columns: slice,
        silence: int | None,
        beam: int,
        lm_weight: float,
        word_score: float,
    ) -> None:
        self.columns, self.silence, self.beam = columns, silence, beam
        self.lm_weight, self.word_score = lm_weight, word_score
        starts = np.cumsum(lengths) - lengths
        own = scores[words]
        node = np.zeros(len(words), np.int64)  # that each spelling has come to
        label, parent, best = [np.array([BLANK])], [np.array([_NONE])], [np.array([0.0])]
        count = 1
        for depth in range(int(lengths.max(initial=0))):
            on = np.flatnonzero(lengths > depth)
            at, said = node[on], labels[starts[on] + depth]
            new = np.append(True, (at[1:] != at[:-1]) | (said[1:] != said[:-1]))
            first = np.flatnonzero(new)
            label.append(said[first])
            parent.append(at[first])
            best.append(np.maximum.reduceat(own[on], first))
            node[on] = count + np.cumsum(new) - 1
            count += len(first)
        self.label, above = np.concatenate(label).astype(np.int64), np.concatenate(parent)
        self.best = lm_weight * np.concatenate(best)  # of what a node's words score by themselves; nothing at the root
        self.children = np.bincount(above[1:], minlength=count)
        self.first_child = np.searchsorted(above[1:], np.arange(count)) + 1  # nodes stand in the order of their parents
        order = np.argsort(node, kind="stable")
        self.word, self.words = words[order], np.bincount(node, minlength=count)
        self.first_word = np.cumsum(self.words) - self.words

    def open(self, scorer: Scorer) -> "Running":
        """A search at the start of a segment."""
        return Running(self, scorer)


class Found(NamedTuple):
    """A text that a search has found: its words, its score, and the label of each frame on its best path."""

    words: tuple[int, ...]
    score: float
    labels: np.ndarray


class Running:
    """A search in the middle of a segment.

    A hypothesis is where it stands in the tree, the language model's state, and the label of the frame before, which is
    the blank or may go on; of two alike in all that, the better one is kept.
    """

    def __init__(self, lexicon: Lexicon, scorer: Scorer) -> None:
        self.scorer, self._lexicon = scorer, lexicon
        self._score, self._node = np.zeros(1), np.zeros(1, np.int64)
        self._state, self._last = np.array([scorer.start]), np.array([BLANK])
        self._frames: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # where from, label, word or none

    def read(self, log_probs: np.ndarray) -> None:
        """Take the next frames, (frames, tokens + phones)."""
        for frame in log_probs[:, self._lexicon.columns].astype(np.float64):
            self._read(frame)

    def _read(self, frame: np.ndarray) -> None:
        lexicon, score, node, state, last = self._lexicon, self._score, self._node, self._state, self._last
        # a next label: not the last one, which would need a blank between; and not one that is hardly heard
        least = np.partition(frame, -LIKELIEST)[-LIKELIEST] if len(frame) > LIKELIEST else -np.inf
        whose, child = _ranges(lexicon.first_child[node], lexicon.children[node])
        label = lexicon.label[child]
        heard = np.flatnonzero((frame[label] >= least) & (label != last[whose]))
        whose, child, label = whose[heard], child[heard], label[heard]
        base = score[whose] + frame[label] - lexicon.best[node[whose]]
        inner = np.flatnonzero(lexicon.children[child])
        # and the words that end there
        of, place = _ranges(lexicon.first_word[child], lexicon.words[child])
        word = lexicon.word[place]
        said, after = self.scorer.step(state[whose[of]], word)
        # the same label goes on; or a blank; or, between words, a silence
        same, everyone = np.flatnonzero(last != BLANK), np.arange(len(score))
        still = np.flatnonzero((node == 0) & (last != lexicon.silence)) if lexicon.silence is not None else same[:0]

        old = np.concatenate([whose[inner], whose[of], same, everyone, still])
        labels = np.concatenate(
            [
                label[inner],
                label[of],
                last[same],
                np.zeros(len(everyone), np.int64),
                np.full(len(still), lexicon.silence or 0),
            ]
        )
        scores = np.concatenate(
            [
                base[inner] + lexicon.best[child[inner]],
                base[of] + lexicon.lm_weight * said + lexicon.word_score,
                score[same] + frame[last[same]],
                score + frame[BLANK],
                score[still] + frame[lexicon.silence or 0],
            ]
        )
        nodes, states, words = node[old], state[old], np.full(len(old), _NONE)
        ends = slice(len(inner), len(inner) + len(of))
        nodes[: len(inner)], nodes[ends], states[ends], words[ends] = child[inner], 0, after, word

        near = np.flatnonzero(scores > scores.max() - THRESHOLD)
        near = near[np.argsort(-scores[near], kind="stable")]
        _, first = np.unique(_keys(states[near], nodes[near], labels[near]), return_index=True)
        kept = near[np.sort(first)[: lexicon.beam]]  # of those alike, the best; of them all, the best ones
        self._score, self._node, self._state, self._last = scores[kept], nodes[kept], states[kept], labels[kept]
        self._frames.append((old[kept], labels[kept], words[kept]))

    def best(self) -> np.ndarray:
        """The label of each frame on the best path so far; the last word may be unfinished."""
        labels = np.zeros(len(self._frames), np.int64)
        at = 0
        for i in range(len(self._frames) - 1, -1, -1):
            came, said, _ = self._frames[i]
            labels[i], at = said[at], came[at]
        return labels

    def finish(self) -> list[Found]:
        """The texts that were found, the best first; none of unfinished words, if any has none."""
        whole = np.flatnonzero(self._node == 0)
        at = whole if len(whole) else np.arange(len(self._node))
        scores = self._score[at] + self._lexicon.lm_weight * self.scorer.finish(self._state[at])
        order = np.argsort(-scores, kind="stable")
        at, scores = at[order], scores[order]
        labels = np.zeros((len(at), len(self._frames)), np.int64)
        texts: list[list[int]] = [[] for _ in at]
        for i in range(len(self._frames) - 1, -1, -1):
            came, said, words = self._frames[i]
            labels[:, i] = said[at]
            here = words[at]
            for row in np.flatnonzero(here != _NONE).tolist():
                texts[row].append(int(here[row]))
            at = came[at]
        found: dict[tuple[int, ...], Found] = {}
        for text, value, row in zip(texts, scores.tolist(), labels, strict=True):
            said = tuple(reversed(text))
            found.setdefault(said, Found(said, value, row))
        return list(found.values())


def _ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """first[i], first[i] + 1, ..., count[i] of them for each i: which i each is of, and the numbers."""
    whose = np.repeat(np.arange(len(count)), count)
    return whose, np.arange(len(whose)) + np.repeat(first - (np.cumsum(count) - count), count)


def _keys(*parts: np.ndarray) -> np.ndarray:
    """Numbers that are equal where all parts (n,) are."""
    keys = parts[0]
    for part in parts[1:]:
        size = int(part.max(initial=0)) + 1
        if int(keys.max(initial=0)) > np.iinfo(np.int64).max // size - 1:
            keys = np.unique(keys, return_inverse=True)[1].reshape(-1)
        keys = keys * size + part
    return keys
