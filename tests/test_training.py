"""Training: the data's order, what is left out, exact resumption, equal curves for one and two workers."""

import dataclasses
import datetime
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

import asr.training.step
from asr.config import AugmentConfig, DataConfig, FeatureConfig, ModelConfig, TrainConfig, TrainingConfig, to_toml
from asr.errors import AsrError, ConfigError
from asr.models import Network, load_network
from asr.nn import LookAhead
from asr.runtime.folder import shipped_model
from asr.text import Tokenizer
from asr.training.checkpoint import average_weights
from asr.training.data import Batch, Corpus, Loader, Sampler, frames_needed
from asr.training.dry_run import dry_run
from asr.training.loop import Trainer, run_training
from asr.training.ranks import RankError, Ranks, Stragglers
from asr.training.shards import ShardDataset, write_shard
from asr.training.step import Losses, ctc, divergence, learning_rate

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


def test_shards_give_back_what_was_written(tmp_path: Path) -> None:
    dataset = ShardDataset(write_corpus(tmp_path / "d", rows=3))
    assert len(dataset) == 3
    assert len(dataset.audio(1)) == dataset.n_samples[1]
    assert set(" ".join(dataset.texts).split()) <= set(WORDS)
    with pytest.raises(ConfigError, match="asr prepare"):
        ShardDataset(tmp_path / "nowhere")


def test_every_usable_utterance_is_in_an_epoch_once(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"))
    sampler = Sampler(Corpus(config.data.train), config, 640)
    first, again, second = sampler.epoch(0), sampler.epoch(0), sampler.epoch(1)
    assert first == again
    assert first != second
    assert sorted(r for plan in first for r in plan.rows) == list(range(60))
    assert all(plan.samples * len(plan.rows) <= 1.3 * 20 * 16_000 for plan in first)


def test_what_cannot_be_learnt_is_left_out_and_counted(tmp_path: Path) -> None:
    audio = np.zeros(8_000)
    dense = row("dense", "high " * 12 + "high", audio)
    long = row("long", "low", np.zeros(16_000 * 21))
    config = tone_config(write_corpus(tmp_path / "d", rows=5, extra=[dense, long]))
    config = changed(config, "data", dev=config.data.train)
    empty = row("empty", "", audio)
    folder = write_corpus(tmp_path / "e", rows=0, extra=[empty, row("new", "höhe", audio)])
    low = Corpus([*config.data.train, str(folder)], Tokenizer.characters(WORDS))
    sampler = Sampler(low, config, 640)
    assert (sampler.too_dense, sampler.too_long, sampler.empty, low.unspelled) == (1, 1, 1, ["new"])
    assert len(sampler.usable) == 5
    with pytest.raises(ConfigError, match="0 too long, 0 with more tokens than frames, 1 without text, 1 not to be"):
        Sampler(Corpus([str(folder)], low.tokenizer), config, 640)
    with pytest.raises(ConfigError, match=r"data.dev: none of its 1 texts can be spelled in the letters of data.train"):
        other = write_corpus(tmp_path / "f", rows=0, extra=[row("new", "höhe", audio)])
        Trainer(changed(config, "data", dev=(str(other),)), tmp_path / "run")
    assert frames_needed([1, 2, 2, 3]) == 5


def test_the_curriculum_starts_with_short_utterances(tmp_path: Path) -> None:
    config = tone_config(
        write_corpus(tmp_path / "d"), curriculum_seconds=0.5, curriculum_step_seconds=0.4, curriculum_epochs=2
    )
    corpus = Corpus(config.data.train)
    sampler = Sampler(corpus, config, 640)
    longest = [max(corpus.n_samples[r] for p in sampler.epoch(e) for r in p.rows) for e in range(3)]
    assert longest == [6_400, 12_800, 19_200]


def test_ranks_share_a_batch_without_overlap(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"))
    corpus = Corpus(config.data.train)
    plan = Sampler(corpus, config, 640).epoch(0)[0]
    whole = Loader(corpus, config, 160).batch(plan, 0)
    parts = [Loader(corpus, config, 160, rank=r, world=2).batch(plan, 0) for r in range(2)]
    assert sum(len(p.lengths) for p in parts) == len(whole.lengths)
    assert torch.equal(parts[1].audio[0], whole.audio[1])
    assert parts[0].token_count == whole.token_count


def test_some_utterances_give_way_to_silence_with_an_empty_text(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"))
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, silence_probability=0.3))
    corpus = Corpus(config.data.train)
    plans = Sampler(corpus, config, 640).epoch(0)
    batches = list(Loader(corpus, config, 160).batches(plans, 0))
    lengths = torch.cat([b.token_lengths for b in batches])
    assert 5 <= int((lengths == 0).sum()) <= 35
    for batch in batches:
        assert bool(batch.counts.all())
        assert float(batch.audio[batch.token_lengths == 0].abs().sum()) == 0.0  # there is no noise to take
        assert float(batch.audio[batch.token_lengths > 0].abs().sum(1).min()) > 0.0


def test_half_of_the_utterances_begin_after_a_silence(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"))
    augment = dataclasses.replace(config.augment, lead_seconds=1.0, gain_db=0.0, speeds=(1.0,))
    config = dataclasses.replace(config, augment=augment)
    corpus = Corpus(config.data.train)
    loader = Loader(corpus, config, 160)
    leads = []
    for plan in Sampler(corpus, config, 640).epoch(0):
        batch = loader.batch(plan, 0)
        for row, audio, length in zip(plan.rows, batch.audio, batch.lengths.tolist(), strict=True):
            lead = length - 2 * 4_000 - int(corpus.n_samples[row])
            spoken = audio[4_000 + lead : length - 4_000]
            assert not audio[: 4_000 + lead].any()
            torch.testing.assert_close(spoken, corpus.audio(row))
            leads.append(lead / 16_000)
    assert 0.25 < np.mean(np.array(leads) > 0) < 0.75
    assert 0.5 < max(leads) <= 1.0


def test_ctc_equals_a_sum_over_all_paths() -> None:
    log_probs = torch.randn(1, 4, 3, dtype=torch.float64).log_softmax(-1)
    target = [1, 2]
    total = 0.0
    for path in np.ndindex(3, 3, 3, 3):
        collapsed = [p for i, p in enumerate(path) if p and (i == 0 or path[i - 1] != p)]
        if collapsed == target:
            total += float(np.exp(sum(float(log_probs[0, t, p]) for t, p in enumerate(path))))
    loss = ctc(log_probs, torch.tensor([4]), torch.tensor([target]), torch.tensor([2]), torch.tensor([True]))
    assert abs(float(loss) + np.log(total)) < 1e-5


def test_a_ctc_crf_of_the_phones_is_their_ctc_less_all_that_could_be_said(tmp_path: Path) -> None:
    config = changed(tone_config(write_corpus(tmp_path / "d")), "model", phone_output=True)
    config = changed(config, "training", crf_weight=1.0)
    trainer = Trainer(config, tmp_path / "run")
    batch = trainer.loader.batch(trainer.sampler.epoch(0)[0], 0)
    losses = trainer.losses.eval()
    assert isinstance(losses, Losses) and losses.likely is not None

    def loss(weight: float) -> float:
        losses.crf_weight = weight
        return losses(batch)[0].item()

    mute = [{**row(f"{i}", "high", np.zeros(16_000)), "phones": None} for i in range(2)]
    silent = changed(config, "data", train=(str(write_corpus(tmp_path / "e", rows=0, extra=mute)),))
    with pytest.raises(ConfigError, match=r"crf_weight = 1.0: the network writes no phones"):
        Trainer(changed(silent, "training", alignment_weight=0.0), tmp_path / "run")

    assert loss(1.0) < loss(0.0), "a sum of probabilities is less than one"
    assert loss(0.0) - loss(1.0) == pytest.approx(2 * (loss(0.0) - loss(0.5)), rel=1e-3)


def test_two_views_of_an_utterance_differ_by_their_masks_alone(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "data"), consistency_weight=0.2)
    corpus = Corpus(config.data.train)
    sampler = Sampler(corpus, config, stride=640)
    plans = sampler.epoch(0)
    grid = 5_120  # to which lengths are rounded up
    assert max(2 * len(plan.rows) * (plan.samples - grid) for plan in plans) <= 20.0 * 16_000, "both views are counted"
    batch = Loader(corpus, config, hop=160).batch(plans[0], 0)
    rows = len(batch.audio)
    first, second = batch.hidden_frames.split(rows)
    assert first.any() and second.any() and not torch.equal(first, second)
    assert len(batch.hidden_bands) == 2 * rows
    assert len(Loader(corpus, config, hop=160, augment=False).batch(plans[0], 0).hidden_frames) == rows


def test_consistency_weighs_how_far_two_views_are_apart(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "data"), consistency_weight=1.0)
    trainer = Trainer(config, tmp_path / "run")
    batch = trainer.loader.batch(trainer.sampler.epoch(0)[0], 0)
    losses = trainer.losses.eval()  # no dropout: the views differ by their masks alone
    assert isinstance(losses, Losses)

    def loss(batch: Batch, weight: float) -> float:
        losses.consistency_weight = weight
        return losses(batch)[0].item()

    alone = [
        dataclasses.replace(batch, hidden_frames=frames, hidden_bands=bands)
        for frames, bands in zip(batch.hidden_frames.chunk(2), batch.hidden_bands.chunk(2), strict=True)
    ]
    assert loss(batch, 0.0) == pytest.approx(np.mean([loss(view, 0.0) for view in alone]), rel=1e-4)
    apart = loss(batch, 1.0) - loss(batch, 0.0)
    assert apart > 1e-4
    assert loss(batch, 2.0) - loss(batch, 0.0) == pytest.approx(2 * apart, rel=1e-3)
    same = dataclasses.replace(
        batch,
        hidden_frames=batch.hidden_frames.chunk(2)[0].repeat(2, 1),
        hidden_bands=batch.hidden_bands.chunk(2)[0].repeat(2, 1),
    )
    assert loss(same, 1.0) == pytest.approx(loss(same, 0.0), rel=1e-5)


def test_the_divergence_is_what_two_distributions_say_and_leaves_padding_out() -> None:
    log_probs = torch.randn(4, 5, 3).log_softmax(-1).requires_grad_()
    frames = torch.tensor([5, 3, 5, 3])
    got = divergence(log_probs, frames, torch.ones(4, dtype=torch.bool))
    p, q = log_probs.detach()[:2], log_probs.detach()[2:]
    each = (p.exp() * (p - q) + q.exp() * (q - p)).sum(-1)  # Jeffreys' divergence of each frame
    assert got.item() == pytest.approx((each[0].sum() + each[1, :3].sum()).item(), rel=1e-5)
    got.backward()
    assert log_probs.grad is not None and not log_probs.grad[1, 3:].any() and log_probs.grad[3, :3].any()
    assert divergence(log_probs, frames, torch.zeros(4, dtype=torch.bool)).item() == 0.0


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate(s, 1_000, 1.0, 100) for s in range(1_001)]
    assert rates[0] == 0.01
    assert max(rates) == rates[100] == 1.0
    assert rates[1_000] < 1e-9


def test_a_network_learns_and_leaves_a_model_folder(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"), epochs=40, learning_rate=1e-2)
    folder = run_training(config, tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert curve[max(curve)] < 0.2 * curve[1]
    network = load_network(folder)
    assert network.config.model == config.model
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert min(r["cer"] for r in rows if r["kind"] == "dev") < 0.1
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_a_killed_run_goes_on_step_by_step_as_if_undisturbed(tmp_path: Path) -> None:
    """The same losses to the last bit: data order, weights, moments and random states are all restored."""
    config = tone_config(write_corpus(tmp_path / "d", rows=200), epochs=3)
    run_training(config, tmp_path / "whole")
    program = (
        "import sys; sys.path.insert(0, 'tests');"
        "from test_training import *;"
        f"run_training(tone_config(Path({str(tmp_path / 'd')!r}), epochs=3), Path({str(tmp_path / 'cut')!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        if log.is_file() and log.read_text().count("\n") > 8:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(losses(tmp_path / "cut")) < len(losses(tmp_path / "whole")), "the child was done before it was killed"
    run_training(config, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_refuses_another_configuration(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    run_training(tone_config(folder, epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"\[training\] differ"):
        run_training(tone_config(folder, epochs=2), tmp_path / "run")


def test_a_run_refuses_to_go_on_with_other_data(tmp_path: Path) -> None:
    """Also where nothing but a text changed, or a recording of the same length."""
    folder = write_corpus(tmp_path / "d", rows=6)
    run_training(tone_config(folder, epochs=1), tmp_path / "run")
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | {"mean": [-9.1] * 20}))
    with pytest.raises(ConfigError, match="prepared anew"):
        run_training(tone_config(folder, epochs=1), tmp_path / "run")
    shutil.rmtree(folder)
    write_corpus(folder, rows=6, seed=1)
    with pytest.raises(ConfigError, match="prepared anew"):
        run_training(tone_config(folder, epochs=1), tmp_path / "run")
    shutil.rmtree(folder)
    run_training(tone_config(write_corpus(folder, rows=6), epochs=1), tmp_path / "run")


def test_weights_of_a_source_that_is_not_there_are_refused(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=3))
    with pytest.raises(ConfigError, match=r"data\.weights\.tone: .* did you mean tones\?"):
        run_training(changed(config, "data", weights={"tone": 0.5}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    config = tone_config(folder, epochs=1)
    missing = dataclasses.replace(config, data=dataclasses.replace(config.data, train=(str(tmp_path / "typo"),)))
    with pytest.raises(ConfigError, match="typo"):
        run_training(missing, tmp_path / "run")
    run_training(config, tmp_path / "run")


def test_without_tuning_data_the_average_is_kept(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=6), epochs=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dev=()))
    network = load_network(run_training(config, tmp_path / "run"))
    assert network.log_priors is not None and network.log_priors.shape == (len(network.tokenizer),)
    assert np.exp(network.log_priors).sum() == pytest.approx(1.0, abs=1e-3)  # measured at the end
    end = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert end["text"] == "no tuning data (data.dev): the mean of the last 2 epochs is kept"


def test_data_of_other_features_is_refused(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=6))
    other = dataclasses.replace(config, features=dataclasses.replace(config.features, low_hz=100.0))
    with pytest.raises(ConfigError, match="statistics"):
        run_training(other, tmp_path / "run")


def test_init_from_continues_and_refuses_another_shape(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    first = run_training(tone_config(folder, epochs=1), tmp_path / "first")
    config = dataclasses.replace(tone_config(folder, epochs=1), init_from=str(first))
    run_training(config, tmp_path / "second")
    other = dataclasses.replace(tone_config(folder, epochs=1, bidirectional=False), init_from=str(first))
    with pytest.raises(ConfigError, match="do not fit"):
        run_training(other, tmp_path / "third")


@pytest.mark.parametrize("frames", [1, 4])
def test_init_from_takes_a_network_of_another_look_ahead(tmp_path: Path, frames: int) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    config = changed(tone_config(folder, epochs=1, bidirectional=False), "model", look_ahead=2)
    start = load_network(run_training(config, tmp_path / "first"))
    other = dataclasses.replace(changed(config, "model", look_ahead=frames), init_from=str(tmp_path / "first" / "best"))
    network = Trainer(other, tmp_path / "second").network
    (before,), (after,) = ([x.weight for x in n.layers if isinstance(x, LookAhead)] for n in (start, network))
    both = min(len(before), len(after))
    assert len(after) == frames + 1 and torch.equal(after[:both], before[:both]) and not after[both:].any()
    name = "layers.2.convolution.weight"
    assert torch.equal(network.state_dict()[name], start.state_dict()[name])


def test_the_shipped_network_is_tuned_to_new_tokens(tmp_path: Path) -> None:
    """All its weights are taken but those of the outputs."""
    extra = [row("new", "höhe", np.zeros(16_000), phones="Ö")]
    folder = write_corpus(tmp_path / "d", rows=4, extra=extra)
    info = json.loads((folder / "dataset.json").read_text())
    info |= {"features": dataclasses.asdict(FeatureConfig()), "mean": [-9.0] * 80, "variance": [9.0] * 80}
    (folder / "dataset.json").write_text(json.dumps(info))
    shipped = load_network(shipped_model() / "streaming")
    config = TrainConfig(
        model=shipped.config.model,
        data=DataConfig(train=(str(folder),)),
        training=TrainingConfig(epochs=1, precision="fp32"),
        init_from=str(shipped_model() / "streaming"),
        new_tokens=True,
    )
    network = Trainer(config, tmp_path / "run").network
    assert "ö" in network.tokenizer.tokens
    before, after = shipped.state_dict(), network.state_dict()
    kept = {name for name, value in after.items() if name in before and torch.equal(value, before[name])}
    output, joint = f"layers.{len(network.layers) - 1}", {"output", "project", "lstm.lstm", "lstm.norm"}
    assert {name.rpartition(".")[0] for name in after.keys() - kept} <= {
        f"{output}.linear", f"{output}.phones", f"{output}.joint", "phone_output.linear",
        *(f"transducer.{part}" for part in joint),
    }  # fmt: skip
    assert not kept & {f"{output}.linear.weight", f"{output}.phones.weight", "phone_output.linear.weight"}
    assert load_network(run_training(config, tmp_path / "run")).tokenizer.tokens == network.tokenizer.tokens
    with pytest.raises(ConfigError, match="new_tokens"):
        dataclasses.replace(config, init_from="")


def test_training_stops_when_it_gets_no_better(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=6), epochs=9, learning_rate=1e-9, patience=2)
    for _ in range(2):  # run again, it is still done
        load_network(run_training(config, tmp_path / "run"))
        assert [r["epoch"] for r in log_rows(tmp_path / "run", "dev")] == [0, 1, 2]
        assert "no better CER for 2 epochs" in log_rows(tmp_path / "run", "stop")[0]["text"]
    with pytest.raises(ConfigError, match="patience"):
        changed(config, "data", dev=())


def test_a_dry_run_tells_what_a_run_would_take_and_writes_nothing(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"), accumulate=2)
    told = dry_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run_training(config, tmp_path / "run")
    steps = log_rows(tmp_path / "run", "step")
    assert told.steps == len(steps)
    audio = told.audio_hours + 2 * 60 * 0.5 / 3600  # and 250 ms on both sides of 60 utterances in 2 epochs
    assert abs(audio - steps[-1]["audio_hours"]) < 1e-3 * audio
    assert 0 < told.hours < 1
    assert 100e6 < told.memory < 100e9
    assert len(told.first) == 3
    assert f"steps: {len(steps)}" in str(told)


def test_the_share_of_clipped_steps_is_logged(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=20)
    for clip_norm, rate in ((1e-6, 1.0), (1e6, 0.0)):
        run = tmp_path / str(clip_norm)
        run_training(tone_config(folder, epochs=2, clip_norm=clip_norm, batch_seconds=8.0), run)
        assert {r["clip_rate"] for r in log_rows(run, "step")} == {rate}
        assert min(r["gradient_norm"] for r in log_rows(run, "step")) > 1e-6


def test_a_non_finite_step_changes_nothing_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features_of, calls = asr.training.step.features_of, []

    def once_nothing_but_nan(network: Network, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(batch)
        features, lengths = features_of(network, batch)
        return features * (float("nan") if len(calls) == 2 else 1.0), lengths

    monkeypatch.setattr(asr.training.step, "features_of", once_nothing_but_nan)
    config = tone_config(write_corpus(tmp_path / "d", rows=20), epochs=1, batch_seconds=8.0)
    network = load_network(run_training(config, tmp_path / "run"))
    assert [r["skipped"] for r in log_rows(tmp_path / "run", "step")][:3] == [0, 1, 1]
    assert all(bool(value.isfinite().all()) for value in network.state_dict().values())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread dies of it
@pytest.mark.parametrize("limit", [2_000, 30_000])  # bytes: the log no longer fits, or the next checkpoint
def test_a_full_disk_stops_a_run_with_its_last_checkpoint_whole(tmp_path: Path, limit: int) -> None:
    config = tone_config(write_corpus(tmp_path / "d"), epochs=3)
    run_training(config, tmp_path / "undisturbed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(metrics: dict) -> None:
        if metrics["epoch"] == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    try:
        with pytest.raises(AsrError, match=r"run: cannot be written .*; checkpoints/step-\d+ is whole"):
            run_training(config, tmp_path / "run", report=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "run").rglob("*.tmp*"))
    run_training(config, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


def test_a_run_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=3), epochs=1)
    (tmp_path / "file").touch()
    with pytest.raises(AsrError, match="file/run: cannot be written"):
        run_training(config, tmp_path / "file" / "run")


def test_the_mean_of_start_and_end_is_kept_where_it_scores_best(tmp_path: Path, monkeypatch) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    first = run_training(tone_config(folder, epochs=1), tmp_path / "first")
    config = dataclasses.replace(tone_config(folder, epochs=1), init_from=str(first))
    scores = iter([0.5, 0.6, 0.4])  # of the epoch, of the mean of epochs, with init_from
    monkeypatch.setattr(Trainer, "_score", lambda self: {"loss": 1.0, "cer": next(scores), "wer": 1.0})
    kept = load_network(run_training(config, tmp_path / "second")).state_dict()
    start, best = load_network(first).state_dict(), load_network(tmp_path / "second" / "best").state_dict()
    name = "layers.2.convolution.weight"
    assert not torch.equal(start[name], best[name])
    torch.testing.assert_close(kept[name], (start[name] + best[name]) / 2)
    end = json.loads((tmp_path / "second" / "log.jsonl").read_text().splitlines()[-1])
    assert end["text"].endswith("of its mean with init_from 40.0%")


def test_averaged_weights_are_the_mean(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for i in range(3):
        save_file({"w": torch.full((2,), float(i))}, tmp_path / f"{i}.safetensors")
    assert average_weights(sorted(tmp_path.glob("*.safetensors")))["w"].tolist() == [1.0, 1.0]


def test_steps_that_stay_non_finite_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asr.training.loop.learning_rate", lambda *_: float("inf"))
    config = tone_config(write_corpus(tmp_path / "d", rows=200), epochs=10)
    with pytest.raises(AsrError, match="non-finite gradient"):
        run_training(config, tmp_path / "run")


def in_two_processes(function: Callable[..., None], *arguments: object) -> None:
    """Run function(rank, *arguments) in two processes that torch.distributed joins."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
        _joined, (port, function, *arguments), nprocs=2
    )


def _joined(rank: int, port: int, function: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=limit)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()


def _train_two(rank: int, config: TrainConfig, run: Path) -> None:
    run_training(config, run, rank=rank, world=2)


def test_two_workers_give_the_curve_of_one(tmp_path: Path) -> None:
    """Same global batches, same masks: losses agree to 1 in 1000 (sums are taken in another order).

    Half of the batches have one utterance, so that one worker has nothing to do.
    """
    folder = write_corpus(tmp_path / "d", rows=40)
    config = tone_config(folder, batch_utterances=3, batch_seconds=4.0)
    sizes = [len(plan.rows) for plan in Sampler(Corpus(config.data.train), config, 640).epoch(0)]
    assert 1 in sizes
    run_training(config, tmp_path / "one")
    in_two_processes(_train_two, config, tmp_path / "two")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(abs(one[s] - two[s]) <= 1e-3 * one[s] for s in one), (one, two)
    heard = [log_rows(tmp_path / name, "step")[-1]["audio_hours"] for name in ("one", "two")]
    assert abs(heard[0] - heard[1]) < 1e-9
    scores = [log_rows(tmp_path / name, "dev")[-1]["loss"] for name in ("one", "two")]
    assert abs(scores[0] - scores[1]) <= 1e-3 * scores[0]


def _meet_one_that_is_gone(rank: int, told: Path, inside: bool) -> None:
    ranks = Ranks(rank, 2, torch.device("cpu"), 60.0)
    assert ranks.gather([float(rank)]) == [[0.0], [1.0]]
    with pytest.raises(RuntimeError, match=r"^out of memory$"), ranks.meet():
        raise RuntimeError("out of memory")  # of this rank alone: nobody else is to blame
    if rank == 1 and inside:
        with ranks.meet():
            os._exit(0)
    if rank == 1:
        os._exit(0)
    try:
        ranks.wait()
    except RankError as error:
        told.write_text(str(error))
    os._exit(0)


@pytest.mark.parametrize("inside", [False, True])
def test_a_rank_that_is_gone_is_named(tmp_path: Path, inside: bool) -> None:
    in_two_processes(_meet_one_that_is_gone, tmp_path / "told", inside)
    assert (tmp_path / "told").read_text().startswith(f"rank 1 on {platform.node()} (process ")


def test_a_straggler_is_found_by_its_work_over_many_steps() -> None:
    network = torch.nn.Linear(1, 1)
    even, uneven = Stragglers(network), Stragglers(network)
    rng = np.random.default_rng(0)
    noise = rng.exponential(1.0, (200, 3))
    assert all(even.find(list(step)) is None for step in noise)
    found = [uneven.find(list(step * [1.0, 1.0, 4.0])) for step in noise]
    found = [f for f in found if f]
    assert found and all(rank == 2 and 2.0 <= times < 6.0 for rank, times in found)
    assert len(found) < 10, "said once for a window, not at every step"


def test_torchrun_trains_without_ray(tmp_path: Path) -> None:
    """`python -m asr.training` as one rank: what torchrun starts several of."""
    config = tone_config(write_corpus(tmp_path / "d", rows=6), epochs=1)
    (tmp_path / "c.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "asr.training", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    load_network(done.stdout.strip())
    failed = subprocess.run([*command, "--set", "data.train=['none']"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith("error: ") and "none: no prepared data" in failed.stderr


@pytest.mark.parametrize("clip_value", [0.0, 1e-4])
def test_each_entry_of_the_gradient_is_clipped_by_value(
    clip_value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: object) -> object:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        largest.append(max(float(gradient.abs().max()) for gradient in gradients))
        return step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    folder = write_corpus(tmp_path / "train", rows=12)
    run_training(tone_config(folder, epochs=1, clip_value=clip_value), tmp_path / "run")
    assert largest
    assert (max(largest) <= clip_value * 1.0001) == (clip_value > 0)
