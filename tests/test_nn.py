"""Layers: the streaming contract, and agreement with independent implementations."""

import math

import pytest
import torch
from contract import check_streaming, check_whole
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from asr.errors import ModelError
from asr.nn import (
    LSTM,
    Bidirectional,
    BiLSTM,
    Chain,
    LookAhead,
    Normalise,
    Recurrent,
    RunningNormalise,
    StreamingLayer,
    StridedConvolution,
    UtteranceNormalise,
    cell_of,
)
from asr.nn.convolution import MaskedBatchNorm


def streaming_layers() -> dict[str, StreamingLayer]:
    torch.manual_seed(0)
    look_ahead = LookAhead(6, 3)
    nn.init.normal_(look_ahead.weight)
    convolution = StridedConvolution(6, 5, 5, 2)
    convolution.norm.running_mean.normal_()
    convolution.norm.running_variance.uniform_(0.5, 2)
    return {
        "normalise": Normalise(torch.randn(6), torch.rand(6)),
        "running normalise": RunningNormalise(torch.randn(6), torch.rand(6), 20.0),
        "convolution": convolution,
        "convolution without stride": StridedConvolution(6, 5, 3, 1),
        "lstm": LSTM(6, 4),
        "look-ahead": look_ahead,
        "chain": Chain([StridedConvolution(6, 5, 3, 2), StridedConvolution(5, 6, 3, 2), LSTM(6, 6), look_ahead]),
    }


@pytest.mark.parametrize("name", streaming_layers())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_streaming_contract(name: str, dtype: torch.dtype, tolerance: float) -> None:
    layer = streaming_layers()[name].to(dtype)
    check_streaming(layer, torch.randn(3, 64, 6, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_bilstm_reads_each_row_as_if_alone(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    check_whole(BiLSTM(6, 4).to(dtype), torch.randn(3, 40, 6, dtype=dtype), tolerance=tolerance)


def test_utterances_are_evened_out_by_their_levels() -> None:
    """Padding and company have no effect, nor have loudness and a microphone on a long utterance, nor pauses."""
    torch.manual_seed(0)
    mean, variance = torch.randn(6).double(), torch.rand(6).double() + 0.5
    check_whole(UtteranceNormalise(mean, variance, 20.0, 4), torch.randn(3, 40, 6).double(), tolerance=1e-9)
    layer = UtteranceNormalise(mean, variance, 1e-6)
    speech = mean + 2 * torch.randn(1, 400, 6).double()
    level = speech.exp().mean(dim=1).log() - mean - 3.5
    expected = Normalise(mean, variance)(speech - level, torch.tensor([400]))[0]
    assert torch.allclose(layer(speech, torch.tensor([400]))[0], expected)
    microphone = torch.randn(6).double()
    assert torch.allclose(layer(speech + microphone, torch.tensor([400]))[0], expected)
    paused = torch.cat([speech, torch.full_like(speech, -16.0)], dim=1)
    louder = layer(paused, torch.tensor([800]))[0][:, :400] - expected
    assert torch.allclose(louder, layer.scale * math.log(2), atol=1e-4)  # half of the time is nothing
    short = UtteranceNormalise(mean, variance, 400.0)(speech, torch.tensor([400]))[0]
    assert torch.allclose(short, (expected + Normalise(mean, variance)(speech, torch.tensor([400]))[0]) / 2)
    with pytest.raises(ModelError, match="takes whole utterances and cannot stream"):
        layer.initial_state(1)


def test_a_stream_is_evened_out_by_what_was_heard_so_far() -> None:
    """Soon a microphone has no effect; nor has a long silence before the first word, which stays more silent."""
    torch.manual_seed(0)
    mean, variance = torch.randn(6).double(), torch.rand(6).double() + 0.5
    layer = RunningNormalise(mean, variance, 50.0)
    speech = mean + 2 * torch.randn(1, 1200, 6).double()  # more than is computed at a time
    lengths = torch.tensor([1200])
    as_it_is, expected = Normalise(mean, variance)(speech, lengths)[0], layer(speech, lengths)[0]
    assert torch.allclose(expected[:, 0], as_it_is[:, 0], atol=0.5)  # one frame tells next to nothing
    microphone = torch.randn(6).double()
    assert (layer(speech + microphone, lengths)[0] - expected)[:, 600:].abs().max() < 0.4 * microphone.abs().max()
    silent = torch.cat([torch.full_like(speech[:, :600], -16.0), speech], dim=1)
    late = layer(silent, torch.tensor([1800]))[0]
    assert late[:, :600].mean() < late[:, 600:].mean() - 2
    assert (late[:, 800:] - expected[:, 200:]).abs().max() < 0.3
    pieces, state = [], layer.initial_state(1)
    for piece in speech.split(7, dim=1):
        y, state = layer.step(piece, state)
        pieces.append(y)
    assert torch.allclose(torch.cat(pieces, dim=1), expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 23), max_size=40), st.integers(1, 200))
def test_any_chunking_equals_the_whole(sizes: list[int], time: int) -> None:
    layer = streaming_layers()["chain"].double().eval()
    x = torch.randn(1, time, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(time))
    with torch.no_grad():
        whole, _ = layer(x, torch.tensor([time]))
        state, outputs, start = layer.initial_state(1), [], 0
        for size in [*sizes, time]:
            y, state = layer.step(x[:, start : start + size], state)
            outputs.append(y)
            start += size
        outputs.append(layer.finish(state)[0])
    joined = torch.cat(outputs, dim=1)
    assert joined.shape == whole.shape
    assert joined.numel() == 0 or float((joined - whole).abs().max()) < 1e-9


def test_bilstm_equals_torch_with_packed_sequences() -> None:
    torch.manual_seed(1)
    ours = BiLSTM(5, 4).double().eval()
    theirs = nn.LSTM(5, 4, batch_first=True, bidirectional=True).double()
    for name, value in ours.ahead.state_dict().items():
        theirs.state_dict()[name].copy_(value)
    for name, value in ours.back.state_dict().items():
        theirs.state_dict()[f"{name}_reverse"].copy_(value)
    x, lengths = torch.randn(3, 20, 5, dtype=torch.float64), torch.tensor([20, 13, 4])
    with torch.no_grad():
        packed, _ = theirs(pack_padded_sequence(x, lengths, batch_first=True))
        expected, _ = pad_packed_sequence(packed, batch_first=True)
        got, _ = ours(x, lengths)
    for i, n in enumerate(lengths):
        assert torch.allclose(got[i, :n], ours.norm(expected[i, :n]), atol=1e-9)


def test_lstm_equals_its_equations() -> None:
    torch.manual_seed(2)
    layer = LSTM(3, 2).double().eval()
    x = torch.randn(1, 7, 3, dtype=torch.float64)
    cell = layer.lstm
    weights = cell.state_dict()
    w_i, w_f, w_c, w_o = weights["weight_ih_l0"].chunk(4)
    u_i, u_f, u_c, u_o = weights["weight_hh_l0"].chunk(4)
    b_i, b_f, b_c, b_o = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).chunk(4)
    h = c = torch.zeros(2, dtype=torch.float64)
    expected = []
    for x_t in x[0]:
        i = torch.sigmoid(w_i @ x_t + u_i @ h + b_i)
        f = torch.sigmoid(w_f @ x_t + u_f @ h + b_f)
        candidate = torch.tanh(w_c @ x_t + u_c @ h + b_c)
        o = torch.sigmoid(w_o @ x_t + u_o @ h + b_o)
        c = f * c + i * candidate
        h = o * torch.tanh(c)
        expected.append(h)
    got, _ = layer(x, torch.tensor([7]))
    assert torch.allclose(got[0], layer.norm(torch.stack(expected)), atol=1e-9)


def test_the_cell_of_a_torch_lstm_does_what_it_does() -> None:
    torch.manual_seed(4)
    theirs = nn.LSTM(3, 5, batch_first=True).double()  # with both biases, as drawn by torch
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    layer = Recurrent(cell_of(theirs))
    inside, _ = layer.inside(x, layer.initial_state(2))
    assert torch.allclose(inside["h"], theirs(x)[0], atol=1e-9)


def test_a_stack_in_both_directions_equals_torch() -> None:
    torch.manual_seed(5)
    theirs = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True).double()

    def one(layer: int, end: str) -> Recurrent:
        alone = nn.LSTM(3 if layer == 0 else 8, 4, batch_first=True).double()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            alone.state_dict()[f"{name}_l0"].copy_(theirs.state_dict()[f"{name}_l{layer}{end}"])
        return Recurrent(cell_of(alone))

    ours = Chain(Bidirectional(one(layer, ""), one(layer, "_reverse")) for layer in range(2))
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    assert torch.allclose(ours(x, torch.tensor([9, 9]))[0], theirs(x)[0], atol=1e-9)


def test_forget_bias_starts_at_one() -> None:
    weights = LSTM(3, 4).lstm.state_dict()
    bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    assert bias.chunk(4)[1].tolist() == [1.0] * 4
    assert bias.chunk(4)[0].tolist() == [0.0] * 4


def test_a_bidirectional_layer_refuses_to_stream() -> None:
    with pytest.raises(ModelError, match="streaming network"):
        BiLSTM(3, 4).initial_state(1)


def test_batch_norm_ignores_padding_while_training() -> None:
    torch.manual_seed(3)
    short, long = StridedConvolution(4, 3, 3, 1), StridedConvolution(4, 3, 3, 1)
    long.load_state_dict(short.state_dict())
    x = torch.randn(2, 10, 4)
    padded = torch.cat([x, torch.full((2, 30, 4), 1e3)], dim=1)
    y, _ = short.train()(x, torch.tensor([10, 10]))
    z, _ = long.train()(padded, torch.tensor([10, 10]))
    assert torch.allclose(y, z[:, :10], atol=1e-5)
    assert torch.allclose(short.norm.running_variance, long.norm.running_variance, atol=1e-5)


def test_a_stride_after_a_look_ahead_is_refused() -> None:
    with pytest.raises(ValueError, match="look-ahead"):
        Chain([LookAhead(4, 2), StridedConvolution(4, 4, 3, 2)])


def test_batches_are_normalised_in_training_as_they_will_be_later() -> None:
    """By the running statistics, whatever else is in the batch; the gradient is that of batch normalisation."""
    torch.manual_seed(0)
    norm = MaskedBatchNorm(5)
    norm.running_mean.copy_(torch.randn(5) * 0.3)
    norm.running_variance.copy_(torch.rand(5) + 0.5)
    x = (1.3 * torch.randn(3, 8, 5) + 0.2).requires_grad_()
    lengths = torch.tensor([8, 5, 6])
    inside = torch.arange(8) < lengths[:, None]
    running = norm.running_mean.clone(), norm.running_variance.clone()

    later = norm.eval()(x, lengths)[inside]
    now = norm.train()(x, lengths)[inside]
    torch.testing.assert_close(now, later)
    kept = x.detach()[inside]
    torch.testing.assert_close(norm.running_mean, running[0].lerp(kept.mean(0), norm.momentum))

    weight = torch.randn_like(now)
    (gradient,) = torch.autograd.grad((now * weight).sum(), x)
    plain = torch.nn.functional.batch_norm(x[inside], None, None, training=True, eps=norm.epsilon)
    ratio = ((kept.var(0, correction=0) + norm.epsilon) / (running[1] + norm.epsilon)).sqrt()
    (expected,) = torch.autograd.grad((plain * ratio * weight).sum(), x)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
