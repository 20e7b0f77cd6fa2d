"""Networks: the streaming contract from samples to log-probabilities, saving and loading, export."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from contract import check_streaming, check_whole

from asr.config import FeatureConfig, ModelConfig, NetworkConfig
from asr.errors import ConfigError, ModelError
from asr.models import Network, load_network, save_network
from asr.runtime.export import build_graph, export_model, write_graphs
from asr.text import Tokenizer
from asr.training.start import take_weights


def tiny_network(*, bidirectional: bool, look_ahead: int = 0, seed: int = 0, layers: int = 2) -> Network:
    torch.manual_seed(seed)
    model = ModelConfig(
        bidirectional=bidirectional, channels=(12, 10), hidden=8, layers=layers, look_ahead=look_ahead, phone_layer=1,
        phone_output=True, utterance_norm=2.0,
    )  # fmt: skip
    config = NetworkConfig(format_version=1, features=FeatureConfig(bands=20), model=model)
    tokenizer = Tokenizer.characters(["abc'"])
    network = Network(config, tokenizer, torch.full((20,), -9.0), torch.full((20,), 4.0), ("<blank>", "AA", "B"))
    for parameter in network.parameters():  # the look-ahead too: its start lets only the present through
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network.eval()


def audio(samples: int, rows: int = 3) -> torch.Tensor:
    return 0.1 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("look_ahead", [0, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_streaming_network_keeps_the_contract(look_ahead: int, dtype: torch.dtype, tolerance: float) -> None:
    network = tiny_network(bidirectional=False, look_ahead=look_ahead).to(dtype)
    check_streaming(network, audio(16_000).to(dtype), tolerance=tolerance)


def test_offline_network_reads_each_row_as_if_alone() -> None:
    check_whole(tiny_network(bidirectional=True).double(), audio(16_000).double(), tolerance=1e-9)


def test_offline_network_refuses_to_stream() -> None:
    with pytest.raises(ModelError, match="streaming network"):
        tiny_network(bidirectional=True).initial_state(1)


def test_a_frame_is_forty_milliseconds_and_probabilities_add_up() -> None:
    network = tiny_network(bidirectional=True)
    log_probs, frames = network(audio(16_000, 2), torch.tensor([16_000, 10_000]))
    tokens = len(network.tokenizer)
    assert log_probs.shape == (2, 25, tokens + 3)
    assert frames.tolist() == [25, 15]
    for each in (log_probs[..., :tokens], log_probs[..., tokens:]):  # of the tokens, and of the phones
        assert torch.allclose(each.exp().sum(-1), torch.ones(2, 25), atol=1e-5)


@pytest.mark.parametrize(("bidirectional", "look_ahead"), [(True, 0), (False, 3)])
def test_a_deeper_network_starts_from_a_shallower_one(bidirectional: bool, look_ahead: int) -> None:
    start = tiny_network(bidirectional=bidirectional, look_ahead=look_ahead, seed=1)
    deeper = tiny_network(bidirectional=bidirectional, look_ahead=look_ahead, seed=2, layers=4)
    before = {name: value.clone() for name, value in deeper.state_dict().items()}
    take_weights(deeper, start)
    after, given = deeper.state_dict(), start.state_dict()
    first = deeper.first_recurrent
    for name, value in after.items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        if first + 2 <= layer < first + 4 or layer == len(deeper.layers) - 1:
            assert torch.equal(value, before[name]), name  # the new layers, and the output on top of them
        elif layer >= first + 4:
            assert torch.equal(value, given[f"layers.{layer - 2}.{name.split('.', 2)[2]}"]), name  # the look-ahead
        else:
            assert torch.equal(value, given[name]), name
    with pytest.raises(ConfigError, match="do not fit"):
        take_weights(start, deeper)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_saved_network_is_the_same_network(tmp_path: Path, bidirectional: bool) -> None:
    network = tiny_network(bidirectional=bidirectional)
    save_network(network, tmp_path / "net")
    loaded = load_network(tmp_path / "net")
    x, lengths = audio(8_000), torch.full((3,), 8_000)
    assert torch.equal(network(x, lengths)[0], loaded(x, lengths)[0])
    assert loaded.config == network.config
    assert loaded.tokenizer.tokens == network.tokenizer.tokens
    assert loaded.phones == network.phones


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "tokens.txt").unlink(), "tokens.txt is missing"),
        (lambda d: (d / "weights.safetensors").write_bytes(b"half"), "weights.safetensors"),
        (
            lambda d: (d / "config.toml").write_text(
                (d / "config.toml").read_text().replace("format_version = 1", "format_version = 9")
            ),
            "version 9",
        ),
        (
            lambda d: (d / "config.toml").write_text(
                (d / "config.toml").read_text().replace("hidden = 8", "hidden = 9")
            ),
            "weights.safetensors",
        ),
    ],
)
def test_a_spoiled_network_is_refused_by_name(tmp_path: Path, spoil, message: str) -> None:
    save_network(tiny_network(bidirectional=False), tmp_path / "net")
    spoil(tmp_path / "net")
    with pytest.raises(ModelError, match=message):
        load_network(tmp_path / "net")


def run_offline(model: bytes, x: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(model)
    *both, frames = session.run(["log_probs", "phone_log_probs", "frames"], {"audio": x, "lengths": lengths})
    return np.concatenate([np.asarray(part) for part in both], axis=-1), np.asarray(frames)


def test_the_offline_graph_equals_pytorch_on_a_padded_batch() -> None:
    network = tiny_network(bidirectional=True)
    x, lengths = audio(9_999), torch.tensor([9_999, 7_000, 1_280])
    expected, frames = network(x, lengths)
    got, got_frames = run_offline(build_graph(network).SerializeToString(), x.numpy(), lengths.numpy())
    assert got_frames.tolist() == frames.tolist()
    for i, n in enumerate(frames.tolist()):
        assert np.abs(got[i, :n] - expected[i, :n].detach().numpy()).max() < 1e-4


@pytest.mark.parametrize("look_ahead", [0, 3])
@pytest.mark.parametrize("block", [1, 4, 25])
def test_the_streaming_graph_in_blocks_equals_pytorch_whole(look_ahead: int, block: int) -> None:
    network = tiny_network(bidirectional=False, look_ahead=look_ahead)
    x = audio(640 * 50, 2)
    expected, _ = network(x, torch.full((2,), x.shape[1]))
    session = onnxruntime.InferenceSession(build_graph(network).SerializeToString())
    shapes = json.loads(session.get_modelmeta().custom_metadata_map["state_shapes"])
    state = {f"state_{i}": np.zeros((2, *s), np.float32) for i, s in enumerate(shapes)}
    names = ["log_probs", "phone_log_probs", *(f"new_{name}" for name in state)]
    outputs = []
    blocks = [(x[:, i : i + 640 * block].numpy(), 0.0) for i in range(0, x.shape[1], 640 * block)]
    if look_ahead:
        blocks.append((np.zeros((2, 640 * look_ahead), np.float32), 1.0))
    for samples, flush in blocks:
        tokens, phones, *after = session.run(names, {"audio": samples, "flush": np.array([flush], np.float32), **state})
        state = dict(zip(state, map(np.asarray, after), strict=True))
        outputs.append(np.concatenate([np.asarray(tokens), np.asarray(phones)], axis=-1))
    got = np.concatenate(outputs, axis=1)[:, look_ahead:]
    assert got.shape == tuple(expected.shape)
    assert np.abs(got - expected.detach().numpy()).max() < 1e-4


def test_graphs_are_written_with_metadata_and_int8_is_close(tmp_path: Path) -> None:
    network = tiny_network(bidirectional=True)
    save_network(network, tmp_path / "net")
    write_graphs(tmp_path / "net")
    x, lengths = audio(16_000).numpy(), np.full(3, 16_000)
    exact, _ = run_offline((tmp_path / "net" / "model.onnx").read_bytes(), x, lengths)
    rounded, _ = run_offline((tmp_path / "net" / "model.int8.onnx").read_bytes(), x, lengths)
    assert 0 < np.abs(exact - rounded).max() < 0.1
    session = onnxruntime.InferenceSession(str(tmp_path / "net" / "model.int8.onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["kind"] == "offline"
    assert metadata["precision"] == "int8"
    assert metadata["samples_per_frame"] == "640"


def test_export_joins_two_runs_into_one_model(tmp_path: Path) -> None:
    save_network(tiny_network(bidirectional=True), tmp_path / "a" / "model" / "offline")
    save_network(tiny_network(bidirectional=False), tmp_path / "b" / "model" / "streaming")
    (tmp_path / "b" / "model" / "lm").mkdir()
    (tmp_path / "b" / "model" / "lm" / "lm.arpa").write_text("ab a b\n")
    export_model([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    assert (tmp_path / "joined" / "lm" / "lm.arpa").is_file()
    for kind in ("offline", "streaming"):
        files = {p.name for p in (tmp_path / "joined" / kind).iterdir()}
        assert {"config.toml", "tokens.txt", "weights.safetensors", "model.onnx", "model.int8.onnx"} <= files
    assert (tmp_path / "joined" / "card.json").is_file()
    written = export_model([tmp_path / "joined"], tmp_path / "graphs", "onnx-int8")
    assert sorted(p.name for p in written) == ["offline.int8.onnx", "streaming.int8.onnx"]


def test_export_replaces_a_model_but_nothing_else(tmp_path: Path) -> None:
    save_network(tiny_network(bidirectional=True), tmp_path / "run" / "model" / "offline")
    (tmp_path / "run" / "log.jsonl").write_text("")
    with pytest.raises(ModelError, match=r"holds other things than a model \(log\.jsonl, model\)"):
        export_model([tmp_path / "run"], tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").exists()
    (tmp_path / "made" / "lm").mkdir(parents=True)
    (tmp_path / "made" / "lm" / "lm.arpa").write_text("ab a b\n")
    export_model([tmp_path / "run"], tmp_path / "made")
    assert (tmp_path / "made" / "lm" / "lm.arpa").is_file()
    assert (tmp_path / "made" / "offline" / "model.onnx").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        export_model([tmp_path / "run"], tmp_path / "file")


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_small_model_holds_each_matrix_once(bidirectional: bool, tmp_path: Path) -> None:
    kind = "offline" if bidirectional else "streaming"
    save_network(tiny_network(bidirectional=bidirectional, look_ahead=0), tmp_path / "a" / kind)
    export_model([tmp_path / "a"], tmp_path / "small", small=True)
    folder = tmp_path / "small" / kind
    assert not (folder / "model.onnx").exists()
    whole = (tmp_path / "a" / kind / "weights.safetensors").stat().st_size
    assert (folder / "weights.safetensors").stat().st_size < 0.8 * whole  # it has few matrices
    x, lengths = audio(8_000), torch.full((3,), 8_000)
    exact, rounded = load_network(tmp_path / "a" / kind), load_network(folder)
    for name, value in exact.state_dict().items():
        steps = 125 if "weight_ih" in name or "weight_hh" in name else 250  # of 7 bits and of 8
        assert float((value - rounded.state_dict()[name]).abs().max()) <= float(value.abs().max()) / steps, name
    with torch.no_grad():
        assert float((exact(x, lengths)[0] - rounded(x, lengths)[0]).abs().max()) < 0.2
    # what is small already loses nothing more when it is made so again
    export_model([tmp_path / "small"], tmp_path / "again", small=True)
    for name, value in load_network(tmp_path / "again" / kind).state_dict().items():
        torch.testing.assert_close(value, rounded.state_dict()[name])


def test_a_small_model_without_its_graph_is_incomplete(tmp_path: Path) -> None:
    save_network(tiny_network(bidirectional=True), tmp_path / "a" / "offline")
    export_model([tmp_path / "a"], tmp_path / "small", small=True)
    graph = tmp_path / "small" / "offline" / "model.int8.onnx"
    whole = graph.read_bytes()
    save_network(tiny_network(bidirectional=True, seed=3), tmp_path / "b" / "offline")
    export_model([tmp_path / "b"], tmp_path / "other", small=True)
    graph.write_bytes((tmp_path / "other" / "offline" / "model.int8.onnx").read_bytes())
    with pytest.raises(ModelError, match=r"model\.int8\.onnx: is not that of the network beside it"):
        load_network(graph.parent)
    graph.write_bytes(whole[:1000])
    with pytest.raises(ModelError, match=r"model\.int8\.onnx: does not hold the network beside it"):
        load_network(graph.parent)
    graph.unlink()
    with pytest.raises(ModelError, match=r"model\.int8\.onnx: is missing, and with it the matrices"):
        load_network(graph.parent)


def test_of_other_cells_a_small_model_has_all_weights(tmp_path: Path) -> None:
    network = tiny_network(bidirectional=True)
    gru = dataclasses.replace(network.config, model=dataclasses.replace(network.config.model, cell="gru"))
    network = Network(gru, network.tokenizer, torch.full((20,), -9.0), torch.full((20,), 4.0), network.phones)
    save_network(network.eval(), tmp_path / "a" / "offline")
    export_model([tmp_path / "a"], tmp_path / "small", small=True)
    rounded = load_network(tmp_path / "small" / "offline").state_dict()
    for name, value in network.state_dict().items():
        assert float((value - rounded[name]).abs().max()) <= float(value.abs().max()) / 250, name


def test_exporting_what_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a run nor a model"):
        export_model([tmp_path], tmp_path / "out")
