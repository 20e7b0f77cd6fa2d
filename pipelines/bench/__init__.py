"""`asr bench`: what recognition and training cost on this machine, each beside what it is compared with.

Everything that is compared runs interleaved in one process, round after round, so that a machine whose speed
drifts changes a ratio little. Figures are medians over the rounds; the limits that they are held against (memory,
matrix products) are measured in the same run.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from asr.errors import ConfigError
from pipelines.bench import batch, features, limits, live, search, streams, training
from pipelines.bench.figures import Figure, as_json, table
from pipelines.bench.setting import Setting
from pipelines.formats import write_text

SECTIONS: dict[str, Callable[[Setting], list[Figure]]] = {
    "machine": lambda setting: [f for n in sorted({1, setting.threads}) for f in limits.measured(n)[1]],
    "features": features.run,
    "exactness": live.exactness,
    "stream": live.run,
    "streams": streams.run,
    "batch": batch.run,
    "search": search.run,
    "training": training.run,
    "server": streams.server,
}
_WIDTH = 160  # of a table in a file
USUAL = tuple(name for name in SECTIONS if name != "server")


def bench(setting: Setting, sections: Sequence[str] = USUAL) -> Iterator[list[Figure]]:
    """Measure sections, in their own order; gives the figures of each when it is done.

    Raises:
        ConfigError: there is no such section.
        AudioError: a recording cannot be read.
        ModelError: the model lacks what a section measures.
    """
    for name in sections:
        if name not in SECTIONS:
            raise ConfigError(f"only = {name!r}: must be one of {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    for name, run in SECTIONS.items():
        if name in sections:
            setting.tell(f"measuring: {name}")
            yield run(setting)


def report(figures: Sequence[Figure], setting: Setting) -> dict[str, Any]:
    """The figures and the machine, as JSON holds them."""
    return {"machine": {**limits.machine(), "threads": setting.threads}, "figures": as_json(figures)}


def run_bench(setting: Setting, sections: Sequence[str], json_file: Path | None) -> None:
    """Measure, print each section's table, and write the JSON, so far as it goes, where it is asked for."""
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    figures: list[Figure] = []
    for found in bench(setting, sections):
        console.print(table(found))
        figures += found
        if json_file is not None:
            write_text(json_file, json.dumps(report(figures, setting), indent=1) + "\n")
