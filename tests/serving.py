"""A server in a thread of this process, over the toy recognizer, and clients for it."""

import asyncio
import io
import json
import socket as sockets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import soundfile
from toy_model import RATE, spell, toy_recognizer
from websockets.sync.client import ClientConnection, connect

from asr.recognizer import Recognizer
from pipelines.serve.run import Addresses, Settings, serve

PAUSE = np.zeros(RATE, np.float32)
TALK = np.concatenate([spell("one two"), PAUSE, spell("three"), PAUSE])


class Served:
    """A running server: where it is, and what stops it."""

    def __init__(self, recognizer: Recognizer, settings: Settings) -> None:
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(recognizer, settings), daemon=True)
        self._thread.start()
        assert self._started.wait(30)
        if self.error is not None:
            raise self.error

    def _run(self, recognizer: Recognizer, settings: Settings) -> None:
        async def until_stopped() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            await serve(recognizer, settings, self._tell, self._stop)

        try:
            asyncio.run(until_stopped())
        except BaseException as error:
            self.error = error
            self._started.set()

    def _tell(self, addresses: Addresses) -> None:
        self.addresses = addresses
        self._started.set()

    @property
    def http(self) -> str:
        return self.addresses.main

    @property
    def native(self) -> str:
        return f"{self.addresses.main.replace('http', 'ws', 1)}/v1/stream"

    @property
    def vosk(self) -> str:
        assert self.addresses.vosk
        return self.addresses.vosk

    @property
    def sherpa(self) -> str:
        assert self.addresses.sherpa
        return self.addresses.sherpa

    def stop(self, wait: bool = True) -> None:
        if self._thread.is_alive():
            assert self._loop and self._stop
            self._loop.call_soon_threadsafe(self._stop.set)
        if wait:
            self._thread.join(30)
            assert not self._thread.is_alive()


@contextmanager
def serving(recognizer: Recognizer | None = None, **settings: Any) -> Iterator[Served]:
    """A server on free ports; `settings` are those of pipelines.serve.run.Settings."""
    ports: dict[str, Any] = {"port": 0, "vosk_port": 0, "sherpa_port": 0}
    served = Served(recognizer or toy_recognizer(), Settings(**ports | settings))
    try:
        yield served
    finally:
        served.stop()


def dial(address: str, **options: Any) -> ClientConnection:
    """Connect as a program does; messages may be large."""
    return connect(address, proxy=None, max_size=None, compression=None, legacy=True, **options)


def begin(address: str, **start: Any) -> ClientConnection:
    """A native session that is ready for audio."""
    socket = dial(address)
    socket.send(json.dumps({"type": "start", **start}))
    reply = json.loads(socket.recv(10))
    assert reply["type"] == "ready", reply
    return socket


def s16(samples: np.ndarray) -> bytes:
    return np.round(samples * 32767).astype("<i2").tobytes()


def in_blocks(data: bytes, size: int = 3200) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def finished(socket: ClientConnection) -> list[dict[str, Any]]:
    """Say finish; the finals that come until `done`."""
    socket.send(json.dumps({"type": "finish"}))
    return until_done(socket)


def until_done(socket: ClientConnection) -> list[dict[str, Any]]:
    finals = []
    for message in socket:
        reply = json.loads(message)
        if reply["type"] == "final":
            finals.append(reply)
        if reply["type"] == "done":
            return finals
    raise AssertionError("closed before done")


def recording(samples: np.ndarray = TALK, format: str = "WAV", rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()


HTTP = httpx.Client(trust_env=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))


def get(address: str, **options: Any) -> httpx.Response:
    return HTTP.get(address, **options)


def metric(served: Served, name: str) -> float:
    lines = get(f"{served.http}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def eventually(true: Any, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    return true()


def post(address: str, data: bytes, fields: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
    files = {"file": ("talk.wav", data)}
    return HTTP.post(f"{address}/v1/audio/transcriptions", files=files, data=fields or {}, **options)


def wire(address: str) -> sockets.socket:
    """A bare connection."""
    return sockets.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=15)
