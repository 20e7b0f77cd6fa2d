"""Forecast a series and find what is odd in it with an LSTM and a dense layer: python docs/examples/time_series.py"""

import sys

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from asr.nn import LSTM, State, detach


def mackey_glass(steps: int, seed: int) -> Tensor:
    """A chaotic series (Mackey and Glass 1977, delay 17), standardised, with noise of 0.05: (steps,)."""
    torch.manual_seed(seed)
    x = (1.2 + 0.2 * torch.randn(18)).tolist()
    for _ in range(500 + 6 * steps):
        x.append(0.9 * x[-1] + 0.2 * x[-18] / (1 + x[-18] ** 10))
    return (torch.tensor(x[-6 * steps :: 6]) - 0.93) / 0.24 + 0.05 * torch.randn(steps)


def main(picture: str = "time_series.png") -> dict[str, float]:
    x = torch.stack([mackey_glass(673, seed) for seed in range(8)])
    lstm, dense = LSTM(1, 32), nn.Linear(32, 1)

    def predict(x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x_1 ... x_t -> x_{t+1} for every t: x and y (batch, time)."""
        y, state = lstm.step(x[..., None], state or lstm.initial_state(len(x)))
        return dense(y)[..., 0], state

    optimizer, state = torch.optim.Adam([*lstm.parameters(), *dense.parameters()], 1e-2), ()
    for step in range(30 * 14):  # truncated back-propagation through time: 14 pieces of 48 steps, the state carried
        start = step % 14 * 48
        y, state = predict(x[:, start : start + 48], detach(state) if start else None)
        optimizer.zero_grad()
        (y - x[:, start + 1 : start + 49]).square().mean().backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
    linear = torch.linalg.lstsq(x.unfold(1, 48, 1)[:, :-1].flatten(0, 1), x[:, 48:].reshape(-1, 1)).solution[:, 0]
    new, forecast = mackey_glass(600, seed=99), []
    odd = torch.cat([new[:300], new[300:330].flip(0), new[330:]])  # thirty steps backwards, which the eye misses
    with torch.no_grad():
        y, state = predict(new[None, :560])
        while len(forecast) < 40:  # each forecast is the next input
            forecast.append(y[0, -1])
            y, state = predict(y[:, -1:], state)
        error = predict(new[None])[0][0, 47:-1] - new[48:]
        score = (predict(odd[None])[0][0, :-1] - odd[1:]).abs() / error.square().mean().sqrt()
    errors = {"LSTM": error, "linear": new.unfold(0, 48, 1)[:-1] @ linear - new[48:], "last value": new.diff()}
    _, (above, below) = plt.subplots(2, 1, figsize=(9, 5), layout="constrained")
    above.plot(range(500, 600), new[500:], "k", range(560, 600), forecast, "r")
    above.set_title("the series, and in red its forecast from step 560")
    below.plot(range(1, 600), score)
    below.set_title("anomaly score: error / usual error (steps 300 to 329 run backwards)")
    plt.savefig(picture)
    return {name: float(e.square().mean().sqrt()) for name, e in errors.items()} | {"odd": float(score[299:330].max())}


if __name__ == "__main__":
    print(*(f"{name}: {value:.3f}" for name, value in main(*sys.argv[1:]).items()), sep="\n")
