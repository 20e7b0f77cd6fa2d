"""Networks that teach another one: it learns what they say of each frame, beside what was said.

Hinton et al. 2015, "Distilling the knowledge in a neural network"; of several the mean of their probabilities.
"""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

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
        ConfigError: one of them has other tokens, phones, features, or frames of another length.
        ModelError: one cannot be read.
    """

    def __init__(self, folders: Sequence[str], student: Network, device: torch.device, precision: str) -> None:
        self.precision = precision
        self.networks: list[Network] = []
        for folder in folders:
            network = load_network(folder).to(device)
            said = network.phones[: network.phone_count] if student.phone_count else ()
            for what, theirs, own in (
                ("[features]", network.config.features, student.config.features),
                ("samples to a frame", network.stride, student.stride),
                ("tokens", network.tokenizer.tokens, student.tokenizer.tokens),
                ("phones at the output", said, student.phones[: student.phone_count]),
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
        said = []
        for network in self.networks:
            features = features_of(network, batch)
            with torch.autocast(batch.audio.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                log_probs, _, auxiliary = network.read_features(*features)
            said.append(torch.cat([log_probs, *phones_beside(auxiliary)], dim=-1).float())
        return said


def phones_beside(auxiliary: dict[str, Tensor]) -> list[Tensor]:
    """What comes behind the tokens: the log-probabilities of the final phones, where a network writes them."""
    return [auxiliary["final phones"]] if "final phones" in auxiliary else []


@torch.no_grad()
def lesson(said: Sequence[Tensor], student: Tensor, frames: Tensor) -> Tensor:
    """The mean of what teachers say, each moved by the frames that bring it nearest to the student in this batch.

    CTC does not say when in a sound its label comes, and who sees less of what follows writes it later. Of several
    workers each has a part of the batch; they find one move together.

    Args:
        said: log-probabilities of each teacher, (batch, time, labels) or more, of which the first are the student's.
        student: its own, (batch, time, labels).
        frames: (batch,), of each row.

    Returns:
        Probabilities, (batch, time, labels); at the borders of a row the first and the last are repeated.
    """
    time = torch.arange(student.shape[1], device=student.device)
    own = torch.where((time < frames[:, None])[..., None], student.float(), 0.0)
    last = (frames - 1).clamp(min=0)[:, None]

    def later(x: Tensor, by: int | Tensor) -> Tensor:
        at = torch.minimum((time - by).clamp(min=0).expand(len(x), -1), last)
        return x.gather(1, at[..., None].expand_as(x))

    mean = torch.zeros_like(own)
    for log_probs in said:
        probs = log_probs[..., : own.shape[-1]].exp()
        agreement = torch.stack([(later(probs, by) * own).sum() for by in range(-_FARTHEST, _FARTHEST + 1)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(agreement)
        mean += later(probs, agreement.argmax() - _FARTHEST)  # a tensor: on a GPU nobody waits for its value
    return mean / len(said)
