"""The training step: augmented features through the network, CTC on tokens and phones, phone states frame by frame.

And the loss of the transducer, where the network has one.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.functional import rnnt_loss

from asr.models import Network
from asr.nn.transducer import Transducer
from asr.training.crf import log_partition
from asr.training.data import UNKNOWN, Batch, features_of
from asr.training.teachers import Teachers, lesson, phones_beside


class Losses(nn.Module):
    """A network with its losses, as one module: what DistributedDataParallel wraps.

    CTC: Graves et al. 2006. Losses are sums over utterances divided by the number of tokens (phones) of the
    global batch, so that any number of workers gives the same mean.

    Args:
        phone_weight: of the phone CTC beside the tokens' one.
        alignment_weight: of the cross-entropy on aligned phone states, a mean over frames.
        precision: "fp32" or "bf16" (autocast; the losses are always float32).
        transducer_weight: of the transducer's loss on tokens beside the CTC.
        freeze_encoder: the transducer's loss is the only one, and all that is not of the transducer stays as it is.
        consistency_weight: of the divergence between what two views of an utterance say, each under masks of its
            own (Yao et al. 2024, "CR-CTC"); batches then come with masks for two views. 0: one view.
        crf_weight: of the denominator of the final phones' CTC (asr.training.crf); 1 makes it a CTC-CRF.
        likely: trigrams of phones, which that needs.
        teachers: networks to learn from, beside what was said (asr.training.teachers).
        teacher_weight: of the divergence from what they say, of tokens and of phones, beside the CTC of each.
    """

    def __init__(
        self,
        network: Network,
        phone_weight: float,
        alignment_weight: float,
        precision: str,
        transducer_weight: float = 0.0,
        freeze_encoder: bool = False,
        consistency_weight: float = 0.0,
        crf_weight: float = 0.0,
        likely: Tensor | None = None,
        teachers: Teachers | None = None,
        teacher_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.phone_weight, self.alignment_weight, self.precision = phone_weight, alignment_weight, precision
        self.transducer_weight, self.freeze_encoder = transducer_weight, freeze_encoder
        self.consistency_weight, self.crf_weight, self.likely = consistency_weight, crf_weight, likely
        self.teachers, self.teacher_weight = teachers, teacher_weight
        if freeze_encoder:
            trained = ("transducer.", f"layers.{len(network.layers) - 1}.joint.")
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name.startswith(trained))

    def train(self, mode: bool = True) -> "Losses":
        """As of every module; frozen layers read as they do in use: no dropout, batch statistics as they are."""
        super().train(mode)
        if self.freeze_encoder:
            self.network.layers.eval()
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the token loss alone (detached): CTC's, of a frozen encoder the transducer's."""
        network = self.network
        with torch.no_grad():
            features, frames = features_of(network, batch)
            views = len(batch.hidden_frames) // len(features)
            said = [x.repeat(views, 1, 1) for x in self.teachers.say(batch)] if self.teachers else []
            if views > 1:  # the second after the first, row by row
                features, frames, batch = features.repeat(views, 1, 1), frames.repeat(views), batch.repeated(views)
            hidden = batch.hidden_frames[:, : features.shape[1], None] | batch.hidden_bands[:, None, :]
            features = features.masked_fill(hidden, 0.0)  # 0 is the mean
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            log_probs, frames, auxiliary = network.read_features(features, frames)
        counted = batch.cpu_lengths // network.stride  # `frames`, on the CPU
        total = torch.zeros((), device=features.device)
        if network.transducer is not None and self.transducer_weight:
            loss = rnnt(
                network.transducer, auxiliary["joint"], counted, batch.tokens, batch.token_lengths, batch.counts
            ) / max(batch.token_count, 1)
            total = self.transducer_weight * loss
            if self.freeze_encoder:
                return total, loss.detach()
        loss = ctc(log_probs, counted, batch.tokens, batch.token_lengths, batch.counts) / max(batch.token_count, 1)
        total = total + loss
        if views > 1:
            spread = divergence(log_probs, frames, batch.counts) / max(batch.token_count, 1)
            total = total + self.consistency_weight * spread
        known = batch.pronounced
        if said:
            total = total + self.teacher_weight * self._lesson(said, log_probs, auxiliary, frames, known, batch)
        for name in ("phones", "final phones"):
            if name in auxiliary and self.phone_weight:
                phone_loss = ctc(auxiliary[name], counted, batch.phones, batch.phone_lengths, known)
                if views > 1:
                    phone_loss = phone_loss + self.consistency_weight * divergence(auxiliary[name], frames, known)
                if name == "final phones" and self.likely is not None and self.crf_weight:
                    all_said = log_partition(auxiliary[name], frames, self.likely)
                    fitting = known & (_least_frames(batch.phones, batch.phone_lengths) <= frames)  # else CTC is 0
                    phone_loss = phone_loss + self.crf_weight * torch.where(fitting, all_said, 0.0).sum()
                total = total + self.phone_weight * phone_loss / max(batch.phone_count, 1)
        if "states" in auxiliary and self.alignment_weight:
            states = auxiliary["states"].float().transpose(1, 2)
            state_loss = F.nll_loss(states, batch.states[:, : states.shape[2]], ignore_index=UNKNOWN, reduction="sum")
            total = total + self.alignment_weight * state_loss / max(batch.state_count, 1)
        return total, loss.detach()

    def _lesson(
        self,
        said: list[Tensor],
        log_probs: Tensor,
        auxiliary: dict[str, Tensor],
        frames: Tensor,
        known: Tensor,
        batch: Batch,
    ) -> Tensor:
        """How far the network is from what its teachers say, by token, and by phone as phones are weighed."""
        own = torch.cat([log_probs, *phones_beside(auxiliary)], dim=-1).float()
        heard = torch.arange(own.shape[1], device=own.device) < frames[:, None]
        apart = F.kl_div(own, lesson(said, own, frames), reduction="none")
        apart = torch.where(heard[..., None], apart, 0.0).sum(1)  # (batch, labels)
        tokens, phones = apart.split([log_probs.shape[-1], own.shape[-1] - log_probs.shape[-1]], dim=1)
        by_token = torch.where(batch.counts, tokens.sum(1), 0.0).sum() / max(batch.token_count, 1)
        by_phone = torch.where(known, phones.sum(1), 0.0).sum() / max(batch.phone_count, 1)
        return by_token + self.phone_weight * by_phone


def ctc(log_probs: Tensor, frames: Tensor, targets: Tensor, target_lengths: Tensor, counts: Tensor) -> Tensor:
    """Summed CTC loss of the rows that count: log_probs (batch, time, tokens), counts (batch,) bool -> scalar.

    `frames` and `target_lengths` are best on the CPU, where the loss reads them: a GPU would be waited for.
    """
    losses = F.ctc_loss(
        log_probs.float().transpose(0, 1), targets, frames, target_lengths, reduction="none", zero_infinity=True
    )
    return torch.where(counts, losses, 0.0).sum()


def _least_frames(targets: Tensor, lengths: Tensor) -> Tensor:
    """How many frames CTC needs at the least: (batch, longest), (batch,) -> (batch,), equal neighbours being parted."""
    place = torch.arange(1, targets.shape[1], device=targets.device)
    lengths = lengths.to(targets.device)
    return lengths + ((targets[:, 1:] == targets[:, :-1]) & (place < lengths[:, None])).sum(1)


def divergence(log_probs: Tensor, frames: Tensor, counts: Tensor) -> Tensor:
    """Summed Kullback-Leibler divergence between two views, each the other's target: (2 batch, time, tokens) -> scalar.

    The first half of the rows is one view, the second the other; rows that do not count, and padding, are left out.
    """
    heard = torch.arange(log_probs.shape[1], device=frames.device) < frames[:, None]
    log_probs = log_probs.float()
    other = torch.cat(log_probs.detach().chunk(2)[::-1])
    apart = F.kl_div(log_probs, other, reduction="none", log_target=True).sum(-1)
    return torch.where(heard & counts[:, None], apart, 0.0).sum()


def rnnt(
    transducer: Transducer, encoder: Tensor, frames: Tensor, targets: Tensor, target_lengths: Tensor, counts: Tensor
) -> Tensor:
    """Summed transducer loss (Graves 2012) of the rows that count: encoder (batch, time, units) -> scalar.

    Row by row: the joint has a value for each frame, each number of tokens and each unit, and padding would double it.
    """
    losses = []
    predicted = transducer.predict(targets)
    for share, prediction, row, t, u in zip(
        encoder, predicted, targets, frames.tolist(), target_lengths.tolist(), strict=True
    ):
        t = max(t, 1)  # of a row that does not count
        log_probs = transducer(share[:t, None].float(), prediction[: u + 1].float())  # (t, u + 1, tokens)
        following = F.pad(row[:u], (0, 1)).expand(t, -1)[..., None]
        # The loss is a function of the blank and the token that follows: of those two rnnt_loss is ten times as fast.
        two = torch.stack([log_probs[..., 0], log_probs.gather(-1, following)[..., 0]], dim=-1)
        ones = torch.ones(1, u, dtype=torch.int32, device=two.device)
        lengths = [torch.tensor([n], dtype=torch.int32, device=two.device) for n in (t, u)]
        losses.append(rnnt_loss(two[None], ones, *lengths, blank=0, reduction="sum", fused_log_softmax=False))
    return torch.where(counts, torch.stack(losses), 0.0).sum()


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
