"""The training step: augmented features through the network, CTC on tokens and phones, phone states frame by frame."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr.models import Network
from asr.training.data import UNKNOWN, Batch


class Losses(nn.Module):
    """A network with its losses, as one module: what DistributedDataParallel wraps.

    CTC: Graves et al. 2006. Losses are sums over utterances divided by the number of tokens (phones) of the
    global batch, so that any number of workers gives the same mean.

    Args:
        phone_weight: of the phone CTC beside the tokens' one.
        alignment_weight: of the cross-entropy on aligned phone states, a mean over frames.
        precision: "fp32" or "bf16" (autocast; the losses are always float32).
    """

    def __init__(self, network: Network, phone_weight: float, alignment_weight: float, precision: str) -> None:
        super().__init__()
        self.network = network
        self.phone_weight, self.alignment_weight, self.precision = phone_weight, alignment_weight, precision

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the token loss alone (detached)."""
        network = self.network
        with torch.no_grad():
            features, frames = features_of(network, batch)
            hidden = batch.hidden_frames[:, : features.shape[1], None] | batch.hidden_bands[:, None, :]
            features = features.masked_fill(hidden, 0.0)  # 0 is the mean
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            log_probs, frames, auxiliary = network.read_features(features, frames)
        loss = ctc(log_probs, frames, batch.tokens, batch.token_lengths, batch.counts) / max(batch.token_count, 1)
        total = loss
        for name in ("phones", "final phones"):
            if name in auxiliary and self.phone_weight:
                phone_loss = ctc(auxiliary[name], frames, batch.phones, batch.phone_lengths, batch.phone_lengths > 0)
                total = total + self.phone_weight * phone_loss / max(batch.phone_count, 1)
        if "states" in auxiliary and self.alignment_weight:
            states = auxiliary["states"].float().transpose(1, 2)
            state_loss = F.nll_loss(states, batch.states[:, : states.shape[2]], ignore_index=UNKNOWN, reduction="sum")
            total = total + self.alignment_weight * state_loss / max(batch.state_count, 1)
        return total, loss.detach()


def features_of(network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
    """A batch's normalised features (batch, frames, bands) and their lengths, computed or as they were stored."""
    if batch.features is None:
        return network.normalised_features(batch.audio, batch.lengths)
    return network.layers[1](batch.features, batch.lengths // network.config.features.hop)


def ctc(log_probs: Tensor, frames: Tensor, targets: Tensor, target_lengths: Tensor, counts: Tensor) -> Tensor:
    """Summed CTC loss of the rows that count: log_probs (batch, time, tokens), counts (batch,) bool -> scalar."""
    losses = F.ctc_loss(
        log_probs.float().transpose(0, 1), targets, frames, target_lengths, reduction="none", zero_infinity=True
    )
    return torch.where(counts, losses, 0.0).sum()


def choose_precision(wanted: str, device: torch.device) -> str:
    """ "bf16" where the device has instructions for it, else "fp32"; anything but "auto" is taken as it is.

    A CPU without them multiplies such matrices a hundred times slower; timing a product instead would depend on
    what else the machine is doing.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    cpu = torch.cpu
    return "bf16" if cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported() else "fp32"


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a half cosine to zero at `total` steps."""
    warmup = min(warmup, max(total // 10, 1))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
