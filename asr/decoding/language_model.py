"""An n-gram model as an automaton that a search walks with many hypotheses at a time."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from asr.decoding.hot_words import Phrases
from asr.decoding.ngram import END, LOG10, START, UNKNOWN, Grams, NgramModel


class Automaton:
    """Its states are the contexts of an n-gram model; state 0 is none (Allauzen, Mohri and Roark 2003).

    A context that tells nothing of the next word is the same state as the longest end of it that does, so that
    hypotheses meet. Logarithms have base 10.

    Attributes:
        start: the state after the start of a sentence.
        unigrams: the score of each word of the lexicon by itself, float64 (lexicon,).

    Args:
        model: the n-grams.
        lexicon: words, by their place in it; those that the model does not know are <unk>.
    """

    def __init__(self, model: NgramModel, lexicon: Sequence[str]) -> None:
        orders = model.orders
        self._words = len(model.words)
        number = {word: i for i, word in enumerate(model.words)}
        self._numbers = np.array([number.get(word, number[UNKNOWN]) for word in lexicon])
        self._end = number[END]

        sizes = [len(grams) for grams in orders[:-1]] or [0]
        first = np.cumsum([1, *sizes])  # of each order's contexts, among states
        targets: list[np.ndarray] = []  # of each order's n-grams, the state that they lead to
        lower: list[np.ndarray] = []  # of each order's contexts, the state of their end
        for n, grams in enumerate(orders):
            shorter = targets[-1][grams.suffix] if n else np.zeros(len(grams), np.int64)
            if n + 1 < len(orders):
                tells = (grams.log_backoff != 0) | (np.bincount(orders[n + 1].prefix, minlength=len(grams)) > 0)
                lower.append(shorter)
                shorter = np.where(tells, first[n] + np.arange(len(grams)), shorter)
            targets.append(shorter)
        backoffs = [np.zeros(1), *(grams.log_backoff / LOG10 for grams in orders[:-1])]
        self._backoff, self._lower = np.concatenate(backoffs), np.concatenate([np.zeros(1, np.int64), *lower])
        self._unigrams, self._after = _scores(orders[0]), targets[0]
        # Arcs of all other orders, sorted: of state and word, as one number.
        keys = [(first[n] + grams.prefix) * self._words + grams.word for n, grams in enumerate(orders[1:])]
        self._keys = np.concatenate([*keys, [np.iinfo(np.int64).max]])
        self._scores = np.concatenate([*(_scores(grams) for grams in orders[1:]), [0.0]])
        self._targets = np.concatenate([*targets[1:], [0]])
        self.start = int(targets[0][number[START]])
        self.unigrams = self._unigrams[self._numbers]

    def step(self, states: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read a word of the lexicon in each state: its score, float64 (n,), and the state after it, int64 (n,)."""
        return self._read(states, self._numbers[words])

    def finish(self, states: np.ndarray) -> np.ndarray:
        """The score of the end of the sentence in each state, float64 (n,)."""
        return self._read(states, np.full(len(states), self._end))[0]

    def _read(self, states: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, after = np.zeros(len(states)), np.empty(len(states), np.int64)
        open_ = np.arange(len(states))
        while len(open_):
            place = np.searchsorted(self._keys, states * self._words + words)
            known = self._keys[place] == states * self._words + words
            scores[open_[known]] += self._scores[place[known]]
            after[open_[known]] = self._targets[place[known]]
            bare = ~known & (states == 0)
            scores[open_[bare]] += self._unigrams[words[bare]]
            after[open_[bare]] = self._after[words[bare]]
            left = ~known & ~bare
            open_, states, words = open_[left], states[left], words[left]
            scores[open_] += self._backoff[states]
            states = self._lower[states]
        return scores, after


class Scorer:
    """An n-gram model and phrases that are likelier than it thinks, as one automaton.

    Args:
        ngrams: the model.
        phrases: what they are worth, in its base-10 logarithms.
    """

    def __init__(self, ngrams: Automaton, phrases: Mapping[tuple[int, ...], float]) -> None:
        self._ngrams, self._phrases = ngrams, Phrases(phrases)
        self._hot = np.array(sorted({word for words in phrases for word in words}), np.int64)
        self._nodes = len(self._phrases)
        self.start = ngrams.start * self._nodes

    def step(self, states: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As the Automaton's."""
        contexts, nodes = np.divmod(states, self._nodes)
        scores, after = self._ngrams.step(contexts, words)
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
    return np.maximum(grams.log_prob / LOG10, -99.0)
