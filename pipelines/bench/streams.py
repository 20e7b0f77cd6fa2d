"""Section "streams": the largest number of live streams that stays in real time, ours and sherpa-onnx's.

Each stream sends real speech in blocks of 100 ms at its own random phase. It counts as real time where 95 of 100
replies come within 200 ms and what waits at the end is no more than that.
"""

import heapq
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.errors import Overloaded
from asr.models import load_network
from asr.recognizer import Recognizer
from asr.streams import Streams, busy_process
from pipelines.bench.figures import Figure, single
from pipelines.bench.limits import measured, work_of
from pipelines.bench.setting import Setting
from pipelines.bench.sherpa import sherpa_streams

_BLOCK = SAMPLE_RATE // 10
_PAUSE = np.zeros(SAMPLE_RATE, np.float32)  # between recordings, so that segments end
_P95, _WARM_UP = 0.2, 3.0  # seconds
_NEAR = 1.15  # the number found is right to so much
_STEP = 1.5  # at least, as long as it goes well
_TRIALS = 12
_TICK = 0.001  # seconds: a sender that wakes for every block would be half of the load


class Talk(Protocol):
    """One live stream of either kind."""

    def feed(self, samples: np.ndarray, /) -> "Future[Any]": ...


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What so many streams got: times in seconds from when a block was due to its reply."""

    streams: int
    p95: float
    median: float
    waiting: float  # of audio that a stream has waiting at the end, on average
    cpu: float  # seconds for each second of audio, those of the sender included

    @property
    def in_real_time(self) -> bool:
        return self.p95 < _P95 and self.waiting < _P95


def run(setting: Setting) -> list[Figure]:
    """Number, delay and cost of each kind."""
    folder = setting.network("streaming")
    speech = np.concatenate([part for x in setting.speech for part in (x, _PAUSE)])
    network = load_network(folder)
    precision = setting.precision("streaming")
    limits, _ = measured(setting.threads)
    most = 1 / work_of(network).seconds(limits, precision)
    size = sum(p.numel() for p in network.parameters()) / 1e6
    section = f"many live streams, {size:.1f} M weights, {setting.threads} cores, {setting.seconds:g} s each"
    kinds: dict[str, Callable[[], AbstractContextManager[Callable[[], Talk]]]] = {
        "ours, greedy": lambda: _ours(setting, "greedy"),
        "ours, beam search with language model": lambda: _ours(setting, "beam"),
        f"sherpa-onnx, greedy, {precision}": lambda: sherpa_streams(setting, precision),
    }
    figures: list[Figure] = []
    for name, kind in kinds.items():
        try:
            best = largest(lambda n, kind=kind, name=name: _trial(kind, n, speech, setting, name), setting.threads)
        except ImportError:
            setting.tell(f"{name}: not installed")
            continue
        if best is None:
            figures.append(single(section, f"{name}: streams", 0, ""))
            continue
        first = figures[0].value if figures else best.streams
        ratio = best.streams / first if first else None
        figures += [
            single(section, f"{name}: streams", best.streams, "", ratio=ratio, of_limit=best.streams / most),
            single(section, f"{name}: 95 of 100 replies within", 1000 * best.p95, "ms"),
            single(section, f"{name}: half of the replies within", 1000 * best.median, "ms"),
            single(section, f"{name}: CPU for a second of audio", 1000 * best.cpu, "ms"),
        ]
    return figures


def largest(trial: Callable[[int], Trial], cores: int, first: int = 40) -> Trial | None:
    """The trial with the most streams in real time, found by steps that narrow; None where not even one is.

    A trial tells what a second of audio costs, and so how many streams to try next on so many cores.
    """
    good: Trial | None = None
    bad: int | None = None
    count = first
    for _ in range(_TRIALS):
        tried = trial(count)
        if tried.in_real_time:
            good = tried
            hoped = int(0.9 * cores / max(tried.cpu, 1e-6))
            following = max(hoped, int(count * _STEP) + 1) if bad is None else (count + bad) // 2
        else:
            bad = count
            following = (good.streams + bad) // 2 if good else count // 2
        if following < 1 or (good and bad and bad <= max(good.streams * _NEAR, good.streams + 1)):
            break
        count = following
    return good


def _trial(
    kind: Callable[[], AbstractContextManager[Callable[[], Talk]]],
    count: int,
    speech: np.ndarray,
    setting: Setting,
    name: str,
) -> Trial:
    with kind() as open_stream:
        tried = measure(open_stream, count, speech, setting.seconds)
    setting.tell(f"{name}: {count} streams, 95 of 100 replies within {1000 * tried.p95:.0f} ms")
    return tried


def measure(
    open_stream: Callable[[], Talk], count: int, speech: np.ndarray, seconds: float, warm_up: float = _WARM_UP
) -> Trial:
    """Keep `count` streams talking in real time for `seconds` after a warm-up.

    Args:
        open_stream: opens one.
        speech: float32 (n,) at 16 kHz; each stream starts at a place of its own in it, and goes round.
    """
    chance = random.Random(count)
    blocks = np.resize(speech, len(speech) // _BLOCK * _BLOCK).reshape(-1, _BLOCK)
    talks = [open_stream() for _ in range(count)]
    places = [chance.randrange(len(blocks)) for _ in talks]
    begin = time.monotonic() + 0.1
    counted_from, until = begin + warm_up, begin + warm_up + seconds
    due = [(begin + 0.1 * chance.random(), i) for i in range(count)]
    heapq.heapify(due)
    delays: list[float] = []  # appended to by whoever replies
    sent = replied = fed = 0
    lock = threading.Lock()
    cpu = 0.0
    overloaded = False
    while due and due[0][0] < until and not overloaded:
        at, i = due[0]
        early = at - time.monotonic()
        if early > 0:
            time.sleep(max(early, _TICK))  # what falls due meanwhile goes out a little late, as counted
        if not cpu and at >= counted_from:
            cpu = time.process_time()

        def reply(future: "Future[Any]", at: float = at) -> None:
            nonlocal replied
            now = time.monotonic()
            with lock:
                replied += 1
                if at >= counted_from:
                    delays.append(now - at)

        try:
            talks[i].feed(blocks[places[i]]).add_done_callback(reply)
        except Overloaded:
            overloaded = True
        places[i] = (places[i] + 1) % len(blocks)
        sent += 1
        fed += at >= counted_from
        heapq.heapreplace(due, (at + 0.1, i))
    spent = time.process_time() - cpu
    with lock:
        waiting = 0.1 * (sent - replied) / count
        ordered = sorted(delays)
    late = max(0.0, time.monotonic() - until)  # the sender itself did not keep up
    if overloaded or len(ordered) < 0.5 * fed or not ordered:
        return Trial(
            streams=count, p95=float("inf"), median=float("inf"), waiting=waiting, cpu=spent / max(0.1 * fed, 0.1)
        )
    return Trial(
        streams=count, p95=ordered[int(0.95 * (len(ordered) - 1))] + late, median=statistics.median(ordered),
        waiting=waiting, cpu=spent / (0.1 * fed),
    )  # fmt: skip


@contextmanager
def _ours(setting: Setting, decoding: str) -> Iterator[Callable[[], Talk]]:
    recognizer = Recognizer.load(setting.model, decoding=decoding)
    with busy_process(), Streams(recognizer, max_streams=1_000_000, threads=setting.threads) as streams:
        yield lambda: streams.open(keep_segments=False)


def server(setting: Setting) -> list[Figure]:
    """The same through `asr serve`: sessions over websockets, from another process."""
    from pipelines.serve.load import run_load

    section = f"live sessions over the server, {setting.threads} cores, {setting.seconds:g} s each"

    def trial(count: int) -> Trial:
        options = ["--decoding", "greedy", *(["--model", str(setting.model)] if setting.model else [])]
        load = run_load(setting.audio, sessions=count, seconds=setting.seconds, options=options)
        setting.tell(f"server: {count} sessions, 95 of 100 replies within {load.p95:.0f} ms")
        waiting = float("inf") if load.failed else 0.0
        cores = load.server_cores + load.sender_cores
        return Trial(streams=count, p95=load.p95 / 1000, median=load.median / 1000, waiting=waiting, cpu=cores / count)

    best = largest(trial, setting.threads)
    if best is None:
        return [single(section, "sessions", 0, "")]
    return [
        single(section, "sessions", best.streams, ""),
        single(section, "95 of 100 replies within", 1000 * best.p95, "ms"),
        single(section, "half of the replies within", 1000 * best.median, "ms"),
        single(section, "CPU for a second of audio, server and senders", 1000 * best.cpu, "ms"),
    ]
