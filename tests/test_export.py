"""Export: what is written says what PyTorch says, on speech, or is not written."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_models import tiny_network

from asr.decoding.calibration import CALIBRATION_FILE
from asr.errors import ModelError
from asr.models import save_network
from asr.runtime.export import build_graph, check_speech, export_model, write_graphs


def damaged(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with other weights in its last matrix, the output layer's."""
    last = [constant for constant in graph.graph.initializer if len(constant.dims) == 2][-1]
    last.CopyFrom(numpy_helper.from_array(5 - 20 * numpy_helper.to_array(last), last.name))
    return graph


@pytest.fixture(params=["offline", "streaming"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    network = tiny_network(bidirectional=request.param == "offline")
    save_network(network, tmp_path / "model" / request.param)
    return tmp_path / "model"


def network_of(model: Path) -> Path:
    return next(model.iterdir())


def test_a_graph_that_differs_from_pytorch_is_refused_with_the_figure(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asr.runtime.export.build_graph", lambda network: damaged(build_graph(network)))
    before = {p.name for p in network_of(model).iterdir()}
    with pytest.raises(ModelError, match=r"model\.onnx: not written, .* [\d.e-]+ where 0\.001 is allowed"):
        write_graphs(network_of(model))
    assert {p.name for p in network_of(model).iterdir()} == before, "something was left behind"


def test_an_int8_graph_that_rounds_too_much_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asr.runtime.export.quantise", damaged)
    with pytest.raises(ModelError, match=r"\.int8\.onnx: not written, .* where 0\.1 is allowed"):
        export_model([model], model.parent / "out", "onnx-int8")
    assert not list((model.parent / "out").iterdir())


def test_what_is_known_of_a_network_goes_with_it_and_a_failure_leaves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = network_of(model).name
    (model / kind / CALIBRATION_FILE).write_text("{}")
    out = model.parent / "out"
    export_model([model], out)
    assert (out / kind / CALIBRATION_FILE).read_text() == "{}"
    monkeypatch.setattr("asr.runtime.export.quantise", damaged)
    with pytest.raises(ModelError, match="not written"):
        export_model([model], out)
    assert {path.name for path in model.parent.iterdir()} == {"model", "out"}


def test_the_check_reads_the_speech_that_it_is_given(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose features are wrong for loud sounds alone passes on silence and is caught on speech."""

    def deaf(network: object) -> onnx.ModelProto:
        graph = build_graph(network)  # type: ignore[arg-type]
        log = next(node for node in graph.graph.node if node.op_type == "Log")
        limit = numpy_helper.from_array(np.array(1e-4, np.float32), "limit")
        graph.graph.initializer.append(limit)
        position = list(graph.graph.node).index(log)
        graph.graph.node.insert(position, onnx.helper.make_node("Min", [log.input[0], "limit"], ["quiet"]))
        log.input[0] = "quiet"
        return graph

    monkeypatch.setattr("asr.runtime.export.build_graph", deaf)
    write_graphs(network_of(model), speech=[np.zeros(16_000, np.float32)])
    with pytest.raises(ModelError, match="not written"):
        write_graphs(network_of(model), speech=[np.zeros(16_000, np.float32), check_speech()])
    with pytest.raises(ModelError, match="not written"):
        write_graphs(network_of(model))


def test_the_speech_that_comes_along_is_a_sentence() -> None:
    speech = check_speech()
    assert 2 <= len(speech) / 16_000 <= 5
    loudness = np.abs(speech[: len(speech) // 400 * 400]).reshape(-1, 400).max(axis=1)
    assert np.percentile(loudness, 90) > 10 * np.percentile(loudness, 5), "speech swells and fades"
