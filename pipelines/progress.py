"""How far a long job is: hours of audio done, how fast, how long it will still take; on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from asr.manifest import Utterance

_ASSUMED_SECONDS = 5.0  # of a row that doesn't tell
_LINE_SECONDS = 30.0  # between the lines where there is no terminal to draw a bar on
_TELLING = 0.01  # of the job: before that, how long it took says nothing of how long it will


def row_seconds(row: Utterance) -> float:
    """What the row says of its length, or a guess."""
    return row.duration if row.duration is not None else _ASSUMED_SECONDS


class Advance(Protocol):
    """Tells the meter of work that is done: its expected `seconds` of audio, and those that it really had."""

    def __call__(self, seconds: float, real_seconds: float | None = None, /) -> None: ...


@contextmanager
def meter(what: str, total: float) -> Iterator[Advance]:
    """A bar on a terminal, elsewhere a line every half minute, of a job with `total` expected seconds of audio."""
    start = told_at = time.monotonic()
    done = heard = 0.0
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty(), transient=True)
    task = bar.add_task("starting", total=total)

    def advance(seconds: float, real_seconds: float | None = None) -> None:
        nonlocal done, heard, told_at
        done += seconds
        heard += seconds if real_seconds is None else real_seconds
        now = time.monotonic()
        minutes = max(now - start, 1e-9) / 60
        left = _clock((now - start) / done * max(total - done, 0)) if done > _TELLING * total else "some time"
        line = f"{heard / 3600:.2f} h of audio, {heard / 3600 / minutes:.2f} h a minute, {left} left"
        bar.update(task, completed=done, description=line)
        if not console.is_terminal and now - told_at > _LINE_SECONDS:
            told_at = now
            console.print(f"{what}: {line}", soft_wrap=True)

    if not console.is_terminal:
        yield advance
        return
    with bar:
        yield advance


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
