"""The search for the words of a lexicon, by labels of one kind: a time-synchronous beam over a tree of words.

Hypotheses are rows of arrays: all of them take each frame together.
"""

import heapq
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from asr.decoding.language_model import Scorer, spread

BLANK = 0
IMPOSSIBLE = -1e4  # instead of minus infinity, where a pronunciation has more phones than there are frames
# Hypotheses so far (natural log) behind the best are dropped; where the beam was full at the frame before, those that
# are further than its last one was, and some more (Kaldi's adaptive beam).
THRESHOLD, SLACK = 22.0, 2.0
SURE = 1.5  # a blank so much (natural log) likelier than any label, priors taken off, is all that there is to a frame
LIKELIEST = 15  # labels that are tried at a frame (docs/trials.md)
SURPRISE = 2.0  # base 10: words that would be dropped though a context made them so much likelier are not looked up
FURTHEST = 10.0  # natural log: texts so much worse than the best that a search found are not looked for
_NONE = -1
_KEY_BITS = 63
_FINE = 2.0**32  # scores that differ by less than one in so many count as equal when they are sorted

Tree = Mapping[str, np.ndarray]  # see tree_of


class Lexicon:
    """A tree of words, spelled in labels of one kind, and how `Running` searches in it.

    On the way to their end, words count as likely as the likeliest that a hypothesis can still become (Ortmanns et al.
    1997): that is taken back when the word is known.

    Args:
        tree: see `tree_of`.
        scores: of each word by itself, base 10.
        columns: of the log-probabilities, those of the labels; the blank is the first.
        silence: a label that may stand between words, any number of times; None: there is none.
        beam: hypotheses that are kept.
        lm_weight, word_score: see BeamConfig.
    """

    def __init__(
        self,
        tree: Tree,
        scores: np.ndarray,
        columns: slice,
        silence: int | None,
        beam: int,
        lm_weight: float,
        word_score: float,
    ) -> None:
        self.columns, self.silence, self.beam = columns, silence, beam
        self.lm_weight, self.word_score = lm_weight, word_score
        self.label, self.children, self.word, self.words = (
            tree[name] for name in ("label", "children", "word", "words")
        )
        self.best = lm_weight * tree["best"]  # of what a node's words score by themselves; nothing at the root
        self.first_child = np.cumsum(self.children) - self.children + 1  # nodes stand in the order of their parents
        self.own = lm_weight * scores[self.word]
        self.surprise = lm_weight * SURPRISE + word_score  # what a word brings at the most, beside its own score
        self.first_word = np.cumsum(self.words) - self.words

    def keys(self, states: np.ndarray, nodes: np.ndarray, labels: np.ndarray, bits: int) -> np.ndarray:
        """Numbers below 2 ** bits that are equal where all three, (n,) each, are."""
        all_nodes, all_labels = len(self.label), self.columns.stop - self.columns.start
        if int(states.max()) >= (1 << bits) // (all_nodes * all_labels) - 1:
            states = np.unique(states, return_inverse=True)[1].reshape(-1)
        return (states * all_nodes + nodes) * all_labels + labels


def tree_of(labels: np.ndarray, lengths: np.ndarray, words: np.ndarray, scores: np.ndarray) -> Tree:
    """The tree of a Lexicon.

    Args:
        labels: of all spellings, one after the other, (all labels,).
        lengths: of each spelling, (spellings,). Those with common beginnings stand together: they are sorted, by
            whatever order of labels.
        words: what each spells, (spellings,).
        scores: of each word by itself, base 10.

    Returns:
        Of each node, the root first: its label, the best score of its words, how many children it has ("children") and
        how many words end there ("words"); and these words ("word").
    """
    starts = np.cumsum(lengths) - lengths
    own = scores[words]
    node = np.zeros(len(words), np.int32)  # that each spelling has come to
    label, parent, best = [np.array([BLANK])], [np.array([_NONE], np.int32)], [np.array([0.0])]
    count = 1
    on, at = np.arange(len(words), dtype=np.int32), node  # spellings that go on, and where they are
    for depth in range(int(lengths.max(initial=0))):
        going = np.flatnonzero(lengths[on] > depth)
        on, at, own = on[going], at[going], own[going]
        said = labels[starts[on] + depth]
        new = np.append(True, (at[1:] != at[:-1]) | (said[1:] != said[:-1]))
        first = np.flatnonzero(new)
        label.append(said[first])
        parent.append(at[first])
        best.append(np.maximum.reduceat(own, first))
        at = np.cumsum(new, dtype=np.int32) + np.int32(count - 1)
        node[on] = at
        count += len(first)
    above = np.concatenate(parent)[1:]
    return {
        "label": np.concatenate(label).astype(np.int64),
        "best": np.concatenate(best),
        "children": np.bincount(above, minlength=count),
        "word": words[np.argsort(node, kind="stable")],
        "words": np.bincount(node, minlength=count),
    }


class Found(NamedTuple):
    """A text that a search has found, by its words, and its score."""

    words: tuple[int, ...]
    score: float


class WordSpan(NamedTuple):
    """A word on the best path: its number, its first frame, and the labels of its frames up to the end of its last."""

    word: int
    start_frame: int
    labels: np.ndarray


class _Frame(NamedTuple):
    """What led to the hypotheses that were kept at a frame.

    Attributes:
        old: of each, which of the frame before it was; label: that it read; word: that ended, or _NONE; text: the
            number of its words so far.
        other: hypotheses that gave way to one of those, as they were alike but for the words before: which one, which
            of the frame before, what word ended, and how much worse they were; the numbers of four arrays.
    """

    old: np.ndarray
    label: np.ndarray
    word: np.ndarray
    text: np.ndarray
    other: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

    def step(self, i: int) -> tuple[int, int, list[tuple[float, int, int]]]:
        """What led to a hypothesis: which one it was, the word that ended, and those that gave way to it, by how much
        worse they were."""
        to, came, word, lost = self.other
        mine = np.flatnonzero(to == i)
        others = sorted(zip(lost[mine].tolist(), came[mine].tolist(), word[mine].tolist(), strict=True))
        return int(self.old[i]), int(self.word[i]), others


class Running:
    """A search in the middle of a segment.

    A hypothesis is where it stands in the tree, the language model's state, and the label of the frame before, which is
    the blank or may go on. Of those alike in all that, what follows is the same: the best one goes on, and the others
    are remembered, for the texts that they stand for.
    """

    def __init__(self, lexicon: Lexicon, scorer: Scorer) -> None:
        self._scorer, self._lexicon = scorer, lexicon
        self._score, self._node = np.zeros(1), np.zeros(1, np.int64)
        self._state, self._last = np.array([scorer.start]), np.array([BLANK])
        self._frames: list[_Frame] = []
        self._text = np.zeros(1, np.int64)  # of each hypothesis, a number for its words so far
        self._width = THRESHOLD  # of the next frame's beam, at the most
        self._above, self._ended = np.array([_NONE]), np.array([_NONE])  # that of all but the last word, and that word

    def read(self, log_probs: np.ndarray) -> None:
        """Take the next frames, (frames, tokens + phones)."""
        for frame in log_probs[:, self._lexicon.columns].astype(np.float64):
            self._read(frame)

    def _read(self, frame: np.ndarray) -> None:
        lexicon, score, node, state, last = self._lexicon, self._score, self._node, self._state, self._last
        if frame[BLANK] > frame[BLANK + 1 :].max() + SURE:
            blanks, none = np.full(len(score), BLANK), np.full(len(score), _NONE)
            self._keep(np.arange(len(score)), blanks, score + frame[BLANK], node, state, none)
            return
        # the same label goes on; or a blank; or, between words, a silence
        same = np.flatnonzero(last != BLANK)
        still = np.flatnonzero((node == 0) & (last != lexicon.silence)) if lexicon.silence is not None else same[:0]
        silence = lexicon.silence or BLANK
        again, blank, paused = score[same] + frame[last[same]], score + frame[BLANK], score[still] + frame[silence]
        floor = max(again.max(initial=-np.inf), blank.max()) - self._width  # what is below will be dropped
        # a next label: not the last one, which would need a blank between; and not one that is hardly heard
        least = np.partition(frame, -LIKELIEST)[-LIKELIEST] if len(frame) > LIKELIEST else -np.inf
        heard = np.where(frame >= least, frame, -np.inf)
        from_ = node[: np.searchsorted(-score, heard.max() - floor)]  # of the best; to others no label brings enough
        whose, child = ranges(lexicon.first_child[from_], lexicon.children[from_])
        label = lexicon.label[child]
        base = score[whose] + heard[label]
        near = np.flatnonzero((base > floor) & (label != last[whose]))
        whose, child, label, base = whose[near], child[near], label[near], base[near] - lexicon.best[node[whose[near]]]
        ahead = base + lexicon.best[child]
        inner = np.flatnonzero(lexicon.children[child])
        floor = max(floor, ahead[inner].max(initial=-np.inf) - self._width)
        inner = inner[ahead[inner] > floor]
        # and the words that end there
        ends = np.flatnonzero((ahead > floor - lexicon.surprise) & (lexicon.words[child] > 0))
        of, place = ranges(lexicon.first_word[child[ends]], lexicon.words[child[ends]])
        hopeful = np.flatnonzero(base[ends[of]] + lexicon.own[place] + lexicon.surprise > floor)
        of, word = ends[of[hopeful]], lexicon.word[place[hopeful]]
        said, after = self._scorer.step(state[whose[of]], word)
        everyone = np.arange(len(score))

        old = np.concatenate([whose[inner], whose[of], same, everyone, still])
        labels = np.concatenate(
            [label[inner], label[of], last[same], np.full(len(everyone), BLANK), np.full(len(still), silence)]
        )
        scores = np.concatenate(
            [ahead[inner], base[of] + lexicon.lm_weight * said + lexicon.word_score, again, blank, paused]
        )
        nodes, states, words = node[old], state[old], np.full(len(old), _NONE)
        ended = slice(len(inner), len(inner) + len(of))
        nodes[: len(inner)], nodes[ended], states[ended], words[ended] = child[inner], 0, after, word
        self._keep(old, labels, scores, nodes, states, words)

    def _keep(
        self,
        old: np.ndarray,
        labels: np.ndarray,
        scores: np.ndarray,
        nodes: np.ndarray,
        states: np.ndarray,
        words: np.ndarray,
    ) -> None:
        """Of what the hypotheses became at a frame, keep the best; `old` tells which one each was (see _Frame)."""
        behind = scores.max() - scores
        near = np.flatnonzero(behind < self._width)
        near = near[_sorted((behind[near] * _FINE).astype(np.int64))[1]]  # the best first
        # sorted by what they are and, those alike, by their scores
        count = len(near)
        bits = count.bit_length()
        keys, rank = _sorted(self._lexicon.keys(states[near], nodes[near], labels[near], _KEY_BITS - bits))
        leads = np.ones(count, bool)
        np.not_equal(keys[1:], keys[:-1], out=leads[1:])
        first = rank[leads]
        winner = np.empty(count, np.int64)
        winner[rank] = first[np.cumsum(leads) - 1]
        best = np.sort(first)[: self._lexicon.beam]  # of those alike, the best; of them all, the best ones
        kept = near[best]
        # those that gave way, and say something else
        goes_on = words[near] == _NONE
        above = np.where(goes_on, self._above[old[near]], self._text[old[near]])
        ended = np.where(goes_on, self._ended[old[near]], words[near])
        differ = (above != above[winner]) | (ended != ended[winner])
        other = np.flatnonzero(differ & (winner <= best[-1]))
        lost, to = near[other], np.searchsorted(best, winner[other])
        others = (to, old[lost], words[lost], scores[near[winner[other]]] - scores[lost])
        text, said = self._text[old[kept]], words[kept]
        text = np.where(said == _NONE, text, _longer(text, said))
        self._above, self._ended = above[best], ended[best]
        self._score, self._node, self._state, self._last = scores[kept], nodes[kept], states[kept], labels[kept]
        full = len(kept) == self._lexicon.beam
        self._width = min(THRESHOLD, self._score[0] - self._score[-1] + SLACK) if full else THRESHOLD
        self._text = text
        came, label, word = (part.astype(np.int32) for part in (old[kept], labels[kept], said))
        self._frames.append(_Frame(came, label, word, text, others))

    def copy(self) -> "Running":
        """The search as it stands now: the two go separate ways. Arrays are never changed, and shared."""
        other = Running(self._lexicon, self._scorer)
        other.__dict__.update(self.__dict__ | {"_frames": self._frames.copy()})
        return other

    def best(self) -> np.ndarray:
        """The label of each frame on the best path so far; the last word may be unfinished."""
        return self._path()[0]

    def words(self) -> list[WordSpan]:
        """The words that have ended on the best path so far, of a lexicon without `silence`."""
        labels, ended = self._path()
        said, changes = np.flatnonzero(labels != BLANK), np.flatnonzero(labels[1:] != labels[:-1]) + 1
        frames = np.array([frame for frame, _ in ended], np.int64)
        ends = np.append(changes, len(labels))[np.searchsorted(changes, frames, side="right")]
        starts = said[np.searchsorted(said, np.append(0, ends[:-1]))] if len(ends) else ends
        spans = zip(ended, starts.tolist(), ends.tolist(), strict=True)
        return [WordSpan(word, start, labels[start:end]) for (_, word), start, end in spans]

    def _path(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The labels of the best path so far, (frames,), and in which frame which word ended."""
        labels, ended = np.zeros(len(self._frames), np.int64), []
        at = 0
        for i in range(len(self._frames) - 1, -1, -1):
            frame = self._frames[i]
            labels[i], word = frame.label[at], int(frame.word[at])
            if word != _NONE:
                ended.append((i, word))
            at = frame.old[at]
        return labels, ended[::-1]

    def finish(self, most: int) -> list[Found]:
        """At most so many texts, the best first; none of unfinished words, if any has none.

        The first is the best that the beam held. The score of another may be that of less than its best path.
        """
        whole = np.flatnonzero(self._node == 0)
        at = whole if len(whole) else np.arange(len(self._node))
        scores = self._score[at] + self._lexicon.lm_weight * self._scorer.finish(self._state[at])
        near = scores >= scores.max() - FURTHEST
        at, scores = at[near], scores[near]
        # Backwards from the end, the best way first. Up to where one hypothesis gave way to another both are what they
        # are; from there on a way takes the one that gave way, and loses what that was worse by.
        ways: list[tuple[float, int, int, tuple[int, ...]]]
        ways = [(-score, len(self._frames), i, ()) for i, score in zip(at.tolist(), scores.tolist(), strict=True)]
        heapq.heapify(ways)
        seen: set[tuple[int, tuple[int, ...]]] = set()
        found: dict[tuple[int, ...], Found] = {}
        steps: dict[tuple[int, int], tuple[int, int, list[tuple[float, int, int]]]] = {}
        most_lost = ways[0][0] + FURTHEST
        while ways and len(found) < most:
            less, t, i, words = heapq.heappop(ways)
            said = (int(self._frames[t - 1].text[i]) if t else 0, words)
            if said in seen:
                continue
            seen.add(said)
            while t:
                t -= 1
                step = steps.get((t, i))
                if step is None:
                    step = steps[t, i] = self._frames[t].step(i)
                old, word, others = step
                for lost, came, ended in others:
                    if less + lost > most_lost:
                        break
                    heapq.heappush(ways, (less + lost, t, came, words if ended == _NONE else (ended, *words)))
                words = words if word == _NONE else (word, *words)
                i = old
            found.setdefault(words, Found(words, -less))
        return list(found.values())


def ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """first[i], first[i] + 1, ..., count[i] of them for each i: which i each is of, and the numbers."""
    whose = np.repeat(np.arange(len(count)), count)
    return whose, np.arange(len(whose)) + (first - (np.cumsum(count) - count))[whose]


def _sorted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that leave bits for their places, sorted, and the place where each was: numpy sorts integers fastest."""
    bits = len(keys).bit_length()
    both = (keys << bits) | np.arange(len(keys))
    both.sort()
    return both >> bits, both & ((1 << bits) - 1)


def _longer(texts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The numbers of texts with one more word, int64: two texts have one number by a chance of 2 ** -64."""
    mixed = spread(texts + words + 1)
    return (mixed ^ (mixed >> np.uint64(32))).view(np.int64)
