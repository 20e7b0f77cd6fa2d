"""How many live sessions the server carries: real speech in real time, and how long its replies take."""

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from asr.audio import SAMPLE_RATE, read_audio
from asr.errors import AsrError
from asr.streams import busy_process
from pipelines.processes import state_of
from pipelines.serve.clients import Running, dial, native_address, s16, started

_BLOCK_SECONDS = 0.1
_WARM_UP_SECONDS = 5.0  # not counted
_PAUSE_SECONDS = 1.2  # between recordings: long enough for an endpoint


@dataclass(frozen=True, kw_only=True)
class Load:
    """What was measured; times in milliseconds from sending a block of 100 ms to its reply.

    Attributes:
        sessions: at a time, each in real time.
        replies: counted, after the warm-up.
        finals: segments that were finished meanwhile.
        failed: sessions that did not last.
        sender_late_p95: how late this load generator itself sent its blocks, ms.
        server_cores, sender_cores: CPU seconds for each second.
    """

    sessions: int
    seconds: float
    replies: int
    finals: int
    failed: int
    median: float
    p95: float
    p99: float
    largest: float
    sender_late_p95: float
    server_cores: float
    sender_cores: float


def run_load(
    audio: Sequence[Path], *, sessions: int = 200, seconds: float = 60.0, options: Sequence[str] = (), seed: int = 0
) -> Load:
    """Start a server, and let so many sessions talk to it in real time, each from its own place in the audio.

    Args:
        audio: recordings of speech; they are joined with pauses, so that endpoints fall.
        sessions: concurrent, each with messages of 100 ms at a random phase; endpointing is on.
        seconds: to measure, after a warm-up of 5 s.
        options: of `asr serve`, such as --decoding beam.

    Raises:
        AsrError: the audio cannot be read, or the server does not start.
    """
    pause = np.zeros(round(_PAUSE_SECONDS * SAMPLE_RATE), np.float32)
    speech = s16(np.concatenate([part for path in audio for part in (read_audio(path), pause)]))
    size = 2 * round(_BLOCK_SECONDS * SAMPLE_RATE)
    blocks = [speech[start : start + size] for start in range(0, len(speech) - size + 1, size)]
    with busy_process(), started("--max-sessions", str(sessions), *options) as server:
        return asyncio.run(_measure(server, blocks, sessions, seconds, random.Random(seed)))


async def _measure(
    server: Running, blocks: Sequence[bytes], sessions: int, seconds: float, chance: random.Random
) -> Load:
    counted_from = time.monotonic() + 2.0 + _WARM_UP_SECONDS
    until = counted_from + seconds
    talks = [
        _Talk(chance.randrange(len(blocks)), counted_from - _WARM_UP_SECONDS + chance.random() * _BLOCK_SECONDS)
        for _ in range(sessions)
    ]
    address = native_address(server.addresses)
    talking = [asyncio.create_task(talk.run(address, blocks, until)) for talk in talks]
    await asyncio.sleep(counted_from - time.monotonic())
    before = state_of(server.process.pid).seconds, time.process_time(), time.monotonic()
    await asyncio.sleep(until - time.monotonic())
    after = state_of(server.process.pid).seconds, time.process_time(), time.monotonic()
    ended = await asyncio.gather(*talking, return_exceptions=True)
    replies = np.array([took for talk in talks for at, took in talk.replies if at >= counted_from]) * 1000
    late = np.array([late for talk in talks for late in talk.late]) * 1000
    if not len(replies):
        raise AsrError("the server gave no reply at all")
    median, p95, p99, largest = np.percentile(replies, [50, 95, 99, 100])
    elapsed = after[2] - before[2]
    return Load(
        sessions=sessions,
        seconds=seconds,
        replies=len(replies),
        finals=sum(talk.finals for talk in talks),
        failed=sum(result is not None for result in ended),
        median=float(median),
        p95=float(p95),
        p99=float(p99),
        largest=float(largest),
        sender_late_p95=float(np.percentile(late, 95)),
        server_cores=(after[0] - before[0]) / elapsed,
        sender_cores=(after[1] - before[1]) / elapsed,
    )


class _Talk:
    """One session: blocks go out when they are due, whether or not replies have come."""

    def __init__(self, place: int, begin: float) -> None:
        self.replies: list[tuple[float, float]] = []  # when it was sent, and seconds until its reply
        self.late: list[float] = []
        self.finals = 0
        self._place, self._begin = place, begin
        self._sent: deque[float] = deque()

    async def run(self, address: str, blocks: Sequence[bytes], until: float) -> None:
        async with dial(address) as socket, asyncio.timeout(until - time.monotonic() + 60):
            await socket.send('{"type": "start"}')

            async def send() -> None:
                number = 0
                while (due := self._begin + number * _BLOCK_SECONDS) < until:
                    await asyncio.sleep(due - time.monotonic())
                    self.late.append(time.monotonic() - due)
                    self._sent.append(due)  # a block that this process sends late still counts from when it was due
                    await socket.send(blocks[(self._place + number) % len(blocks)])
                    number += 1
                await socket.send('{"type": "finish"}')

            sending = asyncio.create_task(send())
            try:
                async for text in socket:
                    if self._take(json.loads(text)):
                        break
                else:
                    raise AsrError("the server closed the connection")
                await sending
            finally:
                sending.cancel()

    def _take(self, message: dict) -> bool:
        """Count a message; return whether it was the last."""
        if message["type"] == "partial":
            sent = self._sent.popleft()
            self.replies.append((sent, time.monotonic() - sent))
        elif message["type"] == "final":
            self.finals += 1
        elif message["type"] == "error":
            raise AsrError(message["message"])
        return message["type"] == "done"


def main(
    audio: Annotated[list[Path], typer.Argument(help="Recordings of speech.")],
    sessions: Annotated[int, typer.Option(min=1, help="Live at a time.")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="To measure.")] = 60.0,
    decoding: Annotated[str, typer.Option(help="greedy, beam or transducer.")] = "greedy",
) -> None:
    """Measure `asr serve` under real-time sessions; the figures go to stdout as JSON."""
    try:
        figures = run_load(audio, sessions=sessions, seconds=seconds, options=["--decoding", decoding])
    except AsrError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(asdict(figures), indent=2))


if __name__ == "__main__":
    typer.run(main)
