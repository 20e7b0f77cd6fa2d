"""asr.audio: every kind of file gives the same samples however it is cut; bad ones are named."""

import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asr.audio import Resampler, audio_blocks, read_audio, to_float
from asr.errors import AudioError

FORMATS = [
    ("wav", "PCM_16", 60),
    ("wav", "PCM_U8", 25),
    ("wav", "PCM_24", 100),
    ("wav", "FLOAT", 120),
    ("wav", "ULAW", 20),
    ("flac", "PCM_16", 60),
    ("aiff", "PCM_16", 60),
    ("rf64", "PCM_16", 60),
    ("mp3", "MPEG_LAYER_III", 20),
    ("ogg", "VORBIS", 15),
    ("opus", "OPUS", 10),
]


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    """A tone of 0.4 with a slow swell, float64 (n,): it can be computed at any rate."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 + 0.1 * np.sin(2 * np.pi * 3 * t)) * np.sin(2 * np.pi * hertz * t)


def noise(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(7).normal(0, 0.1, (round(seconds * rate), channels)).clip(-1, 1)


def write(path: Path, samples: np.ndarray, rate: int = 16_000, subtype: str | None = None, **options) -> Path:
    kind = {".opus": "OGG", ".rf64": "RF64"}.get(path.suffix, path.suffix[1:].upper())
    soundfile.write(path, samples, rate, format=kind, subtype=subtype, **options)
    return path


def joined(path: Path, **options) -> np.ndarray:
    return np.concatenate(list(audio_blocks(path, **options)))


def decibels(signal: np.ndarray, reference: np.ndarray) -> float:
    return 10 * np.log10(np.sum(reference**2) / np.sum((signal - reference) ** 2))


def refusal(path: Path | str) -> str:
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


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


# What is refused.


def test_not_audio(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg
    text = tmp_path / "text.wav"
    text.write_text("Not audio at all. " * 50)
    empty = tmp_path / "empty.wav"
    empty.touch()
    cut = tmp_path / "cut.wav"
    cut.write_bytes(write(tmp_path / "a.wav", tone(0.1)).read_bytes()[:30])
    assert "not audio" in refusal(text)
    assert "empty" in refusal(empty)
    assert "damaged" in refusal(cut)
    assert "no such file" in refusal(tmp_path / "nowhere.wav")
    assert "folder" in refusal(tmp_path)
    assert "not a regular file" in refusal("/dev/null")
    assert "no samples" in refusal(write(tmp_path / "none.wav", tone(0)))
    assert "URL" in refusal("https://example.org/a.wav")
    assert "cannot be opened" in refusal("a\0b.wav")


def test_no_permission(tmp_path):
    path = write(tmp_path / "a.wav", tone(0.1))
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)  # root may read everything
    try:
        assert "no permission" in refusal(path)
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(("suffix", "subtype"), [f[:2] for f in FORMATS])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated(tmp_path, suffix, subtype, kept):
    path = write(tmp_path / f"a.{suffix}", noise(12.0), subtype=subtype)
    data = path.read_bytes()
    path.write_bytes(data[: round(kept * len(data))])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("size", [0, 0x7FFF_F000, 0x7FFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFDB])
def test_wav_of_undeclared_size_is_read_to_its_end(tmp_path, size):
    """A writer into a pipe cannot go back to fill in the size."""
    path = write(tmp_path / "a.wav", tone(1.0))
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    data[4:8] = struct.pack("<I", min(size + 36, 0xFFFF_FFFF))
    path.write_bytes(data)
    np.testing.assert_array_equal(read_audio(path), read_audio(write(tmp_path / "b.wav", tone(1.0))))


def test_wav_with_chunks_around_the_audio(tmp_path):
    path = write(tmp_path / "a.wav", tone(1.0))
    data = path.read_bytes()
    at = data.index(b"data")
    path.write_bytes(data[:at] + b"junk" + struct.pack("<I", 3) + b"abc\0" + data[at:] + b"LIST\4\0\0\0INFO")
    assert len(read_audio(path)) == 16_000
    path.write_bytes(path.read_bytes()[:-2000])
    assert "truncated" in refusal(path)
    path.write_bytes(data[: at + 4] + bytes(4) + b"LIST\4\0\0\0INFO")
    assert "no samples" in refusal(path)


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "GSM610"), ("AU", "G721_32"), ("AU", "G723_24")])
def test_codecs_that_cannot_seek(tmp_path, format, subtype):
    path = tmp_path / "a.bin"
    soundfile.write(path, tone(3.0, 8_000), 8_000, format=format, subtype=subtype)
    whole = read_audio(path, sample_rate=8_000)
    assert decibels(whole[:24_000], tone(3.0, 8_000)) > 10
    np.testing.assert_array_equal(read_audio(path, sample_rate=8_000, offset=1.0), whole[8_000:])


def test_a_tag_behind_the_audio_is_passed_over(tmp_path):
    path = write(tmp_path / "a.flac", tone(1.0))
    whole = read_audio(path)
    path.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
    np.testing.assert_array_equal(read_audio(path), whole)


def test_a_wav_of_zeros_is_refused_at_once(tmp_path):
    path = write(tmp_path / "a.wav", tone(1.0))
    path.write_bytes(path.read_bytes()[:12] + bytes(50_000_000))  # a minute, chunk by chunk
    refusal(path)


@pytest.mark.parametrize("format", ["AU", "NIST"])
def test_other_formats_are_held_to_what_they_declare(tmp_path, format):
    path = tmp_path / "a.sph"
    soundfile.write(path, noise(2.0), 16_000, format=format)
    assert len(read_audio(path)) == 32_000
    path.write_bytes(path.read_bytes()[: round(0.99 * path.stat().st_size)])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("kind", ["a.flac", "a.mp3"])
def test_a_decoder_that_fails_midway(tmp_path, kind):
    path = write(tmp_path / kind, noise(30.0))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 5000] = np.random.default_rng(0).bytes(5000)
    path.write_bytes(data)
    message = refusal(path)
    second = float(message.partition("after ")[2].partition(" s")[0])
    assert "damaged" in message and 5 <= second <= 16


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    samples = tone(12.0).astype(np.float32)
    samples[11 * 16_000] = value
    message = refusal(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    assert "NaN or infinity" in message and "10.00 s" in message


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


# ffmpeg: a stand-in shows what happens around the process, the real one that it is called rightly.

M4A = b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(500)


def stand_in(folder: Path, script: str) -> None:
    program = folder / "ffmpeg"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)


def au(samples: np.ndarray, rate: int) -> bytes:
    header = struct.pack(">4s5I", b".snd", 32, 0xFFFF_FFFF, 6, rate, samples.shape[1]) + b"name" + bytes(4)
    return header + samples.astype(">f4").tobytes()


def test_without_ffmpeg_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "a.m4a"
    path.write_bytes(M4A)
    message = refusal(path)
    assert "ffmpeg" in message and "not installed" in message


def test_ffmpeg_streams(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "a b.m4a"
    path.write_bytes(M4A)
    samples = np.stack([tone(2.5, 48_000), np.zeros(120_000)], axis=1)
    (tmp_path / "out.au").write_bytes(au(samples, 48_000))
    stand_in(tmp_path, f'cat "{tmp_path}/out.au"')
    whole = read_audio(path)
    assert decibels(whole[800:-800], tone(2.5)[800:-800] / 2) > 80
    np.testing.assert_array_equal(joined(path, block_seconds=0.3), whole)
    part = read_audio(path, offset=1.0, duration=0.5)
    np.testing.assert_allclose(part[800:-800], whole[16_800:23_200], atol=1e-6)


def test_ffmpeg_ends_with_the_generator(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "endless.webm"
    path.write_bytes(b"\x1a\x45\xdf\xa3" + bytes(100))
    (tmp_path / "head.au").write_bytes(au(np.zeros((0, 1)), 16_000))
    stand_in(tmp_path, f'echo $$ > "{tmp_path}/pid"; cat "{tmp_path}/head.au"; exec cat /dev/zero')
    blocks = audio_blocks(path, block_seconds=1.0)
    assert len(next(blocks)) == len(next(blocks)) == 16_000
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)  # it runs
    blocks.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_ffmpeg_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "a.m4a"
    path.write_bytes(M4A)
    (tmp_path / "out.au").write_bytes(au(noise(12.0), 16_000))
    stand_in(tmp_path, f'cat "{tmp_path}/out.au"; echo "[aac @ 0x1] bad packet" >&2; echo more >&2; exit 1')
    assert refusal(path).endswith("stopped after 12.00 s: ffmpeg says: bad packet")
    stand_in(tmp_path, 'echo "[in#0 @ 0x1] moov atom not found" >&2; exit 1')
    assert refusal(path) == "not audio, or damaged; ffmpeg says: moov atom not found"


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("name", ["a.m4a", "ä b.webm", "v.mp4", "a.aac"])
def test_real_ffmpeg(tmp_path, name):
    source = write(tmp_path / "source.wav", np.stack([tone(3.0, 44_100)] * 2, axis=1), 44_100)
    video = ["-f", "lavfi", "-i", "testsrc=duration=3:size=64x64"] if name == "v.mp4" else []
    coder = ["-c:a", "libopus"] if name.endswith("webm") else []
    made = ["ffmpeg", "-v", "error", *video, "-i", source, *coder, tmp_path / name]
    subprocess.run(made, check=True, capture_output=True)
    got = read_audio(tmp_path / name)
    assert len(got) == pytest.approx(48_000, abs=1_600)
    # ADTS does not tell the coder's delay: compare spectra, not samples.
    strongest = np.abs(np.fft.rfft(got[8_000:40_000])).argmax() * 16_000 / 32_000
    assert strongest == pytest.approx(440, abs=4)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    assert "damaged" in refusal(tmp_path / name)
