"""Clients for trying the server: a server of their own, and polite conversations in each websocket protocol."""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from asr.errors import AsrError
from pipelines.serve.run import Addresses

_START_SECONDS = 120.0
_LABELS = {"talk to it": "main", "Vosk clients": "vosk", "sherpa-onnx clients": "sherpa"}


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    addresses: Addresses


@contextmanager
def started(*options: str) -> Iterator[Running]:
    """`asr serve` on free ports of this machine, with these options; stopped at the end.

    Raises:
        AsrError: it did not start; its own message says why.
    """
    command = [sys.executable, "-m", "pipelines.cli", "serve", "--port", "0", "--vosk-port", "0", "--sherpa-port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield Running(process=process, addresses=_addresses(process, log))
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _addresses(process: subprocess.Popen[str], log: IO[str]) -> Addresses:
    assert process.stdout is not None
    found: dict[str, str] = {}
    while len(found) < len(_LABELS):
        line = process.stdout.readline()
        if not line:
            process.wait()
            log.seek(0)
            raise AsrError(f"asr serve did not start: {log.read().strip().rpartition(chr(10))[2] or 'it said nothing'}")
        label, _, address = line.strip().partition(": ")
        found[_LABELS[label]] = address
    return Addresses(**found)


def native_address(addresses: Addresses) -> str:
    """Of the native websocket."""
    return f"{addresses.main.replace('http', 'ws', 1)}/v1/stream"


@asynccontextmanager
async def dial(address: str) -> AsyncIterator[ClientConnection]:
    """A websocket without compression, and without a proxy; it is patient with a busy server, whose pongs come late."""
    options: dict[str, Any] = {"proxy": None, "compression": None, "max_size": None, "ping_timeout": None}
    async with connect(address, open_timeout=_START_SECONDS, **options) as socket:
        yield socket


def s16(samples: np.ndarray) -> bytes:
    """float32 (n,) as 16 bit samples."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2").tobytes()


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How a client sends: blocks of so many bytes, so many a second; 0: as fast as it can."""

    block: int
    per_second: float = 0.0

    async def send(self, socket: ClientConnection, data: bytes, sent: Callable[[], None] = lambda: None) -> None:
        """Send all of it; `sent` is called after each block."""
        began = time.monotonic()
        for number, start in enumerate(range(0, len(data), self.block)):
            if self.per_second:
                await asyncio.sleep(max(0.0, began + number / self.per_second - time.monotonic()))
            await socket.send(data[start : start + self.block])
            sent()


async def native(address: str, start: dict[str, Any], data: bytes, pace: Pace) -> list[str]:
    """The finals of a native session."""
    async with dial(address) as socket:
        await socket.send(json.dumps({"type": "start", **start}))

        async def send() -> None:
            await pace.send(socket, data)
            await socket.send('{"type": "finish"}')

        texts, messages = [], await _while_sending(socket, send)
        for message in map(json.loads, messages):
            if message["type"] == "error":
                raise AsrError(message["message"])
            if message["type"] == "final":
                texts.append(message["text"])
        if json.loads(messages[-1])["type"] != "done":
            raise AsrError("the connection ended before done")
        return texts


async def vosk(address: str, sample_rate: int, data: bytes, pace: Pace) -> list[str]:
    """The results of a Vosk session: each block is sent when the one before has its reply."""
    texts = []
    async with dial(address) as socket:
        await socket.send(json.dumps({"config": {"sample_rate": sample_rate}}))
        for start in range(0, len(data), pace.block):
            await socket.send(data[start : start + pace.block])
            texts.append(json.loads(await socket.recv()).get("text", ""))
            if pace.per_second:
                await asyncio.sleep(1 / pace.per_second)
        await socket.send('{"eof" : 1}')
        texts.append(json.loads(await socket.recv())["text"])
    return [text for text in texts if text]


async def sherpa(address: str, data: bytes, pace: Pace) -> list[str]:
    """The finals of a sherpa-onnx session."""
    async with dial(address) as socket:

        async def send() -> None:
            await pace.send(socket, data)
            await socket.send("Done")

        messages = await _while_sending(socket, send)
        if messages[-1] != "Done!":
            raise AsrError("the connection ended before Done!")
        return [message["text"] for message in map(json.loads, messages[:-1]) if message["is_final"]]


async def _while_sending(socket: ClientConnection, send: Callable[[], Any]) -> Sequence[str]:
    """All that comes until the server closes, while `send` does its work."""
    sending = asyncio.ensure_future(send())
    try:
        return [str(message) async for message in socket]
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
