"""pipelines.decoder: what is decoded elsewhere is what is decoded here, and a crash costs one recording."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.audio import read_audio
from asr.errors import AudioError
from pipelines.decoder import Part, decode_all, decode_here, stop_decoder

# A stand-in for a decoder's bug: it reads every recording as ever, and some names kill its process.
CRASHING = """
import asr.audio, os, signal
from pathlib import Path
read = asr.audio.read_audio
def read_audio(path, **part):
    if "crash" in str(path):
        once = Path(str(path) + ".once")
        if not once.exists() or once.read_text() == "again":
            once.exists() or once.write_text("")
            os.kill(os.getpid(), signal.SIGSEGV)
    return read(path, **part)
asr.audio.read_audio = read_audio
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    stop_decoder()
    yield
    stop_decoder()


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for recordings: what has `crash` in its name crashes the decoder."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path


def record(path: Path, seed: int) -> Part:
    samples = np.random.default_rng(seed).integers(-9000, 9000, 8000 + 1000 * seed).astype(np.int16)
    soundfile.write(path, samples, 16_000)
    return Part(str(path))


def test_parts_come_in_order_and_are_what_is_read_here(tmp_path: Path) -> None:
    parts = [record(tmp_path / f"{i}.wav", i) for i in range(5)]
    parts += [Part(parts[2].path, 0.1, 0.2), Part(str(tmp_path / "none.wav")), parts[0]]
    elsewhere, here = list(decode_all(parts)), list(decode_here(parts))
    assert len(elsewhere) == len(parts)
    for part, ours, theirs in zip(parts, elsewhere, here, strict=True):
        if isinstance(theirs, AudioError):
            assert str(ours) == str(theirs) == f"{part.path}: no such file"
        else:
            assert isinstance(ours, np.ndarray)
            np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(ours, read_audio(part.path, offset=part.offset, duration=part.duration))


def test_who_stops_listening_gets_the_next_answer_right(tmp_path: Path) -> None:
    parts = [record(tmp_path / f"{i}.wav", i) for i in range(3)]
    for samples in decode_all(parts):
        assert isinstance(samples, np.ndarray)
        break
    (last,) = decode_all(parts[2:])
    assert isinstance(last, np.ndarray) and len(last) == 10_000


def test_a_crash_costs_one_recording(crashing: Path) -> None:
    parts = [record(crashing / name, i) for i, name in enumerate(("a.wav", "crash.wav", "b.wav"))]
    (crashing / "crash.wav.once").write_text("again")
    first, crashed, last = decode_all(parts)
    assert isinstance(first, np.ndarray) and len(first) == 8000
    assert isinstance(crashed, AudioError)
    assert str(crashed) == f"{parts[1].path}: the decoder crashed (SIGSEGV), 2 times"
    assert isinstance(last, np.ndarray) and len(last) == 10_000


def test_a_single_crash_costs_nothing(crashing: Path) -> None:
    parts = [record(crashing / name, i) for i, name in enumerate(("a.wav", "crash.wav", "b.wav"))]
    assert [len(samples) for samples in decode_all(parts) if isinstance(samples, np.ndarray)] == [8000, 9000, 10_000]
    assert (crashing / "crash.wav.once").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_the_process_ends_when_it_is_stopped(tmp_path: Path) -> None:
    before = _children()
    list(decode_all([record(tmp_path / "a.wav", 1)]))
    started = _children() - before
    assert len(started) == 1
    stop_decoder()
    assert not started & _children()


def _children() -> set[int]:
    """The processes that this one started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
        except OSError:
            continue
    return found
