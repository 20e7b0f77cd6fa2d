"""Recognition: Recognizer for whole files, Session for live audio."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE, Resampler, audio_blocks, to_float
from asr.decoding import Decoder, Hypothesis, TokenSpan, Word, words_from_tokens
from asr.decoding.beam import BeamConfig, BeamSearch
from asr.decoding.greedy import GreedyDecoder
from asr.endpoint import EndpointConfig, Endpointer
from asr.errors import AsrError, AudioError, ConfigError, ModelError
from asr.runtime import OfflineEngine, StreamingEngine, check_choice, load_engine
from asr.runtime.folder import NETWORKS, find_graph, find_language_model, find_networks
from asr.runtime.reader import SegmentReader
from asr.text import Tokenizer

_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
_BATCH_ROWS = 16
_BATCH_SAMPLES = 120 * SAMPLE_RATE  # of a batch, padding included
_GATHER_SAMPLES = 300 * SAMPLE_RATE  # a long file's segments wait for so much audio, to be read in batches


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What live audio has brought: `partial` is the open segment's text so far, `final` what was closed."""

    partial: str
    final: tuple[Segment, ...]


class Recognizer:
    """A model ready to recognize; `Recognizer.load` opens one.

    Args:
        networks: by name, "offline" or "streaming" or both.
        endpoint: where audio is cut into segments; None leaves it uncut, however long.
        name: of the model, for messages.
    """

    def __init__(
        self,
        networks: "dict[str, Network]",
        *,
        endpoint: EndpointConfig | None = EndpointConfig(),  # noqa: B008 (frozen)
        name: str = "model",
    ) -> None:
        self._networks, self._endpoint, self._name = networks, endpoint, name

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        engine: str = "onnx",
        precision: str | None = None,
        threads: int = 1,
        decoding: str = "greedy",
        beam: int | None = None,
        lm_weight: float | None = None,
        word_score: float | None = None,
        nbest: int | None = None,
        endpoint: EndpointConfig | None = EndpointConfig(),  # noqa: B008 (frozen)
    ) -> "Recognizer":
        """Open a model folder; its networks are read when first used.

        Args:
            path: the model folder; None is the model that comes with this package.
            engine: "onnx" or "torch".
            precision: "fp32" or "int8"; None: with onnx int8 where the model has it, with torch fp32.
            threads: for the arithmetic of one network.
            decoding: "greedy", or "beam": with the language model in the folder's lm/.
            beam, lm_weight, word_score, nbest: of the beam search, see asr.decoding.beam.BeamConfig.
            endpoint: where audio is cut into segments; None leaves it uncut, however long.

        Raises:
            ModelError: the folder is missing, incomplete or of another version, or has no language model.
            ConfigError: an argument that is not allowed.
        """
        check_choice(engine=engine, precision=precision, threads=threads)
        folders = find_networks(path)
        settings = {"beam": beam, "lm_weight": lm_weight, "word_score": word_score, "nbest": nbest}
        open_search = _search_opener(path, decoding, {k: v for k, v in settings.items() if v is not None})
        networks = {}
        for name, folder in folders.items():
            if engine == "onnx":
                find_graph(folder, precision)
            tokenizer = Tokenizer.load(folder / "tokens.txt")
            networks[name] = Network(
                tokenizer,
                lambda folder=folder: load_engine(folder, engine=engine, precision=precision, threads=threads),
                open_search=lambda tokens=tokenizer.tokens: open_search(tokens),
                where=str(folder),
            )
        shown = "shipped model" if path is None else f"model {path}"
        return cls(networks, endpoint=endpoint, name=shown)

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the networks that the model has."""
        return tuple(self._networks)

    def transcribe(
        self, audio: str | Path | np.ndarray, sample_rate: int | None = None, network: str = "offline"
    ) -> Transcript:
        """Recognize a recording of any length; a file is read in constant memory.

        Args:
            audio: a file, or samples: int16, or float32 in [-1, 1], (n,) or (n, channels).
            sample_rate: of samples, Hz; 16000 when it is not given. A file tells its own.
            network: "offline", or "streaming", which writes what live audio would give.

        Raises:
            AudioError: the file or the samples cannot be read.
            ModelError: the model has no such network.
        """
        if isinstance(audio, str | Path):
            if sample_rate is not None:
                raise AudioError(f"{audio}: a file tells its own sample rate; leave sample_rate out")
            blocks, rate = audio_blocks(audio), SAMPLE_RATE
        else:
            blocks, rate = iter([audio]), SAMPLE_RATE if sample_rate is None else sample_rate
        chosen = self._network(network)
        if network == "streaming":
            session = Session(chosen, self._endpoint, rate)
            for block in blocks:
                session.feed(block)
            return session.finish()
        return self._transcribe_offline(chosen, blocks, rate)

    def transcribe_batch(self, batch: Sequence[np.ndarray], network: str = "offline") -> list[Transcript]:
        """Recognize many utterances uncut, each one segment: float32 (n,) at 16 kHz each.

        Raises:
            AudioError: samples that cannot be read.
            ModelError: the model has no such network.
        """
        chosen = self._network(network)
        audios = [to_float(samples) for samples in batch]
        if network == "streaming":
            transcripts = []
            for samples in audios:
                session = Session(chosen, None, SAMPLE_RATE)
                session.feed(samples)
                transcripts.append(session.finish())
            return transcripts
        hypotheses = self._read(chosen, audios)
        durations = [len(samples) / SAMPLE_RATE for samples in audios]
        return [
            _transcript([chosen.segment(found, 0.0, duration)], duration)
            for found, duration in zip(hypotheses, durations, strict=True)
        ]

    def stream(self, sample_rate: int = SAMPLE_RATE) -> "Session":
        """Open a session for live audio of `sample_rate` Hz.

        Raises:
            AudioError: a rate outside 8 to 192 kHz.
            ModelError: the model has no streaming network.
        """
        return Session(self._network("streaming"), self._endpoint, sample_rate)

    def _network(self, name: str) -> "Network":
        if name not in NETWORKS:
            raise ConfigError(f"network = {name!r}: must be {' or '.join(NETWORKS)}")
        if name not in self._networks:
            raise ModelError(f"the {self._name} has no {name} network (it has: {', '.join(self._networks)})")
        return self._networks[name]

    def _transcribe_offline(self, network: "Network", blocks: Iterable[np.ndarray], rate: int) -> Transcript:
        clock = _Clock(rate)
        segments: list[Segment | None] = []
        waiting: list[tuple[int, np.ndarray]] = []

        def read_waiting() -> None:
            hypotheses = self._read(network, [samples for _, samples in waiting])
            for (start, samples), found in zip(waiting, hypotheses, strict=True):
                segments.append(network.segment(found, *clock.seconds(start, start + len(samples))))
            waiting.clear()

        for start, samples in _cut(clock.resample(blocks), self._endpoint):
            waiting.append((start, samples))
            if start + len(samples) - waiting[0][0] >= _GATHER_SAMPLES:
                read_waiting()
        read_waiting()
        return _transcript(segments, clock.duration)

    def _read(self, network: "Network", audios: Sequence[np.ndarray]) -> list[list[Hypothesis]]:
        """What each utterance may say; those of like length are read together."""
        order = sorted(range(len(audios)), key=lambda i: len(audios[i]))
        hypotheses: list[list[Hypothesis]] = [[] for _ in audios]
        while order:
            longest = len(audios[order[-1]]) + 2 * len(_EDGE)
            rows = max(1, min(_BATCH_ROWS, _BATCH_SAMPLES // longest))
            chosen, order = order[-rows:], order[:-rows]
            padded = [np.concatenate([_EDGE, audios[i], _EDGE]) for i in chosen]
            for i, log_probs in zip(chosen, network.engine.log_probs(padded), strict=True):
                decoder = network.decoder()
                decoder.accept(log_probs)
                hypotheses[i] = decoder.finish()
        return hypotheses


class Session:
    """Live audio in, text out; `Recognizer.stream` opens one. One thread at a time.

    The text depends on the samples alone, not on how they are cut: every segment's text is what the network
    writes for 250 ms of silence, the segment, and 250 ms of silence, read in blocks of one size.
    """

    def __init__(self, network: "Network", endpoint: EndpointConfig | None, sample_rate: int) -> None:
        self._clock = _Clock(sample_rate)
        self._network = network
        self._endpointer = None if endpoint is None else Endpointer(endpoint)
        self._start = 0  # of the open segment, in samples at 16 kHz
        self._open = self._new_reader()
        self._segments: list[Segment] = []
        self._transcript: Transcript | None = None

    def feed(self, samples: np.ndarray) -> Update:
        """Take the next samples, any number of them, also none: int16, or float32 in [-1, 1], (n,).

        Raises:
            AudioError: samples that cannot be read; the session goes on without them.
            AsrError: the session is finished.
        """
        if self._transcript is not None:
            raise AsrError("this session is finished: open another one with Recognizer.stream()")
        final = self._take(self._clock.process(samples))
        return Update(partial=self._network.text(self._open.decoder.tokens()), final=tuple(final))

    def finish(self) -> Transcript:
        """End the audio and return all that was said; called again, it returns the same."""
        if self._transcript is None:
            self._take(self._clock.finish())
            self._close(self._clock.samples)
            self._transcript = _transcript(self._segments, self._clock.duration)
        return self._transcript

    def _take(self, samples: np.ndarray) -> list[Segment]:
        """Read samples at 16 kHz; return the segments that they close."""
        position = self._clock.samples - len(samples)
        closed = len(self._segments)
        for cut in self._endpointer.accept(samples) if self._endpointer else ():
            if cut > position:
                self._open.push(samples[: cut - position])
                samples, position = samples[cut - position :], cut
                following = samples[:0]
            else:
                following = self._open.rewind(cut - self._start)
            self._close(cut)
            self._start, self._open = cut, self._new_reader()
            self._open.push(following)
        self._open.push(samples)
        return self._segments[closed:]

    def _close(self, end: int) -> None:
        segment = self._network.segment(self._open.finish(), *self._clock.seconds(self._start, end))
        if segment is not None:
            self._segments.append(segment)

    def _new_reader(self) -> "SegmentReader":
        lookback = self._endpointer.lookback if self._endpointer else 0
        return SegmentReader(self._network.engine, self._network.decoder(), lookback)


class Network:
    """One network of a model with its vocabulary.

    Args:
        tokenizer: the vocabulary.
        open_engine: called at first use.
        open_search: called at first use: gives what makes a decoder for each segment.
        where: the network's folder, for messages.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        open_engine: Callable[[], OfflineEngine | StreamingEngine],
        *,
        open_search: Callable[[], Callable[[], Decoder]] = lambda: GreedyDecoder,
        where: str = "network",
    ) -> None:
        self.tokens = tokenizer.tokens
        self._open_engine, self._open_search, self._where = open_engine, open_search, where

    @cached_property
    def engine(self) -> Any:
        """The OfflineEngine or StreamingEngine.

        Raises:
            ModelError: it cannot be opened, or does not fit the vocabulary.
        """
        engine = self._open_engine()
        if engine.vocab_size != len(self.tokens):
            raise ModelError(
                f"{self._where}: tokens.txt has {len(self.tokens)} tokens, the network {engine.vocab_size}; "
                "the model is damaged"
            )
        return engine

    @cached_property
    def decoder(self) -> Callable[[], Decoder]:
        """Makes a decoder for one segment.

        Raises:
            ModelError: the language model cannot be read.
        """
        return self._open_search()

    def text(self, spans: Iterable[TokenSpan]) -> str:
        """The text of tokens."""
        return " ".join("".join(self.tokens[span.token] for span in spans).split())

    def segment(self, hypotheses: Sequence[Hypothesis], start: float, end: float) -> Segment | None:
        """The segment [start, end), in seconds, that says the first of these; None where that is nothing."""
        frame = self.engine.samples_per_frame / SAMPLE_RATE
        words = words_from_tokens(
            hypotheses[0].tokens, self.tokens, start=start, end=end, frame=frame, edge=EDGE_SILENCE_SECONDS
        )
        if not words:
            return None
        texts = [Alternative(text=self.text(h.tokens), score=h.score) for h in hypotheses]
        return Segment(
            text=" ".join(word.text for word in words),
            start=start,
            end=end,
            words=tuple(words),
            alternatives=tuple(texts) if len(texts) > 1 else (),
        )


def _search_opener(
    path: str | Path | None, decoding: str, settings: dict[str, Any]
) -> Callable[[Sequence[str]], Callable[[], Decoder]]:
    """How to open a search for a vocabulary; what it needs is looked for now.

    Raises:
        ConfigError: no such decoding, or settings that it does not have.
        ModelError: the model has no language model.
    """
    if decoding == "greedy":
        for name, value in settings.items():
            raise ConfigError(f"{name} = {value!r}: only with decoding = 'beam'")
        return lambda tokens: GreedyDecoder
    if decoding != "beam":
        raise ConfigError(f"decoding = {decoding!r}: must be greedy or beam")
    config = BeamConfig(**settings)
    model, words = find_language_model(path)
    return lambda tokens: BeamSearch(model, words.read_text(encoding="utf-8").split(), tokens, config)


class _Clock:
    """Brings audio to 16 kHz and tells the time in it."""

    def __init__(self, sample_rate: int) -> None:
        self.samples = 0  # brought to 16 kHz so far
        self._resampler = Resampler(sample_rate, SAMPLE_RATE)
        self._given, self._rate = 0, sample_rate

    @property
    def duration(self) -> float:
        """Seconds of the audio so far."""
        return self._given / self._rate

    def process(self, samples: np.ndarray) -> np.ndarray:
        """Samples as they come -> float32 (n,) at 16 kHz."""
        floats = to_float(samples)
        self._given += len(floats)
        return self._count(self._resampler.process(floats))

    def finish(self) -> np.ndarray:
        """What the resampler still holds."""
        return self._count(self._resampler.finish())

    def resample(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """`process` for every block, and `finish`."""
        for block in blocks:
            yield self.process(block)
        yield self.finish()

    def seconds(self, start: int, end: int) -> tuple[float, float]:
        """Positions at 16 kHz in seconds; rounding in the resampler does not reach past the end."""
        return min(start / SAMPLE_RATE, self.duration), min(end / SAMPLE_RATE, self.duration)

    def _count(self, samples: np.ndarray) -> np.ndarray:
        self.samples += len(samples)
        return samples


def _cut(blocks: Iterable[np.ndarray], endpoint: EndpointConfig | None) -> Iterator[tuple[int, np.ndarray]]:
    """The segments of a recording at 16 kHz with the position of their first sample."""
    if endpoint is None:
        yield 0, np.concatenate([np.zeros(0, np.float32), *blocks])
        return
    endpointer = Endpointer(endpoint)
    start, held = 0, np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        for cut in endpointer.accept(block):
            yield start, held[: cut - start]
            start, held = cut, held[cut - start :]
    yield start, held


def _transcript(segments: Iterable[Segment | None], duration: float) -> Transcript:
    written = tuple(segment for segment in segments if segment is not None)
    return Transcript(
        text=" ".join(segment.text for segment in written),
        words=tuple(word for segment in written for word in segment.words),
        segments=written,
        duration=duration,
    )
