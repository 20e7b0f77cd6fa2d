"""Endpointing: where a stream is cut, whatever its noise and however it arrives."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.audio import read_audio
from asr.endpoint import EndpointConfig, Endpointer
from asr.errors import ConfigError

RATE = 16_000


def noise(seconds: float, db: float, seed: int = 0) -> np.ndarray:
    """Steady noise of `db` below full scale."""
    values = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (values * 10 ** (db / 20)).astype(np.float32)


def speech(seconds: float, db: float = -20, seed: int = 0) -> np.ndarray:
    """Noise that rises and falls by 25 dB, four times a second, as syllables do."""
    carrier = noise(seconds, db, seed)
    swing = 12.5 * np.cos(2 * np.pi * 4 * np.arange(len(carrier)) / RATE) - 12.5
    return (carrier * 10 ** (swing / 20)).astype(np.float32)


def cuts_of(audio: np.ndarray, config: EndpointConfig | None = None, sizes: tuple[int, ...] = (2560,)) -> list[int]:
    endpointer, cuts, position, turn = Endpointer(config), [], 0, 0
    while position < len(audio):
        size = sizes[turn % len(sizes)]
        cuts += endpointer.accept(audio[position : position + size])
        position, turn = position + size, turn + 1
    return cuts


def within(cuts: list[int], start: float, end: float) -> list[int]:
    return [cut for cut in cuts if start * RATE <= cut <= end * RATE]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.2, 2.5), st.floats(0.1, 1.6), st.integers(-70, -35)), min_size=1, max_size=4),
    st.lists(st.sampled_from([0, 1, 159, 160, 1600, 2560, 9973, 100_000]), min_size=1, max_size=5),
    st.integers(0, 9),
)
def test_cuts_do_not_depend_on_how_the_samples_arrive(
    parts: list[tuple[float, float, int]], sizes: list[int], seed: int
) -> None:
    config = EndpointConfig(trailing_silence=0.4, leading_silence=1.0, max_segment=2.0)
    audio = np.concatenate([x for s, p, db in parts for x in (speech(s, seed=seed), noise(p, db, seed))])
    whole = Endpointer(config).accept(audio)
    assert cuts_of(audio, config, (*sizes, 1600)) == whole
    assert all(0 < a < b for a, b in zip([1, *whole], [*whole, len(audio) + 1], strict=True))
    assert np.diff([0, *whole, len(audio)]).max() <= 2 * RATE


@pytest.mark.parametrize("offset", [0, -0.1])
@pytest.mark.parametrize("db", [-100, -70, -50, -35])
def test_a_pause_is_cut_in_its_middle_at_any_noise(db: float, offset: float) -> None:
    audio = np.concatenate([speech(4, seed=1), noise(1.2, db, 2), speech(4, seed=3), noise(1.2, db, 4), speech(3)])
    audio += noise(len(audio) / RATE, db, 5) + np.float32(offset)
    cuts = cuts_of(audio)
    assert len(cuts) == 2
    assert within(cuts, 4.15, 4.85) == cuts[:1]
    assert within(cuts, 9.35, 10.05) == cuts[1:]


def test_a_pause_noisier_than_the_speakers_own_background_is_cut() -> None:
    takes = [np.concatenate([noise(0.3, -70, i), speech(3, seed=i), noise(0.3, -70, i)]) for i in range(3)]
    audio = np.concatenate([takes[0], noise(1.2, -40, 7), takes[1], noise(1.2, -40, 8), takes[2]])
    assert len(cuts_of(audio)) == 2


def test_short_pauses_are_not_cut() -> None:
    audio = np.concatenate([x for i in range(8) for x in (speech(2, seed=i), noise(0.5, -60, i))])
    assert cuts_of(audio) == []


def test_steady_noise_from_the_start_is_no_speech() -> None:
    audio = np.concatenate([noise(3, -40, 1), speech(4), noise(1.5, -40, 2), speech(2)])
    cuts = cuts_of(audio)
    assert within(cuts, 7, 8.5) == cuts
    assert len(cuts) == 1


def test_a_click_does_not_make_a_pause_speech() -> None:
    pause = noise(1.0, -60)
    pause[8000:8100] = 0.9
    assert len(cuts_of(np.concatenate([speech(4), pause, speech(4)]))) == 1


def test_a_forced_cut_falls_on_the_quietest_ten_milliseconds_of_the_last_five_seconds() -> None:
    audio = noise(31, -20)
    audio[10 * RATE : 10 * RATE + 160] = 0  # too early to be taken
    quiet = round(27.31 * RATE)
    audio[quiet : quiet + 160] *= 0.01
    config = EndpointConfig(leading_silence=100.0)
    assert cuts_of(audio, config) == [quiet + 80]


def test_no_segment_is_longer_than_the_limit_wherever_audio_ends() -> None:
    endpointer = Endpointer(EndpointConfig(trailing_silence=0.2, max_segment=2.0))
    accepted = last = 0
    for block in np.array_split(speech(60, seed=1), 60 * 40):  # of 25 ms, which may be the last one
        accepted += len(block)
        for cut in endpointer.accept(block):
            assert cut - last <= 2 * RATE
            last = cut
        assert accepted - last <= 2 * RATE


def test_silence_closes_segments_too() -> None:
    for audio in (np.zeros(60 * RATE, np.float32), noise(60, -30)):
        cuts = cuts_of(audio)
        assert np.diff([0, *cuts, len(audio)]).max() <= 6 * RATE


def test_a_cut_lies_within_the_lookback_and_memory_is_constant() -> None:
    def held(value: object) -> int:
        if isinstance(value, np.ndarray):
            return value.nbytes
        return 8 * len(value) if isinstance(value, list) else sum(map(held, getattr(value, "__dict__", {}).values()))

    endpointer, accepted = Endpointer(), 0
    sizes = []
    for i in range(40):
        for block in np.array_split(speech(8 if i % 4 else 40, seed=i), 50):
            accepted += len(block)
            assert all(accepted - endpointer.lookback <= cut <= accepted for cut in endpointer.accept(block))
        endpointer.accept(noise(1.5, -60, i))
        accepted += round(1.5 * RATE)
        sizes.append(held(endpointer))
    assert max(sizes) < 20_000


def test_joined_utterances_are_cut_in_the_room_noise_between_them(shared_speech: Path) -> None:
    folder = shared_speech / "librispeech_dev_clean_17"
    rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()[::40]]
    rng = np.random.default_rng(1)
    parts, gaps, at = [], [], 0
    for row in rows:
        utterance = read_audio(folder / row["audio_filepath"])
        gap = noise(rng.uniform(0.3, 1.5), rng.uniform(-65, -40), len(gaps))
        gaps.append((at + len(utterance), at + len(utterance) + len(gap)))
        parts += [utterance, gap]
        at += len(utterance) + len(gap)
    audio = np.concatenate(parts)
    cuts = cuts_of(audio)
    long = [gap for gap in gaps[:-1] if gap[1] - gap[0] > RATE]
    assert len(long) >= 8
    assert all(any(start - 4000 <= cut <= end + 4000 for cut in cuts) for start, end in long)
    level = np.sqrt(np.mean(np.square(audio)))
    loud = [cut for cut in cuts if np.sqrt(np.mean(np.square(audio[cut - 800 : cut + 800]))) > level / 4]
    assert len(loud) <= 1  # a forced cut may have no pause to fall on


def live_cuts(audio: np.ndarray, written: Callable[[int], int], config: EndpointConfig | None = None) -> list[int]:
    """Cuts beside a network that at each time, in samples, has written up to `written`."""
    endpointer = Endpointer(config)
    starts = range(0, len(audio), 1600)
    return [c for start in starts for c in endpointer.accept(audio[start : start + 1600], written(start + 1600))]


def test_a_pause_full_of_noise_ends_a_segment_where_the_network_has_long_written_nothing() -> None:
    audio = speech(8)  # it all sounds like speech, but the network has heard no word since the third second

    def written(now: int) -> int:
        return min(now, 3 * RATE)

    assert within(live_cuts(audio, written), 3.6, 4.6) == live_cuts(audio, written)[:1]
    assert cuts_of(audio) == []
    assert live_cuts(audio, written, EndpointConfig(blanks=False)) == []


def test_no_pause_is_cut_while_the_network_writes() -> None:
    audio = np.concatenate([speech(3), noise(5, -60)])
    quick = live_cuts(audio, lambda now: min(now, 3 * RATE))
    late = live_cuts(audio, lambda now: min(now, round(4.5 * RATE)))
    assert len(quick) == len(late) == 1
    assert within(quick, 3.0, 3.7) == quick
    assert within(late, 4.5, 5.3) == late


def test_noise_without_a_word_is_cut_as_silence_is() -> None:
    cuts = live_cuts(speech(21), lambda now: 0)
    assert len(cuts) == 4
    assert np.diff([0, *cuts]).max() <= 5.5 * RATE


@pytest.mark.parametrize(
    "wrong",
    [
        {"trailing_silence": 0.0},
        {"leading_silence": 0.1},
        {"leading_silence": 1e305},
        {"max_segment": 1e9},
        {"trailing_silence": float("nan")},
        {"vad": "webrtc"},
    ],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EndpointConfig(**wrong)
