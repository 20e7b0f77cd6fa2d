"""What a measurement gives: figures, made by interleaved rounds, shown as a table or as JSON."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

Part = Callable[[], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured line: the median over the rounds with its extremes, and what it is compared with.

    Attributes:
        ratio: against the section's first line, above 1 is better; None where it is compared with nothing.
        of_limit: the share that it reaches of what this machine's arithmetic and memory allow; None where unknown.
    """

    section: str
    name: str
    value: float
    low: float
    high: float
    unit: str
    ratio: float | None = None
    of_limit: float | None = None


def single(section: str, name: str, value: float, unit: str, **more: float | None) -> Figure:
    """A figure that was measured once."""
    return Figure(section=section, name=name, value=value, low=value, high=value, unit=unit, **more)


def timed(parts: Mapping[str, Part], rounds: int) -> dict[str, list[float]]:
    """Seconds that each part takes in each round; all are run in turn, after one run of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for part in parts.values():
        part()
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - start)
    return times


def interleaved(
    section: str,
    unit: str,
    work: float,
    parts: Mapping[str, Part],
    rounds: int,
    *,
    per: bool = False,
    ideal: float | Mapping[str, float] | None = None,
) -> list[Figure]:
    """Time parts in turn, each of which does `work` units of work.

    Args:
        per: the figure is microseconds a unit instead of units a second.
        ideal: seconds that the work must take on this machine; of all parts, or of those that are named.
    """
    times = timed(parts, rounds)
    first = statistics.median(next(iter(times.values())))
    figures = []
    for name, seconds in times.items():
        values = sorted(s / work * 1e6 if per else work / s for s in seconds)
        middle = statistics.median(seconds)
        value = middle / work * 1e6 if per else work / middle  # as the ratio has it, also of an even number of rounds
        least = ideal.get(name) if isinstance(ideal, Mapping) else ideal
        figures.append(
            Figure(
                section=section, name=name, value=value, low=values[0], high=values[-1], unit=unit,
                ratio=first / middle, of_limit=None if least is None else least / middle,
            )
        )  # fmt: skip
    return figures


def table(figures: Sequence[Figure]) -> Table:
    """The figures as a table for people."""
    shown = Table("what", "median", "lowest to highest", "unit", "times the first", "of the limit")
    section = ""
    for f in figures:
        if f.section != section:
            shown.add_section()
            shown.add_row(f"[bold]{f.section}[/bold]")
            section = f.section
        ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
        share = "" if f.of_limit is None else f"{100 * f.of_limit:.2g} %"
        shown.add_row(f.name, f"{f.value:,.4g}", f"{f.low:,.4g} to {f.high:,.4g}", f.unit, ratio, share)
    return shown


def as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The figures as JSON holds them."""
    return [dataclasses.asdict(f) for f in figures]
