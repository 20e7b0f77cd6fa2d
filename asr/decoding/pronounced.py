"""The words of a lexicon by their sounds, and how likely what was heard is that of a text."""

import itertools
from collections.abc import Sequence

import numpy as np

from asr.decoding.ctc import log_likelihoods
from asr.decoding.lexicon_search import IMPOSSIBLE
from asr.lexicon import Pronunciations

NO_WORD = -1
# A word without a pronunciation: any phones will do, so many for a letter, each a little worse than the likeliest one.
_PHONES_PER_LETTER, _ANY_PHONE = 0.85, -1.0
_WAYS = 6  # of a word's pronunciations, that are tried


class Pronounced:
    """Pronunciations as numbers of phones, sorted as Lexicon wants them.

    Args:
        pronunciations: of the words of a lexicon.
        place: the number of each of them here; NO_WORD, if it has none.
        phones: those that the network writes, their blank first; what it does not write cannot be said.
        words: those that have numbers here.

    Attributes:
        phones: of all pronunciations, (all phones,); lengths: of each; words: whose it is, both (pronunciations,).
        complete: whether all words have one.
    """

    def __init__(
        self, pronunciations: Pronunciations, place: np.ndarray, phones: Sequence[str], words: Sequence[str]
    ) -> None:
        self._any_phone, self._spelled = len(phones), words
        number = {phone: i for i, phone in enumerate(phones)}
        codes = np.array([number.get(name, 0) for name in pronunciations.names], np.int64)[pronunciations.phones]
        starts = np.cumsum(pronunciations.lengths) - pronunciations.lengths
        self.phones, self.lengths, self.words = codes, pronunciations.lengths, place[pronunciations.words]
        if self.words.min(initial=0) == NO_WORD or not codes.all():
            kept = (self.words != NO_WORD) & (np.minimum.reduceat(codes, starts) > 0)
            self.phones = codes[np.repeat(kept, pronunciations.lengths)]
            self.lengths, self.words = pronunciations.lengths[kept], self.words[kept]
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._order = np.argsort(self.words, kind="stable")
        self._sorted = self.words[self._order]
        self.complete = np.count_nonzero(np.diff(self._sorted, prepend=NO_WORD)) == len(words)

    def log_likelihoods(self, readings: Sequence[np.ndarray], texts: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Of texts, by numbers of words, in all their pronunciations: (frames, phones) each -> (readings, texts)."""
        sounds = {word: self._of(word) for word in set(itertools.chain.from_iterable(texts))}
        said = [[sounds[word] for word in words] for words in texts]
        return np.maximum(log_likelihoods([self._with_any_phone(reading) for reading in readings], said), IMPOSSIBLE)

    def _with_any_phone(self, log_probs: np.ndarray) -> np.ndarray:
        """By its two names, behind the others."""
        anything = log_probs[:, 1:].max(axis=1, keepdims=True) + _ANY_PHONE
        return np.concatenate([log_probs, anything, anything], axis=1)

    def _of(self, word: int) -> list[list[int]]:
        """The ways to say a word, each once."""
        found = self._order[slice(*np.searchsorted(self._sorted, (word, word + 1)))]
        if len(found):
            ways = [self.phones[self._starts[i] : self._starts[i] + self.lengths[i]].tolist() for i in found]
            return [way for i, way in enumerate(ways) if way not in ways[:i]][:_WAYS]
        count = max(round(_PHONES_PER_LETTER * len(self._spelled[word])), 1)
        # of any phones, two names: CTC parts equal neighbours by a blank
        return [[self._any_phone + i % 2 for i in range(count)]]
