"""Beam search: the words of a lexicon that the network and an n-gram language model together find likeliest.

A network that writes phones beside its tokens is read twice, by their pronunciations and by their letters. What either
search finds is weighed by both: each hears words that the other misses.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asr.decoding import Best, Hypothesis, TokenSpan
from asr.decoding.ctc import align, log_likelihoods
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
# The search by phones takes the language model's weight times this, and adds that to a word's score: there are fewer
# phones than letters. And candidates are weighed by all their alignments, where a search follows the best one.
_BY_PHONES, _WEIGHED = (0.87, -0.5), 1.0
_SHARPNESS = 0.1  # of the probabilities that scores stand for: as they are, the best text would be all but certain
_CANDIDATES = 40  # of each search, that are weighed by tokens and phones
# A word without a pronunciation: any phones will do, so many for a letter, each a little worse than the likeliest one.
_PHONES_PER_LETTER, _ANY_PHONE = 0.85, -1.0
_WAYS = 4  # of a text's pronunciations, that are tried
_IMPOSSIBLE = -1e4  # instead of minus infinity, where a pronunciation has more phones than there are frames


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamConfig:
    """How to search; weight, score and share were tuned on 163 utterances of three dev sets, at 28 and 32 % CER.

    Attributes:
        beam: hypotheses that are kept at each frame.
        lm_weight: of the language model's log-probabilities, base 10 as KenLM's are, against the network's, base e.
        word_score: added for each word; more of it, more words.
        phone_share: how much the phones count, 0 to 1, and the tokens the rest, when candidates are weighed by both.
        nbest: hypotheses that are told at the end of a segment.
        hot_words: phrases to expect, with what each adds to the score (natural log) of a text that has it.
    """

    beam: int = 100
    lm_weight: float = 1.75
    word_score: float = 0.5
    phone_share: float = 0.7
    nbest: int = 1
    hot_words: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("beam", "nbest"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must be at least 1")
        if not self.lm_weight >= 0:
            raise ConfigError(f"lm_weight = {self.lm_weight!r}: must not be negative")
        if not 0 <= self.phone_share <= 1:
            raise ConfigError(f"phone_share = {self.phone_share!r}: must be 0 to 1")
        if self.hot_words and not self.lm_weight:
            raise ConfigError("hot words act through the language model: lm_weight must be above 0")


class BeamSearch:
    """A language model and a lexicon for one vocabulary, shared by all decoders; call it for a new one.

    Args:
        model: an n-gram model that KenLM reads: ARPA, also gzipped, or KenLM's binary.
        words: the lexicon; what `tokens` cannot spell is left out.
        tokens: the network's vocabulary: single characters, one of them the space; the blank is token 0.
        config: how to search.
        phones: those that the network writes behind its tokens, their blank first; none, if it writes none.
        pronunciations: phones of words, one way or several.

    Raises:
        ConfigError: the vocabulary has no space, or spells no word of the lexicon, or not some hot word.
        ModelError: the language model cannot be read.
    """

    def __init__(
        self,
        model: Path,
        words: Sequence[str],
        tokens: Sequence[str],
        config: BeamConfig,
        phones: Sequence[str] = (),
        pronunciations: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ) -> None:
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

        context = lm.start(True)
        scores = [lm.score(context, i)[1] for i in range(len(spelled))]
        # More would push all other words with a hot word's first letters out of the search, or in.
        common = sorted(scores)[-_COMMON_WORDS:][0]
        for i, word in enumerate(spelled):
            if word in hot_words:
                scores[i] = max(scores[i], min(scores[i] + hot_words[word], common))

        # A word ends with a space, so "to day" needs the network to write one; within a word, hypotheses are
        # charged for the likeliest word that they can still become.
        self.config, self.space, self.vocab_size = config, index[_SPACE], len(tokens)
        self.letters = [[index[c] for c in word] for word in spelled]
        entries = [(i, [*letters, self.space]) for i, letters in enumerate(self.letters)]
        settings = config.lm_weight, config.word_score
        self._lexicons = [_Lexicon(entries, scores, slice(0, len(tokens)), self.space, config.beam, *settings)]
        self.sounds: list[list[list[int]]] = []  # of each word, the ways to say it
        if phones and pronunciations:
            number = {phone: i for i, phone in enumerate(phones)}
            said = [[p for p in pronunciations.get(word, ()) if p and number.keys() >= set(p)] for word in spelled]
            self.sounds = [[[number[phone] for phone in phones] for phones in ways] for ways in said]
            entries = [(i, way) for i, ways in enumerate(self.sounds) for way in ways]
            self.any_phone = len(phones)
            self.sounds = [ways or [self._any_phones(word)] for word, ways in zip(spelled, self.sounds, strict=True)]
            settings = config.lm_weight * _BY_PHONES[0], config.word_score + _BY_PHONES[1]
            columns = slice(len(tokens), len(tokens) + len(phones))
            self._lexicons.append(_Lexicon(entries, scores, columns, None, config.beam, *settings))
        numbers = {word: i for i, word in enumerate(spelled)}
        self._phrases = Phrases({tuple(numbers[w] for w in words): boost for words, boost in hot.items()})
        self._lm = lm

    def __call__(self) -> "BeamDecoder":
        return BeamDecoder(self)

    def start(self) -> "list[_Running]":
        """The searches at the start of a segment, that by tokens first."""
        running = []
        for lexicon in self._lexicons:
            scorer = _with_phrases(self._lm, self._phrases) if self.config.hot_words else self._lm
            running.append(_Running(lexicon.open(scorer), scorer, lexicon.columns, lexicon.labels))
        return running

    def weigh(self, log_probs: np.ndarray, candidates: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
        """The score of word sequences by tokens and phones, and by the language model.

        Args:
            log_probs: (frames, tokens + phones).
            candidates: word numbers, with what the language model says of them.
        """
        config, texts = self.config, list(candidates)
        by_tokens = log_likelihoods(log_probs[:, : self.vocab_size], [self.spelling(words) for words in texts])
        phones = log_probs[:, self.vocab_size :]
        anything = phones[:, 1:].max(axis=1, keepdims=True) + _ANY_PHONE
        ways = [(i, way) for i, words in enumerate(texts) for way in itertools.islice(self._ways(words), _WAYS)]
        scores = log_likelihoods(np.concatenate([phones, anything, anything], axis=1), [way for _, way in ways])
        by_phones = np.full(len(texts), _IMPOSSIBLE)
        np.maximum.at(by_phones, [i for i, _ in ways], scores)
        language = np.array([candidates[words] for words in texts])
        share, lengths = config.phone_share, np.array([len(words) for words in texts])
        heard = (1 - share) * by_tokens + share * by_phones
        total = heard + config.lm_weight * language + (config.word_score + _WEIGHED) * lengths
        return dict(zip(texts, total.tolist(), strict=True))

    def spelling(self, words: Sequence[int]) -> list[int]:
        """The tokens of a text, with spaces between its words."""
        return [token for word in words for token in (self.space, *self.letters[word])][1:]

    def _ways(self, words: Sequence[int]) -> Iterator[list[int]]:
        """The pronunciations of a text: its words' first ones, and each other one of a word beside those."""
        first = [self.sounds[word][0] for word in words]
        yield [phone for way in first for phone in way]
        for i, word in enumerate(words):
            for other in self.sounds[word][1:]:
                yield [phone for way in (*first[:i], other, *first[i + 1 :]) for phone in way]

    def _any_phones(self, word: str) -> list[int]:
        count = max(round(_PHONES_PER_LETTER * len(word)), 1)
        return [self.any_phone + i % 2 for i in range(count)]  # two names: CTC parts equal neighbours by a blank


class _Lexicon:
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
        if silence is None:  # flashlight reads one between words all the same: `_Running` adds a column of nothing
            silence, labels = labels, labels + 1
        self._silence, self.labels = silence, labels
        self._trie = Trie(labels, silence)
        with _silence():  # of more than six words that sound alike, it says that it keeps six
            for word, spelled in entries:
                self._trie.insert(spelled, word, scores[word])
        self._trie.smear(SmearingMode.MAX)
        self._options = LexiconDecoderOptions(
            beam_size=beam,
            beam_size_token=labels,
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

        search = LexiconDecoder(self._options, self._trie, scorer, self._silence, _BLANK, -1, [], False)
        search.decode_begin()
        return search


class _Running(NamedTuple):
    """A search in the middle of a segment, the language model that it refers to, and the columns that it reads.

    Of labels it reads one more than there are columns, if none of them is a silence.
    """

    search: Any
    scorer: Any
    columns: slice
    labels: int

    def read(self, log_probs: np.ndarray) -> None:
        """Take the next frames, (frames, tokens + phones)."""
        block = np.full((len(log_probs), self.labels), _IMPOSSIBLE, np.float32)
        given = log_probs[:, self.columns]
        block[:, : given.shape[1]] = given
        self.search.decode_step(block.ctypes.data, *block.shape)

    def score(self, words: Sequence[int]) -> float:
        """What the language model says of a whole text: the same to the last bit, however a search came to it."""
        state, total = self.scorer.start(False), 0.0
        for word in words:
            state, score = self.scorer.score(state, word)
            total += score
        return total + self.scorer.finish(state)[1]

    def finish(self) -> list[Any]:
        """What flashlight found, the best first."""
        self.search.decode_end()
        found = self.search.get_all_final_hypothesis()  # in no order where scores are equal
        return sorted(found, key=lambda h: (-h.score, h.words))


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
        # Searches that have read the blocks; None in a copy that has not been used yet.
        self._running: list[_Running] | None = None

    def accept(self, log_probs: np.ndarray, best: Best | None = None) -> None:
        """Take the next frames, (frames, tokens + phones), also none; the best ones alone do not help here."""
        while len(log_probs):
            block = np.array(log_probs[: _COMMIT_FRAMES - self._frames], np.float32, order="C")
            log_probs = log_probs[len(block) :]
            for running in self._search_so_far():
                running.read(block)
            self._blocks.append(block)
            self._frames += len(block)
            if self._frames == _COMMIT_FRAMES:
                self._commit()

    def tokens(self) -> list[TokenSpan]:
        """The best tokens so far; the last word may be unfinished."""
        return self.written + self.pending()

    def finish(self) -> list[Hypothesis]:
        """End the segment: whole words only; the best hypothesis first, at least one."""
        by_tokens, *by_phones = self._search_so_far()
        self._running = None
        # The last word has no space after it. One more frame, in which a space costs as little as none.
        end = np.full((1, self._search.vocab_size), -1e4, np.float32)
        end[0, [_BLANK, self._search.space]] = 0.0
        by_tokens.read(end)
        found, nbest = by_tokens.finish(), self._search.config.nbest
        if not by_phones or not self._frames:
            return [Hypothesis((*self.written, *self._spans(h.tokens)), h.score) for h in found[:nbest]]
        texts = [h.words for h in [*found[:_CANDIDATES], *by_phones[0].finish()[:_CANDIDATES]]]
        candidates = {words: by_tokens.score(words) for words in sorted({_words_in(text) for text in texts})}
        log_probs = np.concatenate(self._blocks)
        weighed = self._search.weigh(log_probs, candidates)
        possible = sorted((words for words in weighed if weighed[words] > -np.inf), key=lambda words: -weighed[words])
        return [
            Hypothesis((*self.written, *self._aligned(log_probs, words, agreement(words, weighed))), weighed[words])
            for words in possible[:nbest]
        ]

    def copy(self) -> "BeamDecoder":
        """The decoder as it stands now; its first use searches again from the last commit."""
        other = BeamDecoder(self._search)
        copied = {"written": self.written.copy(), "_blocks": self._blocks.copy(), "_running": None}
        other.__dict__.update(self.__dict__ | copied)
        return other

    def _aligned(self, log_probs: np.ndarray, words: Sequence[int], shares: Sequence[float]) -> list[TokenSpan]:
        """Where the tokens of a text lie; a word is as sure as its tokens, times the share of texts that have it."""
        found = align(log_probs[:, : self._search.vocab_size], self._search.spelling(words))
        of_tokens: list[float] = []
        for word, share in zip(words, shares, strict=True):
            letters = len(self._search.letters[word])
            of_tokens += [*([1.0] if of_tokens else []), *[share ** (1 / letters)] * letters]
        first = self._first
        return [
            TokenSpan(s.token, first + s.start_frame, first + s.end_frame, s.confidence * share)
            for s, share in zip(found, of_tokens, strict=True)
        ]

    def _search_so_far(self) -> list[_Running]:
        if self._running is None:
            self._running = self._search.start()
            for running in self._running:
                for block in self._blocks:
                    running.read(block)
        return self._running

    def pending(self) -> list[TokenSpan]:
        """The best tokens that are not committed; the last word may be unfinished."""
        # get_best_hypothesis() would leave out the unfinished word
        found = self._search_so_far()[0].search.get_all_final_hypothesis()
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


def _words_in(path: Sequence[int]) -> tuple[int, ...]:
    """The words of a path; on the other frames it has -1."""
    return tuple(word for word in path if word >= 0)


def agreement(words: Sequence[int], weighed: Mapping[tuple[int, ...], float]) -> list[float]:
    """For each word of a text, how much of the probability of all texts, by their scores, has it in its place.

    Wessel et al. 2001, "Confidence measures for large vocabulary continuous speech recognition", on N-best lists.
    """
    from rapidfuzz.distance import Levenshtein

    scores = np.array(list(weighed.values()))
    shares = np.exp(_SHARPNESS * (scores - scores.max()))
    shares /= shares.sum()
    found = np.zeros(len(words))
    for other, share in zip(weighed, shares.tolist(), strict=True):
        for block in Levenshtein.opcodes(words, other).as_matching_blocks():
            found[block.a : block.a + block.size] += share
    return np.minimum(found, 1.0).tolist()


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
