"""asr.training.data: the order of utterances, and what is left out."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tones import WORDS, changed, row, tone_config, write_corpus

from asr.augment import change_speed
from asr.errors import ConfigError
from asr.files import write_atomically
from asr.text import Tokenizer
from asr.training.data import Corpus, Loader, Sampler, frames_needed
from asr.training.loop import Trainer
from asr.training.shards import ShardDataset, write_shard


def test_shards_give_back_what_was_written(tmp_path: Path) -> None:
    dataset = ShardDataset(write_corpus(tmp_path / "d", rows=3))
    assert len(dataset) == 3
    assert len(dataset.audio(1)) == dataset.n_samples[1]
    assert set(" ".join(dataset.texts).split()) <= set(WORDS)
    with pytest.raises(ConfigError, match="asr prepare"):
        ShardDataset(tmp_path / "nowhere")


def test_what_could_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", "a file cannot take the place of a folder")
    with pytest.raises(TypeError):
        write_shard(tmp_path / "shard.arrow", [{"id": 1}])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


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


def test_speeds_are_those_that_are_played(tmp_path: Path) -> None:
    """In between, the lengths of batches and the places of aligned phones would be others than the sound's."""
    usual = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
    config = tone_config(write_corpus(tmp_path / "d"))
    corpus = Corpus(config.data.train)
    for speeds, played in ((usual, set(usual)), ((0.955,), {0.95625})):
        plans = Sampler(corpus, changed(config, "augment", speeds=speeds), 640).epoch(0)
        assert {speed for plan in plans for speed in plan.speeds} == played
    sound = torch.zeros(16_000)
    sound[8_000] = 1.0
    assert int(change_speed(sound, 0.95625).argmax()) == round(8_000 / 0.95625)


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
        assert bool(batch.pronounced.all()), "that nothing is said, the phones are told as well"
        assert torch.equal(batch.phone_lengths == 0, batch.token_lengths == 0)


def test_half_of_the_utterances_begin_after_a_silence(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"))
    augment = dataclasses.replace(config.augment, lead_seconds=1.0, gain_db=0.0, speeds=(1.0,))
    config = dataclasses.replace(config, augment=augment)
    corpus = Corpus(config.data.train)
    loader = Loader(corpus, config, 160)
    leads = []
    for plan in Sampler(corpus, config, 640).epoch(0):
        batch = loader.batch(plan, 0)
        for index, audio, length in zip(plan.rows, batch.audio, batch.lengths.tolist(), strict=True):
            lead = length - 2 * 4_000 - int(corpus.n_samples[index])
            spoken = audio[4_000 + lead : length - 4_000]
            assert not audio[: 4_000 + lead].any()
            torch.testing.assert_close(spoken, corpus.audio(index))
            leads.append(lead / 16_000)
    assert 0.25 < np.mean(np.array(leads) > 0) < 0.75
    assert 0.5 < max(leads) <= 1.0
