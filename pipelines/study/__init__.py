"""`asr study`: what is claimed of LSTMs, put to the test; one report of all of it."""

from pathlib import Path

from asr.errors import ConfigError
from pipelines.study import claims, gradients, limit, memory
from pipelines.study.plan import Experiment
from pipelines.study.report import Study, write_html, write_markdown
from pipelines.study.runner import run_settings
from pipelines.study.words import describe

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e for e in (memory.EXPERIMENT, gradients.EXPERIMENT, *claims.EXPERIMENTS, limit.EXPERIMENT)
}


def study(
    names: list[str], out: Path, *, quick: bool, workers: int, address: str | None = None, markdown: Path | None = None
) -> Path:
    """Run experiments, or go on where an interrupted study stopped, and write OUT/report.html; gives its path.

    Args:
        names: of EXPERIMENTS; none: all of them.
        out: holds a JSON file for each finished setting, which is not run again.
        quick: the small version.
        workers: settings side by side, over Ray; 1 or fewer: one after the other in this process.
        markdown: write a summary there as well, with its figures in a folder beside it.

    Raises:
        ConfigError: a name is unknown, or what is in `out` was run with other settings.
    """
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such experiment; there are {', '.join(EXPERIMENTS)}")
    chosen = [EXPERIMENTS[name] for name in names or EXPERIMENTS]
    settings = {setting.name: setting for experiment in chosen for setting in experiment.settings(quick)}
    rows = run_settings(list(settings.values()), out, quick=quick, workers=workers, address=address)
    command = " ".join(["asr study", *names, *(["--quick"] if quick else [])])
    found = [(e, e.read([rows[s.name] for s in e.settings(quick)])) for e in chosen]
    told = Study(command=command, quick=quick, speech=describe(quick=quick), findings=found, rows=list(rows.values()))
    write_html(told, out / "report.html")
    if markdown is not None:
        write_markdown(told, markdown)
    return out / "report.html"
