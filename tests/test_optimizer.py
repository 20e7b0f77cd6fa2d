"""asr.training.optimizer: Muon for matrices, AdamW for the rest."""

import pytest
import torch
from torch import nn

from asr.nn.cells import CELLS
from asr.training.optimizer import Optimizer, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_all_singular_values_come_to_lie_around_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    values = torch.linalg.svdvals(orthogonal(matrices).float())
    assert values.max() < 1.3 and values.min() > 0.3
    assert torch.linalg.svdvals(matrices).max() < 0.02  # what went in is unchanged


def trained(network: nn.Module, optimizer: Optimizer, steps: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in network.parameters()]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Conv1d(4, 6, 3), nn.LSTM(6, 8), CELLS["gru"](8, 8), nn.Linear(8, 5), nn.LayerNorm(5)])


def test_each_gate_of_an_lstm_is_a_matrix_by_itself() -> None:
    lstm = nn.LSTM(6, 8)
    weight = dict(lstm.named_parameters())["weight_ih_l0"]
    before = weight.detach().clone()
    optimizer = Optimizer(lstm, 0.1, 0.0)
    trained(lstm, optimizer, 1)
    for change in (weight.detach() - before).chunk(4):
        values = torch.linalg.svdvals(change) / (0.1 * 0.2 * 8**0.5)
        assert values.max() < 1.3 and values.min() > 0.3


def test_a_run_that_goes_on_from_its_state_ends_with_the_same_weights() -> None:
    whole = network()
    expected = trained(whole, Optimizer(whole, 0.01, 0.1), 3, seed=0)
    first = network()
    optimizer = Optimizer(first, 0.01, 0.1)
    generator_free = network()
    again = Optimizer(generator_free, 0.01, 0.1)
    gradients = torch.Generator().manual_seed(0)
    for step in range(3):
        if step == 2:
            again.load_state_dict(optimizer.state_dict())
            generator_free.load_state_dict(first.state_dict())
            first, optimizer = generator_free, again
        for p in first.parameters():
            p.grad = torch.randn(p.shape, generator=gradients)
        optimizer.step()
    for a, b in zip(expected, first.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=0)


def test_without_muon_it_is_adamw() -> None:
    ours, theirs = network(), network()
    got = trained(ours, Optimizer(ours, 0.01, 0.0, muon=False), 4)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p in theirs.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        plain.step()
    for a, b in zip(got, theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach())


def test_the_learning_rate_of_all_weights_can_be_set() -> None:
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = Optimizer(net, 1.0, 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for a, b in zip(before, trained(net, optimizer, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
