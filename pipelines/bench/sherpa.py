"""Many live streams on sherpa-onnx with our network: threads that take what is ready and decode it together."""

import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.bench.setting import Setting

_ROWS = 16  # streams in a step, as in ours


@contextmanager
def sherpa_streams(setting: Setting, precision: str) -> "Iterator[Callable[[], _SherpaTalk]]":
    """sherpa-onnx with the same network: endpointing on, batches as in ours, as many threads that decode."""
    import sherpa_onnx

    from asr.runtime.export import export_model

    with tempfile.TemporaryDirectory() as temporary:
        export_model([setting.network("streaming").parent], Path(temporary), "sherpa")
        folder = Path(temporary) / "streaming"
        recognizer = sherpa_onnx.OnlineRecognizer.from_t_one_ctc(
            tokens=str(folder / "tokens.txt"), model=str(folder / f"model{'.int8' * (precision == 'int8')}.onnx"),
            num_threads=1, enable_endpoint_detection=True,
        )  # fmt: skip
        pool = _Decoding(recognizer, setting.threads)
        try:
            yield lambda: _SherpaTalk(recognizer.create_stream(), pool)
        finally:
            pool.close()


class _SherpaTalk:
    def __init__(self, stream: Any, pool: "_Decoding") -> None:
        self.stream, self.pool = stream, pool
        self.waiting: deque[tuple[np.ndarray, Future[Any]]] = deque()

    def feed(self, samples: np.ndarray) -> "Future[Any]":
        future: Future[Any] = Future()
        self.pool.add(self, samples, future)
        return future


class _Decoding:
    """Threads that take the streams with new audio, up to `_ROWS` at a time, and decode them together."""

    def __init__(self, recognizer: Any, threads: int) -> None:
        self.recognizer = recognizer
        self._ready: deque[_SherpaTalk] = deque()  # each at most once, and none that is being decoded
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def add(self, talk: _SherpaTalk, samples: np.ndarray, future: "Future[Any]") -> None:
        with self._changed:
            talk.waiting.append((samples, future))
            if len(talk.waiting) == 1:
                self._ready.append(talk)
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._closed)
                if self._closed:
                    return
                talks = [self._ready.popleft() for _ in range(min(_ROWS, len(self._ready)))]
                given = [list(talk.waiting) for talk in talks]
            for talk, blocks in zip(talks, given, strict=True):
                for samples, _ in blocks:
                    talk.stream.accept_waveform(8_000, samples)  # of 16 kHz: see asr.runtime.sherpa
            while ready := [talk.stream for talk in talks if self.recognizer.is_ready(talk.stream)]:
                self.recognizer.decode_streams(ready)
            for talk, blocks in zip(talks, given, strict=True):
                text = self.recognizer.get_result(talk.stream)
                if self.recognizer.is_endpoint(talk.stream):
                    self.recognizer.reset(talk.stream)
                for _, future in blocks:
                    future.set_result(text)
            with self._changed:
                for talk, blocks in zip(talks, given, strict=True):
                    for _ in blocks:
                        talk.waiting.popleft()
                    if talk.waiting:
                        self._ready.append(talk)
                self._changed.notify_all()
