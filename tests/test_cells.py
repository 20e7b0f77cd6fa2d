"""The recurrent family: the streaming contract, each cell against its equations or torch, initialisation, export."""

import json
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import onnxruntime
import pytest
import torch
from contract import check_streaming, check_whole
from torch import Tensor, nn

from asr import config
from asr.config import FeatureConfig, ModelConfig, NetworkConfig
from asr.errors import ConfigError, ModelError
from asr.models import Network
from asr.nn import (
    CELLS,
    Bidirectional,
    Cell,
    Chain,
    Recurrent,
    SelfAttention,
    StreamingLayer,
    detach,
    initialise,
    stacked,
)
from asr.runtime.export import build_graph, quantise
from asr.text import Tokenizer

M = TypeVar("M", bound=nn.Module)
TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


def spread(module: M, seed: int = 0) -> M:
    """The module with random weights everywhere, also where they start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return module


def cell(name: str, input_size: int = 3, size: int = 4) -> Cell:
    torch.manual_seed(0)
    return spread(CELLS[name](input_size, size).double())


def run(layer: StreamingLayer, x: Tensor) -> Tensor:
    return layer(x, torch.full((x.shape[0],), x.shape[1]))[0]


def speech(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# the streaming contract


def streaming_layers() -> dict[str, StreamingLayer]:
    torch.manual_seed(0)
    layers: dict[str, StreamingLayer] = {name: Recurrent(kind(6, 4)) for name, kind in CELLS.items()}
    layers["zoneout"] = Recurrent(CELLS["gru"](6, 4), zoneout=0.2)
    layers["residual stack"] = Chain(
        stacked(name, 6, 6, bidirectional=False, residual=True) for name in ("rnn", "lstm-layernorm", "lstm")
    )
    layers["attention"] = SelfAttention(6, 7)
    layers["lstm with attention"] = Chain([stacked("lstm", 6, 5, bidirectional=False), SelfAttention(5, 3)])
    return {name: spread(layer) for name, layer in layers.items()}


@pytest.mark.parametrize("name", streaming_layers())
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_streaming_contract(name: str, dtype: torch.dtype, tolerance: float) -> None:
    check_streaming(streaming_layers()[name].to(dtype), speech(3, 48, 6).to(dtype), tolerance=tolerance)


@pytest.mark.parametrize("name", [*CELLS, "attention"])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_both_directions_read_each_row_as_if_alone(name: str, dtype: torch.dtype, tolerance: float) -> None:
    layer = (
        SelfAttention(6, 5, both=True)
        if name == "attention"
        else stacked(name, 6, 3, bidirectional=True, residual=True)
    )
    check_whole(spread(layer).to(dtype), torch.randn(3, 30, 6, dtype=dtype), tolerance=tolerance)
    with pytest.raises(ModelError, match="streaming network"):
        layer.initial_state(1)


# equations


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normalised(x: np.ndarray, scale: np.ndarray, shift: np.ndarray | float = 0.0) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale + shift


def elman(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.tanh(w["W"] @ x + w["U"] @ h + w["b"]), c


def gru(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (w_r, w_z, w_h), (u_r, u_z, u_h), (b_r, b_z, b_h) = (np.split(w[k], 3) for k in ("W", "U", "b"))
    r = sigmoid(w_r @ x + u_r @ h + b_r)
    z = sigmoid(w_z @ x + u_z @ h + b_z)
    return (1 - z) * np.tanh(w_h @ x + b_h + r * (u_h @ h + w["u_bias"])) + z * h, c


def lstm(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    i, f, g, o = np.split(w["W"] @ x + w["U"] @ h + w["b"], 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def peephole(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    i, f, g, o = np.split(w["W"] @ x + w["U"] @ h + w["b"], 4)
    new = sigmoid(f + w["p_f"] * c) * c + sigmoid(i + w["p_i"] * c) * np.tanh(g)
    return sigmoid(o + w["p_o"] * new) * np.tanh(new), new


def coupled(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f, g, o = np.split(w["W"] @ x + w["U"] @ h + w["b"], 3)
    c = sigmoid(f) * c + (1 - sigmoid(f)) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def projected(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, c = lstm(w, x, h, c)
    return w["v.weight"] @ y, c


def layernorm(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sums = normalised(w["W"] @ x, w["norm_w.weight"]) + normalised(w["U"] @ h, w["norm_u.weight"]) + w["b"]
    i, f, g, o = np.split(sums, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(normalised(c, w["norm_c.weight"], w["norm_c.bias"])), c


def of_1997(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    i, g, o = np.split(w["W"] @ x + w["U"] @ h + w["b"], 3)
    c = c + sigmoid(i) * (4 * sigmoid(g) - 2)  # as the paper writes its squashing functions
    return sigmoid(o) * (2 * sigmoid(c) - 1), c


REFERENCES: dict[str, Callable] = {
    "rnn": elman,
    "gru": gru,
    "lstm": lstm,
    "lstm-peephole": peephole,
    "lstm-coupled": coupled,
    "lstm-projection": projected,
    "lstm-layernorm": layernorm,
    "lstm-1997": of_1997,
}


def follow(name: str, cell: Cell, x: Tensor) -> np.ndarray:
    """What the reference makes of x (time, size) with the cell's weights: h (time, size)."""
    weights = {k: v.numpy() for k, v in cell.state_dict().items()}
    for short, long in (("W", "w.weight"), ("U", "u.weight"), ("b", "w.bias")):
        weights[short] = weights.pop(long)
    h, c = np.zeros(cell.output_size), np.zeros(cell.size)
    outputs = []
    for x_t in x.numpy():
        h, c = REFERENCES[name](weights, x_t, h, c)
        outputs.append(h)
    return np.array(outputs)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("fast", [True, False])
def test_a_cell_equals_its_equations(name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Recurrent(cell(name)).eval()
    if not fast:
        monkeypatch.setattr(type(layer.cell), "fast", None)
    x = speech(1, 12, 3)
    assert np.abs(run(layer, x)[0].detach().numpy() - follow(name, layer.cell, x[0])).max() < 1e-9


@pytest.mark.parametrize("name", CELLS)
def test_both_directions_equal_the_equations_on_a_padded_batch(name: str) -> None:
    layer = Bidirectional(Recurrent(cell(name)), Recurrent(spread(cell(name), seed=1)))
    x, lengths = speech(2, 9, 3), torch.tensor([9, 5])
    got = layer(x, lengths)[0].detach().numpy()
    for row, n in enumerate(lengths.tolist()):
        ahead = follow(name, layer.ahead.cell, x[row, :n])
        back = follow(name, layer.back.cell, x[row, :n].flip(0))[::-1]
        assert np.abs(got[row, :n] - np.concatenate([ahead, back], axis=1)).max() < 1e-9


@pytest.mark.parametrize("name", CELLS)
def test_what_is_inside_a_cell_is_what_its_step_does(name: str) -> None:
    for zoneout in (0.0, 0.3):
        layer = Recurrent(cell(name), zoneout=zoneout).eval()
        x, start = speech(2, 7, 3), layer.step(speech(2, 3, 3), layer.initial_state(2))[1]
        y, last = layer.step(x, start)
        found, state = layer.inside(x, start)
        assert torch.allclose(found["h"], y, atol=1e-9)
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(state, last, strict=True))
        assert set(layer.cell.gates) | set(layer.cell.state) <= set(found)
        for gate in {"i", "f", "o", "r", "z"} & set(found):
            assert float(found[gate].detach().min()) >= 0
            assert float(found[gate].detach().max()) <= 1
        if layer.cell.keep == "f" and not zoneout:
            before = torch.cat([start[1][:, None], found["c"][:, :-1]], dim=1)
            assert torch.allclose(found["c"], found["f"] * before + found["i"] * found["c~"], atol=1e-9)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("rnn", nn.RNN(3, 4, batch_first=True)),
        ("gru", nn.GRU(3, 4, batch_first=True)),
        ("lstm", nn.LSTM(3, 4, batch_first=True)),
        ("lstm-projection", nn.LSTM(3, 4, batch_first=True, proj_size=2)),
    ],
)
def test_output_and_gradients_equal_torch(name: str, theirs: nn.RNNBase, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = theirs.double()
    ours = Recurrent(cell(name))
    monkeypatch.setattr(type(ours.cell), "fast", None)
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0"]
    for key, value in zip(names, ours.cell.weights(), strict=False):
        theirs.state_dict()[key].copy_(value)
    x = speech(2, 10, 3)
    expected, got = theirs(x)[0], run(ours, x)
    assert torch.allclose(got, expected, atol=1e-9, rtol=0)
    expected.square().sum().backward()
    got.square().sum().backward()
    for mine, key in ((ours.cell.w.weight, names[0]), (ours.cell.u.weight, names[1]), (ours.cell.w.bias, names[2])):
        reference = dict(theirs.named_parameters())[key].grad
        assert mine.grad is not None
        assert reference is not None
        assert torch.allclose(mine.grad, reference, atol=1e-9, rtol=0)


def differentiated() -> dict[str, StreamingLayer]:
    layers: dict[str, StreamingLayer] = {name: Recurrent(cell(name, 2, 2)) for name in CELLS}
    layers["attention"] = spread(SelfAttention(2, 2).double())
    layers["both directions"] = Bidirectional(Recurrent(cell("lstm", 2, 1)), Recurrent(cell("lstm-peephole", 2, 1)))
    stack = Chain(stacked("lstm-coupled", 2, 2, bidirectional=False, residual=True) for _ in range(2))
    layers["residual stack"] = spread(stack.double())
    return layers


@pytest.mark.parametrize("name", differentiated())
def test_gradients_equal_differences(name: str) -> None:
    layer = differentiated()[name]
    names, weights = zip(*layer.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        lengths = torch.full((x.shape[0],), x.shape[1])
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, lengths))[0]

    inputs = (speech(2, 4, 2).requires_grad_(), *weights)
    assert torch.autograd.gradcheck(function, inputs, atol=1e-8, rtol=1e-5)  # what differences of 1e-6 can tell


@pytest.mark.parametrize("both", [False, True])
def test_attention_equals_its_equations_and_sees_a_bounded_past(both: bool) -> None:
    layer = spread(SelfAttention(4, 3, both=both).double())
    x = speech(1, 12, 4)
    q, k, v = (x[0] @ w.T for w in layer.qkv.weight.chunk(3))
    expected = []
    for t in range(12):
        seen = slice(max(t - 3, 0), t + 4 if both else t + 1)
        weights = torch.softmax(k[seen] @ q[t] / 2, 0)
        expected.append(x[0, t] + layer.o.weight @ (weights @ v[seen]))
    got = run(layer, x)
    assert torch.allclose(got[0], torch.stack(expected), atol=1e-9)
    changed = x.clone()
    changed[:, :4] = 5.0
    assert torch.equal(run(layer, changed)[:, 7:], got[:, 7:])
    assert not torch.allclose(run(layer, changed)[:, 6], got[:, 6])


def test_attention_starts_as_if_it_were_not_there() -> None:
    x = torch.randn(2, 5, 4)
    assert torch.equal(run(SelfAttention(4, 3), x), x)


def test_a_residual_path_adds_the_input() -> None:
    layer = stacked("rnn", 4, 4, bidirectional=False, residual=True)
    nn.init.zeros_(layer.norm.weight)
    x = torch.randn(2, 5, 4)
    assert torch.equal(run(layer, x), x)
    assert not stacked("rnn", 3, 4, bidirectional=False, residual=True).residual  # sizes differ


# memory


def test_the_error_carousel_carries_gradients_unchanged_and_a_leaky_gate_does_not() -> None:
    kept = {}
    for name in ("lstm-1997", "lstm"):
        layer = Recurrent(CELLS[name](3, 4).double())
        nn.init.zeros_(layer.cell.u.weight)
        h, c = layer.initial_state(1)
        _, (_, last) = layer.step(speech(1, 200, 3), (h, c.requires_grad_()))
        kept[name] = torch.autograd.grad(last.sum(), c)[0]
    assert torch.equal(kept["lstm-1997"], torch.ones(1, 4, dtype=torch.float64))
    assert float(kept["lstm"].max()) < 1e-6


@pytest.mark.parametrize("name", [name for name, kind in CELLS.items() if kind.keep])
def test_the_gate_that_keeps_starts_open_or_by_chrono_initialisation(name: str) -> None:
    layer = CELLS[name](3, 200)
    assert layer.keep
    keep = layer.w.bias[layer.rows(layer.keep)]
    assert keep.tolist() == [1.0] * 200
    initialise(layer, longest_memory=400)
    memory = keep.detach().exp()  # uniform over 1 ... 399 frames
    assert float(memory.min()) >= 1
    assert float(memory.max()) <= 399.01
    assert 160 < float(memory.mean()) < 240
    if "i" in layer.gates:
        assert torch.equal(layer.w.bias[layer.rows("i")], -keep)
    with pytest.raises(ValueError, match="longest_memory = 2"):
        initialise(layer, longest_memory=2)


@pytest.mark.parametrize("name", CELLS)
def test_a_carried_state_carries_the_gradient_until_it_is_detached(name: str) -> None:
    layer, x = Recurrent(cell(name)), speech(2, 8, 3)
    weight = layer.cell.w.weight
    (whole,) = torch.autograd.grad(run(layer, x)[:, 4:].sum(), weight)
    _, state = layer.step(x[:, :4], layer.initial_state(2))
    (carried,) = torch.autograd.grad(layer.step(x[:, 4:], state)[0].sum(), weight, retain_graph=True)
    assert torch.allclose(carried, whole, atol=1e-9)
    cut = detach(state)  # truncated back-propagation through time: the same memory, without its gradient
    assert all(torch.equal(a, b) for a, b in zip(cut, state, strict=True))
    (truncated,) = torch.autograd.grad(layer.step(x[:, 4:], cut)[0].sum(), weight)
    (fresh,) = torch.autograd.grad(run(layer, x[:, 4:]).sum(), weight)
    assert not torch.allclose(truncated, whole, atol=1e-3)
    assert not torch.allclose(truncated, fresh, atol=1e-3)


# training only


def test_variational_dropout_hides_the_same_units_at_every_frame() -> None:
    torch.manual_seed(0)
    inputs = Recurrent(CELLS["rnn"](20, 4), variational_dropout=0.5)
    nn.init.zeros_(inputs.cell.u.weight)
    x = torch.randn(3, 1, 20).expand(3, 6, 20)
    y = run(inputs, x)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert not torch.allclose(y[:, 0], run(inputs, x)[:, 0])  # drawn anew for the next batch
    assert torch.equal(run(inputs.eval(), x), run(Recurrent(inputs.cell), x))

    state = Recurrent(CELLS["rnn"](1, 8), variational_dropout=0.5)
    with torch.no_grad():
        state.cell.w.weight.zero_()
        state.cell.w.bias.fill_(1.0)
        state.cell.u.weight.copy_(torch.eye(8))
    hidden = run(state, torch.ones(1, 6, 1))[0] == torch.tanh(torch.tensor(1.0))
    assert hidden[0].all()  # h_0 = 0: nothing to hide yet
    assert torch.equal(hidden[1:], hidden[1:2].expand(5, 8))
    assert 0 < int(hidden[1].sum()) < 8


def test_under_variational_dropout_a_memory_stays_within_its_bounds() -> None:
    torch.manual_seed(0)
    y = run(Recurrent(CELLS["gru"](3, 50), variational_dropout=0.3), torch.randn(2, 400, 3))
    assert float(y.abs().max()) <= 1.0


def test_zoneout_keeps_units_while_training_and_mixes_after() -> None:
    torch.manual_seed(0)
    layer = Recurrent(cell("gru", 3, 50), zoneout=0.3)
    y = run(layer, speech(4, 30, 3))
    kept = (y[:, 1:] == y[:, :-1]).double().mean()
    assert 0.27 < float(kept) < 0.33
    layer.eval()
    x, state = speech(1, 1, 3), (speech(1, 50),)
    (plain,) = layer.cell(layer.cell.project(x)[:, 0], *state)
    y, new = layer.step(x, state)
    assert torch.allclose(y[:, 0], 0.3 * state[0] + 0.7 * plain, atol=1e-12)
    assert torch.equal(new[0], y[:, 0])


# networks


def network(**model: object) -> Network:
    torch.manual_seed(0)
    settings = ModelConfig(channels=(12, 10), hidden=8, layers=2, **model)  # type: ignore[arg-type]
    full = NetworkConfig(format_version=1, features=FeatureConfig(bands=20), model=settings)
    statistics = torch.full((20,), -9.0), torch.full((20,), 4.0)
    made = Network(full, Tokenizer.characters(["abc'"]), *statistics).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.requires_grad_(False)


VARIANTS = [
    *({"cell": name} for name in CELLS),
    {"cell": "lstm", "residual": True},
    {"cell": "lstm", "attention": 5},
    {"cell": "lstm", "zoneout": 0.2},
    {"cell": "gru", "variational_dropout": 0.3},
    {"cell": "lstm-layernorm", "residual": True, "attention": 5},
]


def named(variant: dict[str, object]) -> str:
    return " ".join(map(str, variant.values()))


def test_every_cell_is_named_in_the_configuration() -> None:
    assert sorted(config.CELLS) == sorted(CELLS)
    with pytest.raises(ConfigError, match=r"model\.cell = 'lstmm': must be one of lstm, "):
        ModelConfig(bidirectional=True, cell="lstmm")
    with pytest.raises(ConfigError, match=r"model\.attention = -1"):
        ModelConfig(bidirectional=True, attention=-1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", [name for name, kind in CELLS.items() if kind.keep])
def test_a_configuration_sets_how_the_gates_start(name: str, bidirectional: bool) -> None:
    def biases(**model: object) -> Tensor:
        torch.manual_seed(0)
        settings = ModelConfig(bidirectional=bidirectional, hidden=50, layers=2, cell=name, **model)  # type: ignore[arg-type]
        full = NetworkConfig(format_version=1, features=FeatureConfig(bands=20), model=settings)
        made = Network(full, Tokenizer.characters(["abc"]), torch.zeros(20), torch.ones(20))
        values = [p.detach() for k, p in made.layers.named_parameters() if k.endswith(("w.bias", "bias_ih_l0"))]
        assert len(values) == (4 if bidirectional else 2)
        rows = CELLS[name](1, 50).rows(CELLS[name].keep or "")
        return torch.cat([value[rows] for value in values])

    assert set(biases().tolist()) == {1.0}
    assert set(biases(forget_bias=2.5).tolist()) == {2.5}
    memory = biases(chrono_frames=60).exp()
    assert float(memory.min()) < 15
    assert 45 < float(memory.max()) <= 59.01


def test_what_a_configuration_may_not_say_about_the_gates() -> None:
    for wrong in ({"chrono_frames": 2}, {"chrono_frames": 50, "cell": "rnn"}, {"zoneout": 1.0}, {"forget_bias": 99.0}):
        name = next(iter(wrong))
        with pytest.raises(ConfigError, match=rf"model\.{name} = {wrong[name]}"):
            ModelConfig(bidirectional=False, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("option", ["zoneout", "variational_dropout"])
def test_a_configuration_switches_on_what_only_training_does(name: str, option: str) -> None:
    net = network(bidirectional=False, cell=name, **{option: 0.5})
    x = 0.1 * speech(1, 6_400).float()
    for dropout in (m for m in net.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0  # the ordinary one
    assert torch.equal(run(net, x), run(net, x))
    features, frames = net.normalised_features(x, torch.tensor([6_400]))
    for layer in (m for m in net.modules() if isinstance(m, Recurrent)):
        layer.train()
    assert not torch.equal(net.read_features(features, frames)[0], net.read_features(features, frames)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_todays_networks_keep_their_weights_names(bidirectional: bool) -> None:
    directions = ["ahead", "back"] if bidirectional else ["lstm"]
    parts = [f"{d}.{w}_{k}_l0" for d in directions for w in ("weight", "bias") for k in ("ih", "hh")]
    names = {k.partition(".")[2] for k in network(bidirectional=bidirectional).state_dict() if "_l0" in k}
    assert names == {f"{layer}.{part}" for layer in (4, 5) for part in parts}


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_a_streaming_graph_in_blocks_equals_pytorch_whole(variant: dict[str, object]) -> None:
    net = network(bidirectional=False, look_ahead=2, **variant)
    x = 0.1 * speech(2, 640 * 24).float()
    expected = run(net, x)
    session = onnxruntime.InferenceSession(build_graph(net).SerializeToString())
    shapes = json.loads(session.get_modelmeta().custom_metadata_map["state_shapes"])
    state: list = [np.zeros((2, *shape), np.float32) for shape in shapes]
    outputs = []
    blocks = [(block.numpy(), 0.0) for block in x.split(640 * 5, dim=1)]
    for samples, flush in [*blocks, (np.zeros((2, 1280), np.float32), 1.0)]:
        feed = {f"state_{i}": value for i, value in enumerate(state)}
        y, *state = session.run(None, {"audio": samples, "flush": np.array([flush], np.float32), **feed})
        outputs.append(np.asarray(y))
    assert np.abs(np.concatenate(outputs, axis=1)[:, 2:] - expected.numpy()).max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_an_offline_graph_equals_pytorch_on_a_padded_batch(variant: dict[str, object]) -> None:
    net = network(bidirectional=True, **variant)
    x, lengths = 0.1 * speech(3, 16_000).float(), torch.tensor([16_000, 7_000, 640])
    expected, frames = net(x, lengths)
    session = onnxruntime.InferenceSession(build_graph(net).SerializeToString())
    got = np.asarray(session.run(["log_probs"], {"audio": x.numpy(), "lengths": lengths.numpy()})[0])
    for i, n in enumerate(frames.tolist()):
        assert np.abs(got[i, :n] - expected[i, :n].numpy()).max() < 1e-4


@pytest.mark.parametrize("name", CELLS)
def test_an_int8_graph_of_any_cell_runs_and_is_close(name: str) -> None:
    net = network(bidirectional=True, cell=name)
    x, lengths = 0.1 * speech(1, 16_000).float(), torch.tensor([16_000])
    session = onnxruntime.InferenceSession(quantise(build_graph(net)).SerializeToString())
    got = np.asarray(session.run(["log_probs"], {"audio": x.numpy(), "lengths": lengths.numpy()})[0])
    assert np.abs(got - net(x, lengths)[0].numpy()).max() < 0.3


def test_zoneout_is_in_the_graph() -> None:
    net = network(bidirectional=False, cell="gru")
    graphs = [build_graph(net)]
    for layer in net.modules():
        if isinstance(layer, Recurrent):
            layer.zoneout = 0.4
    graphs.append(build_graph(net))
    x = 0.1 * speech(1, 6_400).float()
    outputs = []
    for graph in graphs:
        session = onnxruntime.InferenceSession(graph.SerializeToString())
        shapes = json.loads(session.get_modelmeta().custom_metadata_map["state_shapes"])
        state = {f"state_{i}": np.zeros((1, *shape), np.float32) for i, shape in enumerate(shapes)}
        outputs.append(session.run(["log_probs"], {"audio": x.numpy(), "flush": np.zeros(1, np.float32), **state})[0])
    assert np.abs(np.asarray(outputs[1]) - run(net, x).numpy()).max() < 1e-4
    assert np.abs(np.asarray(outputs[0]) - np.asarray(outputs[1])).max() > 1e-3


def test_a_cell_without_translation_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rectified(Cell):
        gates = ("h",)

        def inside(self, wx: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
            return {"h": torch.relu(wx + self.u(h)), "c": c}

    monkeypatch.setitem(CELLS, "gru", Rectified)
    with pytest.raises(ModelError, match=r"Rectified cannot be exported: .*relu"):
        build_graph(network(bidirectional=False, cell="gru"))
