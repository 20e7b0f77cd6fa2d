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

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2 ** 64 divided by the golden ratio (Knuth's multiplicative hashing)
_FILTER_BITS = 12  # to a key, at the least: of keys that are not there one in twelve has to be looked for


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
        self._backoff, self._lower = arrays["backoff"], arrays["lower"]  # of each state
        self._unigrams, self._after = arrays["unigrams"], arrays["after"]  # of each word
        self._keys, self._scores, self._targets = arrays["keys"], arrays["scores"], arrays["targets"]  # of each arc
        self._filter = arrays["filter"]
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
        contexts = []  # of each order, the longest first; 0 where there is none so long
        while states.any():
            contexts.append(states)
            states = self._lower[states].astype(np.int64)
        scores, after = self._unigrams[words].astype(np.float64), self._after[words].astype(np.int64)
        for states in reversed(contexts):
            scores += self._backoff[states]
            keys = states * self._words + words
            at = np.flatnonzero(_may_hold(self._filter, keys))
            wanted = keys[at]
            place = np.searchsorted(self._keys, wanted)
            known = self._keys[place] == wanted
            at, place = at[known], place[known]
            scores[at] = self._scores[place]
            leads = place < len(self._targets)  # those of the highest order lead where the word does without them
            after[at[leads]] = self._targets[place[leads]]
        return scores, after


def _filter_of(keys: np.ndarray) -> np.ndarray:
    """A set of bits, (2 ** n / 8,) uint8, by which most keys that are not among these are known (Bloom 1970)."""
    bits = max(int(len(keys) * _FILTER_BITS - 1).bit_length(), 3)
    there = np.zeros(1 << bits, bool)
    there[_bit(keys, bits)] = True
    return np.packbits(there, bitorder="little")


def _may_hold(filter_: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether keys, int64, may be among those of a filter: (n,) of 0 and 1."""
    bit = _bit(keys, (8 * len(filter_)).bit_length() - 1)
    return filter_[bit >> 3] >> (bit & 7) & 1


def _bit(keys: np.ndarray, bits: int) -> np.ndarray:
    return (spread(keys) >> np.uint64(64 - bits)).view(np.int64)


def spread(numbers: np.ndarray) -> np.ndarray:
    """Numbers, int64, as others, uint64, that are spread over all that there are: no two become one."""
    return numbers.view(np.uint64) * _ODD


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
    # Arcs of all other orders, sorted: of state and word, as one number.
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
        "targets": np.concatenate([np.zeros(0, np.int32), *targets[1:]]),
        "filter": _filter_of(keys[:-1]),
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
        if self._nodes == 1:
            return self._ngrams.step(states, self._words[words])
        contexts, nodes = np.divmod(states, self._nodes)
        scores, after = self._ngrams.step(contexts, self._words[words])
        after *= self._nodes
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
