"""asr.training.teachers: a network learns from what others say of each frame."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tones import changed, row, tone_config, write_corpus
from tones import losses as losses_of

from asr.config import TrainConfig
from asr.errors import AsrError, ConfigError, ModelError
from asr.models import save_network
from asr.training.data import Batch
from asr.training.loop import Trainer, run_training
from asr.training.step import Losses
from asr.training.teachers import lesson


@pytest.mark.parametrize("frames", [-2, 0, 3])
def test_what_a_teacher_says_is_moved_to_where_the_student_says_it(frames: int) -> None:
    torch.manual_seed(1)
    student = (4 * torch.randn(2, 40, 6)).log_softmax(-1)
    teacher = student.roll(-frames, dims=1)
    learned = lesson([teacher], student, torch.tensor([40, 40]))
    inside = slice(3, 37)
    assert torch.equal(learned[:, inside], student.exp()[:, inside])


def test_of_several_teachers_it_is_the_mean_and_padding_tells_nothing() -> None:
    torch.manual_seed(1)
    first, second, student = ((2 * torch.randn(2, 30, 5)).log_softmax(-1) for _ in range(3))
    frames = torch.tensor([30, 12])
    alone = [lesson([teacher], student, frames) for teacher in (first, second)]
    assert torch.allclose(lesson([first, second], student, frames), (alone[0] + alone[1]) / 2)
    heard = (torch.arange(30) < frames[:, None])[..., None]
    others = [torch.where(heard, x, torch.randn(2, 30, 5).log_softmax(-1)) for x in (first, student)]
    assert torch.equal(torch.where(heard, lesson([others[0]], others[1], frames), 0), torch.where(heard, alone[0], 0))


def test_a_teacher_that_writes_later_is_not_asked_about_padding() -> None:
    student = torch.full((2, 30, 3), 0.01)
    student[0, 2:28:4, 1] = student[1, 2:20:4, 1] = 0.98
    teacher = student.roll(3, dims=1)
    teacher[1, 20:] = torch.tensor([0.0, 0.0, 1.0])  # of padding
    learned = lesson([(teacher / teacher.sum(-1, keepdim=True)).log()], student.log(), torch.tensor([30, 20]))
    assert learned[1, 6, 1] > 0.9, "it was moved"
    assert float(learned[1, :20, 2].max()) < 0.5


def teacher_in(folder: Path, config: TrainConfig) -> str:
    """A new network of this configuration, saved; its first weights are drawn by training.seed."""
    network = Trainer(config, folder / "run").network
    save_network(network, folder / "network")
    return str(folder / "network")


def test_the_loss_grows_by_how_far_a_network_is_from_its_teachers(tmp_path: Path) -> None:
    config = changed(tone_config(write_corpus(tmp_path / "data")), "model", phone_output=True)
    itself = teacher_in(tmp_path / "itself", config)
    other = teacher_in(tmp_path / "other", changed(config, "training", seed=5))

    def loss(teacher: str, weight: float) -> float:
        taught = dataclasses.replace(changed(config, "training", teacher_weight=weight), teachers=(teacher,))
        trainer = Trainer(taught, tmp_path / "run")
        batch = trainer.loader.batch(trainer.sampler.epoch(0)[0], 0)
        nothing = torch.zeros_like(batch.hidden_frames), torch.zeros_like(batch.hidden_bands)
        losses = trainer.losses.eval()
        assert isinstance(losses, Losses)
        return losses(dataclasses.replace(batch, hidden_frames=nothing[0], hidden_bands=nothing[1]))[0].item()

    assert loss(itself, 1.0) == pytest.approx(loss(itself, 0.0), abs=1e-4), "there is nothing to learn from itself"
    apart = loss(other, 1.0) - loss(other, 0.0)
    assert apart > 0.01
    assert loss(other, 2.0) - loss(other, 0.0) == pytest.approx(2 * apart, rel=1e-3)


def test_rows_without_phones_teach_none(tmp_path: Path) -> None:
    extra = [{**row("mute", "high", 0.1 * np.sin(np.arange(16_000))), "phones": None}] * 5
    config = changed(tone_config(write_corpus(tmp_path / "data", rows=5, extra=extra)), "model", phone_output=True)
    other = teacher_in(tmp_path / "other", changed(config, "training", seed=5))
    trainer = Trainer(dataclasses.replace(config, teachers=(other,)), tmp_path / "run")
    batch = trainer.loader.batch(trainer.sampler.epoch(0)[0], 0)
    losses = trainer.losses.eval()
    assert isinstance(losses, Losses) and 0 < int((batch.phone_lengths > 0).sum()) < len(batch.audio)

    def of_phones(batch: Batch) -> float:
        found = []
        for weight in (0.0, 1.0):
            losses.teacher_weight = weight
            found.append(losses(batch)[0].item())
        return found[1] - found[0]

    unknown = torch.zeros_like(batch.pronounced)
    without = dataclasses.replace(batch, pronounced=unknown, phone_count=0)
    losses.phone_weight = 0.0
    by_tokens = of_phones(batch)
    losses.phone_weight = 1.0
    assert of_phones(without) == pytest.approx(by_tokens, rel=1e-4) and of_phones(batch) > by_tokens * 1.05


def test_a_streaming_network_learns_from_a_bidirectional_one_and_goes_on(tmp_path: Path) -> None:
    config = changed(tone_config(write_corpus(tmp_path / "data", rows=12), bidirectional=False), "model", hidden=8)
    teacher = teacher_in(tmp_path, changed(config, "model", bidirectional=True, hidden=16))
    config = dataclasses.replace(changed(config, "training", consistency_weight=0.2), teachers=(teacher,))
    before = {path: path.read_bytes() for path in Path(teacher).iterdir()}
    made = run_training(config, tmp_path / "taught")
    assert (made / "weights.safetensors").is_file()
    assert {path: path.read_bytes() for path in Path(teacher).iterdir()} == before
    # from the last checkpoint but one, to the same losses
    taught = losses_of(tmp_path / "taught")
    newest = sorted((tmp_path / "taught" / "checkpoints").iterdir())[-1]
    (newest / "progress.json").write_bytes(b"")
    run_training(config, tmp_path / "taught")
    assert losses_of(tmp_path / "taught") == taught
    another = Trainer(config, tmp_path / "new").network
    (Path(teacher) / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(AsrError, match=r"weights\.safetensors: "):
        run_training(config, tmp_path / "taught")
    save_network(another, teacher)
    with pytest.raises(ConfigError, match=r"network: was trained anew since .* was started with it"):
        run_training(config, tmp_path / "taught")
    untaught = run_training(dataclasses.replace(config, teachers=()), tmp_path / "untaught")
    assert (made / "weights.safetensors").read_bytes() != (untaught / "weights.safetensors").read_bytes()


def test_a_teacher_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "data"))
    with pytest.raises(ModelError, match=r"nowhere: config\.toml is missing"):
        Trainer(dataclasses.replace(config, teachers=("nowhere",)), tmp_path / "run")
    slower = teacher_in(tmp_path / "slower", changed(config, "model", strides=(2, 3)))
    with pytest.raises(ConfigError, match=r"teachers: .*/slower/network has other samples to a frame than"):
        Trainer(dataclasses.replace(config, teachers=(slower,)), tmp_path / "run")
    voiced = teacher_in(tmp_path / "voiced", changed(config, "model", phone_output=True))
    silent = teacher_in(tmp_path / "silent", config)
    with pytest.raises(ConfigError, match="has other phones at the output"):
        Trainer(changed(dataclasses.replace(config, teachers=(silent,)), "model", phone_output=True), tmp_path / "run")
    Trainer(dataclasses.replace(config, teachers=(voiced,)), tmp_path / "run")  # its phones are not asked for
    wide = dataclasses.replace(config, features=dataclasses.replace(config.features, low_hz=50.0))
    deep = tmp_path / "deep"
    network = Trainer(config, tmp_path / "run").network
    network.config = dataclasses.replace(network.config, features=wide.features)
    save_network(network, deep)
    with pytest.raises(ConfigError, match=r"has other \[features\] than"):
        Trainer(dataclasses.replace(config, teachers=(str(deep),)), tmp_path / "run")
