"""`asr evaluate --latency`: how soon words are shown and final after they were spoken, and what that costs in errors."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.decoding import Word
from asr.decoding.calibration import load_calibration
from asr.errors import AudioError, ConfigError, Problem, TextError
from asr.manifest import Utterance, read_manifest
from asr.metrics import ErrorCounts, align_words, count_errors
from asr.runtime import load_engine
from asr.runtime.folder import find_networks
from asr.text import Tokenizer, normalize
from pipelines.evaluate import read_row
from pipelines.evaluate_live import Partials, Stability, join, lay_out
from pipelines.transcribe import RecognizerOptions

if TYPE_CHECKING:
    from asr.recognizer import Recognizer

BLOCKS = (1, 2, 4, 8)  # frames of the network that are read at a time
_PIECE_SECONDS = 60.0
_LAST_PAUSE = 3.0  # seconds after a piece, in which its last words become final
_FEED = SAMPLE_RATE // 100  # samples: text is looked at so often
_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 420, 60, 50  # of the figure, in pixels
_HEADS = ("look-ahead", "block", "WER %", "words", "shown p50", "p90", "p99", "final p50", "p90", "p99", "changed %")
_COLOURS = ("#2f5fa8", "#b3431f", "#2e7d4f", "#7a3fa0", "#8a6d00", "#a0306b")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .15em 1em .15em 0; text-align: right; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left } svg { width: 100%; height: auto } svg text { font-size: 12px; fill: #444 }
"""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One model read in blocks of one size; all times in seconds of the stream, computing not counted.

    Attributes:
        look_ahead: audio after a frame that the network waits for.
        block: audio that is read at a time.
        errors: of the final text.
        partials: from the end of each word that was recognized, by forced alignment, until it was first shown at its
            place, (words,); below 0: it was guessed before its end.
        finals: until it was final.
        stability: of the text shown.
    """

    model: str
    look_ahead: float
    block: float
    errors: ErrorCounts
    partials: np.ndarray
    finals: np.ndarray
    stability: Stability

    def figures(self) -> dict[str, Any]:
        """As JSON holds them; percentiles are null without a word."""
        found: dict[str, Any] = {
            "model": self.model, "look_ahead": self.look_ahead, "block": self.block, "words": self.errors.words,
            "wer": self.errors.wer if np.isfinite(self.errors.wer) else None, "timed_words": len(self.partials),
            "partial_words_changed": self.stability.share,
        }  # fmt: skip
        for name, values in (("first_partial", self.partials), ("final", self.finals)):
            for p in (50, 90, 99):
                found[f"{name}_p{p}"] = float(np.percentile(values, p)) if len(values) else None
        return found


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Audio, what is said in it, and when each word ends, in seconds; None where that is not known."""

    audio: np.ndarray
    text: str
    ends: tuple[float | None, ...]


def measure_latency(
    manifests: Sequence[Path], options: RecognizerOptions, models: Sequence[Path | None], blocks: Sequence[int] = BLOCKS
) -> tuple[list[Latency], list[Problem]]:
    """Read the joined utterances of each speaker live, with each model and in blocks of each size.

    The ends of words come from forced alignment by the first model's offline network, or its streaming one where it
    has no other.

    Raises:
        ModelError: a model cannot be loaded, or has no streaming network.
        ManifestError: a manifest cannot be read.
        ConfigError: nothing to align, or torchaudio is missing.
    """
    pieces, problems = _pieces(manifests, Aligner(models[0]))
    results: list[Latency] = []
    for model in models:
        recognizer = replace(options, model=model).load()
        for block in blocks:
            results.append(_measure(recognizer, "shipped" if model is None else str(model), block, pieces))
    return results, problems


class Aligner:
    """Forced alignment of known text with the networks of a model."""

    def __init__(self, model: Path | None) -> None:
        try:
            import torchaudio  # noqa: F401
        except ImportError:
            raise ConfigError("--latency aligns words with torchaudio: pip install 'streaming-asr[train]'") from None
        networks = find_networks(model)
        folder = networks.get("offline") or networks["streaming"]
        self._engine: Any = load_engine(folder)
        self._tokenizer = Tokenizer.load(folder / "tokens.txt")
        self._calibration = load_calibration(folder, "greedy")

    def words(self, samples: np.ndarray, text: str) -> list[Word]:
        """Each word of the normalised text with its times; none where the text does not fit the audio, (n,) at 16 kHz."""
        import torch
        from torchaudio.functional import forced_align

        try:
            tokens = self._tokenizer.encode(text)
        except TextError:
            return []
        log_probs = self._log_probs(np.concatenate([_EDGE, samples, _EDGE]))
        repeats = sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))
        if not tokens or len(tokens) + repeats > len(log_probs):
            return []
        path, _ = forced_align(torch.from_numpy(log_probs)[None], torch.tensor([tokens], dtype=torch.int32))
        frame = self._engine.samples_per_frame / SAMPLE_RATE
        spans = _token_frames(path[0].numpy())
        assert len(spans) == len(tokens)
        words: list[Word] = []
        position = 0
        for word in normalize(text).split():
            first, after = spans[position][0], spans[position + len(word) - 1][1]
            start, end = (max(t * frame - EDGE_SILENCE_SECONDS, 0.0) for t in (first, after))
            words.append(Word(text=word, start=start, end=end, confidence=1.0))
            position += len(word) + 1  # and the space
        return self._calibration.apply(words, 0.0, len(samples) / SAMPLE_RATE)

    def _log_probs(self, audio: np.ndarray) -> np.ndarray:
        engine = self._engine
        if hasattr(engine, "log_probs"):
            return np.array(engine.log_probs([audio])[0])
        frame = engine.samples_per_frame
        whole, state = engine.step(audio[None, : len(audio) // frame * frame], engine.initial_state())
        if not engine.latency_frames:
            return whole[0]
        rest, _ = engine.step(np.zeros((1, engine.latency_frames * frame), np.float32), state, True)
        return np.concatenate([whole[0], rest[0]])[engine.latency_frames :]


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
    for result in shown:
        colour = _COLOURS[models.index(result.model) % len(_COLOURS)]
        middle, late = (1000 * float(np.percentile(result.partials, p)) for p in (50, 90))
        height = y(100 * result.errors.wer)
        label = f"{1000 * result.block:.0f} ms"
        parts.append(f'<path d="M{x(middle):.1f} {height:.1f}H{x(late):.1f}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(middle):.1f}" cy="{height:.1f}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x(middle) + 7:.1f}" y="{height - 6:.1f}">{label}</text>')
    for i, model in enumerate(models):
        ahead = next(1000 * r.look_ahead for r in shown if r.model == model)
        said = html.escape(f"{model}, {ahead:.0f} ms of look-ahead")
        parts.append(f'<text x="{_WIDTH - 20}" y="{16 + 16 * i}" text-anchor="end" style="fill:{_COLOURS[i % 6]}">{said}</text>')
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        "from the end of a word until it is first shown, ms: a dot at the median, a line to the 90th percentile</text>"
        f'<text x="4" y="14">WER %</text>'
    )
    rows = "".join(
        f"<tr><td>{html.escape(r.model)}</td>" + "".join(f"<td>{cell}</td>" for cell in _cells(r)) + "</tr>" for r in results
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Accuracy against latency</title>\n'
        f"<style>{_STYLE}</style>\n<h1>Accuracy against latency</h1>\n<p>{html.escape(about)}</p>\n"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Word error rate against latency; the table below '
        f'has the figures">{"".join(parts)}</svg>\n<p>Labels are block sizes. Times are of the stream, in milliseconds; '
        "computing is not counted. A negative time: the word was guessed before its end. “changed” is the share of words "
        f"shown that were taken back.</p>\n<table><tr><th>model</th>{''.join(f'<th>{head}</th>' for head in _HEADS)}</tr>"
        f"{rows}</table>\n</html>\n"
    )


def _cells(result: Latency) -> list[str]:
    found = result.figures()
    times = [found[f"{name}_p{p}"] for name in ("first_partial", "final") for p in (50, 90, 99)]
    return [
        f"{1000 * result.look_ahead:.0f}", f"{1000 * result.block:.0f}", f"{100 * result.errors.wer:.2f}",
        str(len(result.partials)), *("–" if t is None else f"{1000 * t:.0f}" for t in times),
        f"{100 * result.stability.share:.2f}",
    ]  # fmt: skip


def _measure(recognizer: "Recognizer", model: str, block: int, pieces: Sequence[_Piece]) -> Latency:
    errors, stability = ErrorCounts(), Stability()
    partials: list[float] = []
    finals: list[float] = []
    engine = recognizer.stream().engine
    for piece in pieces:
        session = recognizer.stream(SAMPLE_RATE, block_frames=block)
        watched, seen = Partials(), _Shown()
        for start in range(0, len(piece.audio), _FEED):
            update = session.feed(piece.audio[start : start + _FEED])
            watched.show(update)
            seen.show((start + _FEED) / SAMPLE_RATE, update.partial, [s.text for s in update.final])
        transcript = session.finish()
        stability += watched.finish(transcript)
        errors += count_errors(piece.text, transcript.text)
        words = transcript.text.split()
        first, final = seen.times(words, len(piece.audio) / SAMPLE_RATE)
        said = written = 0
        for a, b in align_words(piece.text, transcript.text):
            end = piece.ends[said] if a is not None else None
            if a is not None and a == b and end is not None:
                partials.append(first[written] - end)
                finals.append(final[written] - end)
            said, written = said + (a is not None), written + (b is not None)
    frame = engine.samples_per_frame / SAMPLE_RATE
    return Latency(
        model=model,
        look_ahead=engine.latency_frames * frame,
        block=block * frame,
        errors=errors,
        partials=np.array(partials),
        finals=np.array(finals),
        stability=stability,
    )


class _Shown:
    """When what was shown."""

    def __init__(self) -> None:
        self._final: list[str] = []
        self._changes: list[tuple[float, int, list[str]]] = []  # seconds, how many words are final, all words
        self._last: tuple[int, str] | None = None

    def show(self, seconds: float, partial: str, finals: Sequence[str]) -> None:
        """Take what an update has brought."""
        self._final += [word for text in finals for word in text.split()]
        if self._last != (len(self._final), partial):
            self._last = (len(self._final), partial)
            self._changes.append((seconds, len(self._final), self._final + partial.split()))

    def times(self, words: Sequence[str], end: float) -> tuple[list[float], list[float]]:
        """When each word of the final text was first shown at its place, and when it was final; else the end."""
        first, final = [end] * len(words), [end] * len(words)
        for seconds, finished, shown in reversed(self._changes):
            for i, word in enumerate(words[: len(shown)]):
                if shown[i] == word:
                    first[i] = seconds
                if i < finished:
                    final[i] = seconds
        return first, final


def _pieces(manifests: Sequence[Path], aligner: Aligner) -> tuple[list[_Piece], list[Problem]]:
    pieces: list[_Piece] = []
    problems: list[Problem] = []
    for manifest in manifests:
        rows, bad_rows = read_manifest(manifest)
        problems += bad_rows
        for joined in join([row for row in rows if normalize(row.text or "")], _PIECE_SECONDS):
            audios: list[tuple[np.ndarray, float]] = []
            there: list[Utterance] = []
            for row, pause in zip(joined.parts, joined.pauses, strict=True):
                try:
                    samples = read_row(row)
                except AudioError as error:
                    problems.append(Problem(row.where, str(error)))
                    samples = np.zeros(0, np.float32)
                if len(samples):
                    audios.append((samples, pause))
                    there.append(row)
            if audios:
                audios[-1] = (audios[-1][0], max(_LAST_PAUSE, audios[-1][1]))
                pieces.append(_piece(joined.parts, there, audios, aligner))
    if not pieces:
        raise ConfigError("--latency: no row has both text and audio")
    return pieces, problems


def _piece(
    parts: Sequence[Utterance], there: Sequence[Utterance], audios: Sequence[tuple[np.ndarray, float]], aligner: Aligner
) -> _Piece:
    """`parts` are all rows: what is said in those that could not be read is missing in the text recognized."""
    audio, starts = lay_out(audios)
    begins = {row.where: (start, samples) for row, start, (samples, _) in zip(there, starts, audios, strict=True)}
    ends: list[float | None] = []
    for row in parts:
        text = normalize(row.text or "")
        start, samples = begins.get(row.where, (0, None))
        words = [] if samples is None else aligner.words(samples, text)
        ends += [start / SAMPLE_RATE + word.end for word in words] or [None] * len(text.split())
    return _Piece(audio=audio, text=" ".join(row.text or "" for row in parts), ends=tuple(ends))


def _token_frames(path: np.ndarray) -> list[tuple[int, int]]:
    """(first frame, frame after the last) of each token that a path writes; repeats are joined, blanks dropped."""
    edges = [0, *(np.flatnonzero(np.diff(path)) + 1).tolist(), len(path)]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if path[a] != 0]
