"""One step of an LSTM in numpy, for what is computed token by token or word by word without torch."""

import numpy as np


def lstm_step(sums: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums of the gates i, f, c~ and o (asr.nn.cells.LSTMCell), (..., 4 * size), and c, (..., size) -> h, c."""
    i, f, candidate, o = np.split(sums, 4, axis=-1)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(candidate)
    return _sigmoid(o) * np.tanh(c), c


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * np.tanh(0.5 * x) + 0.5  # does not overflow
