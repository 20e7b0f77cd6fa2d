"""Section "features": ours whole, in blocks, and of many streams at once, beside other libraries. One core."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.shape_inference
import onnx.utils
import torch
import torchaudio

from asr.audio import SAMPLE_RATE
from asr.config import FeatureConfig
from asr.features import FLOOR, LogMel
from asr.models import load_network
from asr.runtime.export import build_graph
from pipelines.bench.figures import Figure, interleaved
from pipelines.bench.limits import feature_operations, measured, session_of
from pipelines.bench.setting import Setting

_SECONDS = 20.0
_STREAMS, _GROUP = 64, 16  # what sixteen streams need together fits a core's cache
_BLOCK = 2_560  # 160 ms


def run(setting: Setting) -> list[Figure]:
    """Times real time of each way."""
    limits, _ = measured(1)
    config = FeatureConfig()
    samples = np.resize(np.concatenate(setting.speech), int(_SECONDS * SAMPLE_RATE))
    least = feature_operations(config) * SAMPLE_RATE / config.hop * _SECONDS / limits.fp32
    with torch.no_grad():
        return interleaved("features", "x real time", _SECONDS, _parts(setting, samples), setting.rounds, ideal=least)


def _parts(setting: Setting, samples: np.ndarray) -> dict[str, Callable[[], object]]:
    layer, tensor = LogMel(FeatureConfig()), torch.from_numpy(samples)[None]
    lengths = torch.tensor([len(samples)])
    theirs = torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=80, center=False, norm="slaney", mel_scale="slaney"
    )

    def in_blocks(size: int) -> None:
        state = layer.initial_state(1)
        for start in range(0, len(samples), size):
            _, state = layer.step(tensor[:, start : start + size], state)

    rows = len(samples) // (_STREAMS * _BLOCK) * _STREAMS  # of a block each, as many as make up the time
    blocks = tensor[0, : rows * _BLOCK].reshape(rows, _BLOCK)
    scale = len(samples) / blocks.numel()

    def of_streams(step: Callable[[torch.Tensor], object]) -> None:
        for start in range(0, round(rows * scale), _GROUP):
            step(blocks[start % rows : start % rows + _GROUP])

    state = layer.initial_state(_GROUP)
    graph = _features_alone(setting)
    parts: dict[str, Callable[[], object]] = {
        "torchaudio MelSpectrogram, whole": lambda: torch.log(theirs(tensor) + FLOOR),
        **_others(samples),
        "ours, whole": lambda: layer(tensor, lengths),
        "ours, 160 ms blocks": lambda: in_blocks(_BLOCK),
        "ours, 40 ms blocks": lambda: in_blocks(640),
        f"ours, 160 ms blocks of {_STREAMS} streams": lambda: of_streams(lambda rows: layer.step(rows, state)),
    }
    if graph is not None:
        parts[f"in the graph, 160 ms blocks of {_STREAMS} streams"] = lambda: of_streams(graph)
    return parts


def _others(samples: np.ndarray) -> dict[str, Callable[[], object]]:
    """Other libraries that are installed, read whole."""
    parts: dict[str, Callable[[], object]] = {}
    try:
        import librosa

        parts["librosa, whole"] = lambda: librosa.feature.melspectrogram(
            y=samples, sr=SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=80, center=False
        )
    except ImportError:
        pass
    try:
        import kaldi_native_fbank as knf

        options = knf.FbankOptions()
        options.frame_opts.dither = 0
        options.mel_opts.num_bins = 80

        def kaldi() -> None:
            fbank = knf.OnlineFbank(options)
            fbank.accept_waveform(SAMPLE_RATE, samples)  # type: ignore[arg-type]
            fbank.input_finished()
            np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])

        parts["kaldi-native-fbank, whole"] = kaldi
    except ImportError:
        pass
    return parts


def _features_alone(setting: Setting) -> Callable[[torch.Tensor], object] | None:
    """The exported streaming graph as far as its features, for `_GROUP` rows of a block."""
    model = onnx.shape_inference.infer_shapes(build_graph(load_network(setting.network("streaming"))))
    log_mel = next(node.output[0] for node in model.graph.node if node.op_type == "Log")
    names = [value.name for value in model.graph.input]
    session = session_of(onnx.utils.Extractor(model).extract_model(names, [log_mel]), threads=1)
    feed: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [_GROUP if i == 0 and value.name != "flush" else n for i, n in enumerate(value.shape)]
        if value.name != "audio":
            feed[value.name] = np.zeros(shape, np.float32)
    return lambda rows: session.run(None, feed | {"audio": rows.numpy()})
