"""Recognition: the text of files and of live audio, however it is cut, with networks made by hand."""

import dataclasses
import io
import itertools
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from test_endpoint import RATE, noise, speech
from toy_model import spell, toy_recognizer

from asr.endpoint import EndpointConfig, Endpointer
from asr.errors import AsrError, AudioError, ConfigError, ModelError
from asr.recognizer import Network, Recognizer, Session, Transcript
from asr.runtime import State
from asr.runtime.folder import shipped_model
from asr.runtime.reader import usual_block
from asr.text import Tokenizer

FRAME = 640
TOKENIZER = Tokenizer.characters(["abcdef"])
SHORT = EndpointConfig(trailing_silence=0.4, leading_silence=1.0, max_segment=2.5, blanks=False)
EDGE = np.zeros(4000, np.float32)


def energies(samples: np.ndarray) -> np.ndarray:
    """Whole numbers, so that nothing depends on the order of additions: (n,) -> (n // FRAME,)."""
    whole = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    return np.rint(np.abs(whole.astype(np.float64)) * 2**15).astype(np.int64).sum(axis=1)


def token(memory: int, ahead: int) -> int:
    return (memory + ahead) // 7 % len(TOKENIZER)


class MemoryEngine:
    """Every frame's token depends on all frames since the start, and on one `latency_frames` ahead."""

    samples_per_frame = FRAME
    vocab_size, phone_count, joint_size = len(TOKENIZER), 0, 0

    def __init__(self, latency_frames: int = 2) -> None:
        self.latency_frames = latency_frames
        self.frames = 0
        self.batches: list[tuple[int, int]] = []

    def initial_state(self, batch: int = 1) -> State:
        return tuple(np.zeros((batch, n), np.int64) for n in (1, self.latency_frames))

    def step(self, audio: np.ndarray, state: State, flush: bool = False) -> tuple[np.ndarray, State]:
        assert audio.dtype == np.float32
        assert audio.shape[1] > 0
        assert audio.shape[1] % FRAME == 0
        self.frames += audio.size // FRAME
        rows = [self._step(samples, *parts) for samples, *parts in zip(audio, *state, strict=True)]
        log_probs, memories, held = zip(*rows, strict=True)
        return np.stack(log_probs), (np.stack(memories), np.stack(held))

    def _step(self, audio: np.ndarray, memory: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, ...]:
        last, waiting, path = int(memory[0]), held.tolist(), []
        for value in energies(audio).tolist():
            last = (last * 5 + value) % 9973
            waiting.append(last)
            path.append(token(waiting.pop(0), value))
        return one_hot(path), np.array([last]), np.array(waiting, np.int64)

    def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.batches.append((len(batch), sum(len(samples) for samples in batch)))
        return [one_hot(path(samples, self.latency_frames)) for samples in batch]


def one_hot(tokens: Sequence[int]) -> np.ndarray:
    values = np.full((len(tokens), len(TOKENIZER)), -9.0, np.float32)
    values[np.arange(len(tokens)), list(tokens)] = np.log(0.9)
    return values


def path(samples: np.ndarray, latency: int) -> list[int]:
    """What MemoryEngine writes for a whole segment: the oracle of the streaming tests."""
    values = energies(samples).tolist()
    memory = list(itertools.accumulate(values, lambda m, v: (m * 5 + v) % 9973, initial=0))[1:]
    return [token(m, v) for m, v in zip(memory, [*values[latency:], *[0] * latency], strict=True)]


def text(tokens: Sequence[int]) -> str:
    return " ".join(TOKENIZER.decode(t for t, _ in itertools.groupby(tokens)).split())


def live_texts(audio: np.ndarray, latency: int) -> list[str]:
    """What MemoryEngine writes for a stream, shared out at the endpoints of SHORT; segments without text left out."""
    tokens = path(np.concatenate([EDGE, audio, EDGE]), latency)
    endpointer, frames = Endpointer(SHORT), [0]
    for start in range(0, len(audio), 1600):
        for cut in endpointer.accept(audio[start : start + 1600]):
            frame = max(round((cut + len(EDGE)) / FRAME), frames[-1])
            frames.append(frame if endpointer.paused else frame + gap(tokens[frame : frame + 12]))
    return [found for a, b in itertools.pairwise([*frames, len(tokens)]) if (found := text(tokens[a:b]))]


def gap(tokens: list[int]) -> int:
    """The middle of the first of the longest stretches of blanks and spaces."""
    if not any(TOKENIZER.decode([t]).strip() for t in tokens):
        return 0
    best = (0, 0, 0)
    for start, end in itertools.combinations(range(len(tokens) + 1), 2):
        if not TOKENIZER.decode(tokens[start:end]).strip():
            best = max(best, (end - start, -start, (start + end) // 2))
    return best[2]


def recognizer(latency: int = 2, endpoint: EndpointConfig | None = SHORT) -> tuple[Recognizer, MemoryEngine]:
    engine = MemoryEngine(latency)
    networks = {name: Network(TOKENIZER, lambda: engine) for name in ("offline", "streaming")}
    return Recognizer(networks, endpoint=endpoint), engine


def fed(session: Session, audio: np.ndarray, sizes: Sequence[int] = (1600,)) -> Transcript:
    position = 0
    for size in itertools.cycle(sizes):
        if position >= len(audio):
            return session.finish()
        session.feed(audio[position : position + size])
        position += size
    raise AssertionError


def conversation(parts: list[tuple[float, float]], seed: int = 0) -> np.ndarray:
    return np.concatenate([x for i, (s, p) in enumerate(parts) for x in (speech(s, seed=seed + i), noise(p, -60, i))])


PARTS = st.lists(st.tuples(st.floats(0.0, 3.5), st.floats(0.0, 1.6)), min_size=1, max_size=4)
SIZES = st.lists(st.sampled_from([0, 1, 7, 640, 1600, 2559, 2560, 2561, 11_003, 90_000]), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(PARTS, SIZES, st.integers(0, 3), st.integers(0, 99))
def test_live_text_is_the_networks_own_shared_out_at_the_endpoints_however_the_audio_comes(
    parts: list[tuple[float, float]], sizes: list[int], latency: int, seed: int
) -> None:
    audio = conversation(parts, seed)
    model, engine = recognizer(latency)
    engine.frames = 0
    whole = model.transcribe(audio, RATE, network="streaming")
    assert [s.text for s in whole.segments] == live_texts(audio, latency)
    assert whole.text == " ".join(live_texts(audio, latency))
    assert engine.frames == (len(audio) + 2 * len(EDGE)) // FRAME + latency  # nothing is read twice
    assert fed(model.stream(), audio, [*sizes, 3200]) == whole
    check_times(whole)


@settings(max_examples=20, deadline=None)
@given(PARTS, st.integers(0, 99))
def test_every_segment_of_a_file_is_read_by_itself(parts: list[tuple[float, float]], seed: int) -> None:
    audio = conversation(parts, seed)
    model, _ = recognizer()
    whole = model.transcribe(audio, RATE)
    cuts = [0, *Endpointer(SHORT).accept(audio), len(audio)]
    segments = [np.concatenate([EDGE, audio[a:b], EDGE]) for a, b in itertools.pairwise(cuts)]
    assert [s.text for s in whole.segments] == [t for segment in segments if (t := text(path(segment, 2)))]
    check_times(whole)


@settings(max_examples=15, deadline=None)
@given(SIZES, st.integers(0, 2000), st.booleans())
def test_noise_in_which_the_network_writes_nothing_ends_a_segment_however_the_audio_comes(
    sizes: list[int], shift: int, reset: bool
) -> None:
    room, rattle = np.zeros(shift, np.float32), speech(3.0, db=-10)
    audio = np.concatenate([room, spell("one two"), rattle, spell("three"), rattle])
    model = toy_recognizer(endpoint=EndpointConfig(reset=reset))
    whole = model.transcribe(audio, RATE, network="streaming")
    assert [segment.text for segment in whole.segments] == ["one two", "three"]
    assert fed(model.stream(), audio, [*sizes, 3200]) == whole
    alone = toy_recognizer(endpoint=EndpointConfig(blanks=False)).transcribe(audio, RATE, network="streaming")
    assert len(alone.segments) == 1


def test_the_network_may_start_anew_in_a_pause() -> None:
    parts = [speech(1.5, seed=1), noise(1.0, -60, 1), speech(1.5, seed=2), noise(1.0, -60, 2)]
    other = [speech(1.5, seed=3), *parts[1:]]

    def segments(parts: list[np.ndarray], *, reset: bool) -> list[str]:
        rules = dataclasses.replace(SHORT, reset=reset)
        model, _ = recognizer(endpoint=rules)
        return [s.text for s in model.transcribe(np.concatenate(parts), RATE, "streaming").segments]

    # MemoryEngine never forgets: what the second segment says depends on the first, unless it starts anew
    kept, kept_too = segments(parts, reset=False), segments(other, reset=False)
    anew, anew_too = segments(parts, reset=True), segments(other, reset=True)
    assert len(kept) == len(kept_too) >= 2
    assert kept[1] != kept_too[1]
    assert anew[0] == kept[0]
    assert anew[1] != kept[1]
    # the end of the pause before it was read with the old state, so its text begins with that
    assert anew[1][-20:] == anew_too[1][-20:]


def check_times(transcript: Transcript) -> None:
    for spans in (transcript.segments, transcript.words):
        edges = [t for span in spans for t in (span.start, span.end)]
        assert edges == sorted(edges)
        assert all(0 <= t <= transcript.duration for t in edges)
    assert all(0 <= word.confidence <= 1 for word in transcript.words)
    assert transcript.text == " ".join(word.text for word in transcript.words)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.integers(0, 40_000))
def test_a_partial_tells_every_whole_block_and_the_end_what_is_left(latency: int, samples: int) -> None:
    model, _ = recognizer(latency, endpoint=None)
    audio = speech(2.5)[:samples]
    session = model.stream()
    update = session.feed(audio)
    frames = (len(EDGE) + samples) // (usual_block(FRAME) * FRAME) * usual_block(FRAME) - latency
    padded = np.concatenate([EDGE, audio, EDGE])
    values = path(padded, latency)
    assert update.partial == text(values[: max(frames, 0)])
    assert session.finish().text == text(values)


def test_finals_come_with_the_feed_that_closes_them() -> None:
    model, _ = recognizer()
    audio = conversation([(1.5, 1.0), (1.5, 1.0), (1.0, 0.2)])
    session = model.stream()
    finals = [s for block in np.array_split(audio, 97) for s in session.feed(block).final]
    whole = session.finish()
    assert len(finals) >= 2
    assert tuple(finals) == whole.segments[: len(finals)]


def test_interleaved_sessions_do_not_touch_each_other() -> None:
    model, _ = recognizer()
    audios = [conversation([(2, 0.8), (1, 0.3)], seed) for seed in range(3)]
    alone = [fed(model.stream(), audio) for audio in audios]
    sessions = [model.stream() for _ in audios]
    for position in range(0, max(map(len, audios)), 1000):
        for session, audio in zip(sessions, audios, strict=True):
            session.feed(audio[position : position + 1000])
    assert [session.finish() for session in sessions] == alone


@pytest.mark.parametrize("network", ["offline", "streaming"])
@pytest.mark.parametrize("samples", [0, 1, 639, 8000])
def test_very_short_audio_has_a_valid_transcript(network: str, samples: int) -> None:
    model, _ = recognizer()
    transcript = model.transcribe(speech(1)[:samples], RATE, network=network)
    assert transcript.duration == samples / RATE
    check_times(transcript)


@pytest.mark.parametrize("network", ["offline", "streaming"])
def test_silence_has_an_empty_text(network: str) -> None:
    transcript = recognizer()[0].transcribe(np.zeros(20 * RATE, np.float32), RATE, network=network)
    assert transcript == Transcript(text="", words=(), segments=(), duration=20.0)


def test_a_finished_session_says_so() -> None:
    session = recognizer()[0].stream()
    session.feed(speech(1))
    first = session.finish()
    assert session.finish() is first
    with pytest.raises(AsrError, match=r"finished.*Recognizer\.stream"):
        session.feed(speech(1))


def test_bad_samples_are_refused_and_the_session_goes_on() -> None:
    model, _ = recognizer()
    session = model.stream()
    session.feed(speech(1))
    with pytest.raises(AudioError, match="NaN"):
        session.feed(np.array([0.0, np.nan], np.float32))
    with pytest.raises(AudioError, match="int32"):
        session.feed(np.zeros(5, np.int32))
    session.feed(speech(1, seed=1))
    assert session.finish() == model.transcribe(np.concatenate([speech(1), speech(1, seed=1)]), RATE, "streaming")


def test_the_callers_buffer_may_be_used_again_and_words_that_were_told_stay() -> None:
    model, _ = recognizer()
    audio = conversation([(2.0, 0.6), (1.0, 0.2)])
    one, other = model.stream(), model.stream()
    buffer = np.empty(1000, np.float32)
    told = []
    for start in range(0, len(audio) // 1000 * 1000, 1000):
        buffer[:] = audio[start : start + 1000]
        update = one.feed(buffer)
        assert update == other.feed(audio[start : start + 1000])
        told.append((update, update.words))
    assert one.finish() == other.finish()
    assert [update.words for update, _ in told] == [words for _, words in told]
    assert max(len(words) for _, words in told) > 3


def test_integers_and_floats_are_the_same_audio() -> None:
    model, _ = recognizer()
    audio = np.rint(conversation([(2, 0.8), (1, 0.1)]) * 32768).astype(np.int16)
    assert fed(model.stream(), audio) == fed(model.stream(), audio.astype(np.float32) / 32768)


@settings(max_examples=5, deadline=None)
@given(SIZES, st.sampled_from([8_000, 22_050, 44_100, 48_000]))
def test_another_rate_is_resampled_with_state(sizes: list[int], rate: int) -> None:
    model, _ = recognizer()
    audio = conversation([(1.5, 0.8), (1, 0.1)])
    session = model.stream(rate)
    live = fed(session, audio, [*sizes, 4000])
    assert live == model.transcribe(audio, rate, network="streaming")
    assert live.duration == len(audio) / rate
    check_times(live)


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_a_file_and_the_same_audio_live_have_one_text(tmp_path: Path, rate: int) -> None:
    model, _ = recognizer()
    samples = np.rint(np.clip(conversation([(2, 0.8), (3, 0.2), (1, 1.0)]), -1, 1) * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, rate)
    file = model.transcribe(tmp_path / "a.wav", network="streaming")
    live = fed(model.stream(rate), samples, [1999])
    assert file.text == live.text
    assert [w.text for w in file.words] == [w.text for w in live.words]
    assert file.duration == pytest.approx(live.duration, abs=1e-4)
    assert len(file.segments) > 1


def test_a_long_file_is_read_in_batches_of_bounded_size(tmp_path: Path) -> None:
    model, engine = recognizer(endpoint=EndpointConfig())
    audio = np.tile(conversation([(6, 1.0), (9, 1.2), (40, 1.0)]), 20)
    soundfile.write(tmp_path / "long.flac", audio, RATE)
    transcript = model.transcribe(tmp_path / "long.flac")
    assert transcript.duration == pytest.approx(len(audio) / RATE)
    assert len(transcript.segments) >= 60
    assert max(s.end - s.start for s in transcript.segments) <= 30.0
    assert max(rows for rows, _ in engine.batches) > 1
    assert max(samples for _, samples in engine.batches) <= 125 * RATE
    assert sum(samples for _, samples in engine.batches) - len(EDGE) * 2 * len(transcript.segments) == pytest.approx(
        len(audio), abs=RATE
    )


def test_a_batch_is_uncut_and_keeps_its_order() -> None:
    model, engine = recognizer()
    audios = [conversation([(n, 1.0), (0.5, 0.0)], seed=i) for i, n in enumerate([3.0, 0.2, 5.0, 1.0])] * 6
    for network in ("offline", "streaming"):
        transcripts = model.transcribe_batch(audios, network=network)
        assert [t.text for t in transcripts] == [text(path(np.concatenate([EDGE, a, EDGE]), 2)) for a in audios]
        assert all(len(t.segments) == 1 for t in transcripts)
    assert {rows for rows, _ in engine.batches} == {16, 8}
    assert model.transcribe_batch([]) == []


def test_a_session_keeps_its_size_and_its_pace() -> None:
    model, engine = recognizer(endpoint=EndpointConfig())
    session = model.stream()
    block = np.zeros(RATE, np.float32)
    sizes, steps = [], []
    tracemalloc.start()
    for _ in range(6):
        before = engine.frames
        for _ in range(60):
            session.feed(block)
        sizes.append(tracemalloc.get_traced_memory()[0])
        steps.append(engine.frames - before)
    tracemalloc.stop()
    assert max(sizes) < 700_000  # bytes; the audio fed is 23 million
    assert max(steps[1:]) < 1.2 * min(steps[1:])


class OtherEngine(MemoryEngine):
    """Reads whole utterances, and finds the token after the one that MemoryEngine finds."""

    def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [one_hot(reread(samples)) for samples in batch]


def reread(samples: np.ndarray) -> list[int]:
    return [(t + 1) % len(TOKENIZER) for t in path(samples, 0)]


def two_networks(endpoint: EndpointConfig | None = SHORT) -> Recognizer:
    networks = {"streaming": Network(TOKENIZER, MemoryEngine), "offline": Network(TOKENIZER, OtherEngine)}
    return Recognizer(networks, endpoint=endpoint)


@settings(max_examples=15, deadline=None)
@given(PARTS, SIZES, st.integers(0, 99))
def test_two_passes_give_partials_of_one_network_and_finals_of_the_other(
    parts: list[tuple[float, float]], sizes: list[int], seed: int
) -> None:
    audio = conversation(parts, seed)
    one_pass, two_pass = two_networks().stream(), two_networks().stream(two_pass=True)
    for samples in np.array_split(audio, 7):
        first, second = one_pass.feed(samples), two_pass.feed(samples)
        assert first.partial == second.partial
    cuts = [0, *Endpointer(SHORT).accept(audio), len(audio)]
    read = [(a, b, text(reread(np.concatenate([EDGE, audio[a:b], EDGE])))) for a, b in itertools.pairwise(cuts)]
    whole = two_pass.finish()
    assert [(s.start, s.end, s.text) for s in whole.segments] == [(a / RATE, b / RATE, t) for a, b, t in read if t]
    assert fed(two_networks().stream(two_pass=True), audio, [*sizes, 3200]) == whole
    check_times(whole)


def test_two_passes_need_an_offline_network_and_endpoints() -> None:
    with pytest.raises(ModelError, match=r"the model M has no offline network \(it has: streaming\)"):
        Recognizer({"streaming": Network(TOKENIZER, MemoryEngine)}, name="model M").stream(two_pass=True)
    with pytest.raises(ConfigError, match=r"two_pass.*endpoint"):
        two_networks(endpoint=None).stream(two_pass=True)


def test_a_session_may_have_endpoints_of_its_own_and_forget_what_it_has_told() -> None:
    model, _ = recognizer(endpoint=None)
    audio = conversation([(1.5, 1.0), (1.5, 1.0), (1.0, 0.2)])
    kept = fed(model.stream(endpoint=SHORT), audio)
    assert kept == recognizer(endpoint=SHORT)[0].transcribe(audio, RATE, "streaming")
    session = model.stream(endpoint=SHORT, keep_segments=False)
    told = [s for block in np.array_split(audio, 50) for s in session.feed(block).final]
    last = session.finish()
    assert len(told) > 1
    assert (*told, *last.segments) == kept.segments
    assert last.duration == kept.duration
    assert len(fed(model.stream(), audio).segments) == 1


@settings(max_examples=15, deadline=None)
@given(PARTS, SIZES, st.sampled_from([RATE, RATE, 8_000, 44_100]), st.booleans(), st.integers(0, 99))
def test_a_session_goes_on_after_a_trip_through_bytes(
    parts: list[tuple[float, float]], sizes: list[int], rate: int, two_pass: bool, seed: int
) -> None:
    model = two_networks()
    audio = conversation(parts, seed)
    one = other = model.stream(rate, two_pass=two_pass)
    for block in np.array_split(audio, 9):
        other = model.resume(other.save())
        for part in np.array_split(block, len(sizes)):
            assert one is not other
            assert one.feed(part) == other.feed(part)
    assert two_networks().resume(other.save()).finish() == one.finish()  # in a new process, so to speak


def test_a_saved_session_is_refused_by_another_search_than_its_own(tmp_path: Path) -> None:
    model = shutil.copytree(shipped_model(), tmp_path / "model")
    hot_words = {"phoebe": 5.0, "mister quilter": 3.0}
    data = Recognizer.load(model, hot_words=hot_words).stream().save()
    assert Recognizer.load(model, hot_words=hot_words).resume(data).finish().text == ""
    told = r"a saved session: its search was \w{16}; in the model .* it is \w{16}"
    with pytest.raises(ModelError, match=told):
        Recognizer.load(model).resume(data)
    (model / "streaming" / "priors.txt").unlink()
    with pytest.raises(ModelError, match=told):
        Recognizer.load(model, hot_words=hot_words).resume(data)


def test_a_saved_session_is_refused_by_name_where_it_does_not_fit() -> None:
    model, _ = recognizer()
    session = model.stream(two_pass=True)
    session.feed(speech(1))
    data = session.save()
    wider = {n: Network(Tokenizer.characters(["abcdeg"]), MemoryEngine) for n in ("offline", "streaming")}
    with pytest.raises(ModelError, match=r"its streaming network was \w{16}; in the model N it is \w{16}"):
        Recognizer(wider, name="model N").resume(data)
    with pytest.raises(ModelError, match="model O has no offline network"):
        Recognizer({"streaming": Network(TOKENIZER, MemoryEngine)}, name="model O").resume(data)
    for broken in (data[:-300], b"", b"PK" + data[9:], data[:300] + b"??" + data[302:]):
        with pytest.raises(ModelError, match=r"a saved state is damaged"):
            model.resume(broken)
    with np.load(io.BytesIO(data)) as file:
        arrays = [file[name] for name in file.files]
    state, _ = MemoryEngine().initial_state()
    arrays = [array[:, :-1] if array.shape == state.shape else array for array in arrays]
    other = io.BytesIO()
    np.savez(other, *arrays)
    with pytest.raises(ModelError, match=r"a saved state is damaged.*network's state"):
        model.resume(other.getvalue())
    session.finish()
    with pytest.raises(AsrError, match="finished"):
        session.save()


def test_what_is_missing_or_wrong_is_named() -> None:
    model = Recognizer({"offline": Network(TOKENIZER, MemoryEngine)}, name="model M")
    assert model.networks == ("offline",)
    with pytest.raises(ModelError, match=r"the model M has no streaming network \(it has: offline\)"):
        model.stream()
    with pytest.raises(ModelError, match="no streaming network"):
        model.transcribe(EDGE, RATE, network="streaming")
    with pytest.raises(ConfigError, match=r"'online'.*offline or streaming"):
        model.transcribe(EDGE, RATE, network="online")
    with pytest.raises(AudioError, match=r"a\.wav.*sample_rate"):
        model.transcribe("a.wav", RATE)
    with pytest.raises(AudioError, match="44 Hz"):
        recognizer()[0].stream(44)
    damaged = Recognizer({"offline": Network(Tokenizer.characters(["ab"]), MemoryEngine, where="M/offline")})
    with pytest.raises(ModelError, match=r"M/offline: tokens.txt has 4 tokens, the network 8"):
        damaged.transcribe(EDGE, RATE)


def test_importing_is_light() -> None:
    program = (
        "import sys, asr; assert not {'numpy', 'onnxruntime'} & sys.modules.keys(); asr.__version__; asr.load; "
        "import asr.runtime.onnx; assert not {'torch', 'ray'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
