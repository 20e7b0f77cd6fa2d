"""Runs the settings of a study: each once, its result kept as JSON, so that a study goes on where it stopped."""

import importlib
import itertools
import json
import platform
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asr.errors import ConfigError
from asr.files import write_atomically
from pipelines.study.plan import Row, Setting
from pipelines.study.words import make_speech


def run_settings(
    settings: Sequence[Setting], out: Path, *, quick: bool, workers: int, address: str | None
) -> dict[str, Row]:
    """Run what is not finished yet; gives each setting's options and result in one, by its name.

    Raises:
        ConfigError: a kept result is of other options, or no JSON.
    """
    results = out / "results"
    results.mkdir(parents=True, exist_ok=True)
    left = [setting for setting in settings if _kept(setting, results) is None]
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("settings", total=len(settings), completed=len(settings) - len(left))
        if any(setting.speech for setting in left):
            progress.update(bar, description="speech is prepared")
            make_speech(out / "speech", quick=quick)
        alone = [setting for setting in left if setting.alone]
        together = [setting for setting in left if not setting.alone]
        side_by_side = workers > 1 or address is not None
        rest = (
            _run_on_ray(together, out, workers, address) if side_by_side else map(partial(_run_one, out=out), together)
        )
        for name in itertools.chain(map(partial(_run_one, out=out), alone), rest):
            progress.update(bar, description=f"{name} done", advance=1)
            if not progress.console.is_terminal:
                progress.console.print(f"{name} done", highlight=False)
    rows = {}
    for setting in settings:
        row = _kept(setting, results)
        assert row is not None
        rows[setting.name] = row
    return rows


def machine() -> dict[str, str]:
    """What the timings depend on."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(len(names)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def _kept(setting: Setting, results: Path) -> Row | None:
    """A finished setting's options and result, or None where it has not been run."""
    path = results / f"{setting.name}.json"
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        options, row = kept["options"], {**kept["options"], **kept["result"], **kept["told"]}
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: damaged ({error}); remove it to run the setting again") from error
    if options != json.loads(json.dumps(setting.options)):
        raise ConfigError(f"{path}: was run with other options; give another --out, or remove the file")
    return row


def _run_on_ray(settings: Sequence[Setting], out: Path, workers: int, address: str | None) -> Iterator[str]:
    if not settings:
        return
    from pipelines import ray_local

    with ray_local.start(address, cpus=workers) as ray:
        task = ray.remote(num_cpus=1)(_run_one)
        waiting = [task.remote(setting, out.absolute()) for setting in settings]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)


def _run_one(setting: Setting, out: Path) -> str:
    """Run a setting on one thread and keep its result; gives its name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wall, clock = time.perf_counter(), time.process_time()
    try:
        module = importlib.import_module(f"pipelines.study.{setting.run}")
        where = {"folder": str(out / "speech")} if setting.speech else {}
        result = module.run(**setting.options, **where)
    finally:
        torch.set_num_threads(threads)
    told = {"processor_s": time.process_time() - clock, "wall_s": time.perf_counter() - wall, "machine": machine()}
    kept = {"options": setting.options, "result": result, "told": told}
    write_atomically(out / "results" / f"{setting.name}.json", json.dumps(kept, indent=1) + "\n")
    return setting.name
