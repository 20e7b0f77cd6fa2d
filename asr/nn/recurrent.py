"""Recurrent layers: the LSTM that streams and the bidirectional LSTM that reads whole utterances."""

import torch
from torch import Tensor, nn

from asr.errors import ModelError
from asr.nn.cells import LSTMCell, initialise
from asr.nn.layer import State, StreamingLayer


class LSTM(StreamingLayer):
    """A long short-term memory layer, layer-normalised, with dropout while training.

        i, f, o = sigmoid(W x_t + U h_{t-1} + b)    input, forget and output gates
        c~      = tanh(W x_t + U h_{t-1} + b)       candidate
        c_t     = f * c_{t-1} + i * c~              cell: the constant error carousel, gated
        h_t     = o * tanh(c_t)

    Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000. The forget bias starts at 1, so that memory
    and gradient last from the first update on (Jozefowicz et al. 2015).

    Args:
        forget_bias, longest_memory: how the gates start, see asr.nn.initialise.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dropout: float = 0.0,
        *,
        forget_bias: float = 1.0,
        longest_memory: int = 0,
    ) -> None:
        super().__init__()
        self.lstm = new_lstm(input_size, hidden_size, forget_bias, longest_memory)
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if not x.shape[1]:
            return self._nothing(x.shape[0]), lengths
        y, _ = self.lstm(x)
        return self.dropout(self.norm(y)), lengths

    def initial_state(self, batch_size: int) -> State:
        zeros = self.norm.weight.new_zeros(batch_size, self.lstm.hidden_size)
        return zeros, zeros.clone()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if not x.shape[1]:
            return self._nothing(x.shape[0]), state
        h, c = state
        y, (h, c) = self.lstm(x, (h[None], c[None]))
        return self.dropout(self.norm(y)), (h[0], c[0])

    def _nothing(self, batch_size: int) -> Tensor:
        return self.norm.weight.new_zeros(batch_size, 0, self.lstm.hidden_size)


class BiLSTM(StreamingLayer):
    """Two LSTMs over a whole utterance, one in each direction, joined: (batch, time, 2 * hidden).

    Schuster and Paliwal 1997; Graves et al. 2013. Exact for padded batches without packed sequences: the
    backward LSTM reads each row's valid part reversed, so that padding comes last for it as well.

    Args:
        forget_bias, longest_memory: how the gates start, see asr.nn.initialise.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dropout: float = 0.0,
        *,
        forget_bias: float = 1.0,
        longest_memory: int = 0,
    ) -> None:
        super().__init__()
        self.ahead = new_lstm(input_size, hidden_size, forget_bias, longest_memory)
        self.back = new_lstm(input_size, hidden_size, forget_bias, longest_memory)
        self.norm = nn.LayerNorm(2 * hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if not x.shape[1]:
            return x.new_zeros(x.shape[0], 0, len(self.norm.weight)), lengths
        ahead, _ = self.ahead(x)
        back, _ = self.back(reverse(x, lengths))
        y = torch.cat([ahead, reverse(back, lengths)], dim=-1)
        return self.dropout(self.norm(y)), lengths

    def initial_state(self, batch_size: int) -> State:
        raise ModelError(
            "a bidirectional LSTM reads whole utterances and cannot stream; use the model's streaming network"
        )


def new_lstm(input_size: int, hidden_size: int, forget_bias: float = 1.0, longest_memory: int = 0) -> nn.LSTM:
    """One torch LSTM layer, batch first, that starts as `initialise` starts a cell."""
    cell = LSTMCell(input_size, hidden_size)
    initialise(cell, forget_bias=forget_bias, longest_memory=longest_memory)
    lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
    with torch.no_grad():
        for weight, value in zip(lstm.parameters(), cell.weights(), strict=True):
            weight.copy_(value)
    return lstm


def cell_of(lstm: nn.LSTM) -> LSTMCell:
    """The cell, as equations, that a torch LSTM layer runs: copies of its weights, both biases added."""
    w, u, b, u_b = lstm.parameters()
    cell = LSTMCell(lstm.input_size, lstm.hidden_size).to(w)
    with torch.no_grad():
        cell.w.weight.copy_(w)
        cell.u.weight.copy_(u)
        cell.w.bias.copy_(b + u_b)
    return cell


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse the valid part of each row and leave the padding where it is: x (batch, time, size)."""
    time = torch.arange(x.shape[1], device=x.device)
    index = torch.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
