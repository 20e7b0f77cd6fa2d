"""Beam search: the words of a lexicon that the network and an n-gram language model together find likeliest.

A network that writes phones beside its tokens is searched by the words' pronunciations, and what is found is weighed by
letters as well, and by a next-word model where there is one. Words without a pronunciation are searched for by letters.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from asr.cache import kept
from asr.decoding import Best, Decoder, Hypothesis, TokenSpan
from asr.decoding.ctc import align, log_likelihoods
from asr.decoding.hot_words import check_hot_words
from asr.decoding.language_model import Automaton, Scorer
from asr.decoding.lexicon_search import BLANK, IMPOSSIBLE, Found, Lexicon, Running, Tree, WordSpan, ranges, tree_of
from asr.decoding.next_word import UNKNOWN_ID, Memories, TextScorer
from asr.decoding.pronounced import NO_WORD, Pronounced
from asr.decoding.texts import agreement, differences, edited
from asr.errors import ConfigError, ModelError
from asr.lexicon import Pronunciations

_SPACE = " "
_COMMON_WORDS = 1000  # on the way to their end, hot words count as no more likely than the least of so many words
# An utterance that does not end is committed word by word, so that cost and memory stay bounded: each 60 s
# (of 40 ms frames; 45 s of 30 ms) all but the last sixth; endpointing cuts sooner.
_COMMIT_FRAMES = 1500
_LOOKBACK_FRAMES = 250
_BY_PHONES = 0.97  # the search by phones takes the language model's weight times this: there are fewer than letters
# Where a text was heard in one reading, which says less than two, the weight is times this, and a word's score less.
_ONCE = (1.2, -0.75)
_HEARD = 0.1  # exponent of the tokens' probabilities in a word's confidence: many right words were hardly heard
_LETTERS_SHARE = 16  # of the hypotheses, one in so many is by letters where words without a pronunciation want it
_FOUND = 200  # texts of each search
_CANDIDATES = 60  # of them, that are weighed by tokens and phones; of the others, what differs from the best one there
_ROUNDS = 4  # of that, at the most
_SILENCE = 4.0  # natural log: a text must be so much likelier than that nobody spoke; noises sound like short words
_SPELLED = 6.0  # likewise by the tokens alone: phones may have been taught no silence (9 at the least in single words)


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamConfig:
    """How to search; the weights were tuned on three dev sets (docs/trials.md).

    Attributes:
        beam: hypotheses that are kept at each frame.
        lm_weight: of the language model's log-probabilities, base 10, against the network's, base e.
        word_score: added for each word; more of it, more words.
        phone_share: how much the phones count, 0 to 1, and the tokens the rest, when candidates are weighed by both.
        prior_weight: how much of the outputs' prior probabilities is taken off their log-probabilities, where the model
            has them.
        network_share: how much a next-word model counts, 0 to 1, and the n-grams the rest, when candidates are weighed.
        nbest: hypotheses that are told at the end of a segment.
        hot_words: phrases to expect, with what each adds to the score (natural log) of a text that has it.
    """

    beam: int = 800
    lm_weight: float = 2.25
    word_score: float = 0.0
    phone_share: float = 0.85
    prior_weight: float = 0.5
    network_share: float = 0.75
    nbest: int = 1
    hot_words: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("beam", "nbest"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must be at least 1")
        for name in ("lm_weight", "prior_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must not be negative, nor infinite")
        if not math.isfinite(self.word_score):
            raise ConfigError(f"word_score = {self.word_score!r}: must be a finite number")
        for name in ("phone_share", "network_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must be 0 to 1")
        if self.hot_words and not self.lm_weight:
            raise ConfigError("hot words act through the language model: lm_weight must be above 0")


class BeamSearch:
    """A language model and a lexicon for one vocabulary, shared by all decoders; call it for a new one.

    Args:
        ngrams: the language model.
        words: the lexicon; what `tokens` cannot spell is left out. Fastest where it is that of `ngrams`.
        tokens: the network's vocabulary: single characters, one of them the space; the blank is token 0.
        config: how to search.
        phones: those that the network writes behind its tokens, their blank first; none, if it writes none.
        pronunciations: of the lexicon's words.
        next_word: weighs the texts that are found, beside the n-grams.
        log_priors: of the network's outputs, (tokens + phones,). What it says of a sound and what the language models
            say of a word both count how frequent it is; that is taken off (Bourlard and Morgan 1994; for CTC, whose
            blank is the most frequent of all, Miao et al. 2015, https://arxiv.org/abs/1507.08240).

    Raises:
        ConfigError: the vocabulary has no space, or spells no word of the lexicon, or not some hot word.
        ModelError: there are fewer priors than outputs.
    """

    def __init__(
        self,
        ngrams: Automaton,
        words: Sequence[str],
        tokens: Sequence[str],
        config: BeamConfig,
        phones: Sequence[str] = (),
        pronunciations: Pronunciations | None = None,
        next_word: TextScorer | None = None,
        log_priors: np.ndarray | None = None,
    ) -> None:
        index = {token: i for i, token in enumerate(tokens) if i != BLANK}
        spelled, letters = words, _letters(words)
        place = np.arange(len(words))  # of each word, among those that can be spelled
        foreign = {chr(letter) for letter in np.flatnonzero(np.bincount(letters)).tolist()} - index.keys()
        if foreign or not all(words):
            written = [i for i, word in enumerate(words) if word and not foreign & set(word)]
            spelled = [words[i] for i in written]
            place[:] = NO_WORD
            place[written] = np.arange(len(written))
        if _SPACE not in index or not spelled:
            reason = "spells no word of the lexicon" if _SPACE in index else "has no space"
            raise ConfigError(f"beam search: the vocabulary of {len(tokens)} tokens {reason}")
        asked = check_hot_words(config.hot_words, index)
        hot = {phrase: boost / config.lm_weight for phrase, boost in asked.items() if boost}
        hot_words: dict[str, float] = {}  # the most that each may bring
        for phrase, boost in hot.items():
            hot_words |= {word: max(boost, hot_words.get(word, 0.0)) for word in phrase}
        numbers: dict[str, int] = {}
        if hot_words:
            numbers = dict(zip(spelled, range(len(spelled)), strict=True))
            spelled = [*spelled, *(word for word in hot_words if word not in numbers)]  # in one order in every process
            numbers |= {word: i for i, word in enumerate(spelled[len(numbers) :], len(numbers))}

        called = ngrams.numbers(spelled)
        scores = ngrams.unigrams[called]
        self._next_word = next_word if config.network_share else None
        if self._next_word:
            # Words that it does not know share the probability of <unk> as their unigrams do.
            known = map(self._next_word.numbers.get, spelled, itertools.repeat(UNKNOWN_ID))
            self._numbers = np.fromiter(known, np.int64, len(spelled))
            unknown = self._numbers == UNKNOWN_ID
            total = np.log10(np.sum(10 ** scores[unknown]) + 1e-12)
            self._shares = np.where(unknown, scores - total, 0.0)
        # More would push all other words with a hot word's first letters out of the search, or in.
        common = np.sort(scores)[-_COMMON_WORDS:][0]
        for word, boost in hot_words.items():
            i = numbers[word]
            scores[i] = max(scores[i], min(scores[i] + boost, common))

        # A word ends with a space, so "to day" needs the network to write one; within a word, hypotheses are
        # charged for the likeliest word that they can still become.
        self.config, self.space, self.vocab_size = config, index[_SPACE], len(tokens)
        self.outputs = (*tokens, *phones)
        outputs = len(self.outputs)
        if log_priors is not None and len(log_priors) < outputs:
            raise ModelError(f"{len(log_priors)} priors for {outputs} outputs; the model is damaged")
        known_priors = np.zeros(outputs) if log_priors is None else log_priors[:outputs]
        self.offsets = (-config.prior_weight * known_priors).astype(np.float32)
        self._spelled, self._index = spelled, index
        letters = letters if spelled is words else _letters(spelled)
        self._said = Pronounced(pronunciations, place, phones, spelled) if phones and pronunciations else None
        if self._said and not len(self._said.words):
            self._said = None

        def tree(make: Callable[..., Tree], *given: np.ndarray) -> Tree:
            """Kept for the next process, but for that with hot words: each may have others."""
            return make(*given) if hot_words else kept("tree", given, lambda: make(*given))

        def tree_of_letters(letters: np.ndarray, table: np.ndarray, scores: np.ndarray) -> Tree:
            ends = np.flatnonzero(letters == ord(_SPACE))
            lengths = np.diff(ends, prepend=-1)
            order = np.array(sorted(range(len(spelled)), key=spelled.__getitem__))
            starts = ends[order] + 1 - lengths[order]
            return tree_of(table[letters[ranges(starts, lengths[order])[1]]], lengths[order], order, scores)

        self.by_sound = self._by_letters = None
        if self._said:
            ways = tree(tree_of, self._said.phones, self._said.lengths, self._said.words, scores)
            columns = slice(len(tokens), outputs)
            settings = config.lm_weight * _BY_PHONES, config.word_score
            self.by_sound = Lexicon(ways, scores, columns, None, config.beam, *settings)
        if not self._said or not self._said.complete:
            spellings = tree(tree_of_letters, letters, _token_table(index), scores)
            beam = max(config.beam // _LETTERS_SHARE, 1) if self._said else config.beam
            columns, settings = slice(0, len(tokens)), (config.lm_weight, config.word_score)
            self._by_letters = Lexicon(spellings, scores, columns, self.space, beam, *settings)
        self.weighs = bool(self._said or self._next_word)  # what the searches find
        self._plain = Scorer(ngrams, called, {})
        self._scorer = Scorer(ngrams, called, {tuple(numbers[w] for w in phrase): b for phrase, b in hot.items()})

    def __call__(self) -> "BeamDecoder":
        return BeamDecoder(self)

    def start(self) -> list[Running]:
        """The searches at the start of a segment: by sound, if there is one, and by letters last."""
        return [Running(lexicon, self._scorer) for lexicon in (self.by_sound, self._by_letters) if lexicon]

    def finish(self, running: Sequence[Running], most: int) -> list[Found]:
        """What each of these found, at most so many texts."""
        if self._by_letters:
            # By letters a word ends with a space, and the last one has none: one more frame, where one costs nothing.
            end = np.full((1, self.vocab_size), IMPOSSIBLE, np.float32)
            end[0, [BLANK, self.space]] = 0.0
            running[-1].read(end)
        return [found for search in running for found in search.finish(most)]

    def choose(self, readings: Sequence[np.ndarray], texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """The scores of the first of some texts, of none, and of what the best of these becomes by what others differ.

        In a long text a few unsure places alone make hundreds of texts, and what is wrong elsewhere is in none of the
        likeliest: so one place after the other of the best text is made as any other text has it, and then all those
        together that are better so (Deoras, Mikolov and Church 2011, for confusion networks).

        Args:
            readings: see `weigh`.
            texts: what was found, the likeliest first.
        """
        memories = self._next_word.memories() if self._next_word else None

        def weigh(some: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
            return self.weigh(readings, list(dict.fromkeys([(), *some])), memories)

        weighed = weigh(texts[:_CANDIDATES])
        for _ in range(_ROUNDS):
            best = max(weighed, key=lambda words: weighed[words])
            edits = dict.fromkeys(edit for text in texts for edit in differences(best, text))
            single = {edited(best, [edit]): edit for edit in edits}
            new = [text for text in single if text not in weighed][:_CANDIDATES]
            if not new:
                break
            weighed |= weigh(new)
            better = sorted((text for text in new if weighed[text] > weighed[best]), key=lambda text: -weighed[text])
            if not better:
                break
            together = edited(best, [single[text] for text in better])
            if together not in weighed:
                weighed |= weigh([together])
        return weighed

    def weigh(
        self, readings: Sequence[np.ndarray], texts: Sequence[tuple[int, ...]], memories: Memories | None = None
    ) -> dict[tuple[int, ...], float]:
        """The score of texts by what was heard, the mean of all readings, and by the language models.

        Args:
            readings: what networks say of the same audio, their priors taken off: (frames, tokens + phones) each.
            texts: numbers of words.
            memories: of the next-word model, of texts that were weighed before.
        """
        config, lengths = self.config, np.array([len(words) for words in texts])
        heard = self._heard(readings, texts)
        factor, more = _ONCE if self._said and len(readings) == 1 else (1.0, 0.0)
        ngrams = self._plain.texts(texts)
        language = factor * self._with_next_words(ngrams, texts, memories)
        if config.hot_words:
            language += self._scorer.texts(texts) - ngrams
        total = heard + config.lm_weight * language + (config.word_score + more) * lengths
        return dict(zip(texts, total.tolist(), strict=True))

    def _heard(self, readings: Sequence[np.ndarray], texts: Sequence[tuple[int, ...]]) -> np.ndarray:
        """The log-likelihood of texts by tokens, and by phones where there are any; none where tokens hear silence."""
        share, vocabulary = self.config.phone_share if self._said else 0.0, self.vocab_size
        heard = np.zeros(len(texts))
        if self._said and share > 0:
            by_phones = self._said.log_likelihoods([reading[:, vocabulary:] for reading in readings], texts)
            heard += share * by_phones.mean(axis=0)
        spellings = [[[self.spelling(words)]] if words else [] for words in texts]
        spelled = log_likelihoods([reading[:, :vocabulary] for reading in readings], spellings).mean(axis=0)
        silent = spelled == -np.inf  # more letters than frames: its words have no place
        if share < 1:
            heard += (1 - share) * spelled
            nothing = [i for i, words in enumerate(texts) if not words]
            silent |= spelled < spelled[nothing].max(initial=-np.inf) + _SPELLED
            silent[nothing] = False
        heard[silent] = -np.inf
        return heard

    def _with_next_words(
        self, ngrams: np.ndarray, texts: Sequence[tuple[int, ...]], memories: Memories | None
    ) -> np.ndarray:
        """The base-10 log-probability of texts, (texts,): what n-grams say, and the next-word model's share."""
        if not self._next_word:
            return ngrams
        numbers = [self._numbers[list(words)].tolist() for words in texts]
        unknown = np.array([self._shares[list(words)].sum() for words in texts])
        network = self._next_word.log_probs(numbers, memories) / math.log(10) + unknown
        return ngrams + self.config.network_share * (network - ngrams)

    def letters(self, word: int) -> list[int]:
        """The tokens of a word."""
        return [self._index[letter] for letter in self._spelled[word]]

    def spelling(self, words: Sequence[int]) -> list[int]:
        """The tokens of a text, with spaces between its words."""
        return [token for word in words for token in (self.space, *self.letters(word))][1:]


def _letters(words: Sequence[str]) -> np.ndarray:
    """The letters of words, each with the space behind it, as code points, (letters,)."""
    return np.frombuffer(_SPACE.join([*words, ""]).encode("utf-32-le"), np.uint32)


def _token_table(index: Mapping[str, int]) -> np.ndarray:
    """The tokens of letters, by code point."""
    known = np.array([ord(token) for token in index if len(token) == 1])
    table = np.zeros(int(known.max()) + 1, np.int64)
    table[known] = [index[chr(code)] for code in known.tolist()]
    return table


class BeamDecoder:
    """Beam search of one segment, block by block (see asr.decoding.Decoder)."""

    shared = ("_search", "_running")  # not of the state that asr.snapshot keeps: the blocks are searched again

    def __init__(self, search: BeamSearch) -> None:
        self.written: list[TokenSpan] = []  # committed
        self._search = search
        self._first = 0  # the first frame that is not committed
        self._blocks: list[np.ndarray] = []  # the frames from there on
        self._frames = 0  # in the blocks
        # Searches that have read the blocks; None until they are needed.
        self._running: list[Running] | None = None

    @property
    def weighs(self) -> bool:
        """Whether what is found is weighed at the end of the segment."""
        return self._search.weighs

    def accept(self, log_probs: np.ndarray, best: Best | None = None) -> None:
        """Take the next frames, (frames, tokens + phones), also none; the best ones alone do not help here."""
        while len(log_probs):
            block = np.array(log_probs[: _COMMIT_FRAMES - self._frames], np.float32, order="C")
            log_probs = log_probs[len(block) :]
            scaled = block + self._search.offsets
            for running in self._search_so_far():
                running.read(scaled)
            self._blocks.append(block)
            self._frames += len(block)
            if self._frames == _COMMIT_FRAMES:
                self._commit()

    def tokens(self) -> list[TokenSpan]:
        """The best tokens so far; the last word may be unfinished."""
        return self.written + self.pending()

    def finish(self, again: np.ndarray | None = None, other: Decoder | None = None) -> list[Hypothesis]:
        """End the segment: whole words only; the best hypothesis first, at least one.

        Other readings count where nothing is committed, which they would not fit.
        """
        nbest, weighs = self._search.config.nbest, self._search.weighs and self._frames > 0
        found = self._search.finish(self._search_so_far(), _FOUND if weighs else nbest)
        self._running = None
        if not self._frames:
            return [Hypothesis(tuple(self.written), f.score) for f in found]
        log_probs = np.concatenate(self._blocks)
        if not weighs:
            letters = log_probs[:, : self._search.vocab_size]
            return [
                Hypothesis((*self.written, *self._later(align(letters, self._search.spelling(f.words)))), f.score)
                for f in found
            ]
        own = [log_probs] if again is None or self._first else [log_probs, again]
        readings = [reading + self._search.offsets for reading in own]
        if isinstance(other, BeamDecoder) and not self._first:
            readings += other.heard_by(self._search.outputs)
        likeliest_first = sorted(found, key=lambda f: -f.score)
        weighed = self._search.choose(readings, list(dict.fromkeys(f.words for f in likeliest_first)))
        weighed[()] += _SILENCE
        possible = sorted((words for words in weighed if weighed[words] > -np.inf), key=lambda words: -weighed[words])
        return [
            Hypothesis((*self.written, *self._aligned(log_probs, words, agreement(words, weighed))), weighed[words])
            for words in possible[:nbest]
        ]

    def heard_by(self, outputs: tuple[str, ...]) -> list[np.ndarray]:
        """What its network said of the segment, priors taken off, if that is all there and of these outputs."""
        known = self._frames and not self._first and self._search.outputs == outputs
        return [np.concatenate(self._blocks) + self._search.offsets] if known else []

    def copy(self) -> "BeamDecoder":
        """The decoder as it stands now: the two go separate ways."""
        other = BeamDecoder(self._search)
        running = None if self._running is None else [search.copy() for search in self._running]
        copied = {"written": self.written.copy(), "_blocks": self._blocks.copy(), "_running": running}
        other.__dict__.update(self.__dict__ | copied)
        return other

    def _aligned(self, log_probs: np.ndarray, words: Sequence[int], shares: Sequence[float]) -> list[TokenSpan]:
        """Where the tokens of a text lie; a word is as sure as the share of texts that have it, and a little as its
        tokens."""
        found = align(log_probs[:, : self._search.vocab_size], self._search.spelling(words))
        of_tokens: list[float] = []
        for word, share in zip(words, shares, strict=True):
            letters = len(self._search.letters(word))
            of_tokens += [*([1.0] if of_tokens else []), *[share ** (1 / letters)] * letters]
        return [
            replace(span, confidence=span.confidence**_HEARD * share)
            for span, share in zip(self._later(found), of_tokens, strict=True)
        ]

    def _later(self, spans: Sequence[TokenSpan]) -> list[TokenSpan]:
        """Spans that begin where nothing is committed any more, as those of the segment."""
        first = self._first
        return [TokenSpan(s.token, first + s.start_frame, first + s.end_frame, s.confidence) for s in spans]

    def _search_so_far(self) -> list[Running]:
        if self._running is None:
            self._running = self._search.start()
            for running in self._running:
                for block in self._blocks:
                    running.read(block + self._search.offsets)
        return self._running

    def pending(self) -> list[TokenSpan]:
        """The best tokens that are not committed. A word is there once its last phone is heard; where the search is by
        letters alone, letter by letter."""
        if not self._frames:
            return []
        first = self._search_so_far()[0]
        return self._letters_of(first.words()) if self._search.by_sound else self._spans(first.best())

    def _letters_of(self, words: Sequence[WordSpan]) -> list[TokenSpan]:
        """The letters of words that a search by phones has found, each word's evenly over its frames."""
        if not words:
            return []
        labels = np.concatenate([word.labels for word in words])
        lengths = np.array([len(word.labels) for word in words])
        whose, frames = ranges(np.array([word.start_frame for word in words]), lengths)
        phones = np.concatenate(self._blocks)[frames, self._search.vocab_size + labels]
        said = labels != BLANK
        chances = np.bincount(whose, np.exp(phones) * said) / np.bincount(whose, said)
        spans: list[TokenSpan] = []
        for (word, start, own), chance in zip(words, np.minimum(chances, 1.0).tolist(), strict=True):
            letters = self._search.letters(word)
            if spans:
                spans.append(TokenSpan(self._search.space, spans[-1].end_frame, start, 1.0))
            borders = [start + round(len(own) * i / len(letters)) for i in range(len(letters) + 1)]
            sure = chance ** (1 / len(letters))
            spans += (TokenSpan(*of, sure) for of in zip(letters, borders[:-1], borders[1:], strict=True))
        return self._later(spans)

    def _spans(self, labels: np.ndarray) -> list[TokenSpan]:
        """The tokens of a path, which has a label for each frame."""
        tokens = labels[: self._frames]
        log_probs = np.concatenate(self._blocks)[np.arange(len(tokens)), tokens]
        ends = np.append(np.flatnonzero(np.diff(tokens)) + 1, len(tokens))
        starts = np.append(0, ends[:-1])
        sums = np.add.reduceat(np.minimum(np.exp(log_probs, dtype=np.float64), 1.0), starts)
        runs = zip(tokens[starts].tolist(), starts.tolist(), ends.tolist(), sums.tolist(), strict=True)
        first = self._first
        return [TokenSpan(t, first + a, first + b, total / (b - a)) for t, a, b, total in runs if t != BLANK]

    def _commit(self) -> None:
        """Write down what is best but the last seconds, cut behind a word; search on from there."""
        latest, space = self._first + self._frames - _LOOKBACK_FRAMES, self._search.space
        spans = self.pending()
        if self._search.by_sound:  # which has no spaces but between words
            spaces = [i for i, span in enumerate(spans) if span.token == space and span.start_frame <= latest]
            whole = spans and spans[-1].end_frame <= latest
            sure = len(spans) if whole else spaces[-1] if spaces else 0  # spans of words that have ended
            cut = min([latest, *(span.start_frame for span in spans[sure:] if span.token != space)])
            cut = cut if cut > self._first else latest
            self.written += spans[:sure]
        else:
            spaces = [span.end_frame for span in spans if span.token == space and span.end_frame <= latest]
            cut = spaces[-1] if spaces else latest
            self.written += [span for span in spans if span.end_frame <= cut]
        if self.written and self.written[-1].token != space:  # the space may be heard with the next word alone
            self.written.append(TokenSpan(space, self.written[-1].end_frame, cut, 1.0))
        rest = np.concatenate(self._blocks)[cut - self._first :]
        self._blocks, self._frames, self._first, self._running = [rest], len(rest), cut, None
