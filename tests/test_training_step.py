"""asr.training.step: losses, the learning rate, clipping."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tones import changed, row, tone_config, write_corpus

from asr.errors import ConfigError
from asr.training.data import Batch, Corpus, Loader, Sampler
from asr.training.loop import Trainer, run_training
from asr.training.step import Losses, ctc, divergence, learning_rate


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


def test_a_row_of_silence_teaches_the_phones_and_one_too_short_for_its_phones_nothing(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=3)
    config = changed(tone_config(folder), "model", phone_output=True)
    config = changed(changed(config, "training", crf_weight=1.0), "augment", silence_probability=0.0)
    trainer = Trainer(config, tmp_path / "run")
    batch, losses = trainer.loader.batch(trainer.sampler.epoch(0)[0], 0), trainer.losses.eval()
    assert isinstance(losses, Losses)

    def of_phones(batch: Batch) -> float:
        """What phones add to the loss."""
        found = []
        for weight in (0.0, 1.0):
            losses.phone_weight = weight
            found.append(losses(dataclasses.replace(batch, phone_count=1))[0].item())
        return found[1] - found[0]

    nothing = dataclasses.replace(batch, phone_lengths=torch.zeros_like(batch.phone_lengths))
    assert of_phones(nothing) > 1.0
    assert of_phones(dataclasses.replace(nothing, pronounced=torch.zeros_like(batch.pronounced))) == 0.0
    rows, frames = batch.states.shape
    phones = torch.ones(rows, 2 * frames, dtype=torch.long)
    long = dataclasses.replace(batch, phones=phones, phone_lengths=torch.full((rows,), 2 * frames))
    assert of_phones(long) == 0.0


def test_what_else_could_be_said_counts_from_crf_start_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(tone_config(write_corpus(tmp_path / "d"), epochs=2), "model", phone_output=True)
    config = changed(config, "training", crf_weight=0.8, crf_start=0.5)
    seen, forward = [], Losses.forward

    def watched(self: Losses, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(self.crf_weight)
        return forward(self, batch)

    monkeypatch.setattr(Losses, "forward", watched)
    run_training(config, tmp_path / "run")
    assert set(seen[: len(seen) // 2]) == {0.0} and set(seen[len(seen) // 2 :]) == {0.8}


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
