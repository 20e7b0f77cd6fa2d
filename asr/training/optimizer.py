"""The optimiser: Muon for the matrices of the recurrent layers and convolutions, AdamW for all other weights."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from asr.nn.cells import Cell

_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: singular values come to lie around 1
_ITERATIONS = 5
_RMS = 0.2  # of an update, as AdamW's is, so that one learning rate serves both (Liu et al. 2025)


class Optimizer:
    """Muon and AdamW side by side, with one interface: `param_groups`, `step`, `zero_grad`, `state_dict`.

    Muon makes the momentum of a matrix orthogonal before it is applied, so that directions that are rarely in the
    gradient count as much as frequent ones (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; scaled as in
    Liu et al. 2025, https://arxiv.org/abs/2502.16982). Of an LSTM each gate's matrix is one by itself.

    Args:
        network: whose weights are trained.
        rate: the learning rate of both.
        weight_decay: of all that are not vectors.
        muon: False leaves all weights to AdamW.
    """

    def __init__(self, network: nn.Module, rate: float, weight_decay: float, *, muon: bool = True) -> None:
        gates = _gates(network) if muon else {}
        rest = [p for p in network.parameters() if p not in gates]
        adamw = torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
                {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=rate,
            betas=(0.9, 0.98),
            fused=True,  # four times as fast on a CPU: a twentieth of a step
        )
        self._parts: list[torch.optim.Optimizer] = [adamw]
        if gates:
            self._parts.append(_Muon(gates, rate, weight_decay))

    @property
    def param_groups(self) -> list[dict]:
        """Of both; what is written into them counts."""
        return [group for part in self._parts for group in part.param_groups]

    def step(self) -> None:
        """Apply the gradients."""
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The moments by name."""
        return {
            f"{i}.{index}.{name}": value
            for i, part in enumerate(self._parts)
            for index, entry in part.state_dict()["state"].items()
            for name, value in entry.items()
        }

    def load_state_dict(self, moments: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        states: dict[int, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        for key, value in moments.items():
            i, index, name = key.split(".")
            states[int(i)][int(index)][name] = value
        for i, part in enumerate(self._parts):
            groups = part.state_dict()["param_groups"]
            part.load_state_dict({"state": {k: dict(v) for k, v in states[i].items()}, "param_groups": groups})


class _Muon(torch.optim.Optimizer):
    def __init__(self, gates: dict[nn.Parameter, int], rate: float, weight_decay: float) -> None:
        self._gates = gates
        super().__init__(list(gates), {"lr": rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # one product for many matrices
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - _MOMENTUM)
                direction = p.grad.lerp(state["momentum"], _MOMENTUM)  # Nesterov's
                matrices = direction.reshape(self._gates[p], p.shape[0] // self._gates[p], -1)
                alike[matrices.shape[1:]].append((p, matrices))
            for (rows, columns), pairs in alike.items():
                updates = orthogonal(torch.cat([matrices for _, matrices in pairs]))
                rate = group["lr"] * _RMS * max(rows, columns) ** 0.5
                for (p, _), update in zip(pairs, updates.split([len(m) for _, m in pairs]), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.reshape(p.shape).to(p.dtype), alpha=-rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices, (n, rows, columns) each, whose singular values are all about 1 (0.7 to 1.2)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(_precision(matrices.device))
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _precision(device: torch.device) -> torch.dtype:
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _gates(network: nn.Module) -> dict[nn.Parameter, int]:
    """The weights for Muon, with the number of matrices that lie in each, one above the other."""
    found: dict[nn.Parameter, int] = {}

    def add(parameters: Iterable[Tensor], gates: int) -> None:
        found.update({p: gates for p in parameters if isinstance(p, nn.Parameter) and p.ndim > 1})

    for module in network.modules():
        if isinstance(module, nn.LSTM):
            add(module.parameters(), 4)
        elif isinstance(module, Cell):
            add((module.w.weight, module.u.weight), len(module.gates))
        elif isinstance(module, nn.Conv1d):
            add((module.weight,), 1)
    return found
