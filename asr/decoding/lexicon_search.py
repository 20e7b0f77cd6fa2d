"""The search for the words of a lexicon, by labels of one kind: flashlight-text's, with what it needs around it."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from asr.decoding.hot_words import Phrases

BLANK = 0
IMPOSSIBLE = -1e4  # instead of minus infinity, where a pronunciation has more phones than there are frames
_THRESHOLD = 15.0  # hypotheses so far (natural log) behind the best are dropped
_LIKELIEST = 10  # labels that are tried at a frame: a third of the work, and no more errors (docs/trials.md)


class Lexicon:
    """Words as labels of one kind, and how to search for them."""

    def __init__(
        self,
        entries: Sequence[tuple[int, list[int]]],
        scores: Sequence[float],
        columns: slice,
        silence: int | None,
        beam: int,
        lm_weight: float,
        word_score: float,
    ) -> None:
        from flashlight.lib.text.decoder import CriterionType, LexiconDecoderOptions, SmearingMode, Trie

        labels = columns.stop - columns.start
        self.columns = columns
        if silence is None:  # flashlight reads one between words all the same: `Running` adds a column of nothing
            silence, labels = labels, labels + 1
        self._silence, self.labels = silence, labels
        self._trie = Trie(labels, silence)
        with quiet():  # of more than six words that sound alike, it says that it keeps six
            for word, spelled in entries:
                self._trie.insert(spelled, word, scores[word])
        self._trie.smear(SmearingMode.MAX)
        self._options = LexiconDecoderOptions(
            beam_size=beam,
            beam_size_token=min(_LIKELIEST, labels),
            beam_threshold=_THRESHOLD,
            lm_weight=lm_weight,
            word_score=word_score,
            unk_score=-float("inf"),
            sil_score=0.0,
            log_add=False,
            criterion_type=CriterionType.CTC,
        )

    def open(self, scorer: Any) -> Any:
        """A search at the start of a segment; it refers to the scorer, and to this, without owning them."""
        from flashlight.lib.text.decoder import LexiconDecoder

        search = LexiconDecoder(self._options, self._trie, scorer, self._silence, BLANK, -1, [], False)
        search.decode_begin()
        return search


class Running(NamedTuple):
    """A search in the middle of a segment, the language model that it refers to, and the columns that it reads.

    Of labels it reads one more than there are columns, if none of them is a silence.
    """

    search: Any
    scorer: Any
    columns: slice
    labels: int

    def read(self, log_probs: np.ndarray) -> None:
        """Take the next frames, (frames, tokens + phones)."""
        block = np.full((len(log_probs), self.labels), IMPOSSIBLE, np.float32)
        given = log_probs[:, self.columns]
        block[:, : given.shape[1]] = given
        self.search.decode_step(block.ctypes.data, *block.shape)

    def finish(self) -> list[Any]:
        """What flashlight found, the best first."""
        self.search.decode_end()
        found = self.search.get_all_final_hypothesis()  # in no order where scores are equal
        return sorted(found, key=lambda h: (-h.score, h.words))


def score(lm: Any, words: Sequence[int]) -> float:
    """What a language model says of a whole text: the same to the last bit, however a search came to it."""
    state, total = lm.start(False), 0.0
    for word in words:
        state, score = lm.score(state, word)
        total += score
    return total + lm.finish(state)[1]


def with_phrases(lm: Any, phrases: Phrases) -> Any:
    """A language model that adds to another one's scores what phrases are worth; for one segment."""
    from flashlight.lib.text.decoder import LM

    class WithPhrases(LM):
        def __init__(self) -> None:
            super().__init__()
            self._nodes: dict[Any, int] = {}  # of states within a phrase

        def start(self, start_with_nothing: bool) -> Any:
            return lm.start(start_with_nothing)

        def score(self, state: Any, word: int) -> tuple[Any, float]:
            after, score = lm.score(state, word)
            node, bonus = phrases.step(self._nodes.get(state, 0), word)
            if node:
                self._nodes[after] = node
            return after, score + bonus

        def finish(self, state: Any) -> tuple[Any, float]:
            after, score = lm.finish(state)
            return after, score - phrases.lent(self._nodes.get(state, 0))

    return WithPhrases()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """KenLM draws a progress bar on the process's stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
