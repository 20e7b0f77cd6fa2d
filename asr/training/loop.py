"""The training loop: one process of one or more, from a configuration to a model folder."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch.nn.parallel import DistributedDataParallel

from asr.augment import SAMPLE_RATE
from asr.config import NetworkConfig, TrainConfig
from asr.decoding.greedy import GreedyDecoder
from asr.decoding.transducer import TransducerSearch
from asr.errors import AsrError, ConfigError, ModelError
from asr.models import FORMAT_VERSION, Network, load_network
from asr.nn.layer import valid
from asr.runtime.folder import WEIGHTS_FILE, read_priors
from asr.text import Tokenizer
from asr.training.checkpoint import average_weights, checkpoints, load_checkpoint, random_state
from asr.training.crf import trigrams
from asr.training.data import Corpus, Loader, Plan, Sampler, features_of, tuning_plan
from asr.training.device import DeviceLoader, fits
from asr.training.optimizer import Optimizer
from asr.training.ranks import Ranks, Stragglers
from asr.training.record import Record
from asr.training.shards import ShardDataset
from asr.training.start import check_inputs, same_shape, take_weights
from asr.training.step import Losses, choose_precision, ctc, learning_rate, rnnt
from asr.training.teachers import Teachers

_BAD_STEPS_IN_A_ROW = 20
_CRF_PRIORS = 0.3  # of the phones' log-priors, that a search is to take off (docs/trials.md)
_PRIOR_MINUTES = 10.0  # of speech, over which the outputs' mean probabilities are measured
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
        AsrError: data, configuration or checkpoints are not usable, `run` cannot be written, the loss stays
            non-finite, or (RankError) another rank is gone, or another training has `run`.
    """
    return Trainer(config, run, rank=rank, world=world, device=device).train(report)


class Trainer:
    """What a run holds between its steps; making one writes nothing."""

    def __init__(
        self, config: TrainConfig, run: Path, *, rank: int = 0, world: int = 1, device: torch.device | None = None
    ) -> None:
        self.config, self.run = config, run
        self.device = device or torch.device("cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(config.training.threads)
        torch.manual_seed(config.training.seed + rank)
        check_inputs(config, run)
        self.ranks = Ranks(rank, world, self.device, config.training.hang_seconds)
        self.checkpoint = self._newest_checkpoint()
        self.dithered = not config.training.freeze_encoder  # which leaves all that it does not train to the last bit
        start = load_network(config.init_from, dithered=self.dithered) if config.init_from else None
        tokenizer = start.tokenizer if start else None
        if tokenizer and config.new_tokens:
            tokenizer = tokenizer.extended(text for folder in config.data.train for text in ShardDataset(folder).texts)
        if self.checkpoint:
            tokenizer = Tokenizer.load(run / "tokens.txt")
        phones = start.phones if start and not config.new_tokens else None
        self.corpus = Corpus(config.data.train, tokenizer, phones, config.data.cut_seconds)
        self.network = self._new_network(start).to(self.device)
        self.goes_on = start is not None and same_shape(self.network, start)
        self.sampler = Sampler(self.corpus, config, self.network.stride)
        self.dev = Corpus(config.data.dev, self.corpus.tokenizer, self.corpus.phones) if config.data.dev else None
        if self.dev is not None and not len(self.dev):
            whose = "init_from (or set new_tokens = true)" if tokenizer and start else "data.train"
            raise ConfigError(
                f"data.dev: none of its {len(self.dev.unspelled)} texts can be spelled in the letters of {whose}"
            )
        if self.dev is not None and not any(self.dev.tokens):
            raise ConfigError(
                f"data.dev: none of its {len(self.dev)} utterances has a text to score against; prepare it from a "
                "manifest with texts, or leave it out"
            )
        hop = config.features.hop
        on_gpu = self.device.type == "cuda" and fits(self.corpus, self.device)
        if on_gpu:
            self.loader = DeviceLoader(self.corpus, config, hop, self.device, rank=rank, world=world)
        else:
            self.loader = Loader(self.corpus, config, hop, rank=rank, world=world)
        self.dev_loader = Loader(self.dev, config, hop, augment=False) if self.dev else None
        precision = choose_precision(config.training.precision, self.device)
        training = config.training
        teachers = None
        if config.teachers and training.teacher_weight:
            teachers = Teachers(config.teachers, self.network, self.device, precision)
        losses = Losses(
            self.network, training.phone_weight, training.alignment_weight, precision, training.transducer_weight,
            training.freeze_encoder, training.consistency_weight, training.crf_weight, self._phone_trigrams(),
            teachers, training.teacher_weight,
        )  # fmt: skip
        self.own_losses = losses
        self.losses = DistributedDataParallel(losses) if world > 1 else losses
        self.optimizer = Optimizer(
            self.network, training.learning_rate, training.weight_decay, muon=training.optimizer == "muon"
        )
        accumulate = config.training.accumulate
        self.steps_in = [-(-len(self.sampler.epoch(e)) // accumulate) for e in range(config.training.epochs)]
        self.steps = sum(self.steps_in)
        if not self.steps:
            raise ConfigError("data.weights draws no utterance in any epoch; raise them")
        self.progress = {
            "epoch": 0, "batch": 0, "best": math.inf, "since_best": 0, "skipped": 0, "clipped": 0, "audio_seconds": 0.0
        }  # fmt: skip
        self.step = 0
        self.bad_steps = 0  # in a row, with a non-finite gradient
        self.stragglers = Stragglers(self.network)
        self.record = Record(run, rank)
        self.description = self._describe(precision)

    def _phone_trigrams(self) -> torch.Tensor | None:
        """What the denominator of the final phones' CTC takes for likely; None where the network is trained without."""
        phones = self.network.phone_count
        weight = self.config.training.crf_weight
        if not weight:
            return None
        if not phones:
            raise ConfigError(
                f"training.crf_weight = {weight}: the network writes no phones; prepare data.train with --lexicon "
                "cmudict (English), or set it to 0"
            )
        return trigrams(self.corpus.phone_ids, phones).to(self.device)

    def _newest_checkpoint(self, before: Path | None = None) -> Path | None:
        """What rank 0 sees: another rank may see a shared folder as it was a moment ago."""
        found = [path for path in checkpoints(self.run / "checkpoints") if before is None or path < before]
        own = int(found[-1].name.partition("-")[2]) if found else -1
        step = int(self.ranks.gather([own])[0][0])
        return self.run / "checkpoints" / f"step-{step:08d}" if step >= 0 else None

    def _new_network(self, start: Network | None) -> Network:
        config = self.config
        statistics = self.corpus.statistics
        mean = torch.tensor(statistics.mean, dtype=torch.float32)
        variance = torch.tensor(statistics.variance, dtype=torch.float32)
        settings = NetworkConfig(format_version=FORMAT_VERSION, features=config.features, model=config.model)
        model, training = config.model, config.training
        wanted = (model.phone_layer or model.phone_output) and (training.phone_weight or training.freeze_encoder)
        phones = self.corpus.phones if wanted else ()
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)  # the same first weights on every rank
            states = self.corpus.state_count if training.alignment_weight and not training.freeze_encoder else 0
            network = Network(settings, self.corpus.tokenizer, mean, variance, phones, states)
        if start is not None:
            take_weights(network, start)
        return network

    def _describe(self, precision: str) -> str:
        sampler, corpus = self.sampler, self.corpus
        weights = sum(p.numel() for p in self.network.parameters())
        hours = corpus.n_samples[sampler.usable].sum() / SAMPLE_RATE / 3600
        left = {
            "too long": sampler.too_long,
            "more tokens than frames": sampler.too_dense,
            "without text": sampler.empty,
            "not spelled by the tokenizer": len(corpus.unspelled),
            "of data.dev not spelled": len(self.dev.unspelled) if self.dev is not None else 0,
        }
        left_out = ", ".join(f"{n} {why}" for why, n in left.items() if n) or "none"
        return (
            f"{self.config.model.kind} network, {weights / 1e6:.2f} M weights, {len(corpus.tokenizer)} tokens, "
            f"{len(corpus.phones)} phones; {len(sampler.usable)} utterances, {hours:.2f} h; left out: {left_out}; "
            f"{self.steps} steps in {self.config.training.epochs} epochs; {precision}, "
            f"{self.ranks.world} worker(s)"
        )

    def train(self, report: Report | None = None) -> Path:
        """All that is left of the run; gives the network's folder."""
        with self.record:
            damaged = self._restore()
            [finished], *_ = self.ranks.gather([self.record.is_finished(self.config)])
            self.record.begin(self.config, self.network, resumed=self.checkpoint is not None, damaged=damaged)
            text = self.description + (f"; continuing from {self.checkpoint.name}" if self.checkpoint else "")
            if damaged:
                text += f", as {' and '.join(path.name for path in damaged)} cannot be read"
            workers = ", ".join(self.ranks.names)
            self.record.log("start", self.step, text=text, total=self.steps, workers=workers)
            while self.progress["epoch"] < self.config.training.epochs and not self._out_of_patience():
                epoch = self.progress["epoch"]
                self._epoch(epoch)
                metrics = {"epoch": epoch, "step": self.step, **self._tune(epoch)}
                finished = False
                if report:
                    report(metrics)
            if finished:  # what was put beside the weights since then, calibrations for example, stays
                self.record.log("end", self.step, text="finished before; the model stays as it is")
                return self._folder
            return self._finish()

    def _restore(self) -> list[Path]:
        """Take up the newest checkpoint that all ranks can read; gives the newer ones, which they cannot.

        Raises:
            ModelError: there are checkpoints, and none can be read.
        """
        damaged: list[Path] = []
        first: ModelError | None = None
        path = self._newest_checkpoint()
        while path:
            kept, error = {}, None
            try:
                kept = load_checkpoint(path, self.network, self.optimizer, self.ranks.rank, self.device)
            except ModelError as reason:
                error = reason
            if not any(failed for [failed] in self.ranks.gather([error is not None])):
                self.step = kept.pop("step")
                self.progress |= kept
                break
            first = first or error or ModelError(f"{path}: another rank cannot continue from this checkpoint")
            damaged.append(path)
            path = self._newest_checkpoint(before=path)
        if first and not path:
            raise first
        self.checkpoint = path
        return damaged

    def _epoch(self, epoch: int) -> None:
        training = self.config.training
        planned = self.sampler.epoch(epoch)
        for start in range(self.progress["batch"], len(planned), training.accumulate):
            clock = time.perf_counter()
            group = planned[start : start + training.accumulate]
            rate = learning_rate(self.step, self.steps, training.learning_rate, training.warmup_steps)
            self.own_losses.crf_weight = training.crf_weight * (self.step >= training.crf_start * self.steps)
            loss, norm, seconds = self.train_on(group, epoch, rate)
            self.step += 1
            self.progress["batch"] = start + len(group)
            self.progress["audio_seconds"] += seconds
            self.record.log(
                "step", self.step, epoch=epoch, batch=start, loss=loss, learning_rate=rate, gradient_norm=norm,
                clip_rate=self.progress["clipped"] / (start // training.accumulate + 1),
                skipped=self.progress["skipped"], audio_hours=self.progress["audio_seconds"] / 3600,
                speed=seconds / (time.perf_counter() - clock),
            )  # fmt: skip
            if self.progress["batch"] < len(planned) and self.step % training.checkpoint_steps == 0:
                self._save()

    def train_on(self, group: list[Plan], epoch: int, rate: float) -> tuple[float, float, float]:
        """One step of the optimiser.

        Args:
            group: the global batches whose mean gradient is taken; this rank reads its share of each.
            epoch: from 0, for what is drawn at random.
            rate: the learning rate.

        Returns:
            The loss a token, the norm of the gradient before clipping, and the seconds of audio read by all ranks.

        Raises:
            AsrError: too many steps in a row had a non-finite gradient.
        """
        training = self.config.training
        self.losses.train()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        running = [value for name, value in self.network.named_buffers() if "running_" in name]
        before = [value.clone() for value in running]
        loss = torch.zeros((), device=self.device)
        seconds = work = 0.0
        utterances = 0
        clock = time.perf_counter()
        for batch in self.loader.batches(group, epoch):
            batch = batch.to(self.device)
            with self.ranks.meet():
                total, token_loss = self.losses(batch)
                work += time.perf_counter() - clock - self.stragglers.waited()
                # DistributedDataParallel takes the mean over ranks of what are parts of a sum
                (total * self.ranks.world / len(group)).backward()
            loss += token_loss / len(group)
            seconds += float(batch.cpu_lengths.sum()) / SAMPLE_RATE
            utterances += len(batch.lengths)
            clock = time.perf_counter()
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), training.clip_norm))
        if math.isfinite(norm):
            if training.clip_value:
                torch.nn.utils.clip_grad_value_(self.network.parameters(), training.clip_value)
            self.optimizer.step()
            self.bad_steps = 0
            self.progress["clipped"] += norm > training.clip_norm
        else:
            for value, kept in zip(running, before, strict=True):
                value.copy_(kept)  # what batch normalisation saw of this step is not to stay either
            self.progress["skipped"] += 1
            self.bad_steps += 1
            if self.bad_steps >= _BAD_STEPS_IN_A_ROW:
                raise AsrError(
                    f"{self.run}: {self.bad_steps} steps in a row had a non-finite gradient (step {self.step + 1}); "
                    "lower training.learning_rate, or look at the data of these steps in log.jsonl"
                )
        self.optimizer.zero_grad()
        rows = self.ranks.gather([float(loss), seconds, work / utterances])
        slow = self.stragglers.find([row[2] for row in rows])
        if slow:
            name, times = self.ranks.names[slow[0]], slow[1]
            text = f"{name} is slow: {times:.1f} times the others' work on an utterance, and they wait for it"
            self.record.log("slow", self.step + 1, text=text)
        return sum(row[0] for row in rows), norm, sum(row[1] for row in rows)

    def _save(self) -> None:
        states = self.ranks.gather_bytes(random_state(self.device))
        self.record.checkpoint(self.step, self.network, self.optimizer, states, self.progress)
        self.ranks.wait()

    def _tune(self, epoch: int) -> dict:
        """Keep this epoch's weights; where it is time, score the tuning data, keep the best, write a checkpoint."""
        training = self.config.training
        self.record.keep_epoch(epoch, self.network, training.average)
        self.progress["epoch"], self.progress["batch"], self.progress["clipped"] = epoch + 1, 0, 0
        if (epoch + 1) % training.score_epochs and epoch + 1 < training.epochs:
            return {}
        metrics = self._score()
        if metrics:
            hours = self.progress["audio_seconds"] / 3600
            self.record.log("dev", self.step, epoch=epoch, audio_hours=hours, **metrics)
        cer, best = metrics.get("cer", 0.0), self.progress["best"]
        self.progress["since_best"] = 0 if cer < best else self.progress["since_best"] + 1
        if cer <= best:
            self.progress["best"] = cer
            self.record.keep(self.network, self.run / "best")
        self._save()
        if self._out_of_patience():
            text = f"stopped after epoch {epoch + 1}: no better CER in the last {self.progress['since_best']} scorings"
            self.record.log("stop", self.step, text=text)
        return metrics

    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        return patience > 0 and self.progress["since_best"] >= patience

    @torch.no_grad()
    def _score(self) -> dict[str, float]:
        """Greedy character and word error rates and loss a token on the tuning data, each rank reading its share.

        A network with a transducer is scored by what that writes.
        """
        if self.dev is None or self.dev_loader is None:
            return {}
        self.network.eval()
        transducer = self.network.transducer
        search = None if transducer is None else TransducerSearch(transducer.arrays())
        loss = tokens = characters = character_errors = words = word_errors = 0.0
        plans = tuning_plan(self.dev, self.config.data.dev_minutes, self.config.training.batch_seconds)
        for plan in plans[self.ranks.rank :: self.ranks.world]:
            batch = self.dev_loader.batch(plan, 0).to(self.device)
            log_probs, frames, auxiliary = self.network.read_features(*features_of(self.network, batch))
            wanted = batch.tokens, batch.token_lengths, batch.counts
            if transducer is None:
                loss += float(ctc(log_probs, frames, *wanted))
            else:
                loss += float(rnnt(transducer, auxiliary["joint"], frames, *wanted))
            tokens += batch.token_count
            read = (log_probs if search is None else auxiliary["joint"]).float().cpu().numpy()
            for row, columns, n in zip(plan.rows, read, frames.tolist(), strict=True):
                decoder = GreedyDecoder() if search is None else search()
                decoder.accept(columns[:n])
                ids = [span.token for span in decoder.tokens()]
                hypothesis = " ".join(self.dev.tokenizer.decode(ids).split())
                reference = self.dev.text(row)
                characters += len(reference)
                character_errors += torchaudio.functional.edit_distance(reference, hypothesis)
                words += len(reference.split())
                word_errors += torchaudio.functional.edit_distance(reference.split(), hypothesis.split())
        rows = self.ranks.gather([loss, tokens, characters, character_errors, words, word_errors])
        loss, tokens, characters, character_errors, words, word_errors = map(sum, zip(*rows, strict=True))
        return {
            "loss": loss / max(tokens, 1),
            "cer": character_errors / max(characters, 1),
            "wer": word_errors / max(words, 1),
        }

    @torch.no_grad()
    def _measure_priors(self) -> np.ndarray:
        """The logarithm of each output's mean probability over training speech as it was recorded.

        Of a CTC-CRF's phones, a part of it: most of what is frequent its denominator has taken off.
        """
        self.network.eval()
        loader = Loader(self.corpus, self.config, self.config.features.hop, augment=False)
        total, count = torch.zeros(()), 0
        seconds = self.config.training.batch_seconds
        for plan in tuning_plan(self.corpus, _PRIOR_MINUTES, seconds, self.sampler.usable):
            batch = loader.batch(plan, 0).to(self.device)
            log_probs, frames, auxiliary = self.network.read_features(*features_of(self.network, batch))
            phones = auxiliary.get("final phones", log_probs[..., :0])
            outputs = torch.cat([log_probs, phones], dim=-1)
            spoken = valid(frames, outputs.shape[1])
            total = total + outputs[spoken].exp().sum(0).cpu()
            count += int(frames.sum())
        log_priors = np.log(np.maximum(total.numpy() / max(count, 1), 1e-6), dtype=np.float32)
        if self.config.training.crf_weight:
            log_priors[len(self.corpus.tokenizer) :] *= _CRF_PRIORS
        return log_priors

    def _finish(self) -> Path:
        """Write the model folder: of the weights that may be meant, those that score best on the tuning data.

        The mean of what a training started from and came to often beats both, and does so on other speech as well
        (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).
        """
        epochs, best = self.record.epochs(), self.run / "best" / WEIGHTS_FILE
        ways = {f"the mean of the last {len(epochs)} epochs": epochs}
        if self.dev is not None:
            ways["the best epoch"] = [best]
            if self.goes_on:
                ways["its mean with init_from"] = [best, Path(self.config.init_from) / WEIGHTS_FILE]
        scores: dict[str, float] = {}
        for name, files in ways.items():
            if files == [best]:
                scores[name] = self.progress["best"]  # scored at its end
            else:
                self._take_mean(files)
                scores[name] = self._score().get("cer", 0.0)
        kept = min(scores, key=lambda name: scores[name])
        self._take_mean(ways[kept])
        told = ", ".join(f"of {name} {cer:.1%}" for name, cer in scores.items())
        text = f"CER {told}" if self.dev is not None else f"no tuning data (data.dev): {kept} is kept"
        if self.ranks.rank == 0:
            frozen = self.config.training.freeze_encoder  # what it says is what it said
            self.network.log_priors = read_priors(Path(self.config.init_from)) if frozen else self._measure_priors()
            self.record.keep(self.network, self._folder)
        self.record.log("end", self.step, text=text)
        self.ranks.wait()
        return self._folder

    @property
    def _folder(self) -> Path:
        """Of the network that comes of it."""
        return self.run / "model" / self.config.model.kind

    def _take_mean(self, files: list[Path]) -> None:
        """Give the network, on all ranks, the mean of the weights that rank 0 reads."""
        if self.ranks.rank == 0:
            self.network.load_state_dict(average_weights(files, dithered=self.dithered))
        self.ranks.share(self.network.state_dict().values())
