"""The training loop: one process of one or more, from a configuration to a model folder."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torchaudio
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from asr.augment import SAMPLE_RATE, changes_waveform
from asr.config import FeatureConfig, NetworkConfig, TrainConfig, load_config, to_toml
from asr.errors import AsrError, ConfigError
from asr.files import write_atomically
from asr.models import FORMAT_VERSION, Network, load_network, save_network
from asr.text import Tokenizer
from asr.training.checkpoint import average_weights, checkpoints, load_checkpoint, random_state, save_checkpoint
from asr.training.data import Corpus, Loader, Sampler, tuning_plan
from asr.training.display import Display
from asr.training.shards import ShardDataset
from asr.training.step import Losses, choose_precision, ctc, features_of, learning_rate

_BAD_STEPS_IN_A_ROW = 20
Report = Callable[[dict], None]


def run_training(
    config: TrainConfig,
    run: Path,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
    report: Report | None = None,
) -> Path:
    """Train, or go on from the newest checkpoint in `run`; leaves the network in run/model/(offline|streaming).

    With `world` above 1, torch.distributed must be initialised and `run` be shared by all ranks.

    Args:
        report: called on every rank with the metrics at the end of each epoch.

    Returns:
        The network's folder.

    Raises:
        AsrError: data, configuration or checkpoint are not usable, or the loss stays non-finite.
    """
    device = device or torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(config.training.threads)
    torch.manual_seed(config.training.seed + rank)
    run.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(config, run, rank, world, device)
    return trainer.train(report)


class _Trainer:
    """What a run holds between its steps."""

    def __init__(self, config: TrainConfig, run: Path, rank: int, world: int, device: torch.device) -> None:
        self.config, self.run, self.rank, self.world, self.device = config, run, rank, world, device
        self.display = Display(quiet=rank > 0)
        check_inputs(config, run)
        start = load_network(config.init_from) if config.init_from else None
        kept = run / "tokens.txt"
        tokenizer = Tokenizer.load(kept) if kept.is_file() else start.tokenizer if start else None
        self.corpus = Corpus(config.data.train, tokenizer, start.phones if start else None)
        self.sampler: Sampler
        self.network = self._new_network(start).to(device)
        self.sampler = Sampler(self.corpus, config, self.network.stride)
        self.dev = Corpus(config.data.dev, self.corpus.tokenizer, self.corpus.phones) if config.data.dev else None
        hop = config.features.hop
        self.loader = Loader(self.corpus, config, hop, rank=rank, world=world)
        self.dev_loader = Loader(self.dev, config, hop, augment=False) if self.dev else None
        precision = choose_precision(config.training.precision, device)
        losses = Losses(self.network, config.training.phone_weight, precision)
        self.losses = DistributedDataParallel(losses) if world > 1 else losses
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        plain = [p for p in self.network.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.training.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.training.learning_rate,
            betas=(0.9, 0.98),
        )
        accumulate = config.training.accumulate
        self.steps_in = [-(-len(self.sampler.epoch(e)) // accumulate) for e in range(config.training.epochs)]
        self.progress = {"epoch": 0, "batch": 0, "best": math.inf, "skipped": 0, "audio_seconds": 0.0}
        self.step = 0
        self.bad_steps = 0  # in a row, with a non-finite gradient
        self.description = self._describe(precision)
        if rank == 0:  # only now: a start that failed leaves no configuration behind
            write_atomically(run / "config.toml", to_toml(config))

    def _new_network(self, start: Network | None) -> Network:
        config = self.config
        statistics = self.corpus.statistics
        mean = torch.tensor(statistics.mean, dtype=torch.float32)
        variance = torch.tensor(statistics.variance, dtype=torch.float32)
        settings = NetworkConfig(format_version=FORMAT_VERSION, features=config.features, model=config.model)
        phones = self.corpus.phones if config.model.phone_layer and config.training.phone_weight else ()
        with torch.random.fork_rng():
            torch.manual_seed(config.training.seed)  # the same first weights on every rank
            network = Network(settings, self.corpus.tokenizer, mean, variance, phones)
        if start is not None:
            _take_weights(network, start)
        return network

    def _describe(self, precision: str) -> str:
        sampler, corpus = self.sampler, self.corpus
        weights = sum(p.numel() for p in self.network.parameters())
        hours = corpus.n_samples[sampler.usable].sum() / SAMPLE_RATE / 3600
        left = {
            "too long": sampler.too_long,
            "more tokens than frames": sampler.too_dense,
            "not spelled by the tokenizer": len(corpus.unspelled),
        }
        left_out = ", ".join(f"{n} {why}" for why, n in left.items() if n) or "none"
        return (
            f"{self.config.model.kind} network, {weights / 1e6:.2f} M weights, {len(corpus.tokenizer)} tokens, "
            f"{len(corpus.phones)} phones; {len(sampler.usable)} utterances, {hours:.2f} h; left out: {left_out}; "
            f"{sum(self.steps_in)} steps in {self.config.training.epochs} epochs; {precision}, {self.world} worker(s)"
        )

    def train(self, report: Report | None) -> Path:
        config = self.config
        found = checkpoints(self.run / "checkpoints")
        if found:
            self.progress = load_checkpoint(found[-1], self.network, self.optimizer, self.rank, self.device)
            self.step = self.progress.pop("step")
        elif self.rank == 0:
            self.corpus.tokenizer.save(self.run / "tokens.txt")
        self.writer = SummaryWriter(str(self.run / "tensorboard")) if self.rank == 0 else None
        with open(os.devnull if self.rank else self.run / "log.jsonl", "a", encoding="utf-8") as self.log, self.display:
            text = self.description + (f"; continuing from {found[-1].name}" if found else "")
            self._log("start", text=text, total=sum(self.steps_in))
            try:
                for epoch in range(self.progress["epoch"], config.training.epochs):
                    self._epoch(epoch)
                    metrics = {"epoch": epoch, "step": self.step, **self._tune(epoch)}
                    if report:
                        report(metrics)
            finally:
                if self.writer:
                    self.writer.close()
            return self._finish()

    def _epoch(self, epoch: int) -> None:
        training = self.config.training
        planned = self.sampler.epoch(epoch)
        first = self.progress["batch"]
        self.losses.train()
        for start in range(first, len(planned), training.accumulate):
            clock = time.perf_counter()
            group = planned[start : start + training.accumulate]
            rate = learning_rate(self.step, sum(self.steps_in), training.learning_rate, training.warmup_steps)
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = rate
            loss = torch.zeros((), device=self.device)
            seconds = 0.0
            for batch in self.loader.batches(group, epoch):
                batch = batch.to(self.device)
                total, token_loss = self.losses(batch)
                # DistributedDataParallel takes the mean over ranks of what are parts of a sum
                (total * self.world / len(group)).backward()
                loss += token_loss / len(group)
                seconds += float(batch.lengths.sum()) / SAMPLE_RATE
            norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), training.clip_norm)
            finite = bool(torch.isfinite(norm))
            if finite:
                self.optimizer.step()
                self.bad_steps = 0
            else:
                self.progress["skipped"] += 1
                self.bad_steps += 1
                if self.bad_steps >= _BAD_STEPS_IN_A_ROW:
                    raise AsrError(
                        f"{self.run}: {self.bad_steps} steps in a row had a non-finite gradient (step {self.step}); "
                        "lower training.learning_rate, or look at the data of these steps in log.jsonl"
                    )
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.world > 1:
                sums = torch.tensor([float(loss), seconds], device=self.device)
                dist.all_reduce(sums)
                loss, seconds = sums[0], float(sums[1])
            self.progress["audio_seconds"] += seconds
            self.progress["batch"] = start + len(group)
            self._log(
                "step", epoch=epoch, loss=float(loss), learning_rate=rate, gradient_norm=float(norm),
                skipped=self.progress["skipped"], audio_hours=self.progress["audio_seconds"] / 3600,
                speed=seconds / (time.perf_counter() - clock),
            )  # fmt: skip
            if self.progress["batch"] < len(planned) and self.step % training.checkpoint_steps == 0:
                self._save()

    def _log(self, kind: str, **values: float | str) -> None:
        """Add a row to log.jsonl, to TensorBoard and to what a person sees; rank 0 alone."""
        if self.rank:
            return
        row = {"kind": kind, "step": self.step, "time": round(time.time(), 1), **values}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        self.display.show(row)
        for name, value in values.items():
            if self.writer and not isinstance(value, str):
                self.writer.add_scalar(f"{kind}/{name}", value, self.step)

    def _save(self) -> None:
        states = [random_state(self.device)]
        if self.world > 1:
            gathered = [torch.empty_like(states[0], device=self.device) for _ in range(self.world)]
            dist.all_gather(gathered, states[0].to(self.device))
            states = [s.cpu() for s in gathered]
        if self.rank == 0:
            folder = self.run / "checkpoints"
            save_checkpoint(folder, self.step, self.network, self.optimizer, states, self.progress)
        if self.world > 1:
            dist.barrier()

    def _tune(self, epoch: int) -> dict:
        """Score the tuning data, keep the best network and this epoch's weights, write a checkpoint."""
        metrics = self._score() if self.rank == 0 else {}
        if self.rank == 0:
            if metrics:
                hours = self.progress["audio_seconds"] / 3600
                self._log("dev", epoch=epoch, audio_hours=hours, **metrics)
            self._keep_epoch(epoch)
            if metrics.get("cer", 0.0) <= self.progress["best"]:
                self.progress["best"] = metrics.get("cer", 0.0)
                save_network(self.network, self.run / "best")
        self.progress["epoch"], self.progress["batch"] = epoch + 1, 0
        self._save()
        return metrics

    def _keep_epoch(self, epoch: int) -> None:
        """Keep the weights of the last epochs, for their average."""
        folder = self.run / "epochs"
        folder.mkdir(exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        save_file(weights, folder / f".{epoch:04d}.tmp")
        os.replace(folder / f".{epoch:04d}.tmp", folder / f"{epoch:04d}.safetensors")
        for old in sorted(folder.glob("*.safetensors"))[: -self.config.training.average]:
            old.unlink()

    @torch.no_grad()
    def _score(self) -> dict[str, float]:
        """Greedy character and word error rates and loss a token on the tuning data."""
        if self.dev is None or self.dev_loader is None:
            return {}
        self.network.eval()
        loss = tokens = characters = character_errors = words = word_errors = 0.0
        for plan in tuning_plan(self.dev, self.config.data.dev_minutes, self.config.training.batch_seconds):
            batch = self.dev_loader.batch(plan, 0).to(self.device)
            log_probs, frames, _ = self.network.read_features(*features_of(self.network, batch))
            loss += float(ctc(log_probs, frames, batch.tokens, batch.token_lengths, batch.counts))
            tokens += batch.token_count
            for row, best, n in zip(plan.rows, log_probs.argmax(-1).cpu(), frames.cpu(), strict=True):
                ids = torch.unique_consecutive(best[: int(n)]).tolist()
                hypothesis = " ".join(self.dev.tokenizer.decode(ids).split())
                reference = self.dev.text(row)
                characters += len(reference)
                character_errors += torchaudio.functional.edit_distance(reference, hypothesis)
                words += len(reference.split())
                word_errors += torchaudio.functional.edit_distance(reference.split(), hypothesis.split())
        return {
            "loss": loss / max(tokens, 1),
            "cer": character_errors / max(characters, 1),
            "wer": word_errors / max(words, 1),
        }

    def _finish(self) -> Path:
        """Average the last epochs where that scores better than the best one, and write the model folder."""
        folder = self.run / "model" / self.config.model.kind
        if self.rank == 0:
            best = load_network(self.run / "best")
            epochs = sorted((self.run / "epochs").glob("*.safetensors"))
            self.network.load_state_dict(average_weights(epochs))
            if self.dev is None:
                save_network(self.network, folder)
                self._log("end", text=f"no tuning data (data.dev): the mean of the last {len(epochs)} epochs is kept")
            else:
                best_cer, averaged = self.progress["best"], self._score()["cer"]
                save_network(self.network if averaged <= best_cer else best, folder)
                self._log("end", text=f"CER of the best epoch {best_cer:.1%}, of the mean of the last {averaged:.1%}")
        if self.world > 1:
            dist.barrier()
        return folder


def check_inputs(config: TrainConfig, run: Path) -> None:
    """Refuse a training that cannot start, before anything is written or another process started.

    Raises:
        AsrError: prepared data is missing or was made with other features, `init_from` is no network, or the run
            was started with another configuration (threads, checkpoint_steps and average may differ).
    """
    for folder in (*config.data.train, *config.data.dev, *filter(None, [config.augment.noise])):
        info = ShardDataset(folder).info
        if info["store"] == "features" and changes_waveform(config.augment):
            raise ConfigError(
                f"{folder}: holds features, so the waveform cannot be augmented; set augment.speeds = [1.0], "
                "gain_db = 0 and the probabilities to 0, or prepare with --store audio"
            )
        made_with = info.get("features", dataclasses.asdict(FeatureConfig()))
        if made_with != dataclasses.asdict(config.features):
            raise ConfigError(f"{folder}: its statistics are of features {made_with}, [features] asks for others")
    if config.init_from:
        load_network(config.init_from)
    if not checkpoints(run / "checkpoints"):
        return

    def core(c: TrainConfig) -> TrainConfig:
        free = {"threads": 1, "checkpoint_steps": 1, "average": 1}
        return dataclasses.replace(c, training=dataclasses.replace(c.training, **free))

    before, now = core(load_config(run / "config.toml")), core(config)
    names = [f.name for f in dataclasses.fields(config) if getattr(before, f.name) != getattr(now, f.name)]
    if names:
        raise ConfigError(
            f"{run}: was started with another configuration ([{'], ['.join(names)}] differ); "
            "give another --out, or the same values"
        )


def _take_weights(network: Network, start: Network) -> None:
    """Copy all weights of `start` that have a place in `network`; refuse a network of another shape."""
    own = network.state_dict()
    fitting = {k: v for k, v in start.state_dict().items() if k in own and own[k].shape == v.shape}
    missing = sorted(own.keys() - fitting.keys())
    body = [name for name in missing if "phone_output" not in name]
    if body:
        raise ConfigError(f"init_from: {len(body)} tensors do not fit, the first is {body[0]}; use the same [model]")
    network.load_state_dict({**own, **fitting})
