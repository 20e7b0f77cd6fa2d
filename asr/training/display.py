"""What a person sees of a training: a bar with the loss, and a line for each epoch."""

import json
import time
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Shows the rows of a run's log.jsonl as they come; a context manager.

    `show` takes a row from the process that trains; `follow` reads the rows from the file instead, in a thread,
    where other processes train.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._console, disable=quiet)
        self._task = self._bar.add_task("training", total=None)
        self._end = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self._bar.stop()

    def show(self, row: dict) -> None:
        """Show one row of the log."""
        kind = row["kind"]
        if "text" in row:
            self._console.print(row["text"], markup=False)
        if kind == "start":
            self._bar.update(self._task, total=row["total"], completed=row["step"])
        elif kind == "step":
            text = f"epoch {row['epoch'] + 1} loss {row['loss']:.3f} {row['speed']:.0f} audio s/s"
            self._bar.update(self._task, description=text, completed=row["step"])
        elif kind == "dev":
            self._console.print(
                f"epoch {row['epoch'] + 1}: dev loss {row['loss']:.3f}, CER {row['cer']:.1%}, WER {row['wer']:.1%}, "
                f"after {row['audio_hours']:.1f} h of audio"
            )

    def note(self, text: str) -> None:
        """Show a line that is not in the log."""
        self._console.print(text, markup=False)

    def follow(self, log: Path) -> None:
        """Show what is added to `log` from now on."""
        start = log.read_bytes().rfind(b"\n") + 1 if log.is_file() else 0  # half a row is removed by who goes on
        self._thread = Thread(target=self._follow, args=(log, start), daemon=True)
        self._thread.start()

    def _follow(self, log: Path, position: int) -> None:
        last = False
        while not last:
            last = self._end.is_set()  # one more look after the end
            if log.is_file():
                with open(log, "rb") as file:
                    file.seek(position)
                    for line in file:
                        if not line.endswith(b"\n"):
                            break  # half-written: read it next time
                        position += len(line)
                        self.show(json.loads(line))
            time.sleep(0.3)
