"""Many live streams over one recognizer: what is ready is stepped together."""

import contextlib
import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from types import EllipsisType, GeneratorType, TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.endpoint import EndpointConfig
from asr.errors import AsrError, AudioError, ConfigError, Overloaded
from asr.network import Transcript
from asr.recognizer import Recognizer
from asr.runtime.reader import Gathering, Later, Step, Work, joined, parted
from asr.session import Session, Update

_T = TypeVar("_T")
# Among many streams, what comes within so many seconds is looked at together: a thread that Python wakes for each
# block costs more than the block.
_PAUSE = 0.001
_SWITCH_SECONDS = 0.0005  # between two threads of Python
# Full steps are handed out before a thread is free: it would stand still until Python's turn comes round to it.
_AHEAD = 2  # a thread, the one that it computes included


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Python set for hundreds of streams in one process.

    The cyclic garbage collector finds next to nothing, and stops all threads for tens of milliseconds. And whoever
    sends or receives gives the interpreter away, and would wait for the usual 5 ms until the engine's thread gives it
    back: several times for each message.
    """
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class Streams:
    """Live streams that share the steps of one network; use it with `with`, or call `close`.

    All methods may be called from any thread, and return at once; what takes time is a Future (in asyncio:
    `await asyncio.wrap_future(stream.feed(samples))`). A stream's text, times and confidences are those of a
    lone `Recognizer.stream` session, whatever its neighbours do.

    One thread does what is to be done in Python. It hands steps of the network to `threads` others, each of which
    computes one at a time on one core; a step takes the blocks that have waited longest, one of each stream, so
    that a stream that gives much at once gets no more than its turn. Second passes, and what a beam search weighs
    at the end of a segment, are computed by one thread more, one segment after the other: the partial texts of all
    other streams go on meanwhile.

    Python itself is the limit of many streams: a process that serves some hundred does so in `with busy_process():`.

    Args:
        recognizer: a model with a streaming network, opened with `threads=1`: cores are shared out here.
        max_streams: open at once; one more is refused with Overloaded.
        wait_ms: a block waits at most so long for blocks of other streams, and not at all when none can come.
        max_batch: blocks in one step: what they need together should fit a core's cache.
        threads: steps that are computed at the same time; as many as there are cores.
        max_waiting: seconds of audio that a stream may have given and that are not read yet.

    Raises:
        ModelError: the model has no streaming network.
        ConfigError: an argument that is not allowed.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        *,
        max_streams: int = 1000,
        wait_ms: float = 5.0,
        max_batch: int = 32,
        threads: int = 2,
        max_waiting: float = 30.0,
    ) -> None:
        for name, value in (("max_streams", max_streams), ("max_batch", max_batch), ("threads", threads)):
            if value < 1:
                raise ConfigError(f"{name} = {value!r}: must be at least 1")
        for name, seconds in (("wait_ms", wait_ms), ("max_waiting", max_waiting)):
            if not seconds >= 0:
                raise ConfigError(f"{name} = {seconds!r}: must not be negative")
        self._recognizer = recognizer
        self._engine = recognizer.stream().engine
        self._max_streams, self._max_waiting = max_streams, max_waiting
        self._patience, self._rows, self._threads = wait_ms / 1000, max_batch, threads
        self._streams: set[Stream] = set()
        self._closed = False
        # Of both, and of what streams have waiting. What a stream asks for goes into the inbox within it: so none of
        # that comes behind `_end`, where nobody would answer.
        self._lock = threading.Lock()
        # What the engine's thread shall do, in this order. It alone touches sessions and what follows.
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ready: Gathering[Stream] = Gathering()
        self._groups = self._flying = 0  # computed at this moment, and blocks in them
        self._ended = False
        self._steppers = ThreadPoolExecutor(threads, "asr-step")
        self._later = ThreadPoolExecutor(1, "asr-segment-ends")
        self._thread = threading.Thread(target=self._run, name="asr-streams", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    def __enter__(self) -> "Streams":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(
        self,
        sample_rate: int = SAMPLE_RATE,
        *,
        endpoint: EndpointConfig | EllipsisType | None = ...,
        two_pass: bool = False,
        keep_segments: bool = True,
    ) -> "Stream":
        """Open a stream of `sample_rate` Hz; the arguments are those of `Recognizer.stream`.

        Raises:
            Overloaded: `max_streams` are open.
            AudioError: a rate outside 8 to 192 kHz.
            ModelError: `two_pass`, and the model has no offline network.
            ConfigError: two passes without endpoints.
            AsrError: closed.
        """
        return self._add(
            lambda: self._recognizer.stream(
                sample_rate, endpoint=endpoint, two_pass=two_pass, keep_segments=keep_segments
            )
        )

    def resume(self, data: bytes) -> "Stream":
        """Go on with what `Stream.save` or `Session.save` wrote, also in another process.

        Raises:
            Overloaded: `max_streams` are open.
            ModelError: the data is damaged, or was written with another model.
            AsrError: closed.
        """
        return self._add(lambda: self._recognizer.resume(data))

    def close(self) -> None:
        """Drop all streams, cancel what waits and end the threads; closing again does nothing."""
        with self._lock:
            self._closed, streams = True, list(self._streams)
        for stream in streams:
            stream.close()
        self._inbox.put(self._end)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._steppers.shutdown()
        self._later.shutdown()

    def _add(self, open_session: Callable[[], Session]) -> "Stream":
        self._check_room()
        stream = Stream(self, open_session())
        with self._lock:
            self._check_room()
            self._streams.add(stream)
        return stream

    def _check_room(self) -> None:
        if self._closed:
            raise AsrError("these streams are closed")
        if len(self._streams) >= self._max_streams:
            raise Overloaded(f"{self._max_streams} streams are open, the most allowed; try again later")

    def _end(self) -> None:
        self._ended = True

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:  # a defect: nobody shall wait for what will never come
            with self._lock:
                self._closed, streams = True, list(self._streams)
                for stream in streams:
                    stream.closed = True
            for stream in streams:
                stream._drop()
            with contextlib.suppress(Empty):
                while True:
                    self._inbox.get_nowait()()
            raise

    def _serve(self) -> None:
        while not self._ended:
            try:
                self._inbox.get(timeout=self._compute())()
                if len(self._streams) > self._rows:
                    sleep(_PAUSE)
                while True:
                    if len(self._ready) >= self._rows:
                        self._compute()
                    self._inbox.get_nowait()()
            except Empty:
                pass

    def _compute(self) -> float | None:
        """Start steps as far as threads are free; return how long, in seconds, the rest may wait for company."""
        while len(self._ready):
            full = len(self._ready) >= self._rows
            if self._groups >= self._threads * (_AHEAD if full else 1):
                return None
            if not full and len(self._ready) < len(self._streams) - self._flying:  # others may come
                left = self._ready.since + self._patience - monotonic()
                if left > 0:
                    return left
            group = [(stream, step) for stream, step in self._ready.take(self._rows) if not stream.closed]
            if group:
                self._groups += 1
                self._flying += len(group)
                self._steppers.submit(self._step, *zip(*group, strict=True))
        return None

    def _step(self, streams: "Sequence[Stream]", steps: Sequence[Step]) -> None:
        try:
            answer: Any = self._engine.step(*joined(steps))
        except Exception as error:  # whatever it is, it is told to those whom it concerns
            answer = error
        self._inbox.put(lambda: self._hand_out(streams, answer))

    def _hand_out(self, streams: "Sequence[Stream]", answer: Any) -> None:
        self._groups -= 1
        self._flying -= len(streams)
        answers = [answer] * len(streams) if isinstance(answer, Exception) else parted(self._engine, *answer)
        for stream, own in zip(streams, answers, strict=True):
            stream.go_on(own)

    def _do_later(self, stream: "Stream", request: Later) -> None:
        if stream.closed:
            return
        try:
            answer: Any = request.work()
        except Exception as error:  # as above
            answer = error
        self._inbox.put(lambda: stream.go_on(answer))


class _Job(NamedTuple):
    start: Callable[[], Any]  # gives work, or its result at once
    future: "Future[Any]"
    seconds: float  # of audio


class Stream:
    """One of the streams; `Streams.open` opens it. What is asked of it happens in the order of asking.

    Cancelling a future only means that nobody waits for it.
    """

    def __init__(self, streams: Streams, session: Session) -> None:
        self.session = session
        self.closed = False
        self._streams = streams
        self._given = self._done = 0.0  # seconds of audio
        self._finishing = False
        self._jobs: deque[_Job] = deque()  # the first is being done; the engine's thread alone touches them
        self._work: Work[Any] | None = None

    @property
    def waiting(self) -> float:
        """Seconds of audio that were given and are not read yet."""
        return self._given - self._done

    def feed(self, samples: np.ndarray) -> "Future[Update]":
        """Take the next samples; see `Session.feed`. The Update comes when they are read.

        The future raises AudioError for samples that cannot be read: the stream goes on without them. Any other
        error closes the stream.

        Raises:
            Overloaded: more than `max_waiting` seconds would wait; feed again when earlier futures are done.
            AsrError: the stream is finished or closed.
        """
        samples = np.array(samples)  # the caller may use its buffer again
        seconds = samples.shape[0] / self.session.sample_rate if samples.ndim else 0.0
        return self._ask(lambda: self.session.feeding(samples), seconds)

    def finish(self) -> "Future[Transcript]":
        """End the audio; all that was said comes when it is read. The stream counts as closed then."""
        return self._ask(self.session.finishing, last=True)

    def save(self) -> "Future[bytes]":
        """The stream as it stands after all that was fed, for `Streams.resume`; it goes on all the same."""
        return self._ask(self.session.save)

    def close(self) -> None:
        """Drop the stream: its open futures are cancelled. Closing again does nothing."""
        with self._streams._lock:
            self._streams._streams.discard(self)
            self.closed = True
            self._streams._inbox.put(self._drop)

    def _ask(self, start: Callable[[], Work[_T] | _T], seconds: float = 0.0, last: bool = False) -> "Future[_T]":
        job = _Job(start, Future(), seconds)
        with self._streams._lock:
            if self.closed or self._finishing:
                state = "finished" if self._finishing else "closed"
                raise AsrError(f"this stream is {state}: open another one with Streams.open()")
            most = self._streams._max_waiting
            if seconds > most:
                raise Overloaded(f"a block of {seconds:.1f} s; at most {most:g} s may wait: feed shorter blocks")
            if self.waiting + seconds > most:
                raise Overloaded(
                    f"{self.waiting:.1f} s of this stream's audio wait to be read, and {seconds:.1f} s more would be "
                    f"too much (at most {most:g} s); feed it when earlier audio is read"
                )
            self._given += seconds
            self._finishing = last
            self._streams._inbox.put(lambda: self._add(job))
        return job.future

    # What follows, the engine's thread calls.

    def _add(self, job: _Job) -> None:
        if self.closed:
            job.future.cancel()
            return
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._start()

    def _start(self) -> None:
        """Start the first job, and the next ones while they are done at once."""
        while self._jobs and self._work is None and not self.closed:
            try:
                work = self._jobs[0].start()
            except Exception as error:
                self._settle(error)
                continue
            if isinstance(work, GeneratorType):
                self._work = work
                self._advance(None)
            else:
                self._settle(work)

    def go_on(self, answer: Any) -> None:
        """Take the answer to this stream's request."""
        if not self.closed:
            self._advance(answer)
            self._start()

    def _advance(self, answer: Any) -> None:
        assert self._work is not None
        try:
            request = self._work.throw(answer) if isinstance(answer, Exception) else self._work.send(answer)
        except StopIteration as done:
            self._settle(done.value)
        except AudioError as error:
            self._settle(error)
        except Exception as error:  # nobody knows what the session is worth now
            self._settle(error)
            self.close()
        else:
            if isinstance(request, Step):
                self._streams._ready.add(self, request)
            else:
                self._streams._later.submit(self._streams._do_later, self, request)

    def _settle(self, result: Any) -> None:
        """The first job is done; `result` is what came of it, or an exception."""
        job, self._work = self._jobs.popleft(), None
        self._done += job.seconds
        if isinstance(result, Transcript):
            with self._streams._lock:
                self._streams._streams.discard(self)
                self.closed = True
        try:
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)
        except InvalidStateError:
            pass  # cancelled: nobody waits for it

    def _drop(self) -> None:
        if self._work is not None:
            self._work.close()
        for job in self._jobs:
            job.future.cancel()
        self._jobs.clear()
        self._work = None
