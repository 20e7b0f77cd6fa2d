"""The streaming network reading a stream, block by block; what it wrote lately is kept, to end a segment there.

What reads is written as a generator: it yields what the networks shall compute and is sent the answer. A lone session
has each request answered at once (`run`); many streams have theirs gathered and answered together (`Gathering`).
"""

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from time import monotonic
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.decoding import Best, Decoder, best_of
from asr.runtime import State, StreamingEngine

_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
_BLOCK_SECONDS = 0.16  # of live audio are read at a time, or a little less or more: whole frames
_CHECKPOINT_BLOCKS = 6  # a segment that is cut in its past is decoded again from at most so far back
T = TypeVar("T")


def usual_block(samples_per_frame: int) -> int:
    """How many frames of a network are read at a time: 4 of 40 ms, 5 of 30 ms."""
    return max(1, round(_BLOCK_SECONDS * SAMPLE_RATE / samples_per_frame))


class Step(NamedTuple):
    """A request: one step of the streaming network; answered with what it wrote.

    The arguments are those of `StreamingEngine.step`, for a batch of one.
    """

    audio: np.ndarray
    state: State
    flush: bool


class Written(NamedTuple):
    """The answer to a step: what the network wrote (frames, columns), each frame's best token, the new state."""

    log_probs: np.ndarray
    best: Best
    state: State


class Later(NamedTuple):
    """A request: what takes long shall be done, in whatever thread; answered with what it returns."""

    work: Callable[[], Any]


Work = Generator[Step | Later, Any, T]


class StreamReader:
    """The streaming network reading a stream, in blocks of one size; a segment may still end in the recent past.

    The network's state goes on from segment to segment, so that it knows voice and room by then; every segment has a
    decoder of its own. Frames are counted from the start of the stream, its edge silence included.

    Attributes:
        decoder: of the open segment.
        start: frame at which that begins.
        frames: read so far, of the stream.
        written: frame after the last one on which the network wrote something to be seen; 0: it never did.

    Args:
        engine: the streaming network.
        open_decoder: makes a decoder for each segment.
        visible: which tokens can be seen, (vocabulary,): neither the blank nor spaces.
        lookback: samples; `cut` goes back no further.
        block_frames: of the network, that are read at a time; None: `usual_block`.
    """

    # not of the state that asr.snapshot keeps
    shared = ("_engine", "_open_decoder", "_visible", "_seen", "_blank", "_first")

    def __init__(
        self,
        engine: StreamingEngine,
        open_decoder: Callable[[], Decoder],
        visible: np.ndarray,
        lookback: int,
        block_frames: int | None = None,
    ) -> None:
        self.decoder = open_decoder()
        self.start = self.frames = self.written = 0
        self._engine, self._open_decoder, self._visible = engine, open_decoder, visible
        self._seen = visible.tolist()
        self._blank = np.full(engine.vocab_size + engine.phone_count, -100.0, np.float32)  # log-probabilities
        self._blank[[0, engine.vocab_size] if engine.phone_count else 0] = 0.0
        self._blank = np.append(self._blank, np.full(engine.joint_size, np.nan, np.float32))  # nothing to join
        self._state = self._first = engine.initial_state()
        self._void = engine.latency_frames  # output frames still to be dropped
        self._lost = 0  # output frames still to be taken for blanks
        self._block = (block_frames or usual_block(engine.samples_per_frame)) * engine.samples_per_frame
        self._kept = -(-lookback // self._block)  # blocks
        self._past: deque[tuple[np.ndarray, Decoder | None]] = deque()  # log-probabilities, the decoder before them
        self._waiting = [_EDGE]  # samples that fill no block yet
        self.lacking = self._block - len(_EDGE)  # samples until they do; where it is not above 0, there is a step

    def check_restored(self) -> None:
        """Whether the network can go on from its state (asr.snapshot): what shares a step with it must not suffer.

        Raises:
            ValueError: it cannot.
        """
        own, wanted = ([(part.shape, part.dtype) for part in state] for state in (self._state, self._first))
        if own != wanted:
            raise ValueError(f"the network's state is {own}, not {wanted}")

    def push(self, samples: np.ndarray) -> None:
        """Take float32 (n,) at 16 kHz, to be read."""
        self._waiting.append(samples)
        self.lacking -= len(samples)

    def step(self) -> Step | None:
        """The step over the next whole block; its answer goes to `accept`. None: it is not full yet."""
        if self.lacking > 0:
            return None
        samples = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        rest = samples[self._block :]
        self._waiting = [rest if len(rest) >= self._block else rest.copy()]
        self.lacking += self._block
        return Step(samples[None, : self._block], self._state, False)

    def finish(self) -> Work[None]:
        """End the stream: read what is left of it, and 250 ms of silence."""
        self.push(_EDGE)
        while (step := self.step()) is not None:
            self.accept((yield step))
        frame = self._engine.samples_per_frame
        rest = np.concatenate(self._waiting)
        rest = rest[: len(rest) // frame * frame]  # what is left after it is silence
        if len(rest):
            self.accept((yield Step(rest[None], self._state, False)))
        if self._engine.latency_frames:
            silence = np.zeros((1, self._engine.latency_frames * frame), np.float32)
            self.accept((yield Step(silence, self._state, True)))

    def restart(self) -> None:
        """Forget voice and room: what follows is read as if the stream began here, in a pause."""
        self._state = self._first
        self._lost = self._engine.latency_frames - self._void  # frames that the old state still held

    def cut(self, frame: int, search: int = 0) -> Decoder:
        """End the open segment before `frame`, which has been read, and return its decoder, which has read it all.

        With `search`, a word that is being written there is written to its end: the segment goes on to the middle of
        the longest stretch, of so many frames, in which nothing to be seen is written.
        """
        frame = max(frame, self.start)  # the segment before this one may have gone on a little
        later: list[np.ndarray] = []  # log-probabilities
        before, decoder = self.frames, self.decoder
        while before > frame or (later and decoder is None):
            log_probs, decoder = self._past.pop()
            before -= len(log_probs)
            later.insert(0, log_probs)
        assert decoder is not None
        following = np.concatenate(later) if later else np.zeros((0, len(self._blank)), np.float32)
        end = frame - before + self._gap(following[frame - before :][:search])
        decoder.accept(following[:end])
        self.decoder, self.start = self._open_decoder(), before + end
        self._past.clear()
        self._decode(following[end:])
        return decoder

    def _gap(self, log_probs: np.ndarray) -> int:
        """The middle of the longest stretch of (frames, vocabulary) in which nothing to be seen is written."""
        written = np.flatnonzero(self._visible[self._tokens(log_probs).argmax(axis=1)])
        edges = np.concatenate([[-1], written, [len(log_probs)]])
        longest = int(np.argmax(np.diff(edges)))
        return int(edges[longest] + edges[longest + 1] + 1) // 2 if len(written) else 0

    def _tokens(self, log_probs: np.ndarray) -> np.ndarray:
        return log_probs[:, : len(self._visible)]

    def accept(self, answer: Written) -> None:
        """Take what a step wrote."""
        log_probs, best, self._state = answer
        if self._void or self._lost:
            log_probs, best = self._without_void(log_probs)
        self.frames += len(log_probs)
        for later, token in enumerate(reversed(best[0])):
            if self._seen[token]:
                self.written = self.frames - later
                break
        self._decode(log_probs, best)

    def _without_void(self, log_probs: np.ndarray) -> tuple[np.ndarray, Best]:
        """What counts of (frames, vocabulary) where a state is new."""
        void = min(self._void, len(log_probs))
        self._void -= void
        log_probs = log_probs[void:]
        lost = min(self._lost, len(log_probs))
        self._lost -= lost
        log_probs = np.concatenate([np.tile(self._blank, (lost, 1)), log_probs[lost:]])
        return log_probs, best_of(self._tokens(log_probs))

    def _decode(self, log_probs: np.ndarray, best: Best | None = None) -> None:
        if not len(log_probs):
            return
        if self._kept:
            due = len(self._past) % _CHECKPOINT_BLOCKS == 0
            self._past.append((log_probs.copy(), self.decoder.copy() if due else None))
            while len(self._past) >= self._kept + _CHECKPOINT_BLOCKS:
                for _ in range(_CHECKPOINT_BLOCKS):
                    self._past.popleft()
        self.decoder.accept(log_probs, best)


def run(work: Work[T] | T, answer: Callable[[Step | Later], Any]) -> T:
    """Do the work of one stream, if it is any: each request is answered at once."""
    if not isinstance(work, Generator):
        return work
    try:
        request = next(work)
        while True:
            request = work.send(answer(request))
    except StopIteration as done:
        return done.value


def run_together(works: Iterable[Work[T]], engine: StreamingEngine, rows: int) -> list[T]:
    """Do the work of many streams: up to `rows` of their steps are one call."""
    results: dict[int, T] = {}
    waiting: Gathering[tuple[int, Work[T]]] = Gathering()

    def advance(number: int, work: Work[T], answer: Any) -> None:
        try:
            while isinstance(request := work.send(answer), Later):
                answer = request.work()
            waiting.add((number, work), request)
        except StopIteration as done:
            results[number] = done.value

    for number, work in enumerate(works):
        advance(number, work, None)
        while len(waiting) >= 2 * rows:
            _answer_group(waiting, engine, rows, advance)
    while len(waiting):
        _answer_group(waiting, engine, rows, advance)
    return [results[number] for number in range(len(results))]


def _answer_group(
    waiting: "Gathering[tuple[int, Work[T]]]",
    engine: StreamingEngine,
    rows: int,
    advance: Callable[[int, Work[T], Any], None],
) -> None:
    group = waiting.take(rows)
    answers = parted(engine, *engine.step(*joined([step for _, step in group])))
    for ((number, work), _), answer in zip(group, answers, strict=True):
        advance(number, work, answer)


def joined(steps: Sequence[Step]) -> Step:
    """Steps of equal length and equal `flush` as one step of many rows."""
    if len(steps) == 1:
        return steps[0]
    state = tuple([np.concatenate(parts) for parts in zip(*[step.state for step in steps], strict=True)])
    return Step(np.concatenate([step.audio for step in steps]), state, steps[0].flush)


def parted(engine: StreamingEngine, log_probs: np.ndarray, state: State) -> list[Written]:
    """What a step of many rows gave, as the answer of each row."""
    by_token = log_probs[..., : engine.vocab_size]
    tokens, values = by_token.argmax(axis=2).tolist(), by_token.max(axis=2).tolist()
    if len(log_probs) == 1:
        return [Written(log_probs[0], (tokens[0], values[0]), state)]
    # copies: a row that outlives its batch must not keep the whole of it
    return [
        Written(row, (tokens[i], values[i]), tuple([part[i : i + 1].copy() for part in state]))
        for i, row in enumerate(log_probs)
    ]


class Gathering(Generic[T]):
    """Steps that wait to be computed, each with whom it belongs to; those of one kind can be one call."""

    def __init__(self) -> None:
        # by length and flush
        self._kinds: defaultdict[tuple[int, bool], deque[tuple[float, T, Step]]] = defaultdict(deque)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def since(self) -> float:
        """When, in `time.monotonic`, the step that has waited longest was added; there must be one."""
        return self._oldest()[0][0]

    def add(self, owner: T, step: Step) -> None:
        """Put a step at the end of the queue."""
        kind = (step.audio.shape[1], step.flush)
        self._kinds[kind].append((monotonic(), owner, step))
        self._count += 1

    def take(self, rows: int) -> list[tuple[T, Step]]:
        """The step that has waited longest and up to `rows` - 1 of its kind, the oldest first."""
        queue = self._oldest()
        taken = [queue.popleft()[1:] for _ in range(min(rows, len(queue)))]
        self._count -= len(taken)
        return taken

    def _oldest(self) -> deque[tuple[float, T, Step]]:
        return min((queue for queue in self._kinds.values() if queue), key=lambda queue: queue[0][0])
