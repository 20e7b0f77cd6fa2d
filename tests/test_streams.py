"""Many streams: each one's text is a lone session's, whatever its neighbours do; what is too much is refused."""

import asyncio
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from test_endpoint import RATE, speech
from test_recognizer import SHORT, TOKENIZER, MemoryEngine, OtherEngine, conversation, recognizer, two_networks
from test_runtime import tiny_model  # noqa: F401 (a fixture)

from asr.endpoint import EndpointConfig
from asr.errors import AsrError, AudioError, ConfigError, ModelError, Overloaded
from asr.recognizer import Network, Recognizer, Transcript, Update
from asr.runtime import State
from asr.runtime.reader import usual_block
from asr.streams import Stream, Streams

SAMPLES = Path(__file__).parents[1] / "scripts" / "samples" / "audio"


def result(future: Future[Any]) -> Any:
    return future.result(timeout=60)


def alone(model: Recognizer, blocks: list[np.ndarray], **options: Any) -> tuple[list[Update], Transcript]:
    session = model.stream(**options)
    return [session.feed(block) for block in blocks], session.finish()


def cut(audio: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    edges = [0, *itertools.accumulate(itertools.islice(itertools.cycle(sizes), 400))]
    return [audio[a:b] for a, b in itertools.pairwise([e for e in edges if e < len(audio)] + [len(audio)])]


class GatedEngine(MemoryEngine):
    """Computes when it is let; tells what was in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.steps: list[np.ndarray] = []

    def step(self, audio: np.ndarray, state: State, flush: bool = False) -> tuple[np.ndarray, State]:
        assert self.gate.wait(60)
        self.steps.append(audio)
        return super().step(audio, state, flush)


@pytest.fixture
def gated() -> Iterator[tuple[Recognizer, GatedEngine]]:
    engine = GatedEngine()
    yield Recognizer({"streaming": Network(TOKENIZER, lambda: engine)}, endpoint=SHORT), engine
    engine.gate.set()


STREAM = st.tuples(
    st.integers(0, 9),  # which audio
    st.lists(st.sampled_from([0, 7, 640, 1600, 2560, 2561, 11_003, 40_000]), min_size=1, max_size=3).filter(any),
    st.integers(0, 12),  # when it joins
    st.sampled_from([None, None, None, 1, 5]),  # after how many blocks it is dropped
    st.booleans(),  # two passes
)


@settings(max_examples=15, deadline=None)
@given(st.lists(STREAM, min_size=1, max_size=7), st.integers(1, 5), st.integers(1, 3), st.sampled_from([0.0, 5.0]))
def test_every_stream_is_as_if_it_were_alone(plans: list[Any], rows: int, threads: int, wait_ms: float) -> None:
    model = two_networks()
    with Streams(model, max_batch=rows, threads=threads, wait_ms=wait_ms, max_waiting=60) as streams:
        running: list[tuple[Stream, list[np.ndarray], list[Future[Update]], int | None, bool]] = []
        todo = sorted(plans, key=lambda plan: plan[2])
        finished: list[tuple[list[Future[Update]], Future[Transcript], list[np.ndarray], bool]] = []
        for turn in itertools.count():
            while todo and todo[0][2] <= turn:
                seed, sizes, _, dropped, two_pass = todo.pop(0)
                blocks = cut(conversation([(1.2, 0.8), (0.3 * seed, 0.5)], seed), sizes)
                running.append((streams.open(two_pass=two_pass), blocks, [], dropped, two_pass))
            for entry in running.copy():
                stream, blocks, updates, dropped, two_pass = entry
                if len(updates) == dropped:
                    stream.close()
                    running.remove(entry)
                elif len(updates) == len(blocks):
                    finished.append((updates, stream.finish(), blocks, two_pass))
                    running.remove(entry)
                else:
                    updates.append(stream.feed(blocks[len(updates)]))
            if not running and not todo:
                break
        for updates, transcript, blocks, two_pass in finished:
            expected = alone(model, blocks, two_pass=two_pass)
            assert ([result(update) for update in updates], result(transcript)) == expected
        assert len(streams) == 0


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_real_networks_streams_are_bit_equal_to_lone_ones(tiny_model: Path, precision: str) -> None:  # noqa: F811
    model = Recognizer.load(tiny_model, precision=precision, endpoint=SHORT)
    audios = [np.clip(conversation([(1.1, 0.6), (0.7 + 0.2 * i, 0.0)], i) * 1.6**i, -1, 1) for i in range(7)]
    with Streams(model, max_batch=4) as streams:
        opened = [(streams.open(), cut(audio, [700 + 300 * i])) for i, audio in enumerate(audios)]
        futures = [[stream.feed(block) for block in blocks] for stream, blocks in opened]
        whole = [result(stream.finish()) for stream, _ in opened]
        for (_, blocks), updates, transcript in zip(opened, futures, whole, strict=True):
            assert ([result(u) for u in updates], transcript) == alone(model, blocks)  # confidences are floats
    assert sum(len(t.words) for t in whole) > 10
    texts = model.transcribe_batch(audios, network="streaming")
    lone = [alone(model, [audio], endpoint=None)[1] for audio in audios]
    assert texts == lone


def test_blocks_of_many_streams_are_one_step(gated: tuple[Recognizer, GatedEngine]) -> None:
    model, engine = gated
    engine.gate.set()
    with Streams(model, max_batch=8, threads=1, wait_ms=60_000) as streams:
        opened = [streams.open() for _ in range(6)]
        futures = [stream.feed(np.zeros(1600, np.float32)) for stream in opened]  # and 250 ms at the start
        for future in futures:
            result(future)
    assert {len(audio) for audio in engine.steps} == {6}


def test_a_block_waits_for_company_only_if_some_can_come(gated: tuple[Recognizer, GatedEngine]) -> None:
    model, engine = gated
    engine.gate.set()
    # one step; with the 4000 samples of silence before the first one two
    block = np.zeros(usual_block(640) * 640, np.float32)
    with Streams(model, wait_ms=3_600_000) as streams:
        first = streams.open()
        result(first.feed(block))
        second = streams.open()
        for samples in (block[: 2 * len(block) - 4000], np.tile(block, 2)):
            waiting = first.feed(np.tile(block, 2))
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            result(second.feed(samples))
            result(waiting)
        waiting = first.feed(block)
        second.close()
        result(waiting)
    with Streams(model, wait_ms=20) as streams:
        streams.open()
        result(streams.open().feed(block))


def test_one_that_gives_all_at_once_gets_its_turn_and_no_more(gated: tuple[Recognizer, GatedEngine]) -> None:
    model, engine = gated
    with Streams(model, max_batch=2, threads=1, wait_ms=0) as streams:
        flood, *live = [streams.open() for _ in range(4)]
        flooding = [flood.feed(np.full(16_000, 0.001 * i, np.float32)) for i in range(20)]
        futures = [stream.feed(np.full(4000, 0.5, np.float32)) for stream in live]
        engine.gate.set()
        for future in futures:
            result(future)
        assert not flooding[-1].done()
        assert flood.waiting > 10
        for future in flooding:
            result(future)
        assert flood.waiting == 0
    first_live = [i for i, audio in enumerate(engine.steps) if (audio == 0.5).any()]
    assert first_live[-1] < 20  # of more than 100 steps


def test_more_than_agreed_is_refused_at_once(gated: tuple[Recognizer, GatedEngine]) -> None:
    model, engine = gated
    second = np.zeros(16_000, np.int16)
    with Streams(model, max_streams=2, max_waiting=3) as streams:
        one, other = streams.open(), streams.open()
        with pytest.raises(Overloaded, match="2 streams are open"):
            streams.open()
        futures = [one.feed(second) for _ in range(3)]
        with pytest.raises(Overloaded, match=r"3.0 s of this stream's audio wait.*1.0 s more.*at most 3 s"):
            one.feed(second)
        futures.append(other.feed(second))
        engine.gate.set()
        for future in futures:
            result(future)
        result(one.feed(second))
        other.close()
        assert len(streams) == 1
        streams.open()
        result(one.finish())
        streams.open()


def test_bad_samples_reach_their_own_future_alone() -> None:
    model, _ = recognizer()
    audio = conversation([(1.5, 1.0), (1.0, 0.2)])
    with Streams(model) as streams:
        good, bad = streams.open(), streams.open()
        pairs = [(good.feed(block), bad.feed(block)) for block in np.array_split(audio, 9)]
        with pytest.raises(AudioError, match="NaN"):
            result(bad.feed(np.array([np.nan], np.float32)))
        wrongs: list[Any] = [np.zeros(3, np.int64), np.float32(0.5), np.array(["a"])]
        for wrong in wrongs:
            with pytest.raises(AudioError):
                result(bad.feed(wrong))
        for pair in pairs:
            assert result(pair[0]) == result(pair[1])
        assert result(good.finish()) == result(bad.finish()) == model.transcribe(audio, RATE, "streaming")
    with pytest.raises(AudioError, match="44 Hz"), Streams(model) as streams:
        streams.open(44)


def test_a_network_that_fails_ends_those_streams_and_no_other() -> None:
    class Failing(MemoryEngine):
        def step(self, audio: np.ndarray, state: State, flush: bool = False) -> tuple[np.ndarray, State]:
            if (audio == 0.75).any():
                raise RuntimeError("out of memory")
            return super().step(audio, state, flush)

    engine = Failing()
    model = Recognizer({"streaming": Network(TOKENIZER, lambda: engine)}, endpoint=SHORT)
    with Streams(model, wait_ms=0, max_batch=1) as streams:
        good, bad = streams.open(), streams.open()
        failing = bad.feed(np.full(9000, 0.75, np.float32))
        with pytest.raises(RuntimeError, match="out of memory"):
            result(failing)
        with pytest.raises(AsrError, match="closed"):
            bad.feed(np.zeros(9, np.float32))
        result(good.feed(speech(1)))
        assert len(result(good.finish()).text) > 3


def test_what_is_closed_cancels_its_futures_and_says_so(gated: tuple[Recognizer, GatedEngine]) -> None:
    model, engine = gated
    streams = Streams(model)
    stream, other = streams.open(), streams.open()
    futures = [stream.feed(speech(1)) for _ in range(3)]
    stream.close()
    stream.close()
    engine.gate.set()
    for future in futures:
        with pytest.raises(CancelledError):
            result(future)
    with pytest.raises(AsrError, match=r"closed.*Streams.open"):
        stream.feed(speech(1))
    finished = other.finish()
    with pytest.raises(AsrError, match=r"finished.*Streams.open"):
        other.feed(speech(1))
    result(finished)
    with pytest.raises(AsrError):
        other.save()
    last = streams.open()
    engine.gate.clear()
    waiting = last.feed(speech(1))
    threading.Timer(0.2, engine.gate.set).start()
    streams.close()
    streams.close()
    assert waiting.cancelled()
    with pytest.raises(AsrError, match="closed"):
        streams.open()
    assert not [t for t in threading.enumerate() if t.name.startswith("asr-") and t.is_alive()]


@pytest.mark.parametrize("during", ["feed", "close"])
def test_what_is_asked_while_all_is_closed_is_answered(during: str) -> None:
    """Whoever leaves the lock finds that another thread has closed all meanwhile."""
    streams = Streams(recognizer()[0], wait_ms=3_600_000)
    stream, other = streams.open(), streams.open()  # of which one waits for the other
    block = np.zeros(16_000, np.float32)
    future = stream.feed(block)
    result(other.save())  # so that was begun

    class ThenClosed:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            streams._lock = lock
            thread = threading.Thread(target=streams.close)
            thread.start()
            thread.join()

    lock, streams._lock = streams._lock, ThenClosed()  # type: ignore[assignment]
    if during == "feed":
        future = stream.feed(block)
    else:
        stream.close()
    assert future.cancelled()


def test_a_cancelled_future_loses_no_audio(gated: tuple[Recognizer, GatedEngine]) -> None:
    model, engine = gated
    audio = conversation([(2.0, 0.6)])
    with Streams(model) as streams:
        stream = streams.open()
        for block in np.array_split(audio, 5):
            stream.feed(block).cancel()
        engine.gate.set()
        assert result(stream.finish()) == model.transcribe(audio, RATE, "streaming")


def test_the_callers_buffer_may_be_used_again(gated: tuple[Recognizer, GatedEngine]) -> None:
    model, engine = gated
    audio = conversation([(2.0, 0.6)])
    buffer = np.empty(1000, np.float32)
    with Streams(model) as streams:
        stream = streams.open()
        for block in cut(audio, [1000]):
            buffer[: len(block)] = block
            stream.feed(buffer[: len(block)])
        engine.gate.set()
        assert result(stream.finish()) == model.transcribe(audio, RATE, "streaming")


def test_streams_are_saved_and_resumed_between_blocks() -> None:
    model = two_networks()
    blocks = cut(conversation([(2.0, 0.8), (1.5, 0.7), (1.0, 0.1)], 3), [2000])
    updates, transcript = alone(model, blocks, two_pass=True)
    got: list[Update] = []
    with Streams(model) as one, Streams(two_networks()) as other:
        stream = one.open(two_pass=True)
        for number, block in enumerate(blocks):
            future = stream.feed(block)
            if number % 11 == 5:
                data = result(stream.save())
                stream.close()
                stream = (other if number % 2 else one).resume(data)
            got.append(result(future))
        assert result(stream.finish()) == transcript
    assert got == updates
    with pytest.raises(ModelError, match="damaged"), Streams(model) as streams:
        streams.resume(data[:-9])


def test_endpoints_and_rates_are_each_streams_own() -> None:
    model, _ = recognizer()
    audio = conversation([(1.0, 0.5), (1.0, 0.5), (1.0, 0.1)])
    choices = [{}, {"endpoint": None}, {"endpoint": EndpointConfig(trailing_silence=0.2)}, {"sample_rate": 8000}]
    choices.append({"keep_segments": False})
    with Streams(model) as streams:
        opened = [streams.open(**choice) for choice in choices]  # type: ignore[arg-type]
        for stream in opened:
            stream.feed(audio)
        got = [result(stream.finish()) for stream in opened]
    assert got == [alone(model, [audio], **choice)[1] for choice in choices]
    assert got[4].segments == got[0].segments[-len(got[4].segments) :] != got[0].segments


def test_second_passes_hold_up_no_other_stream() -> None:
    begun, end = threading.Event(), threading.Event()

    class Slow(OtherEngine):
        def log_probs(self, batch: Any) -> list[np.ndarray]:
            begun.set()
            assert end.wait(60)
            return super().log_probs(batch)

    networks = {"streaming": Network(TOKENIZER, MemoryEngine), "offline": Network(TOKENIZER, Slow)}
    model = Recognizer(networks, endpoint=SHORT)
    with Streams(model) as streams:
        rereading, other = streams.open(two_pass=True), streams.open()
        rereading.feed(conversation([(1.0, 0.8)]))
        assert begun.wait(60)
        assert result(other.feed(speech(1))).partial
        end.set()
        result(rereading.finish())
    end.set()


def test_asyncio_waits_for_streams() -> None:
    model, _ = recognizer()
    audio = conversation([(1.5, 0.7), (1.0, 0.1)])

    async def one(streams: Streams) -> Transcript:
        stream = streams.open()
        for block in cut(audio, [1600]):
            await asyncio.wrap_future(stream.feed(block))
        return await asyncio.wrap_future(stream.finish())

    async def many() -> list[Transcript]:
        with Streams(model) as streams:
            return await asyncio.gather(*(one(streams) for _ in range(5)))

    assert asyncio.run(many()) == [model.transcribe(audio, RATE, "streaming")] * 5


@pytest.mark.parametrize(
    "wrong", [{"max_streams": 0}, {"max_batch": 0}, {"threads": 0}, {"wait_ms": -1}, {"max_waiting": float("nan")}]
)
def test_impossible_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = "):
        Streams(recognizer()[0], **wrong)
    with pytest.raises(ModelError, match="no streaming network"):
        Streams(Recognizer({"offline": Network(TOKENIZER, MemoryEngine)}))


def shipped(decoding: str) -> Recognizer:
    try:
        return Recognizer.load(decoding=decoding)
    except ModelError as error:
        pytest.skip(f"the shipped model is not here: {error}")


def spoken() -> np.ndarray:
    return np.concatenate([soundfile.read(path, dtype="int16")[0] for path in sorted(SAMPLES.glob("*.flac"))[:3]])


def test_a_saved_session_is_resumed_in_another_process(tmp_path: Path) -> None:
    audio = spoken()
    half = len(audio) // 2
    session = shipped("greedy").stream()
    session.feed(audio[:half])
    np.save(tmp_path / "rest.npy", audio[half:])
    (tmp_path / "session").write_bytes(session.save())
    assert (tmp_path / "session").stat().st_size < 1_000_000
    program = (
        "import sys, numpy; from asr import Recognizer; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "session = Recognizer.load(decoding='greedy').resume((folder / 'session').read_bytes())\n"
        "session.feed(numpy.load(folder / 'rest.npy')); print(session.finish())"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    other = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()
    session.feed(audio[half:])
    assert other == str(session.finish())
    assert len(session.finish().words) > 3


def test_a_saved_beam_search_goes_on_where_it_was() -> None:
    model, audio = shipped("beam"), spoken()
    one = other = model.stream()
    for block in np.array_split(audio, 4):
        other = model.resume(other.save())
        assert one.feed(block) == other.feed(block)
    assert one.finish() == other.finish()
    with pytest.raises(ModelError, match=r"decoding was BeamDecoder; in the .* it is GreedyDecoder"):
        shipped("greedy").resume(model.stream().save())


def measured(work: Callable[[], None]) -> int:
    """Bytes that `work` leaves behind."""
    import gc
    import tracemalloc

    gc.collect()
    tracemalloc.start()
    work()
    gc.collect()
    left = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return left


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_an_idle_session_takes_less_than_a_megabyte(rate: int) -> None:
    model = shipped("greedy")
    block = np.random.default_rng(0).normal(0, 0.05, rate // 10).astype(np.float32)
    sessions = [model.stream(rate)]
    sessions[0].feed(block)

    def talk() -> None:
        sessions[0] = model.stream(rate)
        for _ in range(90):  # what it keeps of the past is full by then
            sessions[0].feed(block)

    assert 20_000 < measured(talk) < 1_000_000
