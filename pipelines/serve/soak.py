"""A long day for the server: many clients of all kinds at once, polite and rude, and a check that nothing is lost."""

import asyncio
import http.client
import io
import json
import random
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import typer
from websockets.exceptions import WebSocketException

from asr.audio import SAMPLE_RATE, Resampler, read_audio
from asr.endpoint import EndpointConfig
from asr.errors import AsrError
from asr.recognizer import Recognizer
from pipelines.serve.clients import Pace, Running, dial, native, native_address, s16, sherpa, started, vosk

_RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)
_ENDPOINTS: tuple[dict[str, Any], ...] = ({}, {"trailing_silence": 0.4}, {"trailing_silence": 1.5, "max_segment": 8.0})
_RUDE_SHARE = 0.3
_STUCK_SECONDS = 600.0  # nobody waits longer, however busy the machine is
_SAMPLE_SECONDS = 1.0  # between two looks at the server's memory
_LEAST_SAMPLES = 4  # a median of each quarter
_GROWTH_SHARE, _GROWTH_BYTES = 0.05, 16 << 20  # that memory may grow by, from the second quarter to the last


@dataclass(frozen=True, kw_only=True)
class Talk:
    """Something to say: float32 samples, as they come out of 16 bit ones, and their rate in Hz."""

    samples: np.ndarray
    rate: int


@dataclass(kw_only=True)
class Report:
    """What came of it. `wrong` names each final that differed and each polite session that was lost."""

    sessions: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes, one after the other
    left: int = 0  # sessions that the server still counts when all have gone

    @property
    def growth(self) -> tuple[int, int]:
        """Bytes: the median of the second quarter of the run, when the server is warm, and of the last."""
        if len(self.memory) < _LEAST_SAMPLES:
            return 0, 0
        quarter = len(self.memory) // 4
        return int(np.median(self.memory[quarter : 2 * quarter])), int(np.median(self.memory[-quarter:]))

    def problems(self) -> list[str]:
        """What must not be, in words; empty: all is well."""
        early, late = self.growth
        found = [*self.wrong]
        if late > early * (1 + _GROWTH_SHARE) + _GROWTH_BYTES:
            found.append(f"memory grew from {early >> 20} to {late >> 20} MiB")
        if len(self.memory) < _LEAST_SAMPLES:
            found.append(f"memory was seen {len(self.memory)} times: too few to tell whether it grew")
        if self.left:
            found.append(f"{self.left} sessions are still counted after all clients have gone")
        return found


def run_soak(
    audio: Sequence[Path],
    *,
    model: Path | None = None,
    sessions: int = 100,
    seconds: float = 120.0,
    seed: int = 0,
    tell: Callable[[str], None],
) -> Report:
    """Start a server and let clients come and go for `seconds`, so many at a time.

    Polite clients check that their finals are what `asr transcribe --streaming` writes for the same samples with
    the same endpointing; the others send garbage, break off, lie about rates, or fall silent.

    Raises:
        AsrError: the audio cannot be read, or the server does not start.
    """
    speech = [read_audio(path) for path in audio]
    rules = [EndpointConfig(**endpoint) for endpoint in _ENDPOINTS]
    recognizers = [Recognizer.load(model, decoding="greedy", endpoint=rule) for rule in rules]
    options = ["--decoding", "greedy", "--max-sessions", str(sessions + 8), "--idle", "20"]
    options += ["--model", str(model)] if model else []
    with started(*options) as server:
        soak = _Soak(server, speech, recognizers, random.Random(seed))
        return asyncio.run(soak.run(sessions, seconds, tell))


class _Soak:
    """The clients of one run and what they share."""

    def __init__(
        self,
        server: Running,
        speech: Sequence[np.ndarray],
        recognizers: Sequence[Recognizer],
        chance: random.Random,
    ) -> None:
        self._addresses, self._speech, self._chance = server.addresses, speech, chance
        self._recognizers = recognizers  # of this process, one for each of _ENDPOINTS
        self._talks = [self._talk(rate) for rate in _RATES for _ in range(2)]
        self._expected: dict[tuple[int, int], asyncio.Task[list[str]]] = {}
        self._report = Report()
        self._polite = (self._native, self._native_floats, self._vosk, self._sherpa, self._sherpa_wav)
        self._rude = (self._breaks_off, self._garbage, self._truncated, self._wrong_rate, self._silent, self._noise)

    async def run(self, sessions: int, seconds: float, tell: Callable[[str], None]) -> Report:
        until = time.monotonic() + seconds
        clients = [asyncio.create_task(self._client(until)) for _ in range(sessions)]
        watching = asyncio.create_task(self._watch(tell))
        await asyncio.gather(*clients)
        watching.cancel()
        try:
            for _ in range(300):  # the server may still have to notice that the last has gone
                self._report.left = int(await self._metric("asr_sessions"))
                if not self._report.left:
                    break
                await asyncio.sleep(0.1)
        except AsrError as error:
            self._report.wrong.append(f"sessions that are left: {error}")
        return self._report

    async def _client(self, until: float) -> None:
        """One place, taken by one client after the other."""
        await asyncio.sleep(self._chance.random() * 3)
        while time.monotonic() < until:
            rude = self._chance.random() < _RUDE_SHARE
            work = self._chance.choice(self._rude if rude else self._polite)
            name = work.__name__.strip("_")
            try:
                async with asyncio.timeout(_STUCK_SECONDS):
                    await work()
            except (AsrError, OSError, WebSocketException, TimeoutError) as error:
                if not rude:
                    self._report.wrong.append(f"{name}: lost ({type(error).__name__}: {error})")
            self._report.sessions[name] += 1

    async def _watch(self, tell: Callable[[str], None]) -> None:
        began = told = time.monotonic()
        while True:
            await asyncio.sleep(_SAMPLE_SECONDS)
            try:
                memory = int(await self._metric("process_resident_memory_bytes"))
            except AsrError as error:
                self._report.wrong.append(f"memory: {error}")
                continue
            self._report.memory.append(memory)
            if time.monotonic() - told >= 10:
                told = time.monotonic()
                done, wrong = self._report.sessions.total(), len(self._report.wrong)
                tell(f"{told - began:6.0f} s  {done} sessions, {wrong} wrong, {memory >> 20} MiB")

    async def _metric(self, name: str) -> float:
        def read() -> str:
            with urllib.request.urlopen(f"{self._addresses.main}/metrics", timeout=60) as reply:
                return reply.read().decode()

        try:
            return metric_of(await asyncio.to_thread(read), name)
        except (OSError, ValueError, http.client.HTTPException) as error:  # also half a reply, or one of something else
            raise AsrError(f"the server's metrics cannot be read: {error}") from error

    # ---- the polite

    async def _native(self) -> None:
        number, endpoint = self._pick(), self._chance.randrange(len(_ENDPOINTS))
        talk = self._talks[number]
        start = {"sample_rate": talk.rate, "endpoint": _ENDPOINTS[endpoint]}
        texts = await native(native_address(self._addresses), start, s16(talk.samples), self._pace(2 * talk.rate))
        await self._check("native", number, endpoint, texts)

    async def _native_floats(self) -> None:
        number, endpoint = self._pick(), self._chance.randrange(len(_ENDPOINTS))
        talk = self._talks[number]
        start = {"sample_rate": talk.rate, "format": "f32le", "endpoint": _ENDPOINTS[endpoint]}
        data = talk.samples.astype("<f4").tobytes()
        texts = await native(native_address(self._addresses), start, data, self._pace(4 * talk.rate))
        await self._check("native, floats", number, endpoint, texts)

    async def _vosk(self) -> None:
        number = self._pick()
        talk = self._talks[number]
        assert self._addresses.vosk
        texts = await vosk(self._addresses.vosk, talk.rate, s16(talk.samples), self._pace(2 * talk.rate))
        if " ".join(texts) != " ".join(await self._finals(number, 0)):  # several segments may share one reply
            self._report.wrong.append(f"vosk: {texts!r} instead of {await self._finals(number, 0)!r}")

    async def _sherpa(self) -> None:
        number = self._pick()
        talk = self._talks[number]
        data = talk.samples.astype("<f4").tobytes()
        address = f"{self._addresses.sherpa}/?sample_rate={talk.rate}"
        await self._check("sherpa", number, 0, await sherpa(address, data, self._pace(4 * talk.rate)))

    async def _sherpa_wav(self) -> None:
        number = self._pick()
        talk = self._talks[number]
        file = io.BytesIO()
        soundfile.write(file, talk.samples, talk.rate, format="WAV", subtype="PCM_16")
        assert self._addresses.sherpa
        texts = await sherpa(self._addresses.sherpa, file.getvalue(), self._pace(2 * talk.rate))
        await self._check("sherpa, WAV", number, 0, texts)

    async def _check(self, name: str, number: int, endpoint: int, texts: list[str]) -> None:
        expected = await self._finals(number, endpoint)
        if texts != expected:
            self._report.wrong.append(f"{name}: {texts!r} instead of {expected!r}")

    async def _finals(self, number: int, endpoint: int) -> list[str]:
        """What the file would give; read once, by a recognizer of this process."""
        key = number, endpoint
        if key not in self._expected:
            self._expected[key] = asyncio.create_task(asyncio.to_thread(self._read, number, endpoint))
        return await self._expected[key]

    def _read(self, number: int, endpoint: int) -> list[str]:
        talk = self._talks[number]
        transcript = self._recognizers[endpoint].transcribe(talk.samples, talk.rate, "streaming")
        return [segment.text for segment in transcript.segments]

    def _talk(self, rate: int) -> Talk:
        """Three recordings with pauses between them, at another rate."""
        parts = []
        for _ in range(3):
            pause = np.zeros(round(self._chance.uniform(0.3, 2.0) * SAMPLE_RATE), np.float32)
            parts += [self._chance.choice(self._speech), pause]
        resampler = Resampler(SAMPLE_RATE, rate)
        samples = np.concatenate([resampler.process(np.concatenate(parts)), resampler.finish()])
        return Talk(samples=np.frombuffer(s16(samples), "<i2").astype(np.float32) / 32768, rate=rate)

    def _pick(self) -> int:
        return self._chance.randrange(len(self._talks))

    def _pace(self, bytes_per_second: int) -> Pace:
        """Blocks of 10 to 500 ms that may cut samples in two, at 1 to 4 times real time; some as fast as they can."""
        block = round(bytes_per_second * self._chance.uniform(0.01, 0.5)) | self._chance.randrange(2)
        speed = self._chance.choice((0.0, 1.0, 2.0, 4.0))
        return Pace(block=block, per_second=speed * bytes_per_second / block)

    # ---- the rude

    async def _breaks_off(self) -> None:
        """Leaves in the middle, without a word or with a closing frame."""
        talk = self._talks[self._pick()]
        async with dial(self._address()) as socket:
            await socket.send(json.dumps({"type": "start", "sample_rate": talk.rate}))
            for _ in range(self._chance.randrange(20)):
                await socket.send(s16(talk.samples[:3200]))
            if self._chance.random() < 0.7:
                socket.transport.abort()

    async def _garbage(self) -> None:
        """Bytes that are no messages of any kind."""
        async with dial(self._address()) as socket:
            for _ in range(self._chance.randrange(1, 10)):
                await socket.send(self._chance.randbytes(self._chance.randrange(5000)))
            await self._read_all(socket.recv)

    async def _truncated(self) -> None:
        """JSON that stops too early."""
        whole = json.dumps({"type": "start", "config": {"sample_rate": 16000}, "endpoint": {"trailing_silence": 1}})
        async with dial(self._address()) as socket:
            await socket.send(whole[: self._chance.randrange(1, len(whole))])
            await self._read_all(socket.recv)

    async def _wrong_rate(self) -> None:
        """Rates that nobody has."""
        rate = self._chance.choice((0, -1, 1, 7999, 10**9, 1.5, "fast", None, [], 1e308))
        async with dial(self._address()) as socket:
            start = {"type": "start", "sample_rate": rate, "config": {"sample_rate": rate}}
            await socket.send(json.dumps(start))
            await socket.send(self._chance.randbytes(3200))
            await self._read_all(socket.recv)

    async def _silent(self) -> None:
        """Connects and says nothing for a while."""
        async with dial(self._address()):
            await asyncio.sleep(self._chance.uniform(0, 5))

    async def _noise(self) -> None:
        """Sends as fast as it can, and never reads a reply."""
        async with dial(self._address()) as socket:
            await socket.send('{"type": "start"}')
            for _ in range(50):
                await socket.send(self._chance.randbytes(32_000))
            socket.transport.abort()

    def _address(self) -> str:
        return self._chance.choice(
            [native_address(self._addresses), str(self._addresses.vosk), str(self._addresses.sherpa)]
        )

    async def _read_all(self, receive: Callable[[], Awaitable[object]]) -> None:
        """Read replies for a moment, or until the server has had enough."""
        try:
            async with asyncio.timeout(2):
                while True:
                    await receive()
        except TimeoutError:
            pass


def metric_of(text: str, name: str) -> float:
    """The sum over the labels of a metric in Prometheus' text format.

    Raises:
        AsrError: there is no such metric; a sum over nothing would never be wrong.
    """
    if f"# TYPE {name} " not in text:
        raise AsrError(f"the server has no metric {name}")
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def main(
    audio: Annotated[list[Path] | None, typer.Argument(help="Recordings of speech; without any, the samples.")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Clients at a time.")] = 100,
    minutes: Annotated[float, typer.Option(min=0.05, help="How long they come and go.")] = 2.0,
    hours: Annotated[float, typer.Option(min=0, help="The same in hours; counts instead where given.")] = 0.0,
    model: Annotated[Path | None, typer.Option(help="Model folder; without it, the one that comes along.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is left to chance.")] = 0,
) -> None:
    """Let clients of all kinds, polite and rude, use a server of their own, and check that nothing is lost."""
    samples = Path(__file__).parents[2] / "scripts" / "samples" / "audio"
    tell = partial(print, flush=True)
    seconds = hours * 3600 or minutes * 60
    audio = audio or sorted(samples.iterdir())
    try:
        report = run_soak(audio, model=model, sessions=sessions, seconds=seconds, seed=seed, tell=tell)
    except AsrError as error:
        raise SystemExit(f"error: {error}") from None
    early, late = report.growth
    for name, count in sorted(report.sessions.items()):
        tell(f"{name:15} {count}")
    tell(
        f"{report.sessions.total()} sessions; memory {early >> 20} MiB in the second quarter, {late >> 20} in the last"
    )
    for problem in report.problems()[:20]:
        tell(f"WRONG: {problem}")
    if report.problems():
        raise SystemExit(1)
    tell("all finals equal; no session lost; memory flat")


if __name__ == "__main__":
    typer.run(main)
