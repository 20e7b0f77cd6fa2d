"""The report of a study: one HTML file that opens offline, and a Markdown summary; the same content in both."""

import html
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from asr.files import write_atomically
from pipelines.study.plan import Experiment, Findings, Row, Table

COLOURS = {"holds": "#1a7f37", "does not hold": "#b3261e", "not decided": "#6b6b6b"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1rem }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0 1rem; display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
table.said th, table.said td { text-align: left; white-space: normal; vertical-align: top }
b.v { color: #fff; padding: .1rem .5rem; border-radius: .3rem; font-size: .8rem; white-space: nowrap }
svg { max-width: 100%; height: auto }
.how { color: #555; font-size: .9rem }
code { background: #f2f2f2; padding: .1rem .3rem }
"""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a report tells: the experiments with their findings, and all rows that they come from."""

    command: str
    quick: bool
    speech: str
    findings: Sequence[tuple[Experiment, Findings]]
    rows: Sequence[Row]


def write_html(study: Study, path: Path) -> None:
    """Everything, figures included, in one file."""
    parts = [f"<h1>What is claimed of LSTMs, put to the test</h1><p class=how>{html.escape(_how(study))}</p>"]
    parts.append(_html_table(_overview(study), said=True))
    for experiment, found in study.findings:
        parts.append(f"<h2 id={experiment.name}>{html.escape(experiment.claim)}</h2>")
        parts.append(_html_table(_decisions(found), said=True))
        parts.append(_svg(found.figure))
        parts += [f"<h4>{html.escape(table.title)}</h4>{_html_table(table)}" for table in found.tables]
        parts.append(f"<p class=how>{html.escape(experiment.method)} {_command(study, experiment)}</p>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>asr study</title><style>{STYLE}</style>"
    write_atomically(path, head + "".join(parts) + "</html>")


def write_markdown(study: Study, path: Path) -> None:
    """A summary at `path`, with its figures as PNG files in a folder of the same name beside it."""
    figures = path.with_suffix("")
    figures.mkdir(parents=True, exist_ok=True)
    parts = ["# What is claimed of LSTMs, put to the test", _how(study), _markdown_table(_overview(study))]
    for experiment, found in study.findings:
        picture = figures / f"{experiment.name}.png"
        temporary = picture.with_name(f".{picture.name}")
        found.figure.savefig(temporary, format="png", dpi=80)
        os.replace(temporary, picture)
        parts.append(f"## {experiment.claim}")
        parts.append(_markdown_table(_decisions(found)))
        parts.append(f"![{experiment.claim}]({figures.name}/{picture.name})")
        parts += [f"{table.title}:\n\n{_markdown_table(table)}" for table in found.tables]
        parts.append(f"{experiment.method} {_command(study, experiment)}")
    write_atomically(path, "\n\n".join(parts) + "\n")


def _how(study: Study) -> str:
    machines = Counter(
        f"{m['processor']}, {m['cores']} cores, {m['instructions']}, torch {m['torch']}, Python {m['python']}"
        for m in (row["machine"] for row in study.rows)
    )
    spent = sum(row["processor_s"] for row in study.rows) / 60
    size = "The quick study: small networks, few updates. What it leaves open, the full one may decide. "
    return (
        f"Written by `{study.command}`: {len(study.rows)} settings on one thread each, {spent:.1f} minutes of "
        f"processor time in all. {size if study.quick else ''}Speech: {study.speech}. Machine: {'; '.join(machines)}. "
        "Every verdict is computed from the results by the rule beside it."
    )


def _command(study: Study, experiment: Experiment) -> str:
    seeds = sorted(
        {setting.options["seed"] for setting in experiment.settings(study.quick) if "seed" in setting.options}
    )
    return (
        f"Command: asr study {experiment.name}{' --quick' if study.quick else ''}; seeds {', '.join(map(str, seeds))}."
    )


def _overview(study: Study) -> Table:
    rows = [
        ["" if i else experiment.claim, d.statement, d.verdict]
        for experiment, found in study.findings
        for i, d in enumerate(found.decisions)
    ]
    return Table(title="", head=("claim", "in particular", "verdict"), rows=rows)


def _decisions(found: Findings) -> Table:
    rows = [[d.statement, d.verdict, d.evidence, d.rule] for d in found.decisions]
    return Table(title="", head=("statement", "verdict", "evidence", "rule"), rows=rows)


def _html_table(table: Table, *, said: bool = False) -> str:
    def cell(text: str) -> str:
        if text in COLOURS:
            return f'<td><b class=v style="background:{COLOURS[text]}">{text}</b></td>'
        return f"<td>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in table.rows)
    return f"<table{' class=said' if said else ''}><tr>{head}</tr>{body}</table>"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    marked = [[f"**{cell}**" if cell in COLOURS else cell for cell in row] for row in table.rows]
    return "\n".join([line(table.head), line(["---"] * len(table.head)), *map(line, marked)])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
