"""The model folder: finds what is in it and names what is missing, half-written or of another version."""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import numpy as np

from asr.config import read_toml
from asr.errors import ConfigError, ModelError

FORMAT_VERSION = 1
NETWORKS = ("offline", "streaming")
PREDICTION_FILE = "prediction.npz"  # in the folder of a network with a transducer
WEIGHTS_FILE = "weights.safetensors"
GRAPHS = {"int8": "model.int8.onnx", "fp32": "model.onnx"}
LM_FOLDER, LM_FILE, LM_LEXICON = "lm", "lm.npz", "lexicon.npz"
_PRIORS = "priors.txt"  # of a network
_PHONES = "phones.txt"
NEXT_WORD_FOLDER = "next-word"
_LM_FILES = (LM_FILE, "lm.arpa.gz", "lm.arpa")  # ARPA: of other programs; it takes seconds to read
_SHIPPED = Path(__file__).parents[1] / "shipped"


def shipped_model() -> Path:
    """The model that comes with this package.

    Raises:
        ModelError: this installation has none.
    """
    if not _SHIPPED.is_dir():
        raise ModelError("this installation ships no model; name a model folder")
    return _SHIPPED


def find_networks(path: str | Path | None) -> dict[str, Path]:
    """The networks of a model folder by name, "offline" or "streaming" or both; None is the shipped model.

    Raises:
        ModelError: no such folder, no network in it, or one that is incomplete or of another version.
    """
    folder = shipped_model() if path is None else Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder}: " + ("not a folder" if folder.exists() else "no such model folder"))
    networks = {name: folder / name for name in NETWORKS if (folder / name).is_dir()}
    if not networks:
        if (folder / "model").is_dir():
            hint = f"; this looks like a training run, whose model is {folder / 'model'}"
        elif (folder / "checkpoints").is_dir():
            hint = "; this looks like a training run that has not ended: `asr train`, again, goes on with it"
        elif (folder / "config.toml").is_file():
            hint = f"; this looks like one network of the model {folder.absolute().parent}"
        else:
            hint = ""
        raise ModelError(f"{folder}: not a model: neither offline/ nor streaming/ is in it{hint}")
    for network in networks.values():
        _check(network)
    return networks


def choose_network(networks: Collection[str], streaming: bool = False) -> str:
    """The offline network of those that a model has, unless it has none or the streaming one is asked for."""
    return "streaming" if streaming or "offline" not in networks else "offline"


def _check(network: Path) -> None:
    for name in ("config.toml", "tokens.txt"):
        if not (network / name).is_file():
            raise ModelError(f"{network}: {name} is missing; the model is incomplete")
    try:
        told = read_toml(network / "config.toml")
    except ConfigError as error:
        raise ModelError(f"{error}; the model is damaged") from error
    if (version := told.get("format_version")) != FORMAT_VERSION:
        raise ModelError(f"{network}: format version {version}, this program reads {FORMAT_VERSION}")
    if not isinstance(told.get("model"), dict):
        raise ModelError(f"{network / 'config.toml'}: [model] is missing; the model is damaged")


def find_graph(network: Path, precision: str | None) -> Path:
    """The ONNX graph of a network folder; precision None takes int8 before fp32.

    Raises:
        ModelError: it is not there; the message says how to make it.
    """
    wanted = list(GRAPHS.values()) if precision is None else [GRAPHS[precision]]
    for name in wanted:
        if (network / name).is_file():
            return network / name
    missing = " and ".join(wanted) + (" are" if len(wanted) > 1 else " is")
    present = [precision for precision, name in GRAPHS.items() if (network / name).is_file()]
    raise ModelError(
        f"{network}: {missing} missing"
        + (f" (it has {', '.join(present)})" if present else "")
        + f"; `asr export {network.parent} -o DIR --to model` makes a folder with every graph"
    )


def find_lexicon(path: str | Path | None) -> Path | None:
    """The pronunciations beside the n-gram model of a model folder, if it has any; None is the shipped model."""
    found = (shipped_model() if path is None else Path(path)) / LM_FOLDER / LM_LEXICON
    return found if found.is_file() else None


def find_next_word(path: str | Path | None) -> Path | None:
    """The next-word model of a model folder, if it has one; None is the shipped model."""
    found = (shipped_model() if path is None else Path(path)) / NEXT_WORD_FOLDER
    return found if found.is_dir() else None


def phones_at_output(network: Path) -> list[str]:
    """The phones that the network in a folder writes beside its tokens, their blank first; none, if it writes none.

    Raises:
        ModelError: their names are missing or cannot be read.
    """
    if not read_toml(network / "config.toml")["model"].get("phone_output"):
        return []
    if not (phones := read_phones(network)):
        raise ModelError(f"{network / _PHONES}: missing or empty; the model is damaged")
    return phones


def read_phones(network: Path) -> list[str]:
    """The names of the phones that a network was trained with, their blank first; none, if it was without.

    Raises:
        ModelError: they cannot be read.
    """
    names = network / _PHONES
    try:
        return names.read_text(encoding="utf-8").split() if names.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{names}: cannot be read ({error}); the model is damaged") from error


def write_priors(network: Path, log_priors: np.ndarray) -> None:
    """Write the logarithms of the mean probability of each token, and phone, (tokens + phones,), a line each."""
    (network / _PRIORS).write_text("".join(f"{value:.4f}\n" for value in log_priors), encoding="utf-8")


def read_priors(network: Path) -> np.ndarray | None:
    """What `write_priors` wrote, float32 (tokens + phones,); None where there is nothing.

    Raises:
        ModelError: it cannot be read.
    """
    path = network / _PRIORS
    if not path.is_file():
        return None
    try:
        return np.array(path.read_text(encoding="utf-8").split(), np.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a list of numbers ({error}); the model is damaged") from error


def find_prediction(network: Path) -> Path:
    """The prediction network in the folder of a network with a transducer.

    Raises:
        ModelError: it has none; the message says how to train one.
    """
    if not (network / PREDICTION_FILE).is_file():
        raise ModelError(
            f"{network}: this network has no transducer; choose another decoding (greedy, beam), or train one on it: "
            f"`asr train CONFIG --out RUN --set model.prediction=256 --set training.freeze_encoder=true "
            f"--set init_from={network}`"
        )
    return network / PREDICTION_FILE


def best_decoding(path: str | Path | None) -> Literal["beam", "greedy"]:
    """ "beam" for a model folder with a language model, "greedy" for one without; None is the shipped model.

    Raises:
        ModelError: its language model is incomplete.
    """
    folder = shipped_model() if path is None else Path(path)
    if not (folder / LM_FOLDER).is_dir():
        return "greedy"
    find_language_model(folder)
    return "beam"


def _language_model(folder: Path) -> Path | None:
    files = (folder / LM_FOLDER / name for name in _LM_FILES)
    return next((file for file in files if file.is_file()), None)


def find_language_model(path: str | Path | None) -> Path:
    """The n-gram model of a model folder; None is the shipped model.

    Raises:
        ModelError: it has none; the message says how to make it.
    """
    folder = shipped_model() if path is None else Path(path)
    if (file := _language_model(folder)) is not None:
        return file
    raise ModelError(
        f"{folder}: beam search needs a language model, and {LM_FOLDER}/ is missing or incomplete; copy the model's "
        f"folder anew, or make one with `asr train-lm TEXT --out {folder}`; --decoding greedy goes without"
    )


def search_files(path: str | Path | None, network: Path, decoding: str) -> list[Path]:
    """What is read to search by a network of a model folder, besides its graph; None is the shipped model."""
    if decoding == "greedy":
        return []
    if decoding == "transducer":
        return [find_prediction(network)]
    next_word = find_next_word(path)
    beside = [
        find_lexicon(path),
        network / _PRIORS,
        network / _PHONES,
        *sorted(next_word.iterdir() if next_word else []),
    ]
    return [find_language_model(path), *(file for file in beside if file and file.is_file())]
