"""One network of a model with its vocabulary, and what it says of audio: segments, transcripts."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.decoding import Decoder, Hypothesis, TokenSpan, Word, words_from_tokens
from asr.decoding.calibration import Calibration
from asr.decoding.greedy import GreedyDecoder
from asr.errors import ModelError
from asr.runtime import OfflineEngine, StreamingEngine
from asr.text import Tokenizer

T = TypeVar("T")
R = TypeVar("R")
BATCH_ROWS = 16
_BATCH_SAMPLES = 120 * SAMPLE_RATE  # of a batch, padding included
_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
_SLOWER = 0.9  # the pace of the second reading, for who weighs texts (docs/trials.md)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """What a segment may also say; scores (natural log) compare within one segment."""

    text: str
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of a recording with words in it; `start` and `end` in seconds.

    `alternatives` are the N best texts where more than one was asked for, this one first.
    """

    text: str
    start: float
    end: float
    words: tuple[Word, ...]
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Transcript:
    """A recording's text; `duration` in seconds. Silence has an empty text and no segments."""

    text: str
    words: tuple[Word, ...]
    segments: tuple[Segment, ...]
    duration: float


class Network:
    """One network of a model with its vocabulary.

    Args:
        tokenizer: the vocabulary.
        open_engine: called at first use.
        open_search: called at first use: gives what makes a decoder for each segment.
        where: the network's folder, for messages.
        weights: the file that the engine reads; it tells one network from another in saved sessions.
        searched_by: likewise what tells one search from another: its settings, and the files that it reads.
        calibration: of the words' times and confidences.
        phones: how many the engine is to write behind the tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        open_engine: Callable[[], OfflineEngine | StreamingEngine],
        *,
        open_search: Callable[[], Callable[[], Decoder]] = lambda: GreedyDecoder,
        where: str = "network",
        weights: Path | None = None,
        searched_by: tuple[str, Sequence[Path]] = ("", ()),
        calibration: Calibration = Calibration(),  # noqa: B008 (frozen)
        phones: int = 0,
    ) -> None:
        self.tokens, self._calibration, self._phones = tokenizer.tokens, calibration, phones
        self._open_engine, self._open_search, self._where, self._weights = open_engine, open_search, where, weights
        self._searched_by = searched_by
        self._opening: Future[Callable[[], Decoder]] | None = None

    @cached_property
    def engine(self) -> Any:
        """The OfflineEngine or StreamingEngine.

        Raises:
            ModelError: it cannot be opened, or does not fit the vocabulary.
        """
        if self._opening is None and "decoder" not in self.__dict__:  # the search is opened meanwhile
            pool = ThreadPoolExecutor(1, "asr-search")
            self._opening = pool.submit(self._open_search)
            pool.shutdown(wait=False)
        engine = self._open_engine()
        if engine.vocab_size != len(self.tokens):
            raise ModelError(
                f"{self._where}: tokens.txt has {len(self.tokens)} tokens, the network {engine.vocab_size}; "
                "the model is damaged"
            )
        if engine.phone_count != self._phones:
            raise ModelError(
                f"{self._where}: phones.txt has {self._phones} phones, the network {engine.phone_count}; "
                "the model is damaged"
            )
        return engine

    @cached_property
    def identity(self) -> str:
        """A name that no other network has."""
        digest = hashlib.sha256("\n".join(self.tokens).encode())
        if self._weights is not None:
            digest.update(self._weights.read_bytes())
        return digest.hexdigest()[:16]

    @cached_property
    def search(self) -> str:
        """A name that no other search has: what it wrote down means something to itself alone."""
        settings, files = self._searched_by
        digest = hashlib.sha256(settings.encode())
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    @cached_property
    def visible(self) -> np.ndarray:
        """Which tokens can be seen, bool (vocabulary,): neither the blank nor spaces."""
        return np.array([index > 0 and not token.isspace() for index, token in enumerate(self.tokens)])

    @cached_property
    def decoder(self) -> Callable[[], Decoder]:
        """Makes a decoder for one segment.

        Raises:
            ModelError: the language model cannot be read.
        """
        return self._opening.result() if self._opening else self._open_search()

    def read(self, audios: Sequence[np.ndarray], others: Sequence[Decoder] = ()) -> list[list[Hypothesis]]:
        """What each utterance, float32 (n,) at 16 kHz, may say to an offline network.

        Those of like length are read together. Where texts are weighed, each is read a second time, played slower, and
        what another network heard counts as well, if `others` have read them by it: readings err apart.
        """
        order = sorted(range(len(audios)), key=lambda i: len(audios[i]))
        batches: list[list[int]] = []
        while order:
            longest = len(audios[order[-1]]) + 2 * len(_EDGE)
            rows = max(1, min(BATCH_ROWS, _BATCH_SAMPLES // longest))
            batches.append(order[-rows:])
            del order[-rows:]

        def readings() -> Iterator[list[np.ndarray]]:
            for batch in batches:
                yield [_padded(audios[i]) for i in batch]
                if self.decoder().weighs:  # the search may be opening still, while the first batch is read
                    yield [_padded(_slowed(audios[i])) for i in batch]

        read = _one_ahead(self.engine.log_probs, readings())
        hypotheses: list[list[Hypothesis]] = [[] for _ in audios]
        for batch in batches:
            again: list[np.ndarray] = []
            for row, (i, once) in enumerate(zip(batch, next(read), strict=True)):
                decoder = self.decoder()
                decoder.accept(once)
                if decoder.weighs and not again:
                    again = next(read)
                hypotheses[i] = decoder.finish(again[row] if again else None, others[i] if others else None)
        return hypotheses

    def text(self, spans: Iterable[TokenSpan]) -> str:
        """The text of tokens."""
        return " ".join(self.letters(spans).split())

    def letters(self, spans: Iterable[TokenSpan]) -> str:
        """Tokens as they are spelled; spaces may be double, or at the ends."""
        return "".join([self.tokens[span.token] for span in spans])

    def segment(
        self,
        hypotheses: Sequence[Hypothesis],
        start: float,
        end: float,
        levels: np.ndarray,
        edge: float = EDGE_SILENCE_SECONDS,
    ) -> Segment | None:
        """The segment [start, end), in seconds, that says the first of these; None where that is nothing.

        The frames of the hypotheses begin `edge` seconds before `start`; `levels` are those of its audio
        (asr.decoding.sound).
        """
        frame = self.engine.samples_per_frame / SAMPLE_RATE
        words = words_from_tokens(hypotheses[0].tokens, self.tokens, start=start, end=end, frame=frame, edge=edge)
        if not words:
            return None
        words = self._calibration.apply(words, start, end, levels)
        texts = [Alternative(text=self.text(h.tokens), score=h.score) for h in hypotheses]
        return Segment(
            text=" ".join(word.text for word in words),
            start=start,
            end=end,
            words=tuple(words),
            alternatives=tuple(texts) if len(texts) > 1 else (),
        )


def _padded(samples: np.ndarray) -> np.ndarray:
    return np.concatenate([_EDGE, samples, _EDGE])


def _slowed(samples: np.ndarray) -> np.ndarray:
    import soxr  # an import of which greedy decoding has no need

    return soxr.resample(samples, SAMPLE_RATE * _SLOWER, SAMPLE_RATE)


def _one_ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What `work` makes of each item, in order; of the next one, meanwhile, while the caller has the last."""
    with ThreadPoolExecutor(1, "asr-ahead") as thread:
        waiting: Future[R] | None = None
        for item in items:
            made, waiting = waiting, thread.submit(work, item)
            if made is not None:
                yield made.result()
        if waiting is not None:
            yield waiting.result()


def transcript_of(segments: Iterable[Segment | None], duration: float) -> Transcript:
    """The transcript of `duration` seconds in which these segments, None where nothing was said, follow each other."""
    written = tuple(segment for segment in segments if segment is not None)
    return Transcript(
        text=" ".join(segment.text for segment in written),
        words=tuple(word for segment in written for word in segment.words),
        segments=written,
        duration=duration,
    )
