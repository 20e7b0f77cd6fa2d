"""Whole jobs, as a user runs them: recordings -> prepared data -> a trained model -> text."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from jobs import ray_folder
from tones import losses, tone_config, write_corpus

from asr.errors import AsrError, ConfigError
from asr.metrics import count_errors
from asr.recognizer import Recognizer
from pipelines.prepare import prepare
from pipelines.train import train

KANA = {"か": 250.0, "き": 700.0, "く": 1_600.0, "け": 3_000.0}


def kana_recordings(folder: Path, rows: int, seed: int) -> Path:
    """Recordings in which each kana is a pitch, with a manifest."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(rows):
        words = ["".join(rng.choice(list(KANA), 2)) for _ in range(rng.integers(1, 3))]
        pieces = [np.zeros(800)]
        for word in words:
            for kana in word:
                time = np.arange(4_000) / 16_000
                pieces += [0.3 * np.sin(2 * np.pi * KANA[kana] * time) * np.hanning(4_000), np.zeros(400)]
            pieces.append(np.zeros(3_000))
        audio = np.concatenate(pieces)
        soundfile.write(folder / f"録音 {i}.wav", audio + 0.002 * rng.standard_normal(len(audio)), 16_000)
        lines.append({"audio_filepath": f"録音 {i}.wav", "text": " ".join(words), "duration": len(audio) / 16_000})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return manifest


def test_kana_are_learnt_decoded_and_scored(tmp_path: Path) -> None:
    prepare([kana_recordings(tmp_path / "train", 120, 0)], tmp_path / "data", workers=0)
    manifest = kana_recordings(tmp_path / "test", 10, 1)
    config = tone_config(tmp_path / "data", epochs=20, score_epochs=10, learning_rate=5e-3, batch_seconds=10.0)
    config = dataclasses.replace(
        config,
        features=dataclasses.replace(config.features, bands=80),
        model=dataclasses.replace(config.model, hidden=32, layers=1, phone_layer=0),
        augment=dataclasses.replace(config.augment, speeds=(1.0,)),
    )
    model = train(config, tmp_path / "run", workers=0)
    (model / "lm").mkdir()
    (model / "lm" / "lm.arpa").write_text("of the model that it starts from")
    further = dataclasses.replace(config, init_from=str(model / "offline"))
    further = dataclasses.replace(further, training=dataclasses.replace(config.training, epochs=1))
    assert (train(further, tmp_path / "further", workers=0) / "lm" / "lm.arpa").read_text().startswith("of the model")
    recognizer = Recognizer.load(model, decoding="greedy")
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    errors = characters = 0
    for row in rows:
        text = recognizer.transcribe(tmp_path / "test" / row["audio_filepath"]).text
        counts = count_errors(row["text"], text)
        errors, characters = errors + counts.character_errors, characters + counts.characters
    assert errors / characters < 0.15


def test_stored_features_train_what_audio_trains(tmp_path: Path) -> None:
    """Without augmentation of the waveform, the first loss agrees but for float16 and the last hop's edge."""
    manifest = kana_recordings(tmp_path / "train", 20, 0)
    curves = []
    for store in ("audio", "features"):
        prepare([manifest], tmp_path / store, workers=0, store=store)
        config = tone_config(tmp_path / store, epochs=1)
        config = dataclasses.replace(
            config,
            features=dataclasses.replace(config.features, bands=80),
            augment=dataclasses.replace(config.augment, speeds=(1.0,), gain_db=0.0, time_masks=0, band_masks=0),
        )
        train(config, tmp_path / f"run-{store}", workers=0)
        curves.append(losses(tmp_path / f"run-{store}"))
    assert curves[0].keys() == curves[1].keys()
    assert abs(curves[0][1] - curves[1][1]) < 0.02 * curves[0][1]
    augmented = dataclasses.replace(config, augment=dataclasses.replace(config.augment, gain_db=6.0))
    with pytest.raises(ConfigError, match="holds features"):
        train(augmented, tmp_path / "run-refused", workers=0)


def test_where_int8_would_say_something_else_the_model_has_fp32_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asr.runtime.export._SHIFT", {"fp32": 0.0, "int8": 0.0})
    config = tone_config(write_corpus(tmp_path / "data", rows=40), epochs=1)
    model = train(config, tmp_path / "run", workers=0)
    (model / "offline" / "model.int8.onnx").touch()  # as if of a training before
    train(config, tmp_path / "run", workers=0)
    assert capsys.readouterr().err.count("model.int8.onnx: not written") == 2
    assert (model / "card.json").is_file()
    assert {path.name for path in (model / "offline").glob("*.onnx")} == {"model.onnx"}
    Recognizer.load(model, decoding="greedy").transcribe(np.zeros(8000, np.float32), 16_000)


def test_a_run_that_cannot_be_written_is_told_before_ray_starts(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "data", rows=3))
    (tmp_path / "file").touch()
    with pytest.raises(AsrError, match=r"file/run: cannot be written \(Not a directory\)"):
        train(config, tmp_path / "file" / "run", workers=2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ray_workers_train_what_one_process_trains(tmp_path: Path) -> None:
    """The same global batches and masks: losses agree to 1 %, and the model folder is complete."""
    prepare([kana_recordings(tmp_path / "train", 30, 0)], tmp_path / "data", workers=0)
    config = tone_config(tmp_path / "data", epochs=2)
    config = dataclasses.replace(config, features=dataclasses.replace(config.features, bands=80))
    train(config, tmp_path / "one", workers=0)
    with ray_folder():
        model = train(config, tmp_path / "two", workers=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(abs(one[s] - two[s]) <= 0.01 * one[s] for s in one), (one, two)
    assert {p.name for p in (model / "offline").iterdir()} >= {
        "config.toml", "tokens.txt", "weights.safetensors", "model.onnx", "model.int8.onnx",
    }  # fmt: skip
