"""Configurations: one complete TOML file a model, read into frozen dataclasses that refuse what is wrong."""

import dataclasses
import difflib
import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from asr.errors import ConfigError

T = TypeVar("T")

MOST_SEED = 2**63 - 1  # that torch takes

CELLS = ("lstm", "lstm-peephole", "lstm-coupled", "lstm-projection", "lstm-layernorm", "lstm-1997", "gru", "rnn")


def _check(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise ConfigError(f"{name} = {value!r}: must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Log-mel features."""

    sample_rate: int = 16_000  # Hz; audio of other rates is resampled
    bands: int = 80  # of the mel scale, a number each in a frame
    window_ms: int = 25  # of audio that a frame sees
    hop_ms: int = 10  # from one frame to the next
    low_hz: float = 20.0  # where the lowest band begins
    high_hz: float = 7_600.0  # where the highest band ends

    def __post_init__(self) -> None:
        _check(self.sample_rate == 16_000, "features.sample_rate", self.sample_rate, "16000")
        _check(1 <= self.bands <= 128, "features.bands", self.bands, "1 to 128")
        _check(1 <= self.hop_ms <= self.window_ms, "features.hop_ms", self.hop_ms, "1 to window_ms")
        _check(0 <= self.low_hz < self.high_hz, "features.low_hz", self.low_hz, "at least 0 and below high_hz")
        _check(self.high_hz <= self.sample_rate / 2, "features.high_hz", self.high_hz, "at most half sample_rate")

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return self.sample_rate * self.hop_ms // 1000


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: strided convolutions, recurrent layers, look-ahead, output."""

    bidirectional: bool  # true: offline, reads whole recordings; false: streaming
    channels: tuple[int, ...] = (192, 256)  # outputs of each convolution before the recurrent layers
    kernels: tuple[int, ...] = (5, 3)  # frames that each of them sees
    strides: tuple[int, ...] = (2, 2)  # frames to one of the next: 2 by 2 make frames of 40 ms
    utterance_norm: float = 0.0  # seconds after which half of what an utterance's levels differ by is taken off; 0: off
    hidden: int = 224  # units of a recurrent layer, in each direction
    layers: int = 3  # recurrent layers
    look_ahead: int = 0  # frames (of 40 ms, say) that a streaming network waits for; accuracy against delay
    dropout: float = 0.15  # share of each layer's output hidden in training
    phone_output: bool = False  # phones beside the tokens at the end, which the beam search reads as well
    phone_layer: int = 0  # the recurrent layer that learns phones in training; 0: none (no pronunciations needed)
    prediction: int = 0  # units of a transducer's prediction network and of its joint (asr.nn.transducer); 0: none
    cell: str = "lstm"  # of the recurrent layers; equations in asr.nn.cells
    residual: bool = False  # add each recurrent layer's input to its output, where both are of one size
    attention: int = 0  # frames of the past that self-attention after the recurrent layers sees (both ways offline)
    forget_bias: float = 1.0  # at the start, of the gate that keeps the memory: open
    chrono_frames: int = 0  # where above 0: memories start spread over 1 to so many frames (chrono initialisation)
    variational_dropout: float = 0.0  # share of the recurrent layers' input and state hidden, the same all along
    zoneout: float = 0.0  # probability that a unit of a recurrent state keeps its value for a frame

    def __post_init__(self) -> None:
        widths = len(self.channels) > 0 and min(self.channels) > 0
        _check(widths, "model.channels", self.channels, "a list of at least one width above 0")
        for name in ("kernels", "strides"):
            value = getattr(self, name)
            _check(len(value) == len(self.channels), f"model.{name}", value, "as many as model.channels")
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            _check(1 <= stride <= kernel, "model.strides", self.strides, "1 up to the kernel beside it")
        _check(self.utterance_norm >= 0, "model.utterance_norm", self.utterance_norm, "0 (off) or more seconds")
        _check(self.hidden >= 1, "model.hidden", self.hidden, "at least 1")
        _check(self.layers >= 1, "model.layers", self.layers, "at least 1")
        _check(0 <= self.dropout < 1, "model.dropout", self.dropout, "0 up to 1")
        _check(0 <= self.look_ahead <= 32, "model.look_ahead", self.look_ahead, "0 to 32 frames")
        _check(
            not (self.bidirectional and self.look_ahead), "model.look_ahead", self.look_ahead,
            "0 in a bidirectional network, which sees everything ahead",
        )  # fmt: skip
        _check(0 <= self.phone_layer <= self.layers, "model.phone_layer", self.phone_layer, "0 (none) to model.layers")
        _check(self.prediction >= 0, "model.prediction", self.prediction, "0 (no transducer) or more units")
        _check(self.cell in CELLS, "model.cell", self.cell, f"one of {', '.join(CELLS)}")
        _check(
            self.cell != "lstm-projection" or self.hidden >= 2, "model.hidden", self.hidden,
            "at least 2 with lstm-projection, whose output has half as many",
        )  # fmt: skip
        _check(0 <= self.attention <= 1000, "model.attention", self.attention, "0 (none) to 1000 frames")
        _check(-10 <= self.forget_bias <= 10, "model.forget_bias", self.forget_bias, "-10 to 10")
        _check(
            self.chrono_frames == 0 or self.chrono_frames >= 3, "model.chrono_frames", self.chrono_frames,
            "0 (off) or at least 3 frames",
        )  # fmt: skip
        _check(
            self.chrono_frames == 0 or self.cell not in ("rnn", "lstm-1997"), "model.chrono_frames",
            self.chrono_frames, f"0 with {self.cell}, which has no gate that keeps the memory",
        )  # fmt: skip
        for name in ("variational_dropout", "zoneout"):
            _check(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "0 up to 1")

    @property
    def kind(self) -> str:
        """The folder that such a network has in a model: "offline" or "streaming"."""
        return "offline" if self.bidirectional else "streaming"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prepared folders to train on and to tune on."""

    train: tuple[str, ...]  # folders that `asr prepare` wrote
    dev: tuple[str, ...] = ()  # folders to score each epoch on; the best one is kept
    weights: dict[str, float] = field(default_factory=dict)  # share of a source drawn each epoch, by its name
    max_seconds: float = 20.0  # longer utterances are left out, and counted
    cut_seconds: float = 0.0  # aligned utterances are cut in pauses to pieces of about so much; 0: never
    dev_minutes: float = 30.0  # of the tuning data, evenly picked, scored after each epoch

    def __post_init__(self) -> None:
        _check(len(self.train) > 0, "data.train", self.train, "a list of at least one prepared folder")
        _check(self.max_seconds > 0, "data.max_seconds", self.max_seconds, "above 0")
        _check(self.cut_seconds >= 0, "data.cut_seconds", self.cut_seconds, "not negative")
        _check(self.dev_minutes > 0, "data.dev_minutes", self.dev_minutes, "above 0")
        for source, weight in self.weights.items():
            _check(0 <= weight <= 1, f"data.weights.{source}", weight, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to the training audio and its features; everything is drawn per utterance from the seed."""

    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)  # at which an utterance is played, one of them each time
    gain_db: float = 6.0  # louder or quieter by up to so much
    quiet_db: float = 0.0  # then half of the utterances are made quieter by up to so much, as distant speakers are
    noise: str = ""  # a folder of recordings of noise that `asr prepare` wrote
    noise_probability: float = 0.0  # that noise is mixed in
    noise_snr_db: tuple[float, ...] = (5.0, 30.0)  # lowest and highest: how far below the speech it is
    reverberation_probability: float = 0.0  # that an utterance sounds as in a room
    low_pass_probability: float = 0.0  # that it loses its high frequencies, as by telephone
    lead_seconds: float = 0.0  # half of the utterances begin after up to so much silence, as live audio does
    silence_probability: float = 0.0  # an utterance gives way to noise alone, or to nothing, with an empty text
    time_masks: int = 2  # stretches of an utterance that are hidden (SpecAugment)
    time_mask_frames: int = 30  # of 10 ms, the longest of them
    band_masks: int = 2  # ranges of bands that are hidden
    band_mask_bands: int = 15  # the widest of them

    def __post_init__(self) -> None:
        _check(
            all(0.5 <= s <= 2 for s in self.speeds) and len(self.speeds) > 0, "augment.speeds", self.speeds, "0.5 to 2"
        )
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_probability")):
            _check(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "0 to 1")
        low_high = len(self.noise_snr_db) == 2 and -math.inf < self.noise_snr_db[0] <= self.noise_snr_db[1] < math.inf
        _check(low_high, "augment.noise_snr_db", self.noise_snr_db, "[lowest, highest]")
        for name in (
            "gain_db",
            "quiet_db",
            "lead_seconds",
            "time_masks",
            "time_mask_frames",
            "band_masks",
            "band_mask_bands",
        ):
            _check(
                0 <= getattr(self, name) < math.inf, f"augment.{name}", getattr(self, name), "at least 0, and finite"
            )
        _check(
            self.noise_probability == 0 or self.noise != "", "augment.noise", self.noise,
            "a prepared folder where augment.noise_probability is above 0",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimisation."""

    epochs: int  # times through the data
    seed: int = 1  # of all that is drawn by chance
    batch_seconds: float = 90.0  # of audio in a batch, padding included
    batch_utterances: int = 32  # in a batch, at the most
    accumulate: int = 1  # batches to an update
    optimizer: str = "adamw"  # or "muon" (asr.training.optimizer): fewer updates, for batches of minutes
    learning_rate: float = 2e-3  # the highest; it falls to 0 at the end
    warmup_steps: int = 300  # updates until it is reached: at most a tenth of all
    weight_decay: float = 1e-2  # of all weights, a step, times the learning rate
    clip_norm: float = 2.0  # of the whole gradient
    clip_value: float = 0.0  # of each of its entries, after clip_norm; 0: off
    phone_weight: float = 0.5  # of the loss of the phones beside that of the tokens
    alignment_weight: float = 0.0  # of phone states frame by frame, on the phone layer, where `asr align` was run
    crf_weight: float = 0.0  # of the denominator of the phones' CTC at the output (model.phone_output): 1 is a CTC-CRF
    crf_start: float = 0.0  # share of the updates after which it counts: a new network is better taught by CTC first
    consistency_weight: float = 0.0  # between two views of each utterance, masked apart (CR-CTC); a batch holds both
    teacher_weight: float = 1.0  # of the divergence from what `teachers` say of each frame, beside each CTC
    transducer_weight: float = 1.0  # of the transducer's loss beside CTC's, where model.prediction is above 0
    freeze_encoder: bool = False  # train the transducer alone, on the network that init_from names
    curriculum_seconds: float = 0.0  # the first epoch takes no longer utterances; 0: it takes all
    curriculum_step_seconds: float = 1.0  # so much longer ones are taken in each epoch after it
    curriculum_epochs: int = 5  # after which all are taken
    precision: str = "auto"  # "fp32", "bf16", or bf16 where the machine has instructions for it
    threads: int = 1  # of a worker
    checkpoint_steps: int = 250  # updates from one checkpoint to the next
    score_epochs: int = 1  # from one scoring of data.dev, with a checkpoint, to the next
    average: int = 5  # of the last epochs, whose mean is tried at the end
    patience: int = 0  # scorings without a better CER on data.dev after which training stops; 0: all epochs
    hang_seconds: float = 600.0  # a worker for which the others wait so long is named, and the run stops

    @property
    def views(self) -> int:
        """Under how many masks each utterance of a batch is read."""
        return 2 if self.consistency_weight else 1

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, "training.epochs", self.epochs, "at least 1")
        _check(0 <= self.seed <= MOST_SEED, "training.seed", self.seed, f"0 to {MOST_SEED}")
        _check(self.batch_seconds > 0, "training.batch_seconds", self.batch_seconds, "above 0")
        views = f"at least {self.views}, the views of an utterance"
        _check(self.batch_utterances >= self.views, "training.batch_utterances", self.batch_utterances, views)
        _check(self.accumulate >= 1, "training.accumulate", self.accumulate, "at least 1")
        _check(self.optimizer in ("adamw", "muon"), "training.optimizer", self.optimizer, '"adamw" or "muon"')
        _check(0 < self.learning_rate <= 10, "training.learning_rate", self.learning_rate, "above 0, at most 10")
        _check(self.clip_norm > 0, "training.clip_norm", self.clip_norm, "above 0")
        for name in (
            "clip_value", "warmup_steps", "weight_decay", "phone_weight", "alignment_weight", "transducer_weight",
            "consistency_weight", "crf_weight", "teacher_weight", "curriculum_seconds", "curriculum_step_seconds",
            "curriculum_epochs",
        ):  # fmt: skip
            _check(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "at least 0")
        _check(
            self.precision in ("auto", "fp32", "bf16"), "training.precision", self.precision, '"auto", "fp32" or "bf16"'
        )
        _check(self.threads >= 1, "training.threads", self.threads, "at least 1")
        _check(self.checkpoint_steps >= 1, "training.checkpoint_steps", self.checkpoint_steps, "at least 1")
        _check(0 <= self.crf_start < 1, "training.crf_start", self.crf_start, "0 up to 1")
        _check(self.score_epochs >= 1, "training.score_epochs", self.score_epochs, "at least 1")
        _check(self.average >= 1, "training.average", self.average, "at least 1")
        _check(self.patience >= 0, "training.patience", self.patience, "0 (never stop early) or more scorings")
        _check(1 <= self.hang_seconds <= 1e6, "training.hang_seconds", self.hang_seconds, "1 to 1000000")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training: the data, the features, the network, the optimisation."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    features: FeatureConfig = FeatureConfig()
    augment: AugmentConfig = AugmentConfig()
    init_from: str = ""  # the folder of a network to start from
    teachers: tuple[str, ...] = ()  # folders of networks of the same tokens, from whose mean this one learns too
    new_tokens: bool = False  # with init_from: tokens of data.train that it lacks are added, with new outputs

    def __post_init__(self) -> None:
        bands = self.augment.band_mask_bands
        _check(bands <= self.features.bands, "augment.band_mask_bands", bands, "at most features.bands")
        _check(self.init_from != "" or not self.new_tokens, "new_tokens", True, "false without init_from")
        training = self.training
        _check(
            self.model.prediction == 0 or training.transducer_weight > 0, "training.transducer_weight",
            training.transducer_weight, "above 0 with model.prediction, or nothing teaches the transducer",
        )  # fmt: skip
        _check(
            not training.freeze_encoder or (self.model.prediction > 0 and self.init_from != "" and not self.new_tokens),
            "training.freeze_encoder", True, "false without a transducer to train (model.prediction) and a trained "
            "network to train it on (init_from, with its own tokens)",
        )  # fmt: skip
        _check(
            not (training.freeze_encoder and training.consistency_weight), "training.consistency_weight",
            training.consistency_weight, "0 with training.freeze_encoder: it is of CTC, which is not trained then",
        )  # fmt: skip
        _check(
            not (training.freeze_encoder and self.teachers), "teachers", list(self.teachers),
            "none with training.freeze_encoder: they teach what is not trained then",
        )  # fmt: skip
        _check(
            training.crf_weight == 0 or self.model.phone_output, "training.crf_weight", training.crf_weight,
            "0 without model.phone_output: it is of the phones at the output",
        )  # fmt: skip
        patience = training.patience
        _check(patience == 0 or len(self.data.dev) > 0, "training.patience", patience, "0 without data.dev")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What a network folder's config.toml holds."""

    format_version: int
    features: FeatureConfig
    model: ModelConfig


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a training configuration; `overrides` are "section.key=value", with values as in TOML.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown, a value is impossible.
    """
    values = read_toml(path)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: write section.key=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word is a string
        table = values
        *sections, key = name.strip().split(".")
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {override}: {section} is a value, not a section")
        table[key] = value
    return from_dict(TrainConfig, values, where=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The contents of a TOML file; ConfigError names the file and the fault."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def from_dict(cls: type[T], values: dict[str, Any], *, where: str, prefix: str = "") -> T:
    """Build a config class from plain values, refusing unknown keys by name and wrong types by value."""
    hints = get_type_hints(cls)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        advice = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(hints)}"
        raise ConfigError(f"{where}: unknown key {prefix}{unknown[0]}{advice}")
    for known in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        if required and known.name not in values:
            raise ConfigError(f"{where}: {prefix}{known.name} is missing")
    made = {key: _convert(hints[key], value, where, f"{prefix}{key}") for key, value in values.items()}
    try:
        return cls(**made)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(kind: Any, value: Any, where: str, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {name} = {value!r}: must be a section")
        return from_dict(kind, value, where=where, prefix=f"{name}.")  # type: ignore[arg-type]
    if get_origin(kind) is tuple and get_args(kind)[0] is str and isinstance(value, str):
        return (value,)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_convert(get_args(kind)[0], v, where, name) for v in value)
    if get_origin(kind) is dict and isinstance(value, dict):
        return {k: _convert(get_args(kind)[1], v, where, f"{name}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not (isinstance(kind, type) and isinstance(value, kind)) or (kind is int and isinstance(value, bool)):
        expected = "a list" if get_origin(kind) is tuple else f"of type {getattr(kind, '__name__', kind)}"
        raise ConfigError(f"{where}: {name} = {value!r}: must be {expected}")
    return value


def to_toml(config: Any) -> str:
    """A config object as a complete TOML document, which `from_dict` reads back to an equal object."""
    plain, sections = [], []
    for known in dataclasses.fields(config):
        value = getattr(config, known.name)
        if dataclasses.is_dataclass(value):
            sections.append(f"\n[{known.name}]\n{to_toml(value)}")
        else:
            plain.append(f"{known.name} = {_toml_value(value)}\n")
    return "".join(plain + sections)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # "inf", as TOML has it
    return json.dumps(value, ensure_ascii=False)
