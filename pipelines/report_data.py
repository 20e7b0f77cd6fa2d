"""What is in prepared data, as one HTML file with plots that opens without a network: `report.html`."""

import html
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.errors import Problem
from asr.training.shards import Statistics

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 60, 40  # of a plot, in pixels
_MOST_CHARACTERS = 60  # that are shown
_MOST_REASONS = 20
_BINS = 40
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 720px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .15em 1em .15em 0; text-align: left }
td { font-variant-numeric: tabular-nums } figure { margin: 2em 0 } figcaption { font-weight: 600 }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: #555 } rect { fill: #4878a8 }
path { fill: none; stroke: #4878a8; stroke-width: 1.5 } .band { fill: #4878a833; stroke: none } line { stroke: #bbb }
"""


def data_report(title: str, reports: Sequence[dict], statistics: Statistics, skipped: Sequence[Problem]) -> str:
    """The page.

    Args:
        title: the folder's name.
        reports: of the shards, as `pipelines.shard.make_shard` writes them.
        statistics: of all feature frames.
        skipped: rows that could not be used.
    """
    seconds = np.array([n for report in reports for n in report["samples"]]) / SAMPLE_RATE
    lengths = np.array([n for report in reports for n in report["text_lengths"]])
    characters: Counter[str] = Counter()
    speakers: Counter[str] = Counter()
    for report in reports:
        characters.update(report["characters"])
        speakers.update(report["speakers"])
    unnamed = speakers.pop("", 0) / SAMPLE_RATE
    minutes = np.array(list(speakers.values())) / SAMPLE_RATE / 60
    texts = lengths[lengths > 0]
    told = {
        "utterances": f"{len(seconds):,}",
        "hours": f"{seconds.sum() / 3600:,.2f}",
        "length of an utterance, s": _spread(seconds),
        "characters of a text": _spread(texts),
        "characters a second": _spread(texts / seconds[lengths > 0]),
        "distinct characters": f"{len(characters):,}",
        "speakers named": f"{len(speakers):,}",
        "hours without a speaker's name": f"{unnamed / 3600:,.2f}",
        "rows skipped": f"{len(skipped):,}",
    }
    parts = [
        _table(told),
        _histogram("Length of an utterance, seconds", seconds),
        _histogram("Characters of a text", texts),
        _histogram("Characters a second (outliers are often wrong texts)", texts / seconds[lengths > 0]),
        _histogram("Minutes of a speaker", minutes),
        _bars("Characters", characters.most_common(_MOST_CHARACTERS), len(characters)),
        _band("Log-mel features: mean and standard deviation of each band", statistics),
    ]
    if skipped:
        kinds = Counter(_kind(problem.reason) for problem in skipped)
        most = {reason: f"{count:,}" for reason, count in kinds.most_common(_MOST_REASONS)}
        parts += ["<h2>Rows skipped</h2><p>Each is listed in skipped.jsonl. By reason:</p>", _table(most)]
    body = "\n".join(parts)
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{title}</h1>\n{body}\n</html>\n"
    )


def _spread(values: np.ndarray) -> str:
    if not len(values):
        return "none"
    low, middle, high = np.percentile(values, (5, 50, 95))
    ends = f"from {values.min():.4g} to {values.max():.4g}"
    centre = f"mean {values.mean():.4g}, standard deviation {values.std():.4g}, median {middle:.4g}"
    return f"{centre}, 90 % of them {low:.4g} to {high:.4g}, {ends}"


def _kind(reason: str) -> str:
    """The reason without the names and figures of its row, so that like ones count together."""
    reason = re.sub(r"^(\S*[/\\]\S*|[^:]*[/\\][^:]*\.\w{1,5}): ", "", reason)
    reason = re.sub(r"\bfile:.*?\.\w{1,5}: ", "", reason)  # ffmpeg says it once more
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", reason)
    return re.sub(r"-?\d+(\.\d+)?", "#", reason)


def _table(rows: dict[str, str]) -> str:
    lines = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{lines}</table>"


# ---- plots


def _histogram(title: str, values: np.ndarray) -> str:
    """Counts in bins of equal width, up to the highest percentile; the last bin holds what lies beyond too."""
    if not len(values):
        return ""
    top = max(float(np.percentile(values, 99.5)), 1e-9)
    counts, edges = np.histogram(np.minimum(values, top), bins=_BINS, range=(0, top))
    ticks = [(i / 5, f"{top * i / 5:.3g}") for i in range(5)]
    ticks.append((1, f"{top:.3g}{'+' if values.max() > top else ''}"))
    return _figure(title, _rectangles(counts, edges / top), ticks, int(counts.max()))


def _bars(title: str, counts: Sequence[tuple[str, int]], distinct: int) -> str:
    """A bar for each name, the most frequent first."""
    if not counts:
        return ""
    if distinct > len(counts):
        title = f"{title}, the {len(counts)} most frequent of {distinct}"
    heights = np.array([count for _, count in counts])
    edges = np.linspace(0, 1, len(counts) + 1)
    ticks = [((i + 0.5) / len(counts), "␣" if name == " " else name) for i, (name, _) in enumerate(counts)]
    return _figure(title, _rectangles(heights, edges), ticks, int(heights.max()))


def _band(title: str, statistics: Statistics) -> str:
    """A line through the means, in a band one deviation wide to each side."""
    if not statistics.frames:
        return ""
    mean, deviation = statistics.mean, np.sqrt(np.maximum(statistics.variance, 0))
    low, high = float((mean - deviation).min()), float((mean + deviation).max())
    across = [_LEFT + i / max(len(mean) - 1, 1) * (_WIDTH - _LEFT) for i in range(len(mean))]

    def points(values: np.ndarray) -> list[str]:
        scaled = (values - low) / max(high - low, 1e-9)
        return [f"{x:.1f},{(1 - y) * (_HEIGHT - _BOTTOM):.1f}" for x, y in zip(across, scaled, strict=True)]

    outline = points(mean + deviation) + points(mean - deviation)[::-1]
    drawn = f'<path class="band" d="M{" L".join(outline)} Z"/><path d="M{" L".join(points(mean))}"/>'
    ticks = [(i / max(len(mean) - 1, 1), str(i)) for i in range(0, len(mean), 10)]
    return _figure(title, drawn, ticks, high, low)


def _rectangles(heights: np.ndarray, edges: np.ndarray) -> str:
    """Bars between `edges`, which lie in [0, 1], as high as `heights`."""
    scale = (_HEIGHT - _BOTTOM) / max(float(heights.max()), 1.0)
    drawn = []
    for height, left, right in zip(heights, edges, edges[1:], strict=False):
        x, width = _LEFT + left * (_WIDTH - _LEFT), (right - left) * (_WIDTH - _LEFT) - 1
        tall = float(height) * scale
        y = _HEIGHT - _BOTTOM - tall
        drawn.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{tall:.1f}"/>')
    return "".join(drawn)


def _figure(title: str, drawn: str, ticks: Sequence[tuple[float, str]], high: float, low: float = 0) -> str:
    """A plot with an axis below (`ticks` at places in [0, 1]) and the range of its heights at the left."""
    floor = _HEIGHT - _BOTTOM
    labels = "".join(
        f'<text x="{_LEFT + place * (_WIDTH - _LEFT):.1f}" y="{floor + 16}" text-anchor="middle">'
        f"{html.escape(name)}</text>"
        for place, name in ticks
    )
    heights = "".join(
        f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end">{_short(value)}</text>'
        for y, value in ((10, high), (floor, low))
    )
    axis = f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{floor}" y2="{floor}"/>'
    box = f'viewBox="0 0 {_WIDTH + 20} {_HEIGHT}" role="img" aria-label="{html.escape(title)}"'
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    return f"<figure>{caption}<svg {box}>{drawn}{axis}{labels}{heights}</svg></figure>"


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if math.isfinite(value) else "-"
