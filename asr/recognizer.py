"""Recognition: Recognizer for whole files, Session for live audio."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE, Resampler, audio_blocks, to_float
from asr.decoding import TokenSpan, Word, make_decoder, words_from_tokens
from asr.endpoint import EndpointConfig, Endpointer
from asr.errors import AsrError, AudioError, ConfigError, ModelError
from asr.runtime import OfflineEngine, StreamingEngine, check_choice, load_engine
from asr.runtime.folder import NETWORKS, find_graph, find_networks
from asr.runtime.reader import SegmentReader
from asr.text import Tokenizer

_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
_BATCH_ROWS = 16
_BATCH_SAMPLES = 120 * SAMPLE_RATE  # of a batch, padding included
_GATHER_SAMPLES = 300 * SAMPLE_RATE  # a long file's segments wait for so much audio, to be read in batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of a recording with words in it; `start` and `end` in seconds."""

    text: str
    start: float
    end: float
    words: tuple[Word, ...]


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
        decoding: "greedy".
        endpoint: where audio is cut into segments; None leaves it uncut, however long.
        name: of the model, for messages.

    Raises:
        ConfigError: no such decoding.
    """

    def __init__(
        self,
        networks: "dict[str, Network]",
        *,
        decoding: str = "greedy",
        endpoint: EndpointConfig | None = EndpointConfig(),  # noqa: B008 (frozen)
        name: str = "model",
    ) -> None:
        make_decoder(decoding)
        self._networks, self._decoding, self._endpoint, self._name = networks, decoding, endpoint, name

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        engine: str = "onnx",
        precision: str | None = None,
        threads: int = 1,
        decoding: str = "greedy",
        endpoint: EndpointConfig | None = EndpointConfig(),  # noqa: B008 (frozen)
    ) -> "Recognizer":
        """Open a model folder; its networks are read when first used.

        Args:
            path: the model folder; None is the model that comes with this package.
            engine: "onnx" or "torch".
            precision: "fp32" or "int8"; None: with onnx int8 where the model has it, with torch fp32.
            threads: for the arithmetic of one network.
            decoding: "greedy".
            endpoint: where audio is cut into segments; None leaves it uncut, however long.

        Raises:
            ModelError: the folder is missing, incomplete or of another version.
            ConfigError: an argument that is not allowed.
        """
        check_choice(engine=engine, precision=precision, threads=threads)
        networks = {}
        for name, folder in find_networks(path).items():
            if engine == "onnx":
                find_graph(folder, precision)
            networks[name] = Network(
                Tokenizer.load(folder / "tokens.txt"),
                lambda folder=folder: load_engine(folder, engine=engine, precision=precision, threads=threads),
                where=str(folder),
            )
        shown = "shipped model" if path is None else f"model {path}"
        return cls(networks, decoding=decoding, endpoint=endpoint, name=shown)

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
            session = Session(chosen, self._decoding, self._endpoint, rate)
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
                session = Session(chosen, self._decoding, None, SAMPLE_RATE)
                session.feed(samples)
                transcripts.append(session.finish())
            return transcripts
        spans = self._read(chosen.engine, audios)
        durations = [len(samples) / SAMPLE_RATE for samples in audios]
        return [
            _transcript([chosen.segment(found, 0.0, duration)], duration)
            for found, duration in zip(spans, durations, strict=True)
        ]

    def stream(self, sample_rate: int = SAMPLE_RATE) -> "Session":
        """Open a session for live audio of `sample_rate` Hz.

        Raises:
            AudioError: a rate outside 8 to 192 kHz.
            ModelError: the model has no streaming network.
        """
        return Session(self._network("streaming"), self._decoding, self._endpoint, sample_rate)

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
            spans = self._read(network.engine, [samples for _, samples in waiting])
            for (start, samples), found in zip(waiting, spans, strict=True):
                segments.append(network.segment(found, *clock.seconds(start, start + len(samples))))
            waiting.clear()

        for start, samples in _cut(clock.resample(blocks), self._endpoint):
            waiting.append((start, samples))
            if start + len(samples) - waiting[0][0] >= _GATHER_SAMPLES:
                read_waiting()
        read_waiting()
        return _transcript(segments, clock.duration)

    def _read(self, engine: OfflineEngine, audios: Sequence[np.ndarray]) -> list[list[TokenSpan]]:
        """The tokens of each utterance; those of like length are read together."""
        order = sorted(range(len(audios)), key=lambda i: len(audios[i]))
        spans: list[list[TokenSpan]] = [[] for _ in audios]
        while order:
            longest = len(audios[order[-1]]) + 2 * len(_EDGE)
            rows = max(1, min(_BATCH_ROWS, _BATCH_SAMPLES // longest))
            chosen, order = order[-rows:], order[:-rows]
            padded = [np.concatenate([_EDGE, audios[i], _EDGE]) for i in chosen]
            for i, log_probs in zip(chosen, engine.log_probs(padded), strict=True):
                decoder = make_decoder(self._decoding)
                decoder.accept(log_probs)
                spans[i] = decoder.tokens()
        return spans


class Session:
    """Live audio in, text out; `Recognizer.stream` opens one. One thread at a time.

    The text depends on the samples alone, not on how they are cut: every segment's text is what the network
    writes for 250 ms of silence, the segment, and 250 ms of silence, read in blocks of one size.
    """

    def __init__(self, network: "Network", decoding: str, endpoint: EndpointConfig | None, sample_rate: int) -> None:
        self._clock = _Clock(sample_rate)
        self._network, self._decoding = network, decoding
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
        return SegmentReader(self._network.engine, make_decoder(self._decoding), lookback)


class Network:
    """One network of a model with its vocabulary.

    Args:
        tokenizer: the vocabulary.
        open_engine: called at first use.
        where: the network's folder, for messages.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        open_engine: Callable[[], OfflineEngine | StreamingEngine],
        *,
        where: str = "network",
    ) -> None:
        self.tokens = tokenizer.tokens
        self._open_engine, self._where = open_engine, where

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

    def text(self, spans: Iterable[TokenSpan]) -> str:
        """The text of tokens."""
        return " ".join("".join(self.tokens[span.token] for span in spans).split())

    def segment(self, spans: Iterable[TokenSpan], start: float, end: float) -> Segment | None:
        """The segment [start, end), in seconds, with these tokens; None where they spell nothing."""
        frame = self.engine.samples_per_frame / SAMPLE_RATE
        words = words_from_tokens(spans, self.tokens, start=start, end=end, frame=frame, edge=EDGE_SILENCE_SECONDS)
        if not words:
            return None
        return Segment(text=" ".join(word.text for word in words), start=start, end=end, words=tuple(words))


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
