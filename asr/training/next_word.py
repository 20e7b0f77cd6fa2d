"""Trains a next-word model by truncated back-propagation through time; stopped, it goes on as if undisturbed."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asr.errors import ConfigError, ModelError, TextError
from asr.files import replacing_folder
from asr.next_word import NextWord, load, save
from asr.nn import State, detach
from asr.training.step import choose_precision, learning_rate

_SAMPLED_POWER = 0.75  # of a word's count, in proportion to which it is sampled (Mikolov et al. 2013)
_TRAINING = "training.safetensors"  # beside the model: all that it takes to go on


@dataclass(frozen=True, kw_only=True)
class NextWordTraining:
    """How a next-word model is trained.

    Attributes:
        rows: the text is cut into so many long rows that are read side by side.
        steps: words to a piece of a row: the state is carried to the next piece, the gradient ends.
        rate: of Adam, at its highest.
        clip_norm: of the gradient.
        sampled: the right words compete with so many at an update, drawn anew each time, common ones more often; 0:
            with all. With a large lexicon that is most of the work.
        precision: "auto" (bf16 where the machine has instructions for it), "fp32" or "bf16".
    """

    epochs: int = 3
    rows: int = 64
    steps: int = 32
    rate: float = 4e-3
    clip_norm: float = 1.0
    seed: int = 1
    sampled: int = 0
    precision: str = "auto"


Show = Callable[[int, int, float], None]  # updates done, of so many, the loss a word


def train_next_word(
    model: NextWord,
    lines: Sequence[str],
    folder: Path,
    options: NextWordTraining,
    *,
    show: Show = lambda done, total, loss: None,
    save_every: int = 200,
) -> None:
    """Train on sentences and keep the model in `folder`, which after each save is a whole model; or go on from there.

    Args:
        model: trained in place; what it starts from when there is nothing in `folder`.
        lines: words parted by spaces, normalised already, in the order in which they were written.
        save_every: updates from one save to the next.

    Raises:
        TextError: the text is too short.
        ConfigError: what is in `folder` was trained on other text, or with other options.
        ModelError: what is in `folder` is damaged.
    """
    stream = model.encode(lines)
    length = (len(stream) - 1) // options.rows  # of a row
    if length < options.steps:
        raise TextError(f"{len(stream)} words: too few to train on; {options.rows * options.steps + 1} are needed")
    said = stream[: options.rows * length].view(options.rows, length)
    wanted = stream[1 : options.rows * length + 1].view(options.rows, length)
    pieces = range(0, length - options.steps + 1, options.steps)
    total = options.epochs * len(pieces)

    counts = torch.bincount(stream, minlength=len(model.words)).float()
    drawn = counts.clamp(min=1).pow(_SAMPLED_POWER)
    drawn /= drawn.sum()
    logs = (-torch.expm1(options.sampled * torch.log1p(-drawn))).log()  # of a word's probability to be in a sample

    precision = choose_precision(options.precision, torch.device("cpu"))
    torch.manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate, fused=True)
    about = {"training": dataclasses.asdict(options), "text": _fingerprint(stream, model.words)}
    done, state = 0, model.initial_state(options.rows)
    if folder.exists():
        done, state = _go_on(model, optimizer, folder, about)
    model.train()
    while done < total:
        piece = pieces[done % len(pieces)]
        if piece == 0:
            state = model.initial_state(options.rows)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, total, options.rate, total // 20)
        read, right = said[:, piece : piece + options.steps], wanted[:, piece : piece + options.steps].flatten()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if options.sampled:
                y, state = model.read(read, detach(state))
                words = torch.multinomial(drawn, options.sampled, replacement=True).unique()
                loss = model.sampled_loss(y.flatten(0, 1), right, words, logs)
            else:
                scores, state = model.step(read, detach(state))
                loss = nn.functional.cross_entropy(scores.float().flatten(0, 1), right)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        done += 1
        show(done, total, float(loss.detach()))
        if done % save_every == 0 or done == total:
            _keep(model, optimizer, detach(state), folder, {**about, "updates": done})
    model.eval()


def _keep(model: NextWord, optimizer: torch.optim.Optimizer, state: State, folder: Path, about: dict) -> None:
    """Write the model and all that it takes to go on, in one step."""
    moments = {f"adam.{i}.{k}": v for i, entry in optimizer.state_dict()["state"].items() for k, v in entry.items()}
    memory = {f"state.{i}": part.contiguous() for i, part in enumerate(state)}
    with replacing_folder(folder) as temporary:
        save(model, temporary, about)
        save_file({**moments, **memory, "random": torch.get_rng_state()}, temporary / _TRAINING)


def _go_on(model: NextWord, optimizer: torch.optim.Optimizer, folder: Path, about: dict) -> tuple[int, State]:
    """Restore what `_keep` wrote; gives the updates done and the carried state."""
    kept, told = load(folder)
    for name, value in (*about.items(), ("kind", model.kind), ("size", model.size), ("dropout", model.dropout_rate)):
        if told.get(name) != value:
            raise ConfigError(
                f"{folder}: was trained with another {name} ({json.dumps(told.get(name))}, not {json.dumps(value)}); "
                "give another folder, or remove this one"
            )
    model.load_state_dict(kept.state_dict())
    try:
        tensors = load_file(folder / _TRAINING)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["random"])
        state = tuple(tensors[f"state.{i}"] for i in range(len(model.initial_state(1))))
        return told["updates"], state
    except Exception as error:
        raise ModelError(f"{folder}: cannot go on from here ({str(error).splitlines()[0]}); remove it") from error


def _fingerprint(stream: Tensor, words: Sequence[str]) -> str:
    """What tells a text, and the words that the model knows of it, from others."""
    digest = hashlib.sha256(stream.numpy().tobytes())
    digest.update("\n".join(words).encode())
    return digest.hexdigest()[:16]
