"""Layers with a fixed window over time: normalisation, strided causal convolution, look-ahead."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from asr.errors import ModelError
from asr.nn.layer import State, StreamingLayer, valid, window_state, windows

NO_POWER = 1e-10
# The logarithm of speech's mean power lies so far above the mean of the logarithms: 0.2 to 4.8 in five corpora.
LEVEL_ABOVE_MEAN = 3.5
RUNNING_LEVEL_ABOVE_MEAN = 4.2  # likewise, where loud frames count for more
LARGEST_RISE = 6.0  # of a level, 26 dB: silence is not to become as loud as speech
MEMORY_FRAMES = 1000
_RENORM_RATIO, _RENORM_SHIFT = 3.0, 5.0  # how far a batch may be from the running statistics, in deviations


class Normalise(StreamingLayer):
    """Shift and scale each channel by stored statistics: (x - mean) / sqrt(variance).

    Args:
        mean, variance: (channels,), measured over the training data and kept with the model.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (variance + 1e-5).rsqrt())

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.mean) * self.scale, lengths

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return (x - self.mean) * self.scale, state

    def _nothing(self, batch_size: int) -> Tensor:
        return self.mean.new_zeros(batch_size, 0, len(self.mean))


class UtteranceNormalise(Normalise):
    """As Normalise, of whole utterances whose levels are evened out first: log-mel (batch, time, bands), likewise.

    The level of a band is the logarithm of its mean power, which speech decides and pauses hardly touch: it tells how
    loud the utterance is, and by what microphone it came. What it differs by from that of usual speech is taken off by
    a share of n / (n + frames) of an utterance of n frames, as short ones are of few sounds. After cepstral mean
    normalisation (Atal 1974), whose mean is that of the logarithms.

    Args:
        mean, variance: as Normalise's.
        frames: see above.
        whole: frames to one of the network's output: what fills none does not count.
    """

    def __init__(self, mean: Tensor, variance: Tensor, frames: float, whole: int = 1) -> None:
        super().__init__(mean, variance)
        self.frames, self.whole = frames, whole

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        frames = lengths // self.whole * self.whole
        counts = valid(frames, x.shape[1])[..., None]
        count = frames.clamp(min=1)[:, None].to(x.dtype)
        power = torch.where(counts, x.exp(), 0.0).sum(dim=1) / count
        level = power.clamp(min=NO_POWER).log()
        share = count / (count + self.frames)
        return (x - self.mean - (share * (level - self.mean - LEVEL_ABOVE_MEAN))[:, None]) * self.scale, lengths

    def initial_state(self, batch_size: int) -> State:
        raise ModelError("this network takes whole utterances and cannot stream; use the model's streaming network")


class RunningNormalise(Normalise):
    """UtteranceNormalise for streams: the levels are those of what was heard so far.

    A frame counts by the square root of its power: pauses hardly do, and at the first word after a long silence the
    levels are again those of a few frames. What was heard 10 s ago counts e times less.

    Args:
        mean, variance, frames: as UtteranceNormalise's.
    """

    def __init__(self, mean: Tensor, variance: Tensor, frames: float) -> None:
        super().__init__(mean, variance)
        self.frames = frames

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(x, self.initial_state(x.shape[0]))[0], lengths

    def initial_state(self, batch_size: int) -> State:
        return (self.mean.new_zeros(batch_size, len(self.mean) + 2),)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (sums,), outputs = state, [self._nothing(x.shape[0])]
        for piece in x.split(MEMORY_FRAMES // 2, dim=1) if x.shape[1] else ():
            power = piece.exp()
            loudness = power.sum(dim=2, keepdim=True)
            weight = loudness.sqrt()
            age = torch.arange(1, piece.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None] / MEMORY_FRAMES
            counted = torch.cat([weight * power, weight, loudness], dim=2) * age.exp()
            so_far = (sums[:, None] + counted.cumsum(dim=1)) * (-age).exp()
            weights, squares = so_far[..., -2:].clamp(min=NO_POWER).split(1, dim=2)
            count = weights.square() / squares  # of frames as loud as each other, that would tell as much
            level = (so_far[..., :-2] / weights).clamp(min=NO_POWER).log()
            differs = (level - self.mean - RUNNING_LEVEL_ABOVE_MEAN).clamp(min=-LARGEST_RISE)
            outputs.append((piece - self.mean - count / (count + self.frames) * differs) * self.scale)
            sums = so_far[:, -1]
        return torch.cat(outputs, dim=1), (sums,)


class StridedConvolution(StreamingLayer):
    """A causal convolution over time with a stride, batch normalisation and ReLU.

    Frame t of the output sees input frames up to stride * (t + 1) - 1, with zeros before the first one.
    """

    def __init__(self, input_size: int, output_size: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(input_size, output_size, kernel, stride, bias=False)
        self.norm = MaskedBatchNorm(output_size)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        lengths = lengths // self.stride
        frames, _ = windows(x, None, self.kernel, self.stride)
        return self._convolve(frames, lengths), lengths

    def initial_state(self, batch_size: int) -> State:
        weight = self.convolution.weight
        return window_state(weight.new_zeros(batch_size, 0, weight.shape[1]), self.kernel)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        frames, state = windows(x, state, self.kernel, self.stride)
        return self._convolve(frames, None), state

    def _convolve(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        if frames.shape[1] < self.kernel:
            return self._nothing(frames.shape[0])
        y = self.convolution(frames.transpose(1, 2)).transpose(1, 2)
        return F.relu(self.norm(y, lengths))

    def _nothing(self, batch_size: int) -> Tensor:
        weight = self.convolution.weight
        return weight.new_zeros(batch_size, 0, weight.shape[0])


class MaskedBatchNorm(nn.Module):
    """Batch normalisation over the valid frames alone, of all ranks where training is distributed.

    In training, too, the output is that of the running statistics: batches hold utterances of like length, often of one
    kind (single words, say), and a network that saw each normalised by its own statistics would not know it by others.
    The gradient is that of batch normalisation. Batch renormalisation, Ioffe 2017, https://arxiv.org/abs/1702.03275;
    batch normalisation, Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, size: int, momentum: float = 0.05, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_variance", torch.ones(size))
        self.momentum, self.epsilon = momentum, epsilon

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """x (batch, time, size), lengths (batch,) or None where all frames are valid -> like x."""
        mean, variance = self.running_mean, self.running_variance
        scale = (variance + self.epsilon).rsqrt()
        if self.training and lengths is not None:
            inside = valid(lengths, x.shape[1])[..., None]
            kept = torch.where(inside, x, 0.0).float()
            sums = torch.cat([kept.sum((0, 1)), (kept**2).sum((0, 1)), inside.sum().float()[None]])
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                import torch.distributed.nn.functional as distributed  # differentiable, unlike dist.all_reduce

                sums = distributed.all_reduce(sums)
            count = sums[-1].clamp(min=1.0)
            size = len(self.weight)
            batch_mean = sums[:size] / count
            batch_variance = (sums[size : 2 * size] / count - batch_mean**2).clamp(min=0.0)
            mean = mean.clone()  # like `scale`, of before this batch
            with torch.no_grad():
                self.running_mean.lerp_(batch_mean, self.momentum)
                self.running_variance.lerp_(batch_variance, self.momentum)
            deviation = (batch_variance + self.epsilon).sqrt()
            # Far from the running statistics, as at the start of training, the batch's own count.
            ratio = (deviation * scale).detach().clamp(1 / _RENORM_RATIO, _RENORM_RATIO)
            shift = ((batch_mean - mean) * scale).detach().clamp(-_RENORM_SHIFT, _RENORM_SHIFT)
            scale, mean = ratio / deviation, batch_mean - shift * deviation / ratio
        scale = self.weight * scale
        return x * scale + (self.bias - mean * scale)


class LookAhead(StreamingLayer):
    """A convolution over this frame and the next `frames` ones, one filter a channel, with a residual path.

    The row convolution of Amodei et al. 2015, https://arxiv.org/abs/1512.02595, section 3.7.
    """

    def __init__(self, size: int, frames: int) -> None:
        super().__init__()
        self.latency = frames
        self.weight = nn.Parameter(torch.zeros(frames + 1, size))
        with torch.no_grad():
            self.weight[0] = 1.0

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.where(valid(lengths, x.shape[1])[..., None], x, 0.0)
        return self._filter(F.pad(x, (0, 0, 0, self.latency))), lengths

    def initial_state(self, batch_size: int) -> State:
        held = self.weight.new_zeros(batch_size, self.latency, self.weight.shape[1])
        return held, torch.zeros(batch_size, dtype=torch.long, device=held.device)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        held, seen = state
        before = int(seen[0])
        joined = torch.cat([held, x], dim=1)
        # Until the look-ahead has filled, the oldest frames of the buffer come from before the stream.
        y = self._filter(joined)[:, max(self.latency - before, 0) :]
        count = min(before + x.shape[1], self.latency)
        return y, (joined[:, joined.shape[1] - self.latency :].clone(), torch.full_like(seen, count))

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        held, seen = state
        y = self._filter(F.pad(held, (0, 0, 0, self.latency)))[:, self.latency - int(seen[0]) :]
        return y, seen.clone()

    def _filter(self, x: Tensor) -> Tensor:
        time = x.shape[1] - self.latency
        y = x[:, :time] * self.weight[0]
        for k in range(1, self.latency + 1):
            y = y + x[:, k : k + time] * self.weight[k]
        return y

    def _nothing(self, batch_size: int) -> Tensor:
        return self.weight.new_zeros(batch_size, 0, self.weight.shape[1])
