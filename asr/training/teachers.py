"""Networks that teach another one: it learns what they say of each frame, beside what was said.

Hinton et al. 2015, "Distilling the knowledge in a neural network"; of several the mean of their probabilities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from asr.errors import ConfigError
from asr.models import Network, load_network
from asr.training.data import Batch, features_of

_FARTHEST = 8  # frames that a teacher may write a label sooner, or later, than the one it teaches


class Teachers:
    """Trained networks with the tokens, phones and frames of the one they teach; it may see less of what follows.

    Args:
        folders: of the networks.
        student: whom they teach.
        device: where.
        precision: see Losses.

    Raises:
        ConfigError: one of them writes other tokens or phones, or frames of another length.
        ModelError: one cannot be read.
    """

    def __init__(self, folders: Sequence[str], student: Network, device: torch.device, precision: str) -> None:
        self.precision = precision
        self.networks: list[Network] = []
        for folder in folders:
            network = load_network(folder).to(device)
            for what, theirs, own in (
                ("tokens", network.tokenizer.tokens, student.tokenizer.tokens),
                ("phones at the output", network.phones[: network.phone_count], student.phones[: student.phone_count]),
                ("samples to a frame", network.stride, student.stride),
            ):
                if theirs != own:
                    raise ConfigError(
                        f"teachers: {folder} has other {what} than the network to be trained; begin the training "
                        "with init_from and the same [model], or leave this teacher out"
                    )
            self.networks.append(network)

    @torch.no_grad()
    def say(self, batch: Batch) -> list[Tensor]:
        """The log-probabilities of tokens and phones by each, (batch, frames, tokens + phones), float32, unmasked."""
        with torch.autocast(batch.audio.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return [_listen(network, batch) for network in self.networks]


def _listen(network: Network, batch: Batch) -> Tensor:
    log_probs, _, auxiliary = network.read_features(*features_of(network, batch))
    phones = [auxiliary["final phones"]] if network.phone_count else []
    return torch.cat([log_probs, *phones], dim=-1).float()


@torch.no_grad()
def lesson(said: Sequence[Tensor], student: Tensor, heard: Tensor) -> Tensor:
    """The mean of what teachers say, each moved by the frames that bring it nearest to the student in this batch.

    CTC does not say when in a sound its label comes, and who sees less of what follows writes it later.

    Args:
        said: log-probabilities of each teacher, (batch, frames, labels).
        student: its own.
        heard: (batch, frames) bool: not padding.

    Returns:
        Probabilities, (batch, frames, labels).
    """
    student, inside = student.float(), heard[..., None].float()
    mean = torch.zeros_like(student)
    for log_probs in said:
        moved = [_later(log_probs.exp(), frames) for frames in range(-_FARTHEST, _FARTHEST + 1)]
        agreement = torch.stack([(each * student * inside).sum() for each in moved])
        # without a look at the value, for which a GPU would have to be waited for
        nearest = F.one_hot(agreement.argmax(), len(moved)).to(student.dtype)
        mean += sum(share * each for share, each in zip(nearest, moved, strict=True))
    return mean / len(said)


def _later(x: Tensor, frames: int) -> Tensor:
    """The same, so many frames later: (batch, time, labels); at its borders the first and the last are repeated."""
    time = x.shape[1]
    return x[:, (torch.arange(time, device=x.device) - frames).clamp(0, time - 1)]
