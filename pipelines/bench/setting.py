"""What every section of the bench is given."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from asr.audio import SAMPLE_RATE, read_audio
from asr.errors import ModelError
from asr.runtime.folder import GRAPHS, find_networks


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The speech, the model, and how long and how widely to measure.

    Attributes:
        audio: recordings.
        model: a model folder; None: the shipped one.
        rounds: of what is compared.
        threads: cores, where more than one is used.
        seconds: that many live streams are kept up.
        tell: is told what is being done.
    """

    audio: tuple[Path, ...]
    model: Path | None
    rounds: int
    threads: int
    seconds: float
    tell: Callable[[str], None] = lambda line: None

    @cached_property
    def speech(self) -> list[np.ndarray]:
        """The recordings, float32 (n,) at 16 kHz each.

        Raises:
            AudioError: one cannot be read.
        """
        return [read_audio(path) for path in self.audio]

    @property
    def speech_seconds(self) -> float:
        return sum(map(len, self.speech)) / SAMPLE_RATE

    def network(self, kind: str) -> Path:
        """The folder of a network, "offline" or "streaming".

        Raises:
            ModelError: the model has none.
        """
        networks = find_networks(self.model)
        if kind not in networks:
            raise ModelError(f"{self.model}: no {kind} network, which this section of the bench measures")
        return networks[kind]

    def precision(self, kind: str) -> str:
        """What recognition computes a network in: int8 where there is such a graph, else fp32."""
        return "int8" if (self.network(kind) / GRAPHS["int8"]).is_file() else "fp32"
