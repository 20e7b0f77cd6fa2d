"""asr.audio_file: what is no audio, damaged, or for ffmpeg alone, is named or read."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import FORMATS, decibels, joined, noise, refusal, tone, unprivileged, write

from asr.audio import audio_blocks, read_audio

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
    with unprivileged():
        assert "no permission" in refusal(path)


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


@pytest.mark.parametrize(
    ("format", "endian", "subtype"),
    [
        ("AU", "FILE", "PCM_16"),
        ("AU", "LITTLE", "PCM_16"),
        ("NIST", "FILE", "PCM_16"),
        ("WAV", "BIG", "PCM_16"),  # RIFX
        ("W64", "FILE", "PCM_16"),
        ("W64", "FILE", "FLOAT"),  # with a chunk before the audio
    ],
)
def test_other_formats_are_held_to_what_they_declare(tmp_path, format, endian, subtype):
    path = tmp_path / "a.sph"
    soundfile.write(path, noise(2.0), 16_000, format=format, endian=endian, subtype=subtype)
    assert len(read_audio(path)) == 32_000
    path.write_bytes(path.read_bytes()[: round(0.99 * path.stat().st_size)])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize(("chunk", "size"), [(b"data", (1 << 63) - 1), (b"fact", (1 << 63) - 1), (b"fact", 0)])
def test_a_w64_whose_sizes_say_nothing_is_read_to_its_end(tmp_path, chunk, size):
    path = write(tmp_path / "a.w64", tone(1.0), subtype="FLOAT")
    data = bytearray(path.read_bytes())
    at = data.index(chunk) + 16
    data[at : at + 8] = struct.pack("<Q", size)
    path.write_bytes(data)
    assert len(read_audio(path)) == 16_000


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
