"""What a training would take: its steps, memory and time, from a few steps whose result is thrown away."""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from asr.augment import SAMPLE_RATE
from asr.config import TrainConfig
from asr.training.data import Plan
from asr.training.loop import Trainer

_TIMED_STEPS = 5
_SHOWN = 3
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What was found.

    Attributes:
        description: network and data, in words.
        steps: of the optimiser, in all epochs.
        audio_hours: read in all epochs, after changes of speed.
        memory: peak bytes, of this process or of its GPU, with the largest batch.
        largest: the largest batch, in words.
        hours: estimated for all steps on one worker of this machine, tuning data and checkpoints aside.
        timed: steps that the estimate is from.
        first: the first batches, in words.
    """

    description: str
    steps: int
    audio_hours: float
    memory: int
    largest: str
    hours: float
    timed: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            self.description,
            f"steps: {self.steps}, which read {self.audio_hours:.1f} h of audio",
            f"memory: {self.memory / 2**30:.2f} GiB at the largest batch ({self.largest})",
            f"time: about {self.hours:.2f} h on one worker, judged by {self.timed} steps on this machine as busy as it "
            "is now; scoring data.dev and writing checkpoints come on top",
            "first batches:",
            *(f"  {batch}" for batch in self.first),
        ]
        return "\n".join(lines)


def dry_run(config: TrainConfig, run: Path, device: torch.device | None = None) -> DryRun:
    """Make the data and the network of a training as it would start, and time some steps; writes nothing.

    Raises:
        AsrError: what would stop the training as well.
    """
    trainer = Trainer(config, run, device=device)
    accumulate = config.training.accumulate
    epochs = [trainer.sampler.epoch(epoch) for epoch in range(config.training.epochs)]
    largest = max((plan for epoch in epochs for plan in epoch), key=lambda plan: plan.samples * len(plan.rows))
    trainer.train_on([largest], 0, 0.0)
    steps = [
        (epoch, plans[start : start + accumulate])
        for epoch, plans in enumerate(epochs)
        for start in range(0, len(plans), accumulate)
    ]
    timed = steps[:: -(-len(steps) // _TIMED_STEPS)]
    for epoch, group in timed:  # every new shape is set up once: not in the time
        trainer.train_on(group, epoch, 0.0)
    clock = time.perf_counter()
    for epoch, group in timed:
        trainer.train_on(group, epoch, 0.0)
    seconds = time.perf_counter() - clock
    share = sum(_padded(group) for _, group in timed) / sum(_padded(group) for _, group in steps)
    return DryRun(
        description=trainer.description,
        steps=len(steps),
        audio_hours=sum(_audio_seconds(trainer, plan) for epoch in epochs for plan in epoch) / 3600,
        memory=_peak_memory(trainer.device),
        largest=_told(trainer, largest),
        hours=seconds / share / 3600,
        timed=len(timed),
        first=tuple(_told(trainer, plan, texts=True) for plan in epochs[0][:_SHOWN]),
    )


def _padded(group: list[Plan]) -> int:
    return sum(plan.samples * len(plan.rows) for plan in group)


def _audio_seconds(trainer: Trainer, plan: Plan) -> float:
    lengths = trainer.corpus.n_samples[list(plan.rows)] / SAMPLE_RATE
    return float(sum(length / speed for length, speed in zip(lengths, plan.speeds, strict=True)))


def _told(trainer: Trainer, plan: Plan, *, texts: bool = False) -> str:
    longest = plan.samples / SAMPLE_RATE
    told = f"{len(plan.rows)} utterances padded to {longest:.1f} s, {_audio_seconds(trainer, plan):.1f} s of audio"
    if not texts:
        return told
    text = trainer.corpus.text(plan.rows[0])
    return f"{told}; the first: {text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + ' ...'!r}"


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, except there
