"""Decodes recordings in a process of its own: a decoder that crashes costs one recording, not the job."""

import atexit
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

import numpy as np

from asr.audio import read_audio
from asr.errors import AsrError, AudioError

_AHEAD = 2  # parts asked for at a time: one is decoded while the caller works on the one before
_PIPE_BYTES = 1 << 20
_SAMPLES, _REASON = b"smpl", b"why:"  # what an answer begins with
_ATTEMPTS = 2  # a crash may be somebody else's fault, such as memory that ran out


class Part(NamedTuple):
    """What to read: a file, from `offset` (seconds) on, `duration` seconds (None: to its end)."""

    path: str
    offset: float = 0.0
    duration: float | None = None


Decode = Callable[[Sequence[Part]], Iterator[np.ndarray | AudioError]]  # decode_all, or decode_here


def decode_all(parts: Sequence[Part]) -> Iterator[np.ndarray | AudioError]:
    """Give the samples of each part as `asr.audio.read_audio` does, (n,) float32, or why there are none.

    The process is started at the first use, stays for later ones, and ends with this one.

    Raises:
        AsrError: the process cannot be started.
    """
    global _owner
    if _owner is not None:  # left in the middle: what its process answers would be taken for these parts
        stop_decoder()
    sent = done = crashes = 0
    own = _owner = object()
    try:
        while done < len(parts):
            child = _running()
            try:
                while sent < min(done + _AHEAD, len(parts)):
                    child.requests.send(tuple(parts[sent]))
                    sent += 1
                decoded = child.receive()
            except (EOFError, OSError):
                sent = done
                crashes += 1
                how = stop_decoder()
                if crashes < _ATTEMPTS:
                    continue
                decoded = AudioError(f"{parts[done].path}: the decoder crashed ({how}), {crashes} times")
                sent = done + 1
            done, crashes = done + 1, 0
            yield decoded
            assert _owner is own, "decode_all was asked for other parts before it was done with these"
    finally:
        if _owner is own:
            _owner = None
            if sent > done:  # left early: nobody will fetch the answer
                stop_decoder()


def decode_here(parts: Sequence[Part]) -> Iterator[np.ndarray | AudioError]:
    """The same in this process: what throws costs one part, what crashes ends the process."""
    for part in parts:
        try:
            yield read_audio(part.path, offset=part.offset, duration=part.duration)
        except AudioError as error:
            yield error
        except Exception as error:  # whatever a decoder throws
            yield AudioError(f"{part.path}: {type(error).__name__}: {error}")


class _Child:
    """The process, and the pipes to it and from it."""

    def __init__(self) -> None:
        theirs_in, self.requests = Pipe(duplex=False)
        self.answers, theirs_out = Pipe(duplex=False)
        with suppress(OSError, AttributeError):  # Linux: a recording goes through in one piece, in fewer switches
            fcntl.fcntl(theirs_out.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        descriptors = [theirs_in.fileno(), theirs_out.fileno()]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "pipelines.decoder", *map(str, descriptors)]
        self.process = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL, env=environment)
        theirs_in.close()
        theirs_out.close()
        try:
            self.answers.recv_bytes()  # it is up
        except (EOFError, OSError):
            raise AsrError(f"the decoder's process cannot be started ({self.stop()}): {' '.join(command)}") from None

    def receive(self) -> np.ndarray | AudioError:
        answer = self.answers.recv_bytes()
        if answer.startswith(_REASON):
            return AudioError(answer[len(_REASON) :].decode("utf-8", "surrogateescape"))
        return np.frombuffer(answer, np.float32, offset=len(_SAMPLES))

    def stop(self) -> str:
        """End it; how it had ended if it had."""
        self.requests.close()
        self.answers.close()
        try:
            status = self.process.wait(timeout=1)  # it ends by itself when the pipes are closed
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        return f"status {status}" if status >= 0 else signal.Signals(-status).name


_child: _Child | None = None
_owner: object | None = None  # who awaits its answers


def _running() -> _Child:
    global _child
    if _child is None:
        _child = _Child()
    return _child


@atexit.register
def stop_decoder() -> str:
    """End the process if there is one, and tell how it ended; the next use starts another."""
    global _child
    child, _child = _child, None
    return "" if child is None else child.stop()


def _serve(requests: Connection, answers: Connection) -> None:
    """Answer the parts that come through `requests`, until the other ends are closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this
    answers.send_bytes(b"")
    try:
        while True:
            for decoded in decode_here([Part(*requests.recv())]):
                if isinstance(decoded, AudioError):
                    answers.send_bytes(_REASON + str(decoded).encode("utf-8", "surrogateescape"))
                else:
                    answers.send_bytes(_SAMPLES + decoded.tobytes())
    except (EOFError, OSError):
        pass


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False))
