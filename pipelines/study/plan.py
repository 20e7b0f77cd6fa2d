"""What a study is made of: settings to run, experiments that read their results, decisions by a stated rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.figure import Figure

Row = dict[str, Any]  # a setting's options and what came out of it, in one
Verdict = Literal["holds", "does not hold", "not decided"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One thing to run; its result is kept, and shared by all experiments that ask for it.

    Attributes:
        name: of its file.
        run: the module of pipelines.study whose `run(**options)` gives a dict that JSON holds.
        speech: `run` also takes `folder`, where the speech is.
        alone: a timing: nothing else of the study runs meanwhile.
    """

    name: str
    run: str
    options: dict[str, Any]
    speech: bool = False
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the results say about a statement, and by which rule."""

    statement: str
    verdict: Verdict
    rule: str
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text under their headings."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an experiment's results say."""

    decisions: Sequence[Decision]
    tables: Sequence[Table]
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A claim and how it is put to the test.

    Attributes:
        name: as given to `asr study`.
        settings: what to run; takes whether the study is the quick one.
        read: rows of finished settings -> findings.
        method: how it was done, in sentences.
    """

    name: str
    claim: str
    settings: Callable[[bool], list[Setting]]
    read: Callable[[list[Row]], Findings]
    method: str


def verdict(answer: bool | None) -> Verdict:
    """The word for an answer; None is an open question."""
    return "not decided" if answer is None else "holds" if answer else "does not hold"


SEPARATE = "every seed of one side is beyond every seed of the other (three seeds each: a rank test, p = 0.05)"


def separate(a: Sequence[float], b: Sequence[float]) -> int:
    """-1 where all of `a` lie below all of `b`, 1 where they lie above, else 0, as with fewer than three of each."""
    if min(len(a), len(b)) < 3:
        return 0
    return -1 if max(a) < min(b) else 1 if min(a) > max(b) else 0


def pick(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
