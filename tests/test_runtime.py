"""Engines and model folders: two engines with one result, and what a damaged model is told."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_architecture import TRAINING, WEB
from test_endpoint import RATE, noise, speech

from asr.errors import ConfigError, ModelError
from asr.recognizer import Recognizer
from asr.runtime import load_engine as _load_engine
from asr.runtime.folder import phones_at_output

pytest.importorskip("torch", reason="needs the extra [train] to make a network")
pytest.importorskip("onnx", reason="needs the extra [train] to export a network")


PHONES = ("<blank>", "AA", "B", "K")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder with random networks, both graphs each."""
    import torch

    from asr.config import FeatureConfig, ModelConfig, NetworkConfig
    from asr.models import Network, save_network
    from asr.runtime.export import write_graphs
    from asr.text import Tokenizer

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    for bidirectional in (True, False):
        config = ModelConfig(
            bidirectional=bidirectional, channels=(12, 10), hidden=16, layers=2, look_ahead=0 if bidirectional else 3,
            phone_output=True, utterance_norm=2.0,
        )  # fmt: skip
        network = Network(
            NetworkConfig(format_version=1, features=FeatureConfig(bands=20), model=config),
            Tokenizer.characters(["abc"]),
            torch.full((20,), -9.0),
            torch.full((20,), 4.0),
            PHONES,
        )
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        save_network(network.eval(), folder / config.kind)
        write_graphs(folder / config.kind)
    return folder


def load_engine(network_dir: Path, **chosen: Any) -> Any:
    """An engine of either kind."""
    return _load_engine(network_dir, **chosen)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "model")


CHOICES = [("onnx", "fp32"), ("onnx", "int8"), ("torch", None)]


@pytest.mark.parametrize("phones", [False, True])
def test_offline_engines_agree_and_rows_do_not_touch_each_other(tiny_model: Path, phones: bool) -> None:
    batch = [speech(1.3, seed=1), speech(0.5, seed=2), speech(2.0, seed=3)]
    reference = load_engine(tiny_model / "offline", engine="torch", phones=phones).log_probs(batch)
    assert [len(r) for r in reference] == [len(b) // 640 for b in batch]
    engine = load_engine(tiny_model / "offline", precision="fp32", phones=phones)
    assert engine.phone_count == (len(PHONES) if phones else 0)
    assert {row.shape[1] for row in reference} == {engine.vocab_size + engine.phone_count}
    for row, expected, samples in zip(engine.log_probs(batch), reference, batch, strict=True):
        np.testing.assert_allclose(row, expected, atol=2e-4)
        np.testing.assert_allclose(row, engine.log_probs([samples])[0], atol=1e-5)
    assert engine.log_probs([]) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_utterances_come_back_in_their_order(tiny_model: Path, threads: int) -> None:
    engine = load_engine(tiny_model / "offline", precision="fp32", threads=threads)
    batch = [speech(seconds, seed=i) for i, seconds in enumerate((0.7, 1.9, 0.3, 1.1, 0.3, 2.0, 0.5, 1.3, 0.9, 0.1))]
    rows = engine.log_probs(batch)
    assert [len(row) for row in rows] == [len(samples) // 640 for samples in batch]
    for row, samples in zip(rows, batch, strict=True):
        np.testing.assert_allclose(row, engine.log_probs([samples])[0], atol=1e-5)


@pytest.mark.parametrize(("engine", "precision"), CHOICES)
def test_streaming_engines_give_the_reference_in_any_blocks(
    tiny_model: Path, engine: str, precision: str | None
) -> None:
    import torch

    from asr.models import load_network

    audio = np.stack([speech(2.0, seed=s)[: 640 * 48] for s in (1, 2)])
    with torch.inference_mode():
        whole, _ = load_network(tiny_model / "streaming")(torch.from_numpy(audio), torch.tensor([640 * 48] * 2))
    network = load_engine(tiny_model / "streaming", engine=engine, precision=precision, threads=1, phones=True)
    assert (network.latency_frames, network.phone_count) == (3, len(PHONES))
    for block in (1, 2, 4, 16, 48):
        state, parts = network.initial_state(2), []
        for start in range(0, audio.shape[1], block * 640):
            before = [part.copy() for part in state]
            log_probs, following = network.step(audio[:, start : start + block * 640], state)
            assert log_probs.shape == (2, block, network.vocab_size + network.phone_count)
            for a, b in zip(before, state, strict=True):
                np.testing.assert_array_equal(a, b)
            state = following
            parts.append(log_probs)
        parts.append(network.step(np.zeros((2, 3 * 640), np.float32), state, flush=True)[0])
        joined = np.concatenate(parts, axis=1)[:, 3:]
        if precision == "int8":
            assert np.abs(joined - whole.numpy()).mean() < 0.1
        else:
            np.testing.assert_allclose(joined, whole.numpy(), atol=5e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_neither_company_nor_blocks_change_a_bit_of_a_stream(tiny_model: Path, precision: str) -> None:
    network = load_engine(tiny_model / "streaming", precision=precision)
    loud = np.stack([np.clip(speech(2.0, seed=s)[: 640 * 48] * 4.0 ** (s - 4), -1, 1) for s in range(7)])

    def read(rows: np.ndarray, blocks: list[int]) -> list[np.ndarray]:
        state, parts = network.initial_state(len(rows)), []
        for piece in np.split(rows, np.cumsum(blocks)[:-1] * 640, axis=1):
            log_probs, state = network.step(piece, state)
            parts.append(log_probs)
        return [np.concatenate(parts, axis=1), *state]

    together = read(loud, [4] * 12)
    for i in range(len(loud)):
        for blocks in ([4] * 12, [48], [1] * 48, [7, 13, 28]):
            for one, all_rows in zip(read(loud[i : i + 1], blocks), together, strict=True):
                np.testing.assert_array_equal(one[0], all_rows[i])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_company_does_not_change_a_bit_of_a_whole_utterance(tiny_model: Path, precision: str) -> None:
    network = load_engine(tiny_model / "offline", precision=precision)
    batch = [np.clip(speech(0.5 + 0.3 * s, seed=s) * 3.0 ** (s - 3), -1, 1) for s in range(6)]
    for together, samples in zip(network.log_probs(batch), batch, strict=True):
        np.testing.assert_array_equal(together, network.log_probs([samples])[0])


@pytest.mark.parametrize("network", ["offline", "streaming"])
def test_the_engines_write_the_same_text(tiny_model: Path, network: str) -> None:
    audio = np.concatenate([speech(2, seed=1), noise(1.2, -60), speech(3, seed=2)])
    onnx, torch = (
        Recognizer.load(tiny_model, engine=engine, precision="fp32").transcribe(audio, RATE, network)
        for engine in ("onnx", "torch")
    )
    assert onnx.text == torch.text
    assert len(onnx.text) > 3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_text_does_not_depend_on_how_live_audio_is_cut(tiny_model: Path, precision: str) -> None:
    model = Recognizer.load(tiny_model, precision=precision)
    audio = np.concatenate([speech(2, seed=1), noise(1.2, -60), speech(3, seed=2)])
    whole = model.transcribe(audio, RATE, network="streaming")
    session = model.stream()
    for start in range(0, len(audio), 997):
        session.feed(audio[start : start + 997])
    assert session.finish() == whole


def test_int8_is_taken_first_and_fp32_where_it_is_alone(model: Path) -> None:
    audio = [speech(1)]

    def log_probs(precision: str | None) -> np.ndarray:
        return load_engine(model / "offline", precision=precision).log_probs(audio)[0]

    np.testing.assert_array_equal(log_probs(None), log_probs("int8"))
    full = log_probs("fp32")
    assert np.abs(full - log_probs("int8")).max() > 0
    (model / "offline" / "model.int8.onnx").unlink()
    np.testing.assert_array_equal(log_probs(None), full)


def test_a_missing_precision_is_told_with_the_way_to_make_it(model: Path) -> None:
    (model / "streaming" / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"model.onnx is missing \(it has int8\); `asr export .* -o DIR --to model`"):
        Recognizer.load(model, precision="fp32")


def test_an_incomplete_language_model_is_not_passed_over(model: Path) -> None:
    (model / "lm").mkdir()
    with pytest.raises(ModelError, match=r"lm/ is missing or incomplete; .*--decoding greedy goes without"):
        Recognizer.load(model)
    Recognizer.load(model, decoding="greedy")


def test_neither_graph_is_told(model: Path) -> None:
    for name in ("model.onnx", "model.int8.onnx"):
        (model / "offline" / name).unlink()
    with pytest.raises(ModelError, match=r"model.int8.onnx and model.onnx are missing; "):
        Recognizer.load(model)


@pytest.mark.parametrize("name", ["config.toml", "tokens.txt"])
def test_an_incomplete_network_is_named(model: Path, name: str) -> None:
    (model / "offline" / name).unlink()
    with pytest.raises(ModelError, match=f"offline: {name} is missing"):
        Recognizer.load(model)


def test_damaged_files_are_named(model: Path) -> None:
    graph = model / "streaming" / "model.int8.onnx"
    graph.write_bytes(graph.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"model.int8.onnx: not a readable graph"):
        Recognizer.load(model).transcribe(speech(1), RATE, "streaming")
    (model / "offline" / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"weights.safetensors"):
        Recognizer.load(model, engine="torch").transcribe(speech(1), RATE)
    phones = model / "offline" / "phones.txt"
    phones.write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"phones.txt: cannot be read"):
        Recognizer.load(model, engine="torch").transcribe(speech(1), RATE)
    phones.unlink()
    config = model / "offline" / "config.toml"
    told = config.read_text()
    config.write_text(told.replace("phone_output = false", "phone_output = true"))
    with pytest.raises(ModelError, match=r"phones.txt: missing or empty"):
        phones_at_output(model / "offline")
    config.write_text(told.partition("[model]")[0])
    with pytest.raises(ModelError, match=r"config.toml: \[model\] is missing"):
        Recognizer.load(model)
    config.write_text("format_version = ")
    with pytest.raises(ModelError, match=r"config.toml: not TOML"):
        Recognizer.load(model)


def test_another_version_is_refused(model: Path) -> None:
    import onnx

    config = model / "offline" / "config.toml"
    graph = model / "streaming" / "model.onnx"
    proto = onnx.load(graph)
    onnx.helper.set_model_props(proto, {"format_version": "7"})
    onnx.save(proto, graph)
    with pytest.raises(ModelError, match=r"model.onnx: graph of format version 7, this program reads 1"):
        load_engine(model / "streaming", precision="fp32")
    config.write_text(config.read_text().replace("format_version = 1", "format_version = 2"))
    with pytest.raises(ModelError, match=r"offline: format version 2, this program reads 1"):
        Recognizer.load(model)


def test_what_is_no_model_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: no such model folder"):
        Recognizer.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"whose model is .*model"):
        Recognizer.load(tmp_path)
    with pytest.raises(ModelError, match=r"one network of the model"):
        Recognizer.load(model / "offline")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"not a folder"):
        Recognizer.load(tmp_path / "file")


def test_an_installation_without_a_model_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("asr.runtime.folder._SHIPPED", tmp_path / "shipped")
    with pytest.raises(ModelError, match="ships no model; name a model folder"):
        Recognizer.load()


def test_impossible_choices_are_refused(tiny_model: Path) -> None:
    for wrong in ({"engine": "tensorflow"}, {"precision": "int4"}, {"threads": 0}, {"decoding": "bem"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Recognizer.load(tiny_model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fp32 only"):
        Recognizer.load(tiny_model, engine="torch", precision="int8")


def test_torch_that_is_not_installed_is_named_with_its_extra(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModelError, match=r"pip install 'streaming-asr\[train\]'"):
        load_engine(tiny_model / "offline", engine="torch")


def test_recognizing_imports_neither_torch_nor_ray(tiny_model: Path) -> None:
    program = (
        "import sys, numpy, asr; r = asr.load(sys.argv[1])\n"
        "for network in r.networks: r.transcribe(numpy.zeros(16000, 'float32'), 16000, network)\n"
        f"assert not {TRAINING | WEB | {'typer'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny_model)], check=True, timeout=120)
