"""Accuracy against latency as a table and as one figure, in an HTML file that opens without a network."""

import html
from collections.abc import Sequence

import numpy as np

from pipelines.evaluate_latency import Latency

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 420, 60, 50  # of the figure, in pixels
_HEADS = ("look-ahead", "block", "WER %", "words", "shown p50", "p90", "p99", "final p50", "p90", "p99", "changed %")
_COLOURS = ("#2f5fa8", "#b3431f", "#2e7d4f", "#7a3fa0", "#8a6d00", "#a0306b")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } svg { width: 100%; height: auto } svg text { font-size: 12px; fill: #444 }
td, th { padding: .15em 1em .15em 0; text-align: right; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left }
"""


def latency_table(results: Sequence[Latency]) -> str:
    """The figures as lines to read; times in milliseconds."""
    width = max(len(result.model) for result in results)
    lines = [" " * width + "".join(f"{head:>{max(len(head), 5) + 2}}" for head in _HEADS)]
    for result in results:
        cells = _cells(result)
        lines.append(
            f"{result.model:<{width}}"
            + "".join(f"{cell:>{max(len(head), 5) + 2}}" for head, cell in zip(_HEADS, cells, strict=True))
        )
    return "\n".join(lines) + "\n"


def latency_page(results: Sequence[Latency], about: str) -> str:
    """One figure, a point for each model and block size, with the table below; HTML that opens without a network."""
    shown = [result for result in results if len(result.partials)]
    milliseconds = [1000 * float(np.percentile(r.partials, p)) for r in shown for p in (50, 90)]
    rates = [100 * r.errors.wer for r in shown]
    low, high = min([0.0, *milliseconds]), max([400.0, *milliseconds]) * 1.05
    bottom, top = (min(rates) * 0.95, max(rates) * 1.05 + 0.1) if rates else (0.0, 1.0)

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - 20)

    def y(value: float) -> float:
        return 20 + (top - value) / (top - bottom) * (_HEIGHT - _BOTTOM - 20)

    parts = []
    for value in np.linspace(bottom, top, 6):
        parts.append(f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - 20}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    for value in range(int(np.ceil(low / 100)) * 100, int(high) + 1, 100):
        parts.append(f'<text x="{x(value):.1f}" y="{_HEIGHT - 30}" text-anchor="middle">{value}</text>')
    models = list(dict.fromkeys(result.model for result in shown))
    for i, result in enumerate(shown):
        colour = _COLOURS[models.index(result.model) % len(_COLOURS)]
        middle, late = (1000 * float(np.percentile(result.partials, p)) for p in (50, 90))
        height = y(100 * result.errors.wer)
        label = f"{1000 * result.block:.0f} ms"
        parts.append(f'<path d="M{x(middle):.1f} {height:.1f}H{x(late):.1f}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(middle):.1f}" cy="{height:.1f}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x(middle) + 7:.1f}" y="{height - 6 - 13 * (i % 4):.1f}">{label}</text>')
    for i, model in enumerate(models):
        ahead = next(1000 * r.look_ahead for r in shown if r.model == model)
        said = html.escape(f"{model}, {ahead:.0f} ms of look-ahead")
        place = f'x="{_WIDTH - 20}" y="{16 + 16 * i}" text-anchor="end" style="fill:{_COLOURS[i % len(_COLOURS)]}"'
        parts.append(f"<text {place}>{said}</text>")
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        "from the end of a word until it is first shown, ms: a dot at the median, a line to the 90th percentile</text>"
        '<text x="4" y="14">WER %</text>'
    )
    rows = [f"<td>{html.escape(r.model)}</td>" + "".join(f"<td>{cell}</td>" for cell in _cells(r)) for r in results]
    heads = "".join(f"<th>{head}</th>" for head in ("model", *_HEADS))
    table = f"<tr>{heads}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows)
    spoken = "Word error rate against latency; the table below has the figures"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Accuracy against latency</title>
<style>{_STYLE}</style>
<h1>Accuracy against latency</h1>
<p>{html.escape(about)}</p>
<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>
<p>Labels are block sizes. Times are of the stream, in milliseconds; computing is not counted. A negative time: the word
was guessed before its end. “changed”: of all words that were shown, those that were taken back.</p>
<table>{table}</table>
</html>
"""


def _cells(result: Latency) -> list[str]:
    found = result.figures()
    times = [found[f"{name}_p{p}"] for name in ("first_partial", "final") for p in (50, 90, 99)]
    return [
        f"{1000 * result.look_ahead:.0f}", f"{1000 * result.block:.0f}", f"{100 * result.errors.wer:.2f}",
        str(len(result.partials)), *("–" if t is None else f"{1000 * t:.0f}" for t in times),
        f"{100 * result.stability.share:.2f}",
    ]  # fmt: skip
