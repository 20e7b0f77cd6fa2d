"""asr.audio: every kind of file gives the same samples however it is cut, at any rate."""

import os
import subprocess
import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import FORMATS, decibels, joined, noise, refusal, tone, write

from asr.audio import Resampler, audio_blocks, read_audio, to_float
from asr.errors import AudioError

# What can be read.


def test_16_bit_wav_comes_back_exactly(tmp_path):
    samples = (noise(1.5)[:, 0] * 32767).astype(np.int16)
    got = read_audio(write(tmp_path / "a.wav", samples))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got * 32768, samples)


@pytest.mark.parametrize(("suffix", "subtype", "least"), FORMATS)
def test_formats(tmp_path, suffix, subtype, least):
    path = write(tmp_path / f"a.{suffix}", tone(2.0), subtype=subtype)
    got = read_audio(path)
    assert len(got) == 32_000
    assert decibels(got[1600:-1600], tone(2.0)[1600:-1600]) > least


@pytest.mark.parametrize("rate", [8_000, 11_025, 12_345, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_rates(tmp_path, rate):
    """A tone read at 16 kHz is the tone computed at 16 kHz."""
    path = write(tmp_path / "a.wav", tone(1.0, rate), rate, "FLOAT")
    got = read_audio(path)
    assert abs(len(got) - 16_000) <= 1
    assert decibels(got[800:15_200], tone(1.0)[800:15_200]) > 80


@pytest.mark.parametrize("rate", [4_000, 7_999, 192_001, 384_000])
def test_rates_refused(tmp_path, rate):
    assert f"{rate} Hz" in refusal(write(tmp_path / "a.wav", tone(0.1, rate), rate))
    with pytest.raises(AudioError, match=f"{rate} Hz"):
        Resampler(rate, 16_000)


def test_another_rate_on_request(tmp_path):
    got = read_audio(write(tmp_path / "a.wav", tone(1.0), subtype="FLOAT"), sample_rate=8_000)
    assert decibels(got[400:-400], tone(1.0, 8_000)[400:-400]) > 80


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(tmp_path, channels):
    samples = noise(0.5, channels=channels)
    got = read_audio(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    np.testing.assert_allclose(got, samples.mean(axis=1), atol=1e-7)


def test_mixing_down_is_said_once_and_nothing_heavy_is_imported(tmp_path):
    paths = [write(tmp_path / f"{i}.wav", noise(0.1, channels=2)) for i in range(2)]
    code = (
        "import sys, asr.audio\n"
        "assert not {'torch', 'soundfile', 'soxr'} & set(sys.modules)\n"
        "for path in sys.argv[1:]: asr.audio.read_audio(path)\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("mixed down") == 1 and str(paths[0]) in run.stderr


NAMES = ["with space.wav", "日本語 ü.flac", "-dash.wav", "a:b.wav", "odd.raw", "none"]


@pytest.mark.parametrize("name", NAMES)
def test_names(tmp_path, monkeypatch, name):
    soundfile.write(tmp_path / "plain", tone(0.2), 16_000, format="WAV")
    (tmp_path / "plain").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read_audio(name), read_audio(tmp_path / name))


def test_silence_is_audio(tmp_path):
    got = read_audio(write(tmp_path / "a.wav", np.zeros(8_000)))
    assert got.shape == (8_000,) and not got.any()


@pytest.mark.parametrize("options", [{}, {"bitrate_mode": "VARIABLE"}])
def test_mp3_in_blocks_is_mp3_at_once(tmp_path, options):
    """soundfile's own block reading seeks, and clicks in MP3 of variable bit rate."""
    path = write(tmp_path / "a.mp3", noise(8.0), **options)
    whole, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(joined(path, block_seconds=0.37), whole, atol=1e-6)


# One body: blocks, whole files and parts are the same samples.


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block_seconds=st.floats(0.001, 3.0),
    rate=st.sampled_from([8_000, 16_000, 44_100]),
    kind=st.sampled_from(["a.wav", "a.flac", "a.mp3", "a.ogg"]),
)
def test_blocks_joined_are_the_file(tmp_path, block_seconds, rate, kind):
    path = tmp_path / f"{rate}{kind}"
    if not path.exists():
        write(path, tone(1.3, rate), rate)
    np.testing.assert_array_equal(joined(path, block_seconds=block_seconds), read_audio(path))


@pytest.mark.parametrize("kind", ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.opus"])
def test_parts_are_slices_of_the_whole(tmp_path, kind):
    # A tone: MP3 saves up bits over many frames for it, so a decoder that merely seeks gives silence.
    path = write(tmp_path / kind, tone(9.0), subtype="OPUS" if kind == "a.opus" else None)
    whole = read_audio(path)
    for offset, duration in [(0.0, 2.5), (0.5, 1.0), (1.25, 0.01), (4.321, 3.0), (7.5, None), (8.5, 99.0)]:
        start = round(offset * 16_000)
        stop = None if duration is None else start + round(duration * 16_000)
        got = read_audio(path, offset=offset, duration=duration)
        np.testing.assert_allclose(got, whole[start:stop], atol=1e-5)


def test_parts_that_cannot_be(tmp_path):
    path = write(tmp_path / "a.wav", tone(1.0))
    for offset, duration in [(-1.0, None), (np.nan, None), (np.inf, 1.0), (0.0, 0.0), (0.0, np.nan)]:
        with pytest.raises(AudioError, match=r"a\.wav"):
            read_audio(path, offset=offset, duration=duration)
    with pytest.raises(AudioError, match="ends before 2 s"):
        read_audio(path, offset=2.0)


RATES = [(8_000, 16_000), (44_100, 16_000), (48_000, 16_000), (16_000, 22_050), (16_000, 16_000)]


@settings(max_examples=60, deadline=None)
@given(
    rates=st.sampled_from(RATES),
    cuts=st.lists(st.integers(0, 5_000), max_size=12),
)
def test_resampling_in_blocks_is_resampling_at_once(rates, cuts):
    samples = noise(0.3125)[:, 0].astype(np.float32)
    resampler = Resampler(*rates)
    edges = [0, *sorted(cuts), len(samples)]
    got = [resampler.process(samples[start:stop]) for start, stop in pairwise(edges)]
    got.append(resampler.finish())
    assert all(block.dtype == np.float32 for block in got)
    np.testing.assert_array_equal(np.concatenate(got), soxr.resample(samples, *rates).clip(-1, 1))


def test_long_files_take_constant_memory(tmp_path):
    path = write(tmp_path / "a.wav", np.tile(tone(1.0), 300))
    read_audio(path, duration=1.0)  # imports
    tracemalloc.start()
    assert sum(len(block) for block in audio_blocks(path, sample_rate=8_000, block_seconds=1.0)) == 2_400_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000, f"{peak} bytes for 9.6 MB of samples"


def test_closing_the_blocks_closes_the_file(tmp_path):
    path = write(tmp_path / "a.wav", tone(1.0))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("there is no /proc to count open files in")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        blocks = audio_blocks(path, block_seconds=0.1)
        next(blocks)
        blocks.close()
    refusal(write(tmp_path / "empty.wav", tone(0)))
    assert len(os.listdir("/proc/self/fd")) == before


# Samples.


def test_to_float():
    got = to_float(np.array([[-32768, -32768], [0, 16384], [32767, 32767]], np.int16))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array([-1, 0.25, 32767 / 32768], np.float32))
    np.testing.assert_array_equal(to_float(np.array([0.5, -1.5, 1.5])), np.array([0.5, -1, 1], np.float32))
    assert to_float(np.zeros(0, np.float32)).shape == (0,)
    assert to_float(np.zeros((0, 2), np.int16)).shape == (0,)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.zeros(4, np.int32), "int32"),
        (np.zeros(4, np.uint8), "uint8"),
        (np.zeros(4, np.complex64), "complex64"),
        (np.array([np.nan], np.float32), "NaN"),
        (np.array([1e300]), "1e\\+300"),
        (np.array([12_000.0, -3.0]), "12000"),
        (np.zeros((1, 16_000), np.float32), "shape \\(1, 16000\\)"),
        (np.zeros((2, 2, 2), np.float32), "shape"),
        (np.zeros((4, 0), np.float32), "shape"),
        (np.float32(0), "shape"),
    ],
)
def test_to_float_refuses(samples, said):
    with pytest.raises(AudioError, match=said):
        to_float(samples)
