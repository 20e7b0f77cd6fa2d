"""`asr evaluate --conditions`: each condition does what its name says, and figures are repeatable."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli import main
from pipelines.conditions import CONDITIONS, NOISE_DB, QUIET_DB, noisy, quiet, room, telephone

SAMPLES = Path(__file__).parents[1] / "scripts" / "samples"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, arguments)])
    return int(ended.value.code or 0)


def tones(*hertz: float, samples: int = 16_000) -> np.ndarray:
    time = np.arange(samples) / 16_000
    return np.sum([0.1 * np.sin(2 * np.pi * f * time) for f in hertz], axis=0).astype(np.float32)


def decibels(power: float | np.floating) -> float:
    return 10 * float(np.log10(power))


def share_above(samples: np.ndarray, hertz: float) -> float:
    power = np.abs(np.fft.rfft(samples)) ** 2
    return float(power[round(hertz / 16_000 * len(samples)) :].sum() / power.sum())


def test_quiet_and_noisy_keep_to_their_decibels() -> None:
    speech, rng = tones(300, 900), np.random.default_rng(0)
    fainter = np.mean(quiet(speech, rng) ** 2) / np.mean(speech**2)
    assert decibels(fainter) == pytest.approx(-QUIET_DB, abs=0.01)
    noise = noisy(speech, rng) - speech
    assert decibels(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(NOISE_DB, abs=0.01)
    assert share_above(noise, 4_000) < 0.2, "pink: as much in each octave"


def test_a_telephone_has_nothing_above_4_khz_and_a_room_goes_on_sounding() -> None:
    rng = np.random.default_rng(0)
    assert share_above(tones(1_000, 6_000), 4_500) > 0.4
    assert share_above(telephone(tones(1_000, 6_000), rng), 4_500) < 0.01
    burst = np.concatenate([tones(500, samples=4_000), np.zeros(4_000, np.float32)])
    assert np.mean(room(burst, rng)[4_400:5_000] ** 2) > 1e-7


@given(st.integers(1, 3_000), st.integers(0, 9))
def test_every_condition_keeps_the_length_and_stays_finite(length: int, seed: int) -> None:
    samples = np.random.default_rng(seed).uniform(-1, 1, length).astype(np.float32)
    for change in filter(None, CONDITIONS.values()):
        changed = change(samples, np.random.default_rng(seed))
        assert changed.shape == samples.shape and np.isfinite(changed).all()
    for change in filter(None, CONDITIONS.values()):
        assert np.isfinite(change(np.zeros(length, np.float32), np.random.default_rng(seed))).all()


def test_the_command_scores_each_condition_the_same_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (SAMPLES / "samples.jsonl").read_text().splitlines()[:3]
    manifest = tmp_path / "few.jsonl"
    made = [{**json.loads(r), "audio_filepath": str(SAMPLES / json.loads(r)["audio_filepath"])} for r in rows]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in made))
    figures = []
    for name in ("first", "second"):
        out = tmp_path / f"{name}.json"
        assert run(manifest, "--conditions", "--json", out) == 0
        figures.append({k: v["total"]["wer"] for k, v in json.loads(out.read_text()).items()})
    assert figures[0] == figures[1] and list(figures[0]) == list(CONDITIONS)
    assert "telephone" in capsys.readouterr().out
    plain = tmp_path / "plain.json"
    assert run(manifest, "--json", plain) == 0
    assert json.loads(plain.read_text())["total"]["wer"] == figures[0]["as recorded"]


def test_one_measurement_at_a_time(tmp_path: Path) -> None:
    assert run(tmp_path / "m.jsonl", "--conditions", "--times") == 2
    for others in (["--two-pass"], ["--join", "6"], ["--report", tmp_path / "page.html"]):
        assert run(tmp_path / "m.jsonl", "--conditions", *others) == 2
    assert run(tmp_path / "m.jsonl", "--conditions", "--calibrate", "--model", "m") == 2
