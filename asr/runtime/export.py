"""Export: a trained network as ONNX graphs, each compared with PyTorch on speech before it is written."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.decoding.calibration import CALIBRATION_FILE
from asr.decoding.next_word import make_small
from asr.errors import ModelError
from asr.files import replacing, replacing_folder, write_atomically
from asr.models import Network, load_network, save_network
from asr.nn import LSTM, BiLSTM
from asr.runtime.export_graph import GraphBuilder, check_speech
from asr.runtime.folder import GRAPHS, LM_FOLDER, NEXT_WORD_FOLDER, PREDICTION_FILE, WEIGHTS_FILE
from asr.runtime.onnx import OnnxOffline, open_graph
from asr.runtime.quantise import quantise
from asr.runtime.reader import usual_block
from asr.runtime.sherpa import build_sherpa_graph, read_as_sherpa, sherpa_tokens
from asr.weights import save_small_weights

_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
_TOLERANCE = 1e-3  # largest difference in log-probability between PyTorch and an fp32 graph
# Of a graph that rounds, all the probability that it gives to other tokens than PyTorch does, mean over the frames.
_SHIFT = {"fp32": 0.02, "int8": 0.1}

Reader = Callable[[Path, np.ndarray, Network], np.ndarray]  # a graph's log-probabilities for an utterance


def write_graphs(
    network_folder: str | Path,
    *,
    precisions: tuple[str, ...] = ("fp32", "int8"),
    speech: Sequence[np.ndarray] | None = None,
) -> None:
    """Write model.onnx (fp32) and model.int8.onnx beside a network's weights, checked against PyTorch first.

    Args:
        speech: what they are checked on, float32 (n,) at 16 kHz each; None: a sentence that comes along.

    Raises:
        ModelError: the folder holds no complete network, or a graph's output differs from PyTorch's.
    """
    folder = Path(network_folder)
    network = load_network(folder)
    _write_checked(network, build_graph(network), {p: folder / GRAPHS[p] for p in precisions}, _read, speech)


def build_graph(network: Network) -> onnx.ModelProto:
    """The fp32 graph of a network; inputs, outputs and metadata as asr.runtime describes them."""
    return GraphBuilder(network).build()


def _write_checked(
    network: Network,
    graph: onnx.ModelProto,
    paths: dict[str, Path],
    read: Reader,
    speech: Sequence[np.ndarray] | None,
) -> None:
    """Write a graph in each precision that `paths` names, once it has read speech as PyTorch does."""
    padded = [np.concatenate([_EDGE, samples, _EDGE]) for samples in (speech or [check_speech()])]
    with torch.no_grad():
        expected = [network(torch.from_numpy(x)[None], torch.tensor([len(x)]))[0][0].numpy() for x in padded]
    for precision, path in paths.items():
        with replacing(path) as temporary:
            onnx.save(graph if precision == "fp32" else quantise(graph), str(temporary))
            got = np.concatenate([read(temporary, x, network) for x in padded])
            tokens, wanted = len(network.tokenizer), np.concatenate(expected)
            _compare(got[:, :tokens], wanted[:, :tokens], path, precision, exact=read is _read)
            if got.shape[1] > tokens:
                end = tokens + network.phone_count
                if end > tokens:
                    _compare(got[:, tokens:end], wanted[:, tokens:end], path, precision, exact=True)
                if network.joint_size:
                    _compare_joint(got[:, end:], wanted[:, end:], path, precision)


def _compare(got: np.ndarray, expected: np.ndarray, path: Path, precision: str, *, exact: bool) -> None:
    """Log-probabilities (frames, tokens) of a graph against PyTorch's.

    Raises:
        ModelError: they differ by more than the graph's rounding can explain.
    """
    if got.shape != expected.shape:
        raise ModelError(f"{path}: not written, it gives {got.shape} log-probabilities, PyTorch {expected.shape}")
    if exact and precision == "fp32":
        figure, limit = float(np.abs(got - expected).max()), _TOLERANCE
        meaning = "largest difference in log-probability"
    else:
        figure, limit = float(np.abs(np.exp(got) - np.exp(expected)).sum(axis=1).mean() / 2), _SHIFT[precision]
        meaning = "probability that went to other tokens, mean over the frames"
    _check_within(figure, limit, meaning, path)


def _compare_joint(got: np.ndarray, expected: np.ndarray, path: Path, precision: str) -> None:
    """The encoder's share of a transducer's joint (frames, units) in a graph against PyTorch's, as the joint reads it.

    Raises:
        ModelError: they differ by more than the graph's rounding can explain.
    """
    difference = np.abs(np.tanh(got) - np.tanh(expected))
    if precision == "fp32":
        _check_within(float(difference.max()), _TOLERANCE, "largest difference in tanh of the joint", path)
    else:
        _check_within(float(difference.mean()), _SHIFT[precision], "mean difference in tanh of the joint", path)


def _check_within(figure: float, limit: float, meaning: str, path: Path) -> None:
    if not figure <= limit:
        raise ModelError(
            f"{path}: not written, on speech the graph does not say what PyTorch says: {figure:.2g} where {limit:g} is "
            f"allowed ({meaning})"
        )


def _read(path: Path, audio: np.ndarray, network: Network) -> np.ndarray:
    """As the recognizer reads an utterance, float32 (n,) at 16 kHz with its edge silence."""
    engine = open_graph(path, phones=True, joint=True)
    if isinstance(engine, OnnxOffline):
        return engine.log_probs([audio])[0]
    state, parts = engine.initial_state(), []
    block, whole = usual_block(network.stride) * network.stride, len(audio) // network.stride * network.stride
    for start in range(0, whole, block):
        log_probs, state = engine.step(audio[None, start : min(start + block, whole)], state)
        parts.append(log_probs[0])
    if network.latency:
        silence = np.zeros((1, network.latency * network.stride), np.float32)
        parts.append(engine.step(silence, state, flush=True)[0][0])
    return np.concatenate(parts)[network.latency :]


def export_model(
    sources: list[Path],
    out: Path,
    to: str = "model",
    *,
    small: bool = False,
    speech: Sequence[np.ndarray] | None = None,
) -> list[Path]:
    """Join the networks of runs and model folders into one model folder, or write their graphs alone.

    Args:
        sources: run folders (with model/ inside) or model folders; a later one's network replaces an earlier one's.
        small: a whole model in an eighth of the size: int8 graphs alone, and of the weights what those lack.
        to: "model" for a whole model folder, "onnx" or "onnx-int8" for OUT/(offline|streaming).onnx, "sherpa" for
            OUT/(offline|streaming)/ as the package sherpa-onnx reads them.
        speech: what the graphs are checked on, float32 (n,) at 16 kHz each; None: a sentence that comes along.

    Returns:
        What was written.

    Raises:
        ModelError: a source holds no network, or a graph's output differs from PyTorch's.
    """
    out = out.absolute()
    if to == "model":
        _check_replaceable(out)
    networks: dict[str, Path] = {}
    card = json.dumps({"name": out.name}) + "\n"  # what several sources say of themselves is true of none of the joined
    language_models = _language_models(out)
    for source in sources:
        folder = source / "model" if (source / "model").is_dir() else source
        found = [kind for kind in ("offline", "streaming") if (folder / kind / WEIGHTS_FILE).is_file()]
        if not found:
            raise ModelError(f"{source}: neither a run nor a model folder (no offline/ or streaming/ network in it)")
        networks |= {kind: folder / kind for kind in found}
        if len(sources) == 1 and (folder / "card.json").is_file():
            card = (folder / "card.json").read_text(encoding="utf-8")
        language_models |= _language_models(folder)
    if to == "model":
        return [_write_model(networks, card, language_models, out, small, speech)]
    out.mkdir(parents=True, exist_ok=True)
    if to == "sherpa":
        return [_write_sherpa(load_network(folder), out / kind, speech) for kind, folder in networks.items()]
    precision = "int8" if to == "onnx-int8" else "fp32"
    written = []
    for kind, folder in networks.items():
        network = load_network(folder)
        path = out / f"{kind}.{'int8.' if precision == 'int8' else ''}onnx"
        _write_checked(network, build_graph(network), {precision: path}, _read, speech)
        written.append(path)
    return written


def _write_sherpa(network: Network, out: Path, speech: Sequence[np.ndarray] | None) -> Path:
    """model.onnx, model.int8.onnx and tokens.txt, as sherpa-onnx names them."""
    out.mkdir(exist_ok=True)
    graph = build_sherpa_graph(network)
    _write_checked(network, graph, {p: out / name for p, name in GRAPHS.items()}, read_as_sherpa, speech)
    write_atomically(out / "tokens.txt", sherpa_tokens(network.tokenizer))
    return out


def _check_replaceable(out: Path) -> None:
    """Refuse to put a model where something else lies."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ModelError(f"{out}: is a file; name a folder to write")
    others = sorted({p.name for p in out.iterdir()} - {"offline", "streaming", "card.json", *_language_models(out)})
    if others:
        raise ModelError(f"{out}: holds other things than a model ({', '.join(others[:3])}); name another folder")


def _language_models(folder: Path) -> dict[str, Path]:
    """Those that lie in a folder, by their names in a model folder."""
    return {name: folder / name for name in (LM_FOLDER, NEXT_WORD_FOLDER) if (folder / name).is_dir()}


def _write_model(
    networks: dict[str, Path],
    card: str,
    language_models: dict[str, Path],
    out: Path,
    small: bool,
    speech: Sequence[np.ndarray] | None,
) -> Path:
    with replacing_folder(out) as temporary:
        for kind, folder in networks.items():
            network = load_network(folder)
            save_network(network, temporary / kind)
            write_graphs(temporary / kind, precisions=("int8",) if small else ("fp32", "int8"), speech=speech)
            if small:
                _make_small(network, temporary / kind)
            if (folder / CALIBRATION_FILE).is_file():
                shutil.copy(folder / CALIBRATION_FILE, temporary / kind)
        for name, folder in language_models.items():
            shutil.copytree(folder, temporary / name)
        if small and NEXT_WORD_FOLDER in language_models:
            make_small(temporary / NEXT_WORD_FOLDER)
        write_atomically(temporary / "card.json", card)
    return out


def _make_small(network: Network, folder: Path) -> None:
    """Leave of a network's weights in a folder what its int8 graph lacks, in 8 bits, and of a transducer float16.

    The output of phone states, which is new in every training, goes.
    """
    recurrent = range(network.first_recurrent, network.first_recurrent + network.config.model.layers)
    in_graph: list[str] = []
    if all(isinstance(network.layers[i], LSTM | BiLSTM) for i in recurrent):
        ways = ("ahead", "back") if network.config.model.bidirectional else ("lstm",)
        in_graph = [f"layers.{i}.{way}.weight_{part}_l0" for i in recurrent for way in ways for part in ("ih", "hh")]
    weights = {name: w for name, w in network.state_dict().items() if not name.startswith("state_output.")}
    save_small_weights(weights, in_graph, folder / WEIGHTS_FILE)
    if network.transducer is not None:
        arrays = {name: value.astype(np.float16) for name, value in network.transducer.arrays().items()}
        np.savez(folder / PREDICTION_FILE, allow_pickle=False, **arrays)
