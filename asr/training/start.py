"""What must hold before a training starts or goes on, and the weights that it starts from."""

import dataclasses
import difflib
import hashlib
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from asr.augment import changes_waveform
from asr.config import FeatureConfig, TrainConfig, load_config
from asr.errors import ConfigError
from asr.models import Network, load_network
from asr.nn import LookAhead
from asr.runtime.folder import WEIGHTS_FILE
from asr.training.checkpoint import checkpoints
from asr.training.shards import ALIGNMENT_FILE, ShardDataset

# of [training]: what may change when a run goes on, as it changes nothing of what is learnt
_FREE = {"threads": 1, "checkpoint_steps": 1, "score_epochs": 1, "average": 1, "patience": 0, "hang_seconds": 600.0}
_HELP = "state_output."  # in training, whose size depends on the data
_OF_TRANSDUCER = ("prediction", "dropout")  # of [model], what may differ where the encoder stays as it is


def check_inputs(config: TrainConfig, run: Path) -> None:
    """Refuse a training that cannot start, before anything is written or another process started.

    Raises:
        AsrError: prepared data is missing or was made with other features, `data.weights` names no source of it,
            `init_from` or one of `teachers` is no network, or the run was started with other data, alignments or
            configuration (threads, checkpoint_steps, score_epochs, average, patience and hang_seconds may differ).
    """
    sources: set[str] = set()
    aligned = False
    for folder in _folders(config):
        dataset = ShardDataset(folder)
        if folder in config.data.train:
            sources.update(dataset.sources)
            aligned = aligned or bool(dataset.aligned_phones)
        if dataset.info["store"] == "features" and changes_waveform(config.augment):
            raise ConfigError(
                f"{folder}: holds features, so the waveform cannot be augmented; set augment.speeds = [1.0], "
                "gain_db, quiet_db and the probabilities to 0, or prepare with --store audio"
            )
        wanted = dataclasses.asdict(config.features)
        made_with = dataset.info.get("features", dataclasses.asdict(FeatureConfig()))
        if dataset.info["store"] == "audio":  # its statistics are those of other frames as well
            made_with = {**made_with, "hop_ms": wanted["hop_ms"]}
        if made_with != wanted:
            raise ConfigError(f"{folder}: its statistics are of features {made_with}, [features] asks for others")
    weight = config.training.alignment_weight
    if weight and not (aligned and config.model.phone_layer):
        reason = "no folder of data.train is aligned" if config.model.phone_layer else "model.phone_layer is 0"
        raise ConfigError(
            f"training.alignment_weight = {weight}: {reason}; run `asr align {config.data.train[0]}` (English, and "
            "model.phone_layer above 0), or set it to 0"
        )
    for name in config.data.weights:
        if name not in sources:
            near = difflib.get_close_matches(name, sources, n=1)
            advice = f"did you mean {near[0]}?" if near else f"the sources are {', '.join(sorted(sources))}"
            raise ConfigError(f"data.weights.{name}: no utterance of data.train comes from {name}; {advice}")
    if config.init_from:
        start = load_network(config.init_from)
        wanted = dataclasses.replace(
            start.config.model, **{name: getattr(config.model, name) for name in _OF_TRANSDUCER}
        )
        if config.training.freeze_encoder and config.model != wanted:
            raise ConfigError(
                f"training.freeze_encoder: the network of init_from has another [model] than the configuration; only "
                f"{' and '.join(_OF_TRANSDUCER)} may differ, as nothing else is trained"
            )
    for folder in config.teachers:
        load_network(folder)
    if checkpoints(run / "checkpoints"):
        _check_unchanged(config, run)


def _check_unchanged(config: TrainConfig, run: Path) -> None:
    def core(c: TrainConfig) -> TrainConfig:
        return dataclasses.replace(c, training=dataclasses.replace(c.training, **_FREE))

    before, now = core(load_config(run / "config.toml")), core(config)
    names = [f.name for f in dataclasses.fields(config) if getattr(before, f.name) != getattr(now, f.name)]
    if names:
        raise ConfigError(
            f"{run}: was started with another configuration ([{'], ['.join(names)}] differ); "
            "give another --out, or the same values"
        )
    kept = run / "data.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for name, fingerprint in fingerprints(config).items():
        if known.get(name, fingerprint) != fingerprint:
            made = "aligned" if name.endswith(ALIGNMENT_FILE) else "trained" if name in config.teachers else "prepared"
            raise ConfigError(
                f"{name}: was {made} anew since {run} was started with it, and now holds other data; "
                "bring back what it held, or give another --out"
            )


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """A hash of the contents of each prepared folder, and teacher, that the training reads, by its name.

    It covers the order of the utterances, their texts and lengths, and the statistics of their features. Alignments,
    phones and sources have hashes of their own, where the training looks at them.
    """
    found = {}
    looks = config.training.alignment_weight or config.data.cut_seconds
    for folder in _folders(config):
        dataset = ShardDataset(folder)
        rows = [dataset.ids, dataset.texts, dataset.n_samples.tolist()]
        statistics = [dataset.info[name] for name in ("store", "frames", "mean", "variance")]
        found[folder] = _hash([rows, statistics])
        if folder not in config.data.train:
            continue
        if looks:
            found[f"{folder}/{ALIGNMENT_FILE}"] = dataset.alignment_hash
        if config.model.phone_layer or config.model.phone_output:
            found[f"{folder} (phones)"] = _hash(dataset.phones)
        if config.data.weights:
            found[f"{folder} (sources)"] = _hash(dataset.sources)
    for folder in config.teachers:
        found[folder] = hashlib.sha256((Path(folder) / WEIGHTS_FILE).read_bytes()).hexdigest()
    return found


def _hash(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _folders(config: TrainConfig) -> list[str]:
    return [*config.data.train, *config.data.dev, *filter(None, [config.augment.noise])]


def take_weights(network: Network, start: Network) -> None:
    """Copy the weights of `start` into `network`, except outputs for other tokens or phones, which stay new.

    Where the tokens of `network` begin with those of `start`, only the outputs of the others are new. A transducer is
    new that `start` does not have, or has with other units or tokens.

    A network may have more recurrent layers than `start`: those on top, and the output, stay new (Zeyer et al. 2017,
    https://arxiv.org/abs/1606.06871, train deep stacks so). Of another look-ahead, it has the weights for the frames
    that both see, and zeros for others.

    Raises:
        ConfigError: the networks are of different shapes.
    """
    new = [_HELP]
    deeper = network.config.model.layers - start.config.model.layers
    if deeper > 0:
        first = network.first_recurrent + start.config.model.layers
        new += [f"layers.{i}." for i in range(first, first + deeper)]
    known = len(start.tokenizer)
    if deeper > 0 or network.tokenizer.tokens[:known] != start.tokenizer.tokens:
        new.append(f"layers.{len(network.layers) - 1}.")
    if network.phones != start.phones or network.config.model.phone_layer != start.config.model.phone_layer:
        new.append("phone_output.")
    if network.phones != start.phones or not start.config.model.phone_output:
        new.append(f"layers.{len(network.layers) - 1}.phones.")
    if network.joint_size != start.joint_size or network.tokenizer.tokens != start.tokenizer.tokens:
        new += ["transducer.", f"layers.{len(network.layers) - 1}.joint."]
    own, theirs = network.state_dict(), start.state_dict()
    for part in ("weight", "bias"):
        rows = own[f"layers.{len(network.layers) - 1}.linear.{part}"]
        name = f"layers.{len(start.layers) - 1}.linear.{part}"
        if rows.shape[1:] == theirs[name].shape[1:]:
            theirs[name] = torch.cat([theirs[name], rows[known:]])
    for i, layer in enumerate(start.layers):
        if isinstance(layer, LookAhead) and (frames := network.config.model.look_ahead):
            weight = theirs[f"layers.{i}.weight"][: frames + 1]
            theirs[f"layers.{i}.weight"] = F.pad(weight, (0, 0, 0, frames + 1 - len(weight)))
    wanted = {name: _shifted(name, network, deeper) for name in own if not name.startswith(tuple(new))}
    unfit = [name for name, old in wanted.items() if old not in theirs or theirs[old].shape != own[name].shape]
    if unfit:
        raise ConfigError(
            f"init_from: {len(unfit)} tensors do not fit, the first is {unfit[0]}; use the same [model], more layers, "
            "or another look_ahead, if both have one"
        )
    network.load_state_dict({**own, **{name: theirs[old] for name, old in wanted.items()}})


def same_shape(network: Network, start: Network) -> bool:
    """Whether `take_weights` leaves nothing new but the help in training."""
    own, theirs = network.state_dict(), start.state_dict()
    wanted = [name for name in own if not name.startswith(_HELP)]
    same = network.tokenizer.tokens == start.tokenizer.tokens and network.phones == start.phones
    return same and all(name in theirs and theirs[name].shape == own[name].shape for name in wanted)


def _shifted(name: str, network: Network, deeper: int) -> str:
    """What a weight behind the recurrent layers was called with fewer of them."""
    kind, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    behind = kind == "layers" and int(number) >= network.first_recurrent + network.config.model.layers
    return f"layers.{int(number) - deeper}.{rest}" if behind and deeper > 0 else name


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The configuration with its data named from the root: Ray's workers run in a folder of their own."""

    def absolute(path: str) -> str:
        return path if not path or "://" in path else str(Path(path).absolute())

    data = dataclasses.replace(
        config.data, train=tuple(map(absolute, config.data.train)), dev=tuple(map(absolute, config.data.dev))
    )
    augment = dataclasses.replace(config.augment, noise=absolute(config.augment.noise))
    teachers = tuple(map(absolute, config.teachers))
    init_from = absolute(config.init_from)
    return dataclasses.replace(config, data=data, augment=augment, init_from=init_from, teachers=teachers)
