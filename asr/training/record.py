"""What a training leaves in its folder: configuration, log, curves, checkpoints, the weights worth keeping."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from asr.config import TrainConfig, to_toml
from asr.errors import AsrError
from asr.files import locked, replacing, write_atomically
from asr.models import Network, save_network
from asr.runtime.folder import WEIGHTS_FILE
from asr.training.checkpoint import checkpoints, save_checkpoint
from asr.training.display import Display
from asr.training.optimizer import Optimizer
from asr.training.ranks import RankError
from asr.training.start import fingerprints


class Record:
    """Writes a run's folder and shows its log; a context manager around the training. Only rank 0's does anything.

    It keeps other trainings out of the folder: they would overwrite each other's checkpoints.

    Where the folder cannot be written (the disk is full, say), every method raises an AsrError that names the
    checkpoint to go on from.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self.run, self.on = run, rank == 0
        self._display = Display(quiet=not self.on)
        self._open = ExitStack()

    def __enter__(self) -> "Record":
        if self.on:
            with self._writing():
                self.run.mkdir(parents=True, exist_ok=True)
                self._open.enter_context(locked(self.run / ".lock", self._taken))
                _drop_unfinished_line(self.run / "log.jsonl")
                self._log = self._open.enter_context(open(self.run / "log.jsonl", "a", encoding="utf-8"))
        return self

    def is_finished(self, config: TrainConfig) -> bool:
        """Whether this training came to its end before, and its network is there."""
        told, log = self.run / "config.toml", self.run / "log.jsonl"
        if not (self.on and told.is_file() and (self.run / "model" / config.model.kind / WEIGHTS_FILE).is_file()):
            return False
        kinds = [json.loads(line)["kind"] for line in log.read_text(encoding="utf-8").splitlines()]
        done = [kind for kind in kinds if kind in ("step", "end")]
        return told.read_text(encoding="utf-8") == to_toml(config) and done[-1:] == ["end"]

    def begin(self, config: TrainConfig, network: Network, *, resumed: bool, damaged: list[Path]) -> None:
        """Write down what the run is about, and take away checkpoints that could not be read."""
        self._open.enter_context(self._display)
        if not self.on:
            return
        with self._writing():
            for path in damaged:
                shutil.rmtree(path, ignore_errors=True)
            self._remove_unfinished()
            write_atomically(self.run / "config.toml", to_toml(config))
            write_atomically(self.run / "data.json", json.dumps(fingerprints(config), indent=1) + "\n")
            if not resumed:
                network.tokenizer.save(self.run / "tokens.txt")
            # what a killed run drew past its last checkpoint is drawn again, over it
            self._curves = SummaryWriter(str(self.run / "tensorboard"), purge_step=self._newest_step() + 1)
            self._open.callback(self._curves.close)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what cannot be flushed now was complained of already
            self._open.close()

    def log(self, kind: str, step: int, **values: float | str) -> None:
        """Add a row to log.jsonl, to TensorBoard and to what a person sees."""
        if not self.on:
            return
        row = {"kind": kind, "step": step, "time": round(time.time(), 1), **values}
        with self._writing():
            self._log.write(json.dumps(row) + "\n")
            self._log.flush()
            for name, value in values.items():
                if not isinstance(value, str):
                    self._curves.add_scalar(f"{kind}/{name}", value, step)
        self._display.show(row)

    def checkpoint(
        self, step: int, network: Network, optimizer: Optimizer, states: list[Tensor], progress: dict
    ) -> None:
        """Write a checkpoint (asr.training.checkpoint)."""
        if self.on:
            with self._writing():
                save_checkpoint(self.run / "checkpoints", step, network, optimizer, states, progress)

    def keep_epoch(self, epoch: int, network: Network, count: int) -> None:
        """Keep an epoch's weights for the average, and those of the `count` - 1 epochs before it."""
        if not self.on:
            return
        folder = self.run / "epochs"
        with self._writing():
            folder.mkdir(exist_ok=True)
            weights = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
            with replacing(folder / f"{epoch:04d}.safetensors") as temporary:
                save_file(weights, temporary)
            for old in self.epochs()[:-count]:
                old.unlink()

    def epochs(self) -> list[Path]:
        """The weights kept for the average, oldest first."""
        return sorted((self.run / "epochs").glob("*.safetensors"))

    def keep(self, network: Network, folder: Path) -> None:
        """Write a network folder."""
        if self.on:
            with self._writing():
                save_network(network, folder)

    def _newest_step(self) -> int:
        found = checkpoints(self.run / "checkpoints")
        return int(found[-1].name.partition("-")[2]) if found else 0

    def _remove_unfinished(self) -> None:
        """Files and folders that were to be renamed when finished."""
        for folder in (self.run, *(self.run / name for name in ("checkpoints", "epochs", "model"))):
            for stray in list(folder.glob(".*.tmp*")):
                if stray.is_dir():
                    shutil.rmtree(stray, ignore_errors=True)
                else:
                    stray.unlink(missing_ok=True)

    def _taken(self, owner: str) -> RankError:
        """By another training, or a worker of this one, which is about to be ended."""
        return RankError(
            f"{self.run}: another training (process {owner}) is writing there; wait for it, or give another --out"
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            self._remove_unfinished()
            reason = getattr(error, "strerror", None) or str(error)
            found = checkpoints(self.run / "checkpoints")
            whole = f"checkpoints/{found[-1].name} is whole" if found else "there is no checkpoint yet"
            raise AsrError(f"{self.run}: cannot be written ({reason}); {whole}; make room and run again") from error


def _drop_unfinished_line(path: Path) -> None:
    """Take away the half of a row that a full disk or a killed run left at the end."""
    if path.is_file():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
