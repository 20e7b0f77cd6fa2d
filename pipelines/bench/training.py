"""Section "training": steps of the offline network against packed sequences; on a GPU throughput and share of peak."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from asr.audio import SAMPLE_RATE
from asr.models import Network, load_network
from asr.nn import BiLSTM
from asr.runtime.torch import open_network
from asr.training.data import Batch
from asr.training.step import Losses, choose_precision
from pipelines.bench.figures import Figure, Part, interleaved
from pipelines.bench.limits import measured, work_of
from pipelines.bench.setting import Setting

_ROWS, _SECONDS = 12, 8.0
_GPU_ROWS = 64
_FORWARD_AND_BACK = 3.0  # a training step costs three times the forward pass


def run(setting: Setting) -> list[Figure]:
    """Audio seconds a second of forward, backward and update."""
    torch.set_num_threads(setting.threads)
    network = load_network(setting.network("offline"))
    batch = _batch(network, _ROWS)
    seconds = float(batch.lengths.sum()) / SAMPLE_RATE
    packed = copy.deepcopy(network)
    for i, layer in enumerate(packed.layers):
        if isinstance(layer, BiLSTM):
            packed.layers[i] = _PackedBiLSTM(layer)
    parts: dict[str, Part] = {
        "pack_padded_sequence, fp32": _step(packed, batch, "fp32"),
        "ours, fp32": _step(network, batch, "fp32"),
    }
    if choose_precision("auto", torch.device("cpu")) == "bf16":
        parts["ours, bf16"] = _step(network, batch, "bf16")
    least = _FORWARD_AND_BACK * work_of(network).seconds(measured(setting.threads)[0], "fp32") * seconds
    section = f"training, offline network, {setting.threads} thread{'s' if setting.threads > 1 else ''}"
    figures = interleaved(
        section, "audio s a second", seconds, parts, setting.rounds,
        ideal={name: least for name in parts if "fp32" in name},
    )  # fmt: skip
    torch.set_num_threads(1)
    return figures + (_on_gpu(setting) if torch.cuda.is_available() else [])


def _on_gpu(setting: Setting) -> list[Figure]:
    """The same on the first GPU, and whole files in batches; limits are that GPU's own products, measured beside."""
    device = torch.device("cuda")
    network = load_network(setting.network("offline")).to(device)
    work, batch = work_of(network), _batch(network, _GPU_ROWS).to(device)
    seconds = float(batch.lengths.sum()) / SAMPLE_RATE
    rates = {"fp32": _products(torch.float32), "bf16": _products(torch.bfloat16)}

    def waited(part: Part) -> Part:
        def run() -> None:
            part()
            torch.cuda.synchronize()

        return run

    parts = {f"training, {p}": waited(_step(network, batch, p)) for p in rates}
    ideal = {
        f"training, {p}": _FORWARD_AND_BACK * (work.recurrent + work.others) * seconds / rate
        for p, rate in rates.items()
    }
    name = torch.cuda.get_device_name()
    figures = interleaved(name, "audio hours an hour", seconds, parts, setting.rounds, ideal=ideal)
    engine = open_network(setting.network("offline"))
    rows = [np.resize(np.concatenate(setting.speech), int(_SECONDS * SAMPLE_RATE)) for _ in range(_GPU_ROWS)]
    least = (work.recurrent + work.others) * _GPU_ROWS * _SECONDS / rates["fp32"]
    figures += interleaved(
        name, "audio s a second", _GPU_ROWS * _SECONDS, {"whole files, fp32": lambda: engine.log_probs(rows)},  # type: ignore[union-attr]
        setting.rounds, ideal=least,
    )  # fmt: skip
    return figures


def _products(dtype: torch.dtype) -> float:
    """Operations a second of the GPU's matrix products."""
    size, times = 4096, 20
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.mm(a, a)
    start.record()
    for _ in range(times):
        torch.mm(a, a)
    end.record()
    torch.cuda.synchronize()
    return 2 * size**3 * times / (start.elapsed_time(end) / 1000)


def _step(network: Network, batch: Batch, precision: str) -> Part:
    losses = Losses(network, 0.0, 0.0, precision).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-9)

    def run() -> None:
        losses(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _batch(network: Network, rows: int) -> Batch:
    """Noise of 8 s a row, most rows a little shorter."""
    lengths = torch.tensor([int(_SECONDS * SAMPLE_RATE * (1 - 0.24 * i / rows)) for i in range(rows)])
    longest = int(lengths.max())
    hop, stride = network.config.features.hop, network.stride
    return Batch(
        audio=torch.randn(rows, longest) * 0.1, features=None, lengths=lengths, cpu_lengths=lengths,
        tokens=torch.randint(1, len(network.tokenizer), (rows, 100)), token_lengths=torch.full((rows,), 100),
        counts=torch.ones(rows, dtype=torch.bool),
        phones=torch.zeros(rows, 1, dtype=torch.long), phone_lengths=torch.zeros(rows, dtype=torch.long),
        pronounced=torch.zeros(rows, dtype=torch.bool),
        hidden_frames=torch.zeros(rows, longest // hop, dtype=torch.bool),
        hidden_bands=torch.zeros(rows, network.config.features.bands, dtype=torch.bool),
        states=torch.full((rows, longest // stride), -1), token_count=rows * 100, phone_count=0, state_count=0,
    )  # fmt: skip


class _PackedBiLSTM(BiLSTM):
    """The same layer, with the same weights, by torch's own means for padded batches.

    Args:
        layer: whose weights are shared.
    """

    def __init__(self, layer: BiLSTM) -> None:
        nn.Module.__init__(self)
        self.norm, self.dropout = layer.norm, layer.dropout
        self.both = nn.LSTM(layer.ahead.input_size, layer.ahead.hidden_size, batch_first=True, bidirectional=True)
        ahead, back = layer.ahead.named_parameters(), layer.back.named_parameters()
        for name, value in [*ahead, *((f"{name}_reverse", value) for name, value in back)]:
            setattr(self.both, name, value)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.both(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.dropout(self.norm(y)), lengths
