"""Recurrent layers: the LSTM that streams and the bidirectional LSTM that reads whole utterances."""

import torch
from torch import Tensor, nn

from asr.errors import ModelError
from asr.nn.layer import State, StreamingLayer


class LSTM(StreamingLayer):
    """A long short-term memory layer, layer-normalised, with dropout while training.

        i, f, o = sigmoid(W x_t + U h_{t-1} + b)    input, forget and output gates
        c~      = tanh(W x_t + U h_{t-1} + b)       candidate
        c_t     = f * c_{t-1} + i * c~              cell: the constant error carousel, gated
        h_t     = o * tanh(c_t)

    Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000. The forget bias starts at 1, so that memory
    and gradient last from the first update on (Jozefowicz et al. 2015).
    """

    def __init__(self, input_size: int, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = new_lstm(input_size, hidden_size)
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
    """

    def __init__(self, input_size: int, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ahead = new_lstm(input_size, hidden_size)
        self.back = new_lstm(input_size, hidden_size)
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


def new_lstm(input_size: int, hidden_size: int) -> nn.LSTM:
    """One torch LSTM layer with forget bias 1 and orthogonal recurrent weights, batch first."""
    lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
    weights = dict(lstm.named_parameters())
    with torch.no_grad():
        for gate in weights["weight_hh_l0"].chunk(4):
            nn.init.orthogonal_(gate)
        nn.init.xavier_uniform_(weights["weight_ih_l0"])
        weights["bias_hh_l0"].zero_()
        weights["bias_ih_l0"].zero_()
        weights["bias_ih_l0"][hidden_size : 2 * hidden_size] = 1.0  # torch's order: input, forget, candidate, output
    return lstm


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse the valid part of each row and leave the padding where it is: x (batch, time, size)."""
    time = torch.arange(x.shape[1], device=x.device)
    index = torch.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
