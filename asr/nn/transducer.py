"""What a transducer has beside its encoder: the prediction network, and the joint that weighs both."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr.nn.recurrent import LSTM


class Transducer(nn.Module):
    """Prediction network and joint of a transducer (Graves 2012, https://arxiv.org/abs/1211.3711).

        g_u       = LSTM(y_1 ... y_u)            prediction network: a memory of what was written
        z_{t,u}   = tanh(e_t + V g_u)            joint of frame t and of u tokens written
        p(. | t, u) = softmax(O z_{t,u} + b)     the next token; the blank: nothing more on this frame

    e_t = W f_t + b, the encoder's share, is computed with the encoder's other outputs (asr.models.Output). Joined in a
    hidden layer as in Graves et al. 2013. The LSTM reads tokens one-hot, the blank first of all.

    Args:
        tokens: in the vocabulary, the blank first.
        units: of the LSTM, and of the joint.
        dropout: of the LSTM's output, while training.
    """

    def __init__(self, tokens: int, units: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = LSTM(tokens, units, dropout)
        self.project = nn.Linear(units, units, bias=False)
        self.output = nn.Linear(units, tokens)

    def predict(self, tokens: Tensor) -> Tensor:
        """V g_u after none, one and more of the tokens: (batch, n) int64 -> (batch, n + 1, units)."""
        started = F.one_hot(F.pad(tokens, (1, 0)), self.output.out_features).to(self.output.weight.dtype)
        lengths = torch.full((len(tokens),), started.shape[1], device=tokens.device)
        return self.project(self.lstm(started, lengths)[0])

    def forward(self, encoder: Tensor, prediction: Tensor) -> Tensor:
        """e_t and V g_u, (..., units) of shapes that broadcast -> log-probabilities of tokens (..., tokens)."""
        return self.output(torch.tanh(encoder + prediction)).log_softmax(-1, dtype=torch.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """The weights as asr.decoding.transducer reads them, float32; what one token or the norm scales is multiplied
        out.

        tokens (tokens, 4 units): what each token adds to the gates i, f, c~, o, their bias included; memory (units,
        4 units): what h adds; project (units, units), project_bias (units,): V, of the LSTM's output before its
        norm's weights; output (units, tokens), output_bias (tokens,).
        """
        w, u, b, u_b = self.lstm.lstm.parameters()
        norm, v = self.lstm.norm, self.project.weight
        weights = {
            "tokens": w.T + b + u_b,
            "memory": u.T,
            "project": (v * norm.weight).T,
            "project_bias": v @ norm.bias,
            "output": self.output.weight.T,
            "output_bias": self.output.bias,
        }
        return {name: value.detach().float().cpu().contiguous().numpy() for name, value in weights.items()}
