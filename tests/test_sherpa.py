"""Graphs for sherpa-onnx: the package itself, unchanged, writes our text with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import SHARED

from asr.audio import SAMPLE_RATE, read_audio
from asr.config import FeatureConfig, ModelConfig, NetworkConfig
from asr.errors import ModelError
from asr.metrics import ErrorCounts, count_errors
from asr.models import Network
from asr.recognizer import Recognizer
from asr.runtime.export import check_speech, export_model
from asr.runtime.folder import shipped_model
from asr.runtime.sherpa import build_sherpa_graph, read_as_sherpa
from asr.text import Tokenizer

sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="needs the extra [test]: it brings sherpa-onnx")

SAMPLES = Path(__file__).parents[1] / "scripts" / "samples" / "audio"
SAID_RATE = 8_000  # what from_t_one_ctc has to be told of 16 kHz


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as sherpa-onnx reads it, and beside it as a model folder with fp32 graphs."""
    folder = tmp_path_factory.mktemp("exported")
    export_model([shipped_model()], folder / "sherpa", "sherpa")
    export_model([shipped_model()], folder / "model", "model")
    return folder


def online(exported: Path, name: str = "model.onnx") -> Any:
    folder = exported / "sherpa" / "streaming"
    return sherpa_onnx.OnlineRecognizer.from_t_one_ctc(
        tokens=str(folder / "tokens.txt"), model=str(folder / name), num_threads=1, enable_endpoint_detection=False
    )


def offline(exported: Path) -> Any:
    folder = exported / "sherpa" / "offline"
    return sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc(
        tokens=str(folder / "tokens.txt"), model=str(folder / "model.onnx"), num_threads=1
    )


def live_texts(recognizer: Any, audios: list[np.ndarray], apart: int = 0) -> list[str]:
    """Texts of streams that are decoded together, stream i joining i * `apart` blocks after the first."""
    streams = []
    for i, samples in enumerate(audios):
        stream = recognizer.create_stream()
        stream.accept_waveform(
            SAID_RATE, np.concatenate([np.zeros(4_000), samples, np.zeros(8_000)]).astype(np.float32)
        )
        for _ in range((len(audios) - i) * apart):
            recognizer.decode_stream(stream)
        streams.append(stream)
    while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
        recognizer.decode_streams(ready)
    return [" ".join(recognizer.get_result(stream).split()) for stream in streams]


def file_texts(recognizer: Any, audios: list[np.ndarray]) -> list[str]:
    streams = []
    for samples in audios:
        streams.append(recognizer.create_stream())
        streams[-1].accept_waveform(SAMPLE_RATE, samples)
    recognizer.decode_streams(streams)
    return [" ".join(stream.result.text.split()) for stream in streams]


def as_16_bits(samples: np.ndarray) -> np.ndarray:
    """As a WAV file or a microphone gives them."""
    return (np.clip(np.round(samples * 32_768), -32_768, 32_767) / 32_768).astype(np.float32)


def synthetic_speech() -> list[np.ndarray]:
    return [as_16_bits(read_audio(path)) for path in sorted(SAMPLES.glob("*.flac"))]


def real_speech(corpus: str, every: int) -> list[np.ndarray]:
    rows = (SHARED / corpus / "dev.jsonl").read_text(encoding="utf-8").splitlines()[::every]
    return [as_16_bits(read_audio(SHARED / corpus / json.loads(row)["audio_filepath"])) for row in rows]


def share_that_differs(ours: list[str], theirs: list[str]) -> float:
    return sum((count_errors(*pair) for pair in zip(ours, theirs, strict=True)), ErrorCounts()).wer


def test_live_text_is_ours(exported: Path) -> None:
    audios = synthetic_speech()
    recognizer = Recognizer.load(exported / "model", decoding="greedy", precision="fp32", endpoint=None)
    ours = [recognizer.transcribe(samples, network="streaming").text for samples in audios]
    assert sum(len(text.split()) for text in ours) > 30
    assert share_that_differs(ours, live_texts(online(exported), audios)) <= 0.03  # one word of some sixty


def test_streams_of_different_phases_in_one_step_write_what_each_writes_alone(exported: Path) -> None:
    recognizer, audios = online(exported), synthetic_speech()[:6]
    alone = [live_texts(recognizer, [samples])[0] for samples in audios]
    assert live_texts(recognizer, audios, apart=1) == alone
    assert all(alone)


def test_text_of_files_is_ours_however_loud_they_are(exported: Path) -> None:
    recognizer = Recognizer.load(exported / "model", decoding="greedy", precision="fp32", endpoint=None)
    audios = [np.float32(gain) * (x - x.mean()) for gain in (1, 0.05) for x in synthetic_speech()]
    ours = [t.text for t in recognizer.transcribe_batch(audios)]
    assert share_that_differs(ours, file_texts(offline(exported), audios)) <= 0.02
    assert ours[:12] != ours[12:], "loudness should matter to this model, or the test shows nothing"


def as_sherpa_scales(samples: np.ndarray) -> np.ndarray:
    """It scales 16-bit samples by 32767 / 32768 and cuts: 1 and -1 become zeros, which no graph can undo."""
    return np.where(np.abs(samples) < 1.5 / 32_768, 0, samples).astype(np.float32)


@pytest.mark.parametrize("thinned", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_on_real_speech_at_most_one_word_in_200_differs(exported: Path, shared_speech: Path, thinned: int) -> None:
    """What is left: live, the end of a recording (the last block is held back) and float arithmetic in other blocks;
    of files, an offset (sherpa-onnx takes it away, so it is away here) and the loudness, which is found to 0.3 %."""
    corpora = {"librispeech_dev_clean_17": 12, "speechocean762": 6, "game_dialogue": 3}
    audios = [x for corpus, every in corpora.items() for x in real_speech(corpus, every * thinned)]
    recognizer = Recognizer.load(exported / "model", decoding="greedy", precision="fp32", endpoint=None)
    ours = [recognizer.transcribe(as_sherpa_scales(samples), network="streaming").text for samples in audios]
    assert sum(len(text.split()) for text in ours) > 300
    allowed = 0.005 if thinned == 1 else 0.01  # of some 500 words a third is more than one in 200
    assert share_that_differs(ours, live_texts(online(exported), audios)) <= allowed
    centred = [x - x.mean() for x in audios]
    ours = [t.text for t in recognizer.transcribe_batch(centred)]
    assert share_that_differs(ours, file_texts(offline(exported), centred)) <= allowed


def tiny(bidirectional: bool = False, **model: Any) -> Network:
    torch.manual_seed(5)
    config = ModelConfig(**{"channels": (12, 10), "hidden": 16, "layers": 2, **model}, bidirectional=bidirectional)
    features = FeatureConfig(bands=20)
    full = NetworkConfig(format_version=1, features=features, model=config)
    network = Network(full, Tokenizer.characters(["abc"]), torch.full((20,), -9.0), torch.full((20,), 4.0))
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "model",
    [
        {"look_ahead": 3, "utterance_norm": 1.0},
        {"look_ahead": 0},
        {"channels": (8,), "kernels": (5,), "strides": (3,)},  # five frames to every block
        {"channels": (8,), "kernels": (5,), "strides": (2,)},
        {"channels": (8, 8, 8), "kernels": (3, 3, 3), "strides": (2, 2, 2), "look_ahead": 1},
        {"cell": "gru", "residual": True},
        {"attention": 5, "look_ahead": 2},
    ],
    ids=str,
)
def test_any_network_read_in_blocks_of_150_ms_gives_pytorchs_log_probabilities(
    model: dict[str, Any], tmp_path: Path
) -> None:
    network = tiny(**model)
    path = tmp_path / "model.onnx"
    onnx.save(build_sherpa_graph(network), str(path))
    audio = as_16_bits(np.concatenate([np.zeros(4_000, np.float32), check_speech()]))
    audio[np.abs(audio) < 1.5 / 32_768] = 0  # sherpa-onnx makes zeros of the smallest samples
    expected = network(torch.from_numpy(audio)[None], torch.tensor([len(audio)]))[0][0].numpy()
    got = read_as_sherpa(path, audio, network)
    inside = len(expected) - network.latency  # after the end it hears silence where PyTorch hears nothing
    np.testing.assert_allclose(got[:inside], expected[:inside], atol=1e-3)


@pytest.mark.parametrize("strides", [(2, 2), (3, 1), (2, 1), (1, 1)], ids=str)
def test_any_network_of_files_tells_what_it_says_each_20_ms(strides: tuple[int, ...], tmp_path: Path) -> None:
    network = tiny(bidirectional=True, strides=strides)
    path = tmp_path / "model.onnx"
    onnx.save(build_sherpa_graph(network), str(path))
    speech = check_speech()[: SAMPLE_RATE - 100]
    edge = np.zeros(4_000, np.float32)
    audio = np.concatenate([edge, speech - speech.mean(), edge])
    expected = network(torch.from_numpy(audio)[None], torch.tensor([len(audio)]))[0][0].numpy()
    np.testing.assert_allclose(read_as_sherpa(path, audio, network), expected, atol=1e-3)
    centred = (speech - speech.mean()) / np.sqrt(speech.var() + 1e-5)
    (told,) = onnxruntime.InferenceSession(path).run(None, {"samples": centred[None].astype(np.float32)})
    assert np.asarray(told).shape[1] == len(expected) * network.stride // min(network.stride, SAMPLE_RATE // 50)


def test_what_cannot_run_there_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"runs as a Scan"):
        build_sherpa_graph(tiny(cell="lstm-layernorm"))
    with pytest.raises(ModelError, match=r"blocks of 2400 samples"):
        build_sherpa_graph(tiny(channels=(8, 8), kernels=(4, 4), strides=(4, 4)))
