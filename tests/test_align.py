"""Forced alignment from a flat start, and the frame-wise targets that training takes from it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tones import changed, row, tone_config, write_corpus

from asr.config import FeatureConfig
from asr.errors import ConfigError
from asr.lexicon import phones_of
from asr.models import load_network
from asr.training.align import SILENCE, align
from asr.training.data import EDGE_SAMPLES, UNKNOWN, Corpus, Loader, Plan, Sampler
from asr.training.device import DeviceLoader
from asr.training.loop import run_training
from asr.training.shards import STATES, ShardDataset, write_alignment, write_shard

WORDS = ("see", "low", "may", "new", "key", "toe")
PITCH = {p: 180.0 * 1.28**i for i, p in enumerate(sorted({p for w in WORDS for p in phones_of(w).split()}))}


def speak(words: list[str], rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Each phone a pitch of its own and of random length; pauses between some words: samples, phone of each 10 ms."""
    pieces, phones = [], []

    def add(phone: str, frames: int) -> None:
        time = np.arange(frames * 160) / 16_000
        pitch = PITCH.get(phone, 0.0)
        pieces.append(0.2 * np.sin(2 * np.pi * pitch * time) + 0.1 * np.sin(6.3 * np.pi * pitch * time))
        phones.extend([phone] * frames)

    add(SILENCE, int(rng.integers(10, 30)))
    for word in words:
        for phone in phones_of(word).split():
            add(phone, int(rng.integers(6, 20)))
        if rng.random() < 0.5:
            add(SILENCE, int(rng.integers(8, 30)))
    add(SILENCE, int(rng.integers(10, 30)))
    audio = np.concatenate(pieces)
    return audio + 0.002 * rng.standard_normal(len(audio)), phones


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A prepared and aligned folder, and what its phones truly are."""
    folder = tmp_path_factory.mktemp("aligned")
    rng = np.random.default_rng(3)
    rows, truth = [], []
    for i in range(80):
        words = rng.choice(WORDS, rng.integers(1, 5)).tolist()
        audio, phones = speak(words, rng)
        text = " ".join(words)
        rows.append(row(f"r{i}", text, audio, phones_of(text)))
        truth.append(phones)
    rows.append(row("short", "see low may new key toe", np.zeros(1600), phones_of("see low")))
    rows.append(row("empty", "", np.zeros(1600), ""))
    write_shard(folder / "shard-00000.arrow", rows)
    info = {
        "version": 1, "sample_rate": 16_000, "store": "audio", "utterances": len(rows), "seconds": 1.0, "skipped": 0,
        "shards": [{"file": "shard-00000.arrow", "utterances": len(rows), "seconds": 1.0}], "characters": {},
        "features": dataclasses.asdict(FeatureConfig(bands=20)), "frames": 100, "mean": [-9.0] * 20,
        "variance": [9.0] * 20,
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(info))
    assert align(folder) == pytest.approx(80 / 82)
    return folder, truth


def test_what_is_not_english_is_refused(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=0, extra=[row("a", "übermorgen fährt die straßenbahn", np.zeros(9))])
    with pytest.raises(ConfigError, match=r"has \d+% of its words, so it is hardly English: prepare it without"):
        align(folder)


def test_the_phones_are_found_where_they_are(aligned: tuple[Path, list[list[str]]]) -> None:
    folder, truth = aligned
    dataset = ShardDataset(folder)
    right = total = 0
    for i, phones in enumerate(truth):
        found = [dataset.aligned_phones[s // STATES] for s in dataset.alignment(i)]
        assert len(found) == len(phones)
        right += sum(a == b for a, b in zip(found, phones, strict=True))
        total += len(phones)
    assert right / total > 0.85  # windows of 25 ms blur every border


def test_states_pass_from_left_to_right(aligned: tuple[Path, list[list[str]]]) -> None:
    dataset = ShardDataset(aligned[0])
    for i in range(len(aligned[1])):
        labels = dataset.alignment(i).astype(int)
        steps = labels[1:][np.diff(labels) != 0] % STATES, labels[:-1][np.diff(labels) != 0] % STATES
        assert ((steps[0] - steps[1]) % STATES == 1).all()  # the next state of a phone, or the first of another


def test_rows_without_room_or_text_have_no_labels(aligned: tuple[Path, list[list[str]]]) -> None:
    dataset = ShardDataset(aligned[0])
    assert len(dataset.alignment(80)) == len(dataset.alignment(81)) == 0


@pytest.mark.parametrize(("speed", "hop_ms"), [(0.9, 10), (1.0, 10), (1.1, 10), (1.0, 8), (0.9, 8)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_targets_follow_the_changed_audio_and_the_frames(
    aligned: tuple[Path, list[list[str]]], speed: float, hop_ms: int, bidirectional: bool
) -> None:
    folder, truth = aligned
    config = changed(tone_config(folder, bidirectional=bidirectional), "features", hop_ms=hop_ms)
    corpus = Corpus([str(folder)])
    loader = Loader(corpus, config, config.features.hop)
    samples = int(corpus.n_samples[0] / speed) + 2 * EDGE_SAMPLES
    plan = Plan((0,), (speed,), -(-samples // 5120) * 5120)
    states = loader.batch(plan, 0).states[0].numpy()
    names = sorted({SILENCE, *PITCH})
    frame = 4 * hop_ms / 1000
    delay = 0.0 if bidirectional else 2 * frame
    agree = []
    for t, state in enumerate(states[states != UNKNOWN]):
        time = (t * frame - delay - 0.25) * speed
        want = truth[0][int(time * 100)] if 0 <= time * 100 < len(truth[0]) else SILENCE
        agree.append(names[state // STATES] == want)
    assert np.mean(agree) > 0.75
    on_device = DeviceLoader(corpus, config, config.features.hop, torch.device("cpu"))
    assert torch.equal(on_device.batch(plan, 0).states, loader.batch(plan, 0).states)


def test_before_and_after_an_utterance_there_is_silence_also_where_it_begins_with_speech(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=1)
    frames = int(ShardDataset(folder).n_samples[0]) // 160
    write_alignment(folder, ["sil", "aa"], [np.full(frames, STATES + 1, np.uint8)])
    config = changed(tone_config(folder), "augment", lead_seconds=0.0)
    corpus = Corpus([str(folder)])
    plan = Plan((0,), (1.0,), -(-(160 * frames + 2 * EDGE_SAMPLES) // 5120) * 5120)
    states = Loader(corpus, config, config.features.hop).batch(plan, 0).states[0].numpy()
    states = states[states != UNKNOWN]
    silence, speech = STATES, 1  # among sorted names
    spoken = np.flatnonzero(states == speech)
    assert set(states[: spoken[0]]) == set(states[spoken[-1] + 1 :]) == {silence}
    assert len(spoken) == pytest.approx(frames / 4, abs=1)


def test_every_frame_of_an_utterance_has_a_state_and_no_frame_of_padding(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d")
    lengths = ShardDataset(folder).n_samples // 160
    write_alignment(folder, ["sil", "aa"], [np.full(n, STATES + 1, np.uint8) for n in lengths])
    config = changed(tone_config(folder), "augment", silence_probability=0.3, lead_seconds=0.5)
    corpus = Corpus([str(folder)])
    loader = Loader(corpus, config, config.features.hop)
    on_device = DeviceLoader(corpus, config, config.features.hop, torch.device("cpu"))
    for plan in Sampler(corpus, config, 640).epoch(0):
        batch = loader.batch(plan, 0)
        inside = torch.arange(batch.states.shape[1]) < (batch.lengths // loader.stride)[:, None]
        assert torch.equal(batch.states != UNKNOWN, inside)
        assert batch.state_count == int(inside.sum())
        silent = batch.token_lengths == 0
        assert bool((batch.states[silent] == corpus.silence)[inside[silent]].all())
        assert bool((batch.states[~silent] == 1).any(1).all())
        assert torch.equal(on_device.batch(plan, 0).states, batch.states)


def test_rows_without_alignment_are_not_taught(aligned: tuple[Path, list[list[str]]]) -> None:
    config = tone_config(aligned[0])
    loader = Loader(Corpus([str(aligned[0])]), config, config.features.hop)
    assert (loader.batch(Plan((80,), (1.0,), 10_240), 0).states == UNKNOWN).all()


def test_the_network_learns_them_and_is_kept_with_them(aligned: tuple[Path, list[list[str]]], tmp_path: Path) -> None:
    config = tone_config(aligned[0], epochs=3, alignment_weight=1.0, phone_weight=0.5, learning_rate=1e-2)
    config = dataclasses.replace(config, features=FeatureConfig(bands=20))
    network = load_network(run_training(config, tmp_path / "run"))
    assert network.state_output is not None
    corpus = Corpus([str(aligned[0])])
    loader = Loader(corpus, config, config.features.hop, augment=False)
    right = total = 0
    with torch.no_grad():
        for index in range(20):
            samples = -(-(int(corpus.n_samples[index]) + 2 * EDGE_SAMPLES) // 5120) * 5120
            batch = loader.batch(Plan((index,), (1.0,), samples), 0)
            features, frames = network.normalised_features(batch.audio, batch.lengths)
            states = network.read_features(features, frames)[2]["states"].argmax(-1)[0]
            wanted = batch.states[0, : len(states)]
            right += int((states // STATES == wanted // STATES).sum())
            total += len(states)
    assert right / total > 0.5  # chance is silence alone, a quarter

    again = dataclasses.replace(
        tone_config(aligned[0], epochs=1), init_from=str(tmp_path / "run" / "model" / "offline")
    )
    assert load_network(run_training(again, tmp_path / "again")).state_output is None


def test_an_alignment_of_other_rows_is_refused(tmp_path: Path) -> None:
    """Also where there are as many; one of before it was kept whose it is, where the lengths differ."""
    folder = write_corpus(tmp_path / "d", rows=8)
    align(folder)
    file = folder / "alignment.npz"
    with np.load(file) as kept:
        before = {name: kept[name] for name in ("labels", "ends", "phones")}
    (folder / "shard-00000.arrow").unlink()
    other = write_corpus(tmp_path / "other", rows=8, seed=1)
    (other / "shard-00000.arrow").rename(folder / "shard-00000.arrow")
    with pytest.raises(ConfigError, match=r"alignment.npz: of other data; run `asr align .*d` again"):
        ShardDataset(folder)
    np.savez(file, **before)
    with pytest.raises(ConfigError, match="of other data"):
        ShardDataset(folder)
    align(folder)
    with np.load(file) as kept:
        np.savez(file, **{name: kept[name] for name in before})
    assert len(ShardDataset(folder).alignment(0))


def test_a_run_refuses_to_go_on_with_another_alignment(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=6), epochs=1, alignment_weight=1.0)
    align(tmp_path / "d")
    run_training(config, tmp_path / "run")
    run_training(config, tmp_path / "run")
    dataset = ShardDataset(tmp_path / "d")
    labels = [dataset.alignment(i)[::-1] for i in range(6)]
    write_alignment(tmp_path / "d", dataset.aligned_phones, labels)
    with pytest.raises(ConfigError, match=r"alignment.npz: was aligned anew since .*run was started"):
        run_training(config, tmp_path / "run")
    known = json.loads((tmp_path / "run" / "data.json").read_text())
    (tmp_path / "run" / "data.json").write_text(json.dumps({str(tmp_path / "d"): known[str(tmp_path / "d")]}))
    run_training(config, tmp_path / "run")  # started before it was kept


def test_an_utterance_too_long_for_the_memory_is_left_out(tmp_path: Path) -> None:
    long = row("long", "low " * 700, np.zeros(16_000 * 600))
    folder = write_corpus(tmp_path / "d", rows=3, extra=[long])
    assert align(folder) == 3 / 4
    assert len(ShardDataset(folder).alignment(3)) == 0


def test_features_alone_cannot_be_aligned(aligned: tuple[Path, list[list[str]]], tmp_path: Path) -> None:
    info = json.loads((aligned[0] / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(info | {"store": "features", "shards": []}))
    with pytest.raises(ConfigError, match="needs audio"):
        align(tmp_path)


def test_training_on_phone_states_asks_for_them(aligned: tuple[Path, list[list[str]]], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("dataset.json", "shard-00000.arrow"):
        (bare / name).write_bytes((aligned[0] / name).read_bytes())
    config = tone_config(bare, alignment_weight=1.0)
    with pytest.raises(ConfigError, match="asr align"):
        run_training(config, tmp_path / "run")
    without = dataclasses.replace(config.model, phone_layer=0)
    with pytest.raises(ConfigError, match="phone_layer is 0"):
        run_training(dataclasses.replace(config, model=without), tmp_path / "run")
