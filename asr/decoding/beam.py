"""Beam search: the words of a lexicon that the network and an n-gram language model together find likeliest."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from asr.decoding import Best, Hypothesis, TokenSpan
from asr.decoding.hot_words import Phrases, check_hot_words
from asr.errors import ConfigError, ModelError

_BLANK = 0
_SPACE = " "
_THRESHOLD = 20.0  # hypotheses so far (natural log) behind the best are dropped
_COMMON_WORDS = 1000  # on the way to their end, hot words count as no more likely than the least of so many words
# An utterance that does not end is committed word by word, so that cost and memory stay bounded: each 60 s
# (of 40 ms frames) all but the last 10 s; endpointing cuts sooner.
_COMMIT_FRAMES = 1500
_LOOKBACK_FRAMES = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamConfig:
    """How to search; weight and score were tuned on 220 utterances of three dev sets, at 32 % CER: tune again.

    Attributes:
        beam: hypotheses that are kept at each frame.
        lm_weight: of the language model's log-probabilities, base 10 as KenLM's are, against the network's, base e.
        word_score: added for each word; more of it, more words.
        nbest: hypotheses that are told at the end of a segment.
        hot_words: phrases to expect, with what each adds to the score (natural log) of a text that has it.
    """

    beam: int = 100
    lm_weight: float = 1.5
    word_score: float = 0.5
    nbest: int = 1
    hot_words: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("beam", "nbest"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must be at least 1")
        if not self.lm_weight >= 0:
            raise ConfigError(f"lm_weight = {self.lm_weight!r}: must not be negative")
        if self.hot_words and not self.lm_weight:
            raise ConfigError("hot words act through the language model: lm_weight must be above 0")


class BeamSearch:
    """A language model and a lexicon for one vocabulary, shared by all decoders; call it for a new one.

    Args:
        model: an n-gram model that KenLM reads: ARPA, also gzipped, or KenLM's binary.
        words: the lexicon; what `tokens` cannot spell is left out.
        tokens: the network's vocabulary: single characters, one of them the space; the blank is token 0.
        config: how to search.

    Raises:
        ConfigError: the vocabulary has no space, or spells no word of the lexicon, or not some hot word.
        ModelError: the language model cannot be read.
    """

    def __init__(self, model: Path, words: Sequence[str], tokens: Sequence[str], config: BeamConfig) -> None:
        from flashlight.lib.text.decoder import (
            CriterionType,
            LexiconDecoder,
            LexiconDecoderOptions,
            SmearingMode,
            Trie,
        )
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary

        index = {token: i for i, token in enumerate(tokens) if i != _BLANK}
        spelled = [word for word in words if word and index.keys() >= set(word)]
        if _SPACE not in index or not spelled:
            reason = "spells no word of the lexicon" if _SPACE in index else "has no space"
            raise ConfigError(f"beam search: the vocabulary of {len(tokens)} tokens {reason}")
        hot = {words: boost / config.lm_weight for words, boost in check_hot_words(config.hot_words, index).items()}
        hot_words: dict[str, float] = {}  # the most that each may bring
        for words, boost in hot.items():
            hot_words |= {word: max(boost, hot_words.get(word, 0.0)) for word in words}
        known = set(spelled)
        spelled = [*spelled, *(word for word in hot_words if word not in known)]  # in one order in every process
        dictionary = Dictionary()
        for word in spelled:
            dictionary.add_entry(word)
        try:
            with _silence():
                lm = KenLM(str(model), dictionary)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{model}: not a readable language model ({reason}); `asr train-lm` makes one") from error

        # A word ends with a space, so "to day" needs the network to write one; within a word, hypotheses are
        # charged for the likeliest word that they can still become.
        space = index[_SPACE]
        trie = Trie(len(tokens), space)
        context = lm.start(True)
        scores = [lm.score(context, i)[1] for i in range(len(spelled))]
        # More would push all other words with a hot word's first letters out of the search, or in.
        common = sorted(scores)[-_COMMON_WORDS:][0]
        for i, (word, score) in enumerate(zip(spelled, scores, strict=True)):
            if word in hot_words:
                score = max(score, min(score + hot_words[word], common))
            trie.insert([*(index[c] for c in word), space], i, score)
        trie.smear(SmearingMode.MAX)
        options = LexiconDecoderOptions(
            beam_size=config.beam,
            beam_size_token=len(tokens),
            beam_threshold=_THRESHOLD,
            lm_weight=config.lm_weight,
            word_score=config.word_score,
            unk_score=-float("inf"),
            sil_score=0.0,
            log_add=False,
            criterion_type=CriterionType.CTC,
        )
        self.nbest = config.nbest
        self.space, self.vocab_size = space, len(tokens)
        self._kept = (lm, trie)  # the decoders refer to them without owning them
        numbers = {word: i for i, word in enumerate(spelled)}
        phrases = Phrases({tuple(numbers[w] for w in words): boost for words, boost in hot.items()}) if hot else None

        def start() -> Any:
            scorer = lm if phrases is None else _with_phrases(lm, phrases)
            return LexiconDecoder(options, trie, scorer, space, _BLANK, -1, [], False), scorer

        self._start = start

    def __call__(self) -> "BeamDecoder":
        return BeamDecoder(self)

    def start(self) -> tuple[Any, Any]:
        """A search at the start of a segment, and the language model that it refers to without owning it."""
        search, scorer = self._start()
        search.decode_begin()
        return search, scorer


def _with_phrases(lm: Any, phrases: Phrases) -> Any:
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


class BeamDecoder:
    """Beam search of one segment, block by block (see asr.decoding.Decoder)."""

    shared = ("_search", "_running")  # not of the state that asr.snapshot keeps: the blocks are searched again

    def __init__(self, search: BeamSearch) -> None:
        self.written: list[TokenSpan] = []  # committed
        self._search = search
        self._first = 0  # the first frame that is not committed
        self._blocks: list[np.ndarray] = []  # the frames from there on
        self._frames = 0  # in the blocks
        # A search that has read the blocks, and its language model; None in a copy that has not been used yet.
        self._running: tuple[Any, Any] | None = None

    def accept(self, log_probs: np.ndarray, best: Best | None = None) -> None:
        """Take the next frames, (frames, vocabulary), also none; the best ones alone do not help here."""
        while len(log_probs):
            block = np.array(log_probs[: _COMMIT_FRAMES - self._frames], np.float32, order="C")
            log_probs = log_probs[len(block) :]
            _read(self._search_so_far()[0], block)
            self._blocks.append(block)
            self._frames += len(block)
            if self._frames == _COMMIT_FRAMES:
                self._commit()

    def tokens(self) -> list[TokenSpan]:
        """The best tokens so far; the last word may be unfinished."""
        return self.written + self.pending()

    def finish(self) -> list[Hypothesis]:
        """End the segment: whole words only; the best hypothesis first, at least one."""
        running, _scorer = self._search_so_far()  # which must live as long
        self._running = None
        # The last word has no space after it. One more frame, in which a space costs as little as none.
        end = np.full((1, self._search.vocab_size), -1e4, np.float32)
        end[0, [_BLANK, self._search.space]] = 0.0
        _read(running, end)
        running.decode_end()
        found = sorted(running.get_all_final_hypothesis(), key=lambda h: -h.score)[: self._search.nbest]
        return [Hypothesis((*self.written, *self._spans(h.tokens)), h.score) for h in found]

    def copy(self) -> "BeamDecoder":
        """The decoder as it stands now; its first use searches again from the last commit."""
        other = BeamDecoder(self._search)
        copied = {"written": self.written.copy(), "_blocks": self._blocks.copy(), "_running": None}
        other.__dict__.update(self.__dict__ | copied)
        return other

    def _search_so_far(self) -> tuple[Any, Any]:
        if self._running is None:
            self._running = self._search.start()
            for block in self._blocks:
                _read(self._running[0], block)
        return self._running

    def pending(self) -> list[TokenSpan]:
        """The best tokens that are not committed; the last word may be unfinished."""
        # get_best_hypothesis() would leave out the unfinished word
        found = self._search_so_far()[0].get_all_final_hypothesis()
        return self._spans(max(found, key=lambda h: h.score).tokens) if found else []

    def _spans(self, path: Sequence[int]) -> list[TokenSpan]:
        """The tokens of a path; its first entry stands before the first frame."""
        if not self._frames:
            return []
        tokens = np.array(path[1 : 1 + self._frames])
        log_probs = np.concatenate(self._blocks)[np.arange(len(tokens)), tokens]
        ends = np.append(np.flatnonzero(np.diff(tokens)) + 1, len(tokens))
        starts = np.append(0, ends[:-1])
        sums = np.add.reduceat(np.minimum(np.exp(log_probs, dtype=np.float64), 1.0), starts)
        runs = zip(tokens[starts].tolist(), starts.tolist(), ends.tolist(), sums.tolist(), strict=True)
        first = self._first
        return [TokenSpan(t, first + a, first + b, total / (b - a)) for t, a, b, total in runs if t != _BLANK]

    def _commit(self) -> None:
        """Write down what is best but the last seconds, cut behind a word; search on from there."""
        latest = self._first + self._frames - _LOOKBACK_FRAMES
        spans = self.pending()
        spaces = [span.end_frame for span in spans if span.token == self._search.space and span.end_frame <= latest]
        cut = spaces[-1] if spaces else latest
        self.written += [span for span in spans if span.end_frame <= cut]
        rest = np.concatenate(self._blocks)[cut - self._first :]
        self._blocks, self._frames, self._first, self._running = [rest], len(rest), cut, None


def _read(search, block: np.ndarray) -> None:
    search.decode_step(block.ctypes.data, *block.shape)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
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
