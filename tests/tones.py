"""Corpora of tones to train on in seconds: each word is a pitch."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from asr.config import AugmentConfig, DataConfig, FeatureConfig, ModelConfig, TrainConfig, TrainingConfig
from asr.training.shards import write_shard

WORDS = {"low": 200.0, "mid": 800.0, "high": 2_400.0}


def write_corpus(folder: Path, rows: int = 60, seed: int = 0, extra: list[dict] | None = None) -> Path:
    """A prepared folder of tones: each word is a pitch, each row one to three words."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    data = []
    for i in range(rows):
        words = rng.choice(list(WORDS), rng.integers(1, 4))
        time = np.arange(6_400) / 16_000
        tones = [np.sin(2 * np.pi * WORDS[w] * time) * np.hanning(6_400) for w in words]
        audio = 0.3 * np.concatenate(tones) + 0.003 * rng.standard_normal(6_400 * len(words))
        data.append(row(f"r{i}", " ".join(words), audio))
    data += extra or []
    write_shard(folder / "shard-00000.arrow", data)
    shard = {"file": "shard-00000.arrow", "utterances": len(data), "seconds": 1.0}
    info = {
        "version": 1, "sample_rate": 16_000, "store": "audio", "shards": [shard], "utterances": len(data),
        "seconds": 1.0, "skipped": 0, "characters": {}, "features": dataclasses.asdict(FeatureConfig(bands=20)),
        "frames": 100, "mean": [-9.0] * 20, "variance": [9.0] * 20,
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def row(name: str, text: str, audio: np.ndarray, phones: str | None = None) -> dict:
    samples = (audio * 32_767).astype("<i2")
    return {
        "id": name, "audio": samples.tobytes(), "n_samples": len(samples), "features": None, "n_frames": None,
        "text": text, "phones": phones or " ".join(text.replace(" ", "")).upper(), "speaker": "s", "source": "tones",
    }  # fmt: skip


def tone_config(folder: Path, *, bidirectional: bool = True, epochs: int = 2, **training: object) -> TrainConfig:
    settings = {"batch_seconds": 20.0, "checkpoint_steps": 2, "warmup_steps": 5, "precision": "fp32", **training}
    return TrainConfig(
        model=ModelConfig(
            bidirectional=bidirectional, channels=(16, 16), hidden=16, layers=2, dropout=0.0, phone_layer=1
        ),
        features=FeatureConfig(bands=20),
        data=DataConfig(train=(str(folder),), dev=(str(folder),), dev_minutes=10.0),
        augment=AugmentConfig(band_mask_bands=2, time_mask_frames=4),
        training=TrainingConfig(epochs=epochs, **settings),  # type: ignore[arg-type]
    )


def log_rows(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [r for r in rows if r["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in log_rows(run, "step")}


def changed(config: TrainConfig, section: str, **values: object) -> TrainConfig:
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})
