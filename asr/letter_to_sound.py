"""How a word that no dictionary has may be said: letters to phones, learned from words whose phones are known.

Each letter stands for no, one or two phones: expectation maximisation finds which, over all ways to share the phones of
a word out among its letters. N-grams of letters with their phones then tell how other words are said (Bisani and Ney
2008, "Joint-sequence models for grapheme-to-phoneme conversion", with graphones of one letter).
"""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from asr.decoding.language_model import Automaton
from asr.decoding.ngram import estimate

_MOST_PHONES = 2  # to a letter
_ORDER = 6
_ROUNDS, _LEARNED_FROM = 6, 12_000  # of expectation maximisation: so many words are enough
_BEAM, _SECOND = 24, 0.4  # a second way to say a word, if it is at least so likely as the first
_BETWEEN = "|"  # a letter and its phones, which are parted by "_"
_RARE = 1e-6

Chunk = tuple[str, ...]  # the phones of a letter


class LetterToSound:
    """Learns from words and their phones, parted by spaces; those with more phones than letters allow are left out."""

    def __init__(self, known: Iterable[tuple[str, str]]) -> None:
        pairs = [(word, tuple(phones.split())) for word, phones in known]
        pairs = [(word, phones) for word, phones in pairs if word and len(phones) <= _MOST_PHONES * len(word)]
        likely = _learn(random.Random(1).sample(pairs, min(len(pairs), _LEARNED_FROM)))
        lines = [" ".join(map(_graphone, word, _share_out(word, phones, likely))) for word, phones in pairs]
        model = estimate(lines, order=_ORDER)
        self._automaton = Automaton(model)
        options: dict[str, list[str]] = defaultdict(list)
        for graphone in model.lexicon:
            options[graphone[0]].append(graphone)
        self._options = {letter: (names, self._automaton.numbers(names)) for letter, names in options.items()}

    def ways(self, word: str) -> list[str]:
        """The likeliest ways to say it, one or two, phones parted by spaces; none with a letter that was never seen."""
        if not word or any(letter not in self._options for letter in word):
            return []
        scores, states = np.zeros(1), np.array([self._automaton.start])
        said: list[Chunk] = [()]
        for letter in word:
            names, numbers = self._options[letter]
            rows, columns = np.divmod(np.arange(len(said) * len(names)), len(names))
            more, after = self._automaton.step(states[rows], numbers[columns])
            total = scores[rows] + more
            best = np.argsort(-total, kind="stable")[:_BEAM]
            said = [said[i] + _phones(names[j]) for i, j in zip(rows[best], columns[best], strict=True)]
            scores, states = total[best], after[best]
        scores = scores + self._automaton.finish(states)
        found: dict[Chunk, float] = {}
        for i in np.argsort(-scores, kind="stable").tolist():
            if said[i]:
                found.setdefault(said[i], float(scores[i]))
        first, *others = [*found.items()] or [((), 0.0)]
        second = [way for way, score in others[:1] if score > first[1] + math.log10(_SECOND)]
        return [" ".join(way) for way in (first[0], *second) if way]


def _graphone(letter: str, phones: Chunk) -> str:
    return letter + _BETWEEN + "_".join(phones)


def _phones(graphone: str) -> Chunk:
    return tuple(graphone[2:].split("_")) if len(graphone) > 2 else ()


def _learn(pairs: Sequence[tuple[str, Chunk]]) -> Mapping[tuple[str, Chunk], float]:
    """How likely a letter stands for some phones, over all ways to share them out."""
    likely: Mapping[tuple[str, Chunk], float] = defaultdict(lambda: 1.0)
    for _ in range(_ROUNDS):
        counts: dict[tuple[str, Chunk], float] = defaultdict(float)
        for word, phones in pairs:
            chunks = _chunks(word, phones)
            ahead = _sums(word, chunks, likely)
            if not ahead[-1][-1]:
                continue
            back = [1.0 if j == len(phones) else 0.0 for j in range(len(phones) + 1)]
            for i in range(len(word) - 1, -1, -1):
                before = [0.0] * len(back)
                for j, chunk in chunks[i]:
                    share = likely[word[i], chunk] * back[j + len(chunk)]
                    before[j] += share
                    counts[word[i], chunk] += ahead[i][j] * share / ahead[-1][-1]
                back = before
        totals: dict[str, float] = defaultdict(float)
        for (letter, _), count in counts.items():
            totals[letter] += count
        likely = defaultdict(lambda: _RARE, {key: count / totals[key[0]] for key, count in counts.items()})
    return likely


def _chunks(word: str, phones: Chunk) -> list[list[tuple[int, Chunk]]]:
    """For each letter, the phones that it may stand for, with the place at which they begin."""
    n, most = len(phones), _MOST_PHONES
    found = []
    for i in range(len(word)):
        first = range(max(0, n - most * (len(word) - i)), min(n, most * i) + 1)
        found.append([(j, phones[j : j + k]) for j in first for k in range(min(most, n - j) + 1)])
    return found


def _sums(
    word: str, chunks: list[list[tuple[int, Chunk]]], likely: Mapping[tuple[str, Chunk], float]
) -> list[list[float]]:
    """For each number of letters, how likely they stand for so many of the phones."""
    width = 1 + max(j + len(chunk) for j, chunk in chunks[-1])
    rows = [[1.0] + [0.0] * (width - 1)]
    for letter, options in zip(word, chunks, strict=True):
        row = [0.0] * width
        for j, chunk in options:
            row[j + len(chunk)] += rows[-1][j] * likely[letter, chunk]
        rows.append(row)
    return rows


def _share_out(word: str, phones: Chunk, likely: Mapping[tuple[str, Chunk], float]) -> list[Chunk]:
    """The likeliest way: the phones of each letter."""
    best: list[tuple[float, list[Chunk]] | None] = [(0.0, []), *itertools.repeat(None, len(phones))]
    for letter, options in zip(word, _chunks(word, phones), strict=True):
        row: list[tuple[float, list[Chunk]] | None] = [None] * len(best)
        for j, chunk in options:
            if (old := best[j]) is not None:
                score, end = old[0] + math.log(max(likely[letter, chunk], _RARE)), j + len(chunk)
                if (there := row[end]) is None or score > there[0]:
                    row[end] = score, [*old[1], chunk]
        best = row
    assert best[-1] is not None
    return best[-1][1]
