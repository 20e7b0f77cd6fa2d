"""Live audio in, text out: a Session, and the clock that it goes by."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE, Resampler, to_float
from asr.decoding import Decoder, TokenSpan, Word, words_from_tokens
from asr.decoding.sound import Levels
from asr.endpoint import EndpointConfig, Endpointer
from asr.errors import AsrError, ConfigError
from asr.network import Network, Segment, Transcript, transcript_of
from asr.runtime import StreamingEngine
from asr.runtime.reader import Later, Step, StreamReader, Work, parted, run
from asr.snapshot import Snapshot
from asr.vad import UNIT

_EDGE = round(EDGE_SILENCE_SECONDS * SAMPLE_RATE)  # samples
_SEARCH_SECONDS = 0.5  # a cut that is in no pause waits so long for the end of a word


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What live audio has brought: `partial` is the open segment's text so far, `final` what was closed."""

    partial: str
    final: tuple[Segment, ...]
    _tell_words: Callable[[], Sequence[Word]] = field(default=tuple, repr=False, compare=False)

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of `partial`, with times and confidences (not calibrated) as they look so far."""
        return tuple(self._tell_words())  # worked out only for those who ask


class Session:
    """Live audio in, text out; `Recognizer.stream` opens one. One thread at a time.

    The text depends on the samples alone, not on how they are handed in: it is what the network writes for 250 ms of
    silence, the stream, and 250 ms of silence, read in blocks of one size. Endpoints share it out between segments;
    the network itself goes on across them.

    Args:
        network: the streaming network.
        second: the offline network, if it reads finished segments again.
        block_frames: of the network, that are read at a time: fewer show text sooner and cost more; None: as many as
            make 160 ms, or nearly.
    """

    shared = ("_network", "_second", "_endpoint", "_finished")  # not of the state that asr.snapshot keeps

    def __init__(
        self,
        network: Network,
        endpoint: EndpointConfig | None,
        sample_rate: int,
        *,
        second: Network | None = None,
        keep_segments: bool = True,
        block_frames: int | None = None,
    ) -> None:
        if second is not None and endpoint is None:
            raise ConfigError("two_pass: a segment that never ends is never read again; give an endpoint")
        if block_frames is not None and block_frames < 1:
            raise ConfigError(f"block_frames = {block_frames!r}: must be at least 1")
        self._clock = Clock(sample_rate)
        self._network, self._second = network, second
        self._endpoint, self._frame_samples = endpoint, network.engine.samples_per_frame
        self._endpointer = None if endpoint is None else Endpointer(endpoint)
        lookback = self._endpointer.lookback if self._endpointer else 0
        self._reader = StreamReader(network.engine, network.decoder, network.visible, lookback, block_frames)
        self._start = 0  # of the open segment, in samples at 16 kHz
        self._cuts: list[tuple[int, int]] = []  # found, but not read that far yet; how many frames more to search
        self._audio: list[np.ndarray] = []  # of the open segment and what follows it, for the second pass
        self._levels = Levels()  # of the open segment and what follows it
        self._heard: list[np.ndarray] = []  # samples at 16 kHz that fill no block of the network yet
        self._lacking = self._reader.lacking  # until they do
        self._partial, self._partial_frames = "", 0  # the open segment's text, and after how many frames
        self._letters, self._spelled = "", 0  # of the first tokens of the open segment, and how many they are
        self._pending: list[TokenSpan] = []  # the tokens after those that its decoder has written
        self._keep = keep_segments
        self._segments: list[Segment] = []
        self._finished: Transcript | None = None

    def feed(self, samples: np.ndarray) -> Update:
        """Take the next samples, any number of them, also none: int16, or float32 in [-1, 1], (n,).

        Raises:
            AudioError: samples that cannot be read; the session goes on without them.
            AsrError: the session is finished.
        """
        return run(self.feeding(np.array(samples)), self.answer)  # the caller may use its buffer again

    def finish(self) -> Transcript:
        """End the audio and return all that was said; called again, it returns the same."""
        return run(self.finishing(), self.answer)

    def save(self) -> bytes:
        """The session as it stands, for `Recognizer.resume`; it goes on all the same.

        Raises:
            AsrError: the session is finished.
        """
        self._check_open()
        return Snapshot.write(self, self.about)

    def feeding(self, samples: np.ndarray) -> Work[Update] | Update:
        """`feed`, as work for whoever has the networks (see asr.runtime.reader), or at once where there is none.

        The samples are kept as they are: nobody may change them.
        """
        self._check_open()
        samples = self._clock.process(samples)
        self._heard.append(samples)
        self._lacking -= len(samples)
        return self._reading() if self._lacking <= 0 else self._update()

    def finishing(self) -> Work[Transcript]:
        """`finish`, as work for whoever has the networks."""
        if self._finished is None:
            self._heard.append(self._clock.finish())
            last = yield from self._take()
            yield from self._reader.finish()
            last += yield from self._close_at_cuts(ended=True)
            last += yield from self._close(self._clock.samples, self._reader.frames)
            self._finished = transcript_of(self._segments if self._keep else last, self._clock.duration)
        return self._finished

    def answer(self, request: Step | Later) -> Any:
        """What the network says, asked for this session alone."""
        if isinstance(request, Later):
            return request.work()
        return parted(self._network.engine, *self._network.engine.step(*request))[0]

    @property
    def sample_rate(self) -> int:
        """Of the audio that comes in, Hz."""
        return self._clock.rate

    @property
    def engine(self) -> StreamingEngine:
        """What answers its steps; sessions of one recognizer share it."""
        return self._network.engine

    @property
    def about(self) -> dict[str, Any]:
        """What a saved session needs to be the same where it is resumed."""
        return {
            "streaming network": self._network.identity,
            "offline network": None if self._second is None else self._second.identity,
            "decoding": type(self._reader.decoder).__name__,
            "search": self._network.search,
            "sample_rate": self._clock.rate,
            "endpoint": None if self._endpoint is None else asdict(self._endpoint),
            "two_pass": self._second is not None,
        }

    @property
    def decoders(self) -> dict[str, Callable[[], Decoder]]:
        """What makes a decoder of this session's kind, by the name of the kind."""
        return {type(self._reader.decoder).__name__: self._network.decoder}

    def _check_open(self) -> None:
        if self._finished is not None:
            raise AsrError("this session is finished: open another one with Recognizer.stream()")

    def _reading(self) -> Work[Update]:
        final = yield from self._take()
        if self._reader.frames != self._partial_frames:
            self._spell()
        return self._update(tuple(final))

    def _spell(self) -> None:
        """Bring the open segment's text up to date; what its decoder has written was spelled before."""
        decoder = self._reader.decoder
        self._letters += self._network.letters(decoder.written[self._spelled :])
        self._spelled, self._pending = len(decoder.written), decoder.pending()
        self._partial = " ".join((self._letters + self._network.letters(self._pending)).split())
        self._partial_frames = self._reader.frames

    def _update(self, final: tuple[Segment, ...] = ()) -> Update:
        written = self._reader.decoder.written  # it will grow
        clock, first = self._clock, self._position(self._reader.start)
        times = (self._start, clock.samples, clock.duration, first)
        words = partial(_words, self._network, written, len(written), self._pending, *times)
        return Update(partial=self._partial, final=final, _tell_words=words)

    def _take(self) -> Work[list[Segment]]:
        """Read what was heard; return the segments that it closes."""
        reader, heard, self._heard = self._reader, self._heard, []
        position = self._clock.samples - sum(map(len, heard))
        closed: list[Segment] = []
        for samples in heard:
            energies = self._levels.accept(samples).tolist()
            while len(samples):
                # Unit by unit: what the network has written when it is asked must not depend on how samples come.
                piece = samples[: UNIT - position % UNIT] if self._endpointer else samples
                samples, position = samples[len(piece) :], position + len(piece)
                reader.push(piece)
                while (step := reader.step()) is not None:
                    reader.accept((yield step))
                if self._second is not None:
                    self._audio.append(piece)
                if self._endpointer:
                    self._find_cuts(self._endpointer, piece, energies)
                    energies = []
                if self._cuts:
                    closed += yield from self._close_at_cuts()
        self._lacking = reader.lacking
        return closed

    def _find_cuts(self, endpointer: Endpointer, piece: np.ndarray, energies: list[float]) -> None:
        """Let the endpointer hear what follows; `energies` are those of all that was heard with it."""
        cuts = endpointer.accept(piece, self._position(self._reader.written), energies)
        if cuts:
            if self._endpoint and self._endpoint.reset and endpointer.paused:
                self._reader.restart()
            search = 0 if endpointer.paused else round(_SEARCH_SECONDS * SAMPLE_RATE / self._frame_samples)
            self._cuts += [(cut, search) for cut in cuts]

    def _close_at_cuts(self, *, ended: bool = False) -> Work[list[Segment]]:
        """Close the segments whose end has been read, or all, where the stream has ended."""
        closed: list[Segment] = []
        while self._cuts:
            cut, search = self._cuts[0]
            if not ended and self._frame(cut) + search > self._reader.frames:
                break
            del self._cuts[0]
            closed += yield from self._close(cut, self._frame(cut), search)
        return closed

    def _close(self, end: int, frame: int, search: int = 0) -> Work[list[Segment]]:
        """End the open segment at a sample, before a frame; return it, if anything was said in it."""
        network, times = self._network, self._clock.seconds(self._start, end)
        edge = (self._start - self._position(self._reader.start)) / SAMPLE_RATE
        decoder = self._reader.cut(frame, search)
        if self._second is not None:
            audio = np.concatenate([np.zeros(0, np.float32), *self._audio])
            network, edge = self._second, EDGE_SILENCE_SECONDS
            (hypotheses,) = yield Later(partial(network.read, [audio[: end - self._start]], [decoder]))
            self._audio = [audio[end - self._start :]]
        elif decoder.weighs:
            hypotheses = yield Later(decoder.finish)
        else:
            hypotheses = decoder.finish()
        levels = self._levels.take((end - self._start) / SAMPLE_RATE)
        self._start = end
        self._partial_frames = -1  # the text so far was of the segment that is closed
        self._letters, self._spelled = "", 0
        segment = network.segment(hypotheses, *times, levels, edge)
        found = [] if segment is None else [segment]
        if self._keep:
            self._segments += found
        return found

    def _frame(self, sample: int) -> int:
        """The frame, of the stream, that begins nearest to a sample."""
        return round((sample + _EDGE) / self._frame_samples)

    def _position(self, frame: int) -> int:
        """The sample at which a frame begins; the first ones lie in the silence before the stream."""
        return frame * self._frame_samples - _EDGE


def _words(
    network: Network,
    written: list[TokenSpan],
    count: int,
    pending: list[TokenSpan],
    start: int,
    end: int,
    duration: float,
    first: int,
) -> list[Word]:
    """The words of an open segment: of the first `count` tokens written and those pending.

    The segment lies from sample `start` to sample `end` of `duration` seconds; its frames begin at sample `first`.
    """
    begins, ends = min(start / SAMPLE_RATE, duration), min(end / SAMPLE_RATE, duration)
    frame, edge = network.engine.samples_per_frame / SAMPLE_RATE, (start - first) / SAMPLE_RATE
    spans = [*written[:count], *pending]
    return words_from_tokens(spans, network.tokens, start=begins, end=ends, frame=frame, edge=edge)


class Clock:
    """Brings audio to 16 kHz and tells the time in it."""

    def __init__(self, sample_rate: int) -> None:
        self.samples = 0  # brought to 16 kHz so far
        self.rate = int(sample_rate)  # of what comes in
        self._resampler = Resampler(sample_rate, SAMPLE_RATE)
        self._given = 0

    @property
    def duration(self) -> float:
        """Seconds of the audio so far."""
        return self._given / self.rate

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
