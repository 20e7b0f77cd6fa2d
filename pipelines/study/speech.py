"""Small networks trained alike on short spoken words and scored in quiet, in noise and on long utterances.

All of them have the same convolutions in front and the same number of weights; what differs is between.
"""

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr.audio import SAMPLE_RATE, read_audio
from asr.augment import add_noise
from asr.config import AugmentConfig, DataConfig, ModelConfig, NetworkConfig, TrainConfig, TrainingConfig
from asr.metrics import ErrorCounts, count_errors
from asr.models import FORMAT_VERSION, Network, Output
from asr.text import BLANK, Tokenizer
from asr.training.data import EDGE_SAMPLES, Batch, Corpus, Loader, Sampler
from asr.training.shards import ShardDataset
from asr.training.step import Losses, ctc, learning_rate
from pipelines.study.baselines import HEADS, FeedForward, Transformer
from pipelines.study.cost import equal_width

NETWORKS: dict[str, dict[str, Any]] = {
    "lstm": {},
    "bilstm": {"bidirectional": True},
    "deep": {"layers": 4, "residual": True},  # without the paths it had not left the plateau after 800 updates
    "peephole": {"cell": "lstm-peephole"},
    "attention": {"attention": 50},
    "rnn": {"cell": "rnn"},
    "gru": {"cell": "gru"},
    "transformer": {},
    "feed-forward": {},
}
BASELINES = {"transformer": Transformer, "feed-forward": FeedForward}
SNRS = (20, 10, 0)


class Words(Tokenizer):
    """A vocabulary of whole words: with a few dozen of them they are learned sooner than their spelling."""

    def __init__(self, texts: Iterable[str]) -> None:
        super().__init__([BLANK, *sorted({word for text in texts for word in text.split()})])

    def encode(self, text: str) -> list[int]:
        """The index of each word."""
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of indices; blanks are dropped."""
        return " ".join(self.tokens[i] for i in ids if i != 0)


Spoken = tuple[Tensor, str]  # samples (n,) without edge silence, and what is said


def run(
    *,
    network: str,
    data: str,
    seed: int,
    updates: int,
    equal_time: bool,
    hidden: int,
    lengths: Sequence[int],
    rates: Sequence[float],
    folder: str,
) -> dict[str, Any]:
    """Train one network and score it.

    Args:
        network: of NETWORKS.
        data: "train" or "tenth".
        updates: of the LSTM; of all networks, unless `equal_time`: then as many as take as long as the LSTM's.
        hidden: units of the LSTM, whose number of weights all networks get.
        lengths: steps of the network (40 ms each), of joined utterances to be scored.
        rates: learning rates; of several, the one with the lowest training loss after a quarter of the updates.
        folder: the speech (pipelines.study.words.make_speech).
    """
    torch.manual_seed(seed)
    config = configuration(Path(folder) / data, seed, hidden)
    vocabulary = Words(ShardDataset(Path(folder) / "train").texts)
    corpus = Corpus([str(Path(folder) / data)], vocabulary)
    net = build(network, config, corpus)
    cost = 1.0
    if equal_time and network != "lstm":
        cost = relative_cost(net, build("lstm", config, corpus), corpus, config)
    own_updates = round(updates / cost)
    rate = choose_rate(rates, net, corpus, config, own_updates // 4)
    clock = time.process_time()
    curve = train(net, corpus, config, own_updates, rate)
    seconds = time.process_time() - clock
    net.eval()
    test = spoken(Corpus([str(Path(folder) / "test")], vocabulary))
    heard = spoken(Corpus([str(Path(folder) / f"{data}-heard")], vocabulary))
    noises = [torch.from_numpy(read_audio(path)) for path in sorted((Path(folder) / "noise").iterdir())]
    return {
        "weights": weights(net),
        "updates_done": own_updates,
        "cost": cost,
        "rate": rate,
        "seconds": seconds,
        "curve": curve,
        "train_heard": score(net, heard),
        "test": score(net, test),
        "noise": {str(snr): score(net, noisy(test, noises, snr)) for snr in SNRS},
        "lengths": {str(n): score(net, joined(test, n * net.stride)) for n in lengths},
    }


def configuration(train: Path, seed: int, hidden: int) -> TrainConfig:
    """How every network is trained; the model is the LSTM's."""
    return TrainConfig(
        model=ModelConfig(
            bidirectional=False, channels=(48, 64), kernels=(5, 3), strides=(2, 2), hidden=hidden, layers=2, dropout=0.1
        ),
        data=DataConfig(train=(str(train),)),
        augment=AugmentConfig(
            speeds=(1.0,), gain_db=0.0, time_masks=1, time_mask_frames=10, band_masks=1, band_mask_bands=10
        ),
        training=TrainingConfig(
            epochs=1, seed=seed, batch_seconds=20.0, batch_utterances=12, warmup_steps=50,
        ),
    )  # fmt: skip


def build(name: str, config: TrainConfig, corpus: Corpus) -> Network:
    """The network `name`, as wide as gives it the weights of config's LSTM."""
    wanted = weights(_network("lstm", config, corpus, config.model.hidden))
    if name == "lstm":
        return _network(name, config, corpus, config.model.hidden)
    width = equal_width(lambda width: weights(_network(name, config, corpus, width)), wanted, step=HEADS)
    return _network(name, config, corpus, width)


def weights(network: nn.Module) -> int:
    """How many there are to train."""
    return sum(p.numel() for p in network.parameters())


def _network(name: str, config: TrainConfig, corpus: Corpus, hidden: int) -> Network:
    model = dataclasses.replace(config.model, hidden=hidden, **NETWORKS[name])
    settings = NetworkConfig(format_version=FORMAT_VERSION, features=config.features, model=model)
    mean = torch.tensor(corpus.statistics.mean, dtype=torch.float32)
    variance = torch.tensor(corpus.statistics.variance, dtype=torch.float32)
    network = Network(settings, corpus.tokenizer, mean, variance)
    if name in BASELINES:  # in place of the recurrent layers
        body = BASELINES[name](model.channels[-1], hidden, model.layers, model.dropout)
        front = list(network.layers)[: network.first_recurrent]
        network.layers = nn.ModuleList([*front, body, Output(hidden, len(corpus.tokenizer))])
    return network


def choose_rate(rates: Sequence[float], network: Network, corpus: Corpus, config: TrainConfig, updates: int) -> float:
    """The rate at which a copy of the network comes to the lowest training loss."""
    if len(rates) == 1:
        return rates[0]
    return min(rates, key=lambda rate: train(copy.deepcopy(network), corpus, config, updates, rate)[-1][1])


def train(network: Network, corpus: Corpus, config: TrainConfig, updates: int, rate: float) -> list[tuple[int, float]]:
    """Train for a number of updates, the rate falling to zero at the last; gives (update, loss a word) now and then.

    asr.training.loop counts epochs and saves as it goes; here the budget is updates, and a run takes minutes.
    """
    losses = Losses(network, phone_weight=0.0, alignment_weight=0.0, precision="fp32").train()
    optimizer = torch.optim.AdamW(
        network.parameters(), weight_decay=config.training.weight_decay, betas=(0.9, 0.98), fused=True
    )
    curve, recent = [], []
    for step, batch in enumerate(itertools.islice(_batches(network, corpus, config), updates)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, updates, rate, config.training.warmup_steps)
        recent.append(_update(losses, batch, optimizer, config.training.clip_norm))
        if len(recent) == max(updates // 20, 1):
            curve.append((step + 1, statistics.fmean(recent)))
            recent = []
    return curve


def relative_cost(
    network: Network, reference: Network, corpus: Corpus, config: TrainConfig, batches: int = 10
) -> float:
    """Processor time of an update of `network` over that of `reference`, the two timed in turn."""
    plan = list(itertools.islice(_batches(network, corpus, config), batches))
    spent = []
    pairs = []
    for net in (network, reference):
        losses = Losses(copy.deepcopy(net), phone_weight=0.0, alignment_weight=0.0, precision="fp32").train()
        pairs.append((losses, torch.optim.AdamW(losses.parameters(), fused=True)))
    for _ in range(2):  # the first round warms up: each new shape costs a set-up
        spent = [0.0, 0.0]
        for batch in plan:
            for which, (losses, optimizer) in enumerate(pairs):
                clock = time.process_time()
                _update(losses, batch, optimizer, config.training.clip_norm)
                spent[which] += time.process_time() - clock
    return spent[0] / spent[1]


def _batches(network: Network, corpus: Corpus, config: TrainConfig) -> Iterator[Batch]:
    """Batches without end, epoch after epoch."""
    sampler, loader = Sampler(corpus, config, network.stride), Loader(corpus, config, config.features.hop)
    for epoch in itertools.count():
        yield from loader.batches(sampler.epoch(epoch), epoch)


def _update(losses: Losses, batch: Batch, optimizer: torch.optim.Optimizer, clip_norm: float) -> float:
    total, loss = losses(batch)
    optimizer.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(losses.parameters(), clip_norm)
    optimizer.step()
    return float(loss)


def spoken(corpus: Corpus) -> list[Spoken]:
    """All utterances of a corpus with their texts."""
    return [(corpus.audio(i), corpus.text(i)) for i in range(len(corpus))]


def noisy(speech: Sequence[Spoken], noises: Sequence[Tensor], snr_db: float) -> list[Spoken]:
    """The same with noise mixed in, the next clip for each utterance."""
    return [(add_noise(audio, noise, snr_db), text) for (audio, text), noise in zip(speech, itertools.cycle(noises))]


def joined(speech: Sequence[Spoken], samples: int, count: int = 6) -> list[Spoken]:
    """Utterances joined to `count` of about so many samples each, in order, from the start again at the end."""
    source = itertools.cycle(speech)
    long = []
    for _ in range(count):
        parts = [next(source)]
        while sum(len(audio) for audio, _ in parts) < samples - 2 * EDGE_SAMPLES:
            parts.append(next(source))
        long.append((torch.cat([audio for audio, _ in parts]), " ".join(text for _, text in parts)))
    return long


@torch.no_grad()
def score(network: Network, speech: Sequence[Spoken], seconds: float = 60.0) -> dict[str, float]:
    """Greedy word error rate, and the loss a word."""
    order = sorted(speech, key=lambda pair: len(pair[0]))
    counts, loss, tokens = ErrorCounts(), 0.0, 0
    while order:
        size = 1
        while size < len(order) and len(order[size][0]) * (size + 1) < seconds * SAMPLE_RATE:
            size += 1
        group, order = order[:size], order[size:]
        lengths = torch.tensor([len(audio) + 2 * EDGE_SAMPLES for audio, _ in group])
        batch = torch.zeros(size, int(lengths.max()))
        for row, (audio, _) in zip(batch, group, strict=True):
            row[EDGE_SAMPLES : EDGE_SAMPLES + len(audio)] = audio
        log_probs, frames = network(batch, lengths)
        targets = [network.tokenizer.encode(text) for _, text in group]
        padded = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], batch_first=True)
        target_lengths = torch.tensor([len(t) for t in targets])
        loss += float(ctc(log_probs, frames, padded, target_lengths, torch.ones(size, dtype=torch.bool)))
        tokens += int(target_lengths.sum())
        for best, n, (_, text) in zip(log_probs.argmax(-1), frames, group, strict=True):
            ids = torch.unique_consecutive(best[: int(n)]).tolist()
            counts += count_errors(text, network.tokenizer.decode(ids))
    return {"wer": counts.wer, "loss": loss / max(tokens, 1)}
