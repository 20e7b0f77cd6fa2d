"""An n-gram model as an automaton that a search walks with many hypotheses at a time."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from asr.cache import kept
from asr.decoding.hot_words import Phrases
from asr.decoding.ngram import END, LOG10, START, UNKNOWN, Grams, NgramModel
from asr.decoding.ngram_files import read_ngrams

_LOWER = -1  # an arc's target: where the same word leads from the state below


class Automaton:
    """Its states are the contexts of an n-gram model; state 0 is none (Allauzen, Mohri and Roark 2003).

    A context that tells nothing of the next word is the same state as the longest end of it that does, so that
    hypotheses meet. Logarithms have base 10.

    Args:
        model: its words by themselves may be enough;
        whole: then gives the whole model, when it is first needed, which may be ready before.

    Attributes:
        lexicon: the words that can be said.
        unigrams: the score of each of the model's words by itself.
    """

    def __init__(self, model: NgramModel, whole: "Callable[[], Arcs] | None" = None) -> None:
        self._names, self.lexicon = model.words, model.lexicon
        self._first = len(model.words) - len(self.lexicon)  # what the model calls the first word of the lexicon
        self.unigrams = _scores(model.orders[0])
        self._whole = whole or (lambda: Arcs.of(model))

    @cached_property
    def _arcs(self) -> "Arcs":
        return self._whole()

    @cached_property
    def _number(self) -> dict[str, int]:
        return dict(zip(self._names, range(len(self._names)), strict=True))

    @property
    def start(self) -> int:
        """The state after the start of a sentence."""
        return self._arcs.start

    def numbers(self, words: Sequence[str]) -> np.ndarray:
        """What the model calls words, int64 (words,): those that it does not know, <unk>."""
        if words is self.lexicon:
            return np.arange(self._first, self._first + len(words))
        unknown = itertools.repeat(self._number[UNKNOWN])
        return np.fromiter(map(self._number.get, words, unknown), np.int64, len(words))

    def finish(self, states: np.ndarray) -> np.ndarray:
        """The score of the end of the sentence in each state, float64 (n,)."""
        return self.step(states, np.full(len(states), self._arcs.end))[0]

    def step(self, states: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read a word, as the model calls it, in each state: its score, float64 (n,), and the next state, int64."""
        return self._arcs.step(states, words)


class Arcs:
    """The states of an Automaton, and where words lead from each.

    Attributes:
        start: the state after the start of a sentence.
        end: what the model calls the end of one.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._backoff, self._lower, self._unigrams, self._after, self._keys, self._scores, self._targets = (
            arrays[name] for name in ("backoff", "lower", "unigrams", "after", "keys", "scores", "targets")
        )
        self._words = len(self._unigrams)
        self.start, self.end = arrays["sentence"].tolist()

    @classmethod
    def of(cls, model: NgramModel) -> "Arcs":
        """Those of a model."""
        return cls(_arcs(model))

    @classmethod
    def read(cls, path: Path, words: NgramModel) -> "Arcs":
        """Those of a file, of which `read_words` gave the words; kept for the next process (see asr.cache.kept).

        Raises:
            ModelError: it cannot be read.
        """
        return cls(kept("arcs", [path], lambda: _arcs(read_ngrams(path, words))))

    def step(self, states: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Automaton."""
        scores, after = np.zeros(len(states)), np.empty(len(states), np.int64)
        open_, scored = np.arange(len(states)), np.zeros(len(states), bool)
        while len(open_):
            wanted = states * self._words + words
            place = np.searchsorted(self._keys, wanted)
            known, bare = self._keys[place] == wanted, states == 0
            bare &= ~known
            counts = known & ~scored
            scores[open_[counts]] += self._scores[place[counts]]
            scored |= known
            target = np.where(known, self._targets[np.minimum(place, len(self._targets) - 1)], _LOWER)
            target[bare] = self._after[words[bare]]
            counts = bare & ~scored
            scores[open_[counts]] += self._unigrams[words[counts]]
            found = target != _LOWER
            after[open_[found]] = target[found]
            left = ~found
            open_, states, words, scored = open_[left], states[left], words[left], scored[left]
            scores[open_[~scored]] += self._backoff[states[~scored]]
            states = self._lower[states].astype(np.int64)
        return scores, after


def _arcs(model: NgramModel) -> dict[str, np.ndarray]:
    orders, words = model.orders, len(model.words)
    contexts = orders[:-1] or orders  # words by themselves at the least
    first = np.cumsum([1, *map(len, contexts)], dtype=np.int32)  # of each order's contexts, among states
    targets: list[np.ndarray] = []  # of each order's n-grams that are contexts, the state that they lead to
    lower: list[np.ndarray] = [np.zeros(1, np.int32)]  # of each order's contexts, the state of their end
    for n, grams in enumerate(contexts):
        shorter = targets[-1][grams.suffix] if n else np.zeros(len(grams), np.int32)
        lower.append(shorter)
        tells = grams.log_backoff != 0
        if n + 1 < len(orders):
            tells[orders[n + 1].prefix] = True
        targets.append(np.where(tells, np.arange(first[n], first[n + 1], dtype=np.int32), shorter))
    backoffs = [np.asarray(grams.log_backoff / LOG10, np.float32) for grams in contexts]
    # Arcs of all other orders, sorted: of state and word, as one number. Where those of the highest order lead to
    # is what the order below says.
    keys = np.empty(sum(map(len, orders[1:])) + 1, np.int64)
    keys[-1] = np.iinfo(np.int64).max
    place = 0
    for n, grams in enumerate(orders[1:]):
        those = keys[place : place + len(grams)]
        np.add(grams.prefix, first[n], out=those)
        those *= words
        those += grams.word
        place += len(grams)
    return {
        "backoff": np.concatenate([np.zeros(1, np.float32), *backoffs]),
        "lower": np.concatenate(lower),
        "unigrams": _scores(orders[0]),
        "after": targets[0],
        "keys": keys,
        "scores": np.concatenate([*(_scores(grams) for grams in orders[1:]), np.zeros(1, np.float32)]),
        "targets": np.concatenate([*targets[1:], np.full(1, _LOWER, np.int32)]),
        "sentence": np.array([targets[0][model.words.index(START)], model.words.index(END)], np.int64),
    }


class Scorer:
    """An n-gram model and phrases that are likelier than it thinks, as one automaton over the words of a lexicon.

    Args:
        ngrams: the model.
        words: what it calls those of the lexicon (see `Automaton.numbers`).
        phrases: what they are worth, in its base-10 logarithms; of places in the lexicon.
    """

    def __init__(self, ngrams: Automaton, words: np.ndarray, phrases: Mapping[tuple[int, ...], float]) -> None:
        self._ngrams, self._words, self._phrases = ngrams, words, Phrases(phrases)
        self._hot = np.array(sorted({word for words in phrases for word in words}), np.int64)
        self._nodes = len(self._phrases)

    @property
    def start(self) -> int:
        """The state at the start."""
        return self._ngrams.start * self._nodes

    def step(self, states: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As the Automaton's, of places in the lexicon."""
        contexts, nodes = np.divmod(states, self._nodes)
        scores, after = self._ngrams.step(contexts, self._words[words])
        after *= self._nodes
        if self._nodes > 1:
            for i in np.flatnonzero((nodes > 0) | np.isin(words, self._hot)).tolist():
                node, bonus = self._phrases.step(int(nodes[i]), int(words[i]))
                scores[i] += bonus
                after[i] += node
        return scores, after

    def finish(self, states: np.ndarray) -> np.ndarray:
        """As the Automaton's; of phrases that have not ended nothing is left."""
        contexts, nodes = np.divmod(states, self._nodes)
        return self._ngrams.finish(contexts) - np.array([self._phrases.lent(node) for node in nodes.tolist()])

    def texts(self, texts: Iterable[Sequence[int]]) -> np.ndarray:
        """The scores of whole texts, ends included: float64 (texts,)."""
        rows = list(texts)
        lengths = np.array([len(text) for text in rows], np.int64)
        words = np.zeros((len(rows), max(lengths, default=0)), np.int64)
        for row, text in zip(words, rows, strict=True):
            row[: len(text)] = text
        scores, states = np.zeros(len(rows)), np.full(len(rows), self.start)
        for depth, said in enumerate(words.T):
            on = np.flatnonzero(lengths > depth)
            found, states[on] = self.step(states[on], said[on])
            scores[on] += found
        return scores + self.finish(states)


def _scores(grams: Grams) -> np.ndarray:
    scores = np.multiply(grams.log_prob, 1 / LOG10, dtype=np.float32)
    return np.maximum(scores, -99.0, out=scores)
