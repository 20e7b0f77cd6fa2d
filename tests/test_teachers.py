"""asr.training.teachers: a network learns from what others say of each frame."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tones import changed, tone_config, write_corpus

from asr.config import TrainConfig
from asr.errors import ConfigError, ModelError
from asr.models import save_network
from asr.training.loop import Trainer, run_training
from asr.training.step import Losses
from asr.training.teachers import lesson


@pytest.mark.parametrize("frames", [-2, 0, 3])
def test_what_a_teacher_says_is_moved_to_where_the_student_says_it(frames: int) -> None:
    torch.manual_seed(1)
    student = (4 * torch.randn(2, 40, 6)).log_softmax(-1)
    teacher = student.roll(-frames, dims=1)
    learned = lesson([teacher], student, torch.ones(2, 40, dtype=torch.bool))
    inside = slice(3, 37)
    assert torch.equal(learned[:, inside], student.exp()[:, inside])


def test_of_several_teachers_it_is_the_mean_and_padding_moves_nothing() -> None:
    torch.manual_seed(1)
    first, second, student = ((2 * torch.randn(2, 30, 5)).log_softmax(-1) for _ in range(3))
    heard = torch.arange(30) < torch.tensor([[30], [12]])
    alone = [lesson([teacher], student, heard) for teacher in (first, second)]
    assert torch.allclose(lesson([first, second], student, heard), (alone[0] + alone[1]) / 2)
    other = torch.where(heard[..., None], student, torch.randn(2, 30, 5).log_softmax(-1))
    assert torch.equal(lesson([first], other, heard), alone[0])


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


def test_a_streaming_network_learns_from_a_bidirectional_one_and_goes_on(tmp_path: Path) -> None:
    config = changed(tone_config(write_corpus(tmp_path / "data", rows=12), bidirectional=False), "model", hidden=8)
    teacher = teacher_in(tmp_path, changed(config, "model", bidirectional=True, hidden=16))
    config = dataclasses.replace(changed(config, "training", consistency_weight=0.2), teachers=(teacher,))
    before = {path: path.read_bytes() for path in Path(teacher).iterdir()}
    made = run_training(config, tmp_path / "taught")
    assert (made / "weights.safetensors").is_file()
    assert {path: path.read_bytes() for path in Path(teacher).iterdir()} == before
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
    with pytest.raises(ConfigError, match="has other phones at the output"):
        Trainer(dataclasses.replace(config, teachers=(voiced,)), tmp_path / "run")
