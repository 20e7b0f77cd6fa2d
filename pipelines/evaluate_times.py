"""How exact the times of words are, on recordings laid out with pauses: measured, and fitted."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.decoding import Word
from asr.decoding.calibration import Calibration
from asr.decoding.sound import levels_of, smooth, sounds
from asr.errors import AudioError, ConfigError, Problem
from asr.manifest import read_manifest
from asr.text import normalize
from pipelines.evaluate import read_row
from pipelines.evaluate_live import join, lay_out
from pipelines.transcribe import RecognizerOptions

_PIECE_SECONDS = 20.0
_MARGIN = 0.03  # seconds of a recording before and after its speech; with less it may be cut off
_REACH = 0.5  # seconds: a word so far outside its recording is not taken for its
_FEWEST = 20  # boundaries, to fit on
_SOUND = 0.3  # seconds: how far words are moved to where a sound begins or ends


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """First words and their true starts, last words and their true ends, in seconds; a lone word is both.

    `recordings` were laid out; in those whose words are not here, other words were recognized.
    """

    recordings: int
    starts: tuple[tuple[Word, float], ...]
    ends: tuple[tuple[Word, float], ...]

    @property
    def start_errors(self) -> np.ndarray:
        """Seconds, (starts,); above 0: too late."""
        return np.array([word.start - true for word, true in self.starts])

    @property
    def end_errors(self) -> np.ndarray:
        """Seconds, (ends,); above 0: too late."""
        return np.array([word.end - true for word, true in self.ends])

    def figures(self) -> dict[str, float | int]:
        """Of the distances from the true times, in seconds."""
        values = {"start": self.start_errors, "end": self.end_errors}
        values["both"] = np.concatenate([values["start"], values["end"]])
        found: dict[str, float | int] = {"recordings": self.recordings}
        for name, errors in values.items():
            found[f"{name}s"] = len(errors)
            if len(errors):
                middle, high = np.percentile(np.abs(errors), (50, 95))
                found |= {f"{name}_median": float(middle), f"{name}_p95": float(high)}
        return found


def speech_edges(samples: np.ndarray) -> tuple[float, float] | None:
    """Where speech begins and ends in a recording, (n,) at 16 kHz, by its loudness, in seconds.

    None where it is not clear: much noise, or the recording begins or ends in the midst of speech.
    """
    starts, ends = sounds(smooth(levels_of(samples)))
    if not starts or math.isnan(starts[0]) or math.isnan(ends[-1]):
        return None
    start, end = starts[0], ends[-1]
    return (start, end) if start >= _MARGIN and end <= len(samples) / SAMPLE_RATE - _MARGIN else None


def word_times(manifests: Sequence[Path], options: RecognizerOptions, network: str) -> tuple[Boundaries, list[Problem]]:
    """Lay out the recordings of each speaker with pauses, recognize them, and compare the times at their borders.

    Raises:
        ModelError: the model cannot be loaded, or lacks the network.
        ManifestError: a manifest cannot be read.
    """
    recognizer = options.load(endpoint=False)
    recordings = 0
    starts: list[tuple[Word, float]] = []
    ends: list[tuple[Word, float]] = []
    problems: list[Problem] = []
    for manifest in manifests:
        for audio, placed in _pieces(manifest, problems):
            words = recognizer.transcribe_batch([audio], network=network)[0].words
            recordings += len(placed)
            for text, (first, last), (start, end) in placed:
                # by the middle: with CTC's times not even a right word need touch its sound
                inside = [word for word in words if first <= (word.start + word.end) / 2 < last]
                said = normalize(text).split()
                if inside and normalize(inside[0].text) == said[0]:
                    starts.append((inside[0], start))
                if inside and normalize(inside[-1].text) == said[-1]:
                    ends.append((inside[-1], end))
    return Boundaries(recordings=recordings, starts=tuple(starts), ends=tuple(ends)), problems


def fit_times(found: Boundaries) -> Calibration:
    """Shifts by the median error, from words as the decoder gives them.

    Raises:
        ConfigError: too few words were recognized.
    """
    if len(found.starts) < _FEWEST or len(found.ends) < _FEWEST:
        raise ConfigError(
            f"--times --calibrate: {len(found.starts)} first and {len(found.ends)} last words of {found.recordings} "
            f"recordings were recognized: needs {_FEWEST} of each; give more speech"
        )
    starts, ends = (-float(np.median(errors)) for errors in (found.start_errors, found.end_errors))
    return Calibration(start_shift=round(starts, 3), end_shift=round(ends, 3), reach=_SOUND)


_Placed = tuple[str, tuple[float, float], tuple[float, float]]


def _pieces(manifest: Path, problems: list[Problem]) -> Iterator[tuple[np.ndarray, list[_Placed]]]:
    """Audio, and what is said where: the text, the time in which its words are looked for, that of the speech."""
    rows, bad_rows = read_manifest(manifest)
    problems += bad_rows
    for piece in join([row for row in rows if normalize(row.text or "")], _PIECE_SECONDS):
        audios: list[tuple[np.ndarray, float]] = []
        known: list[tuple[str, tuple[float, float], float]] = []
        for row, pause in zip(piece.parts, piece.pauses, strict=True):
            try:
                samples = read_row(row)
            except AudioError as error:
                problems.append(Problem(row.where, str(error)))
                continue
            edges = speech_edges(samples)
            if edges is not None:
                audios.append((samples, pause))
                known.append((row.text or "", edges, min(pause / 2, _REACH)))
        if not audios:
            continue
        audio, positions = lay_out(audios)
        placed: list[_Placed] = []
        before = _REACH
        for (text, (start, end), after), position, (samples, _) in zip(known, positions, audios, strict=True):
            first, last = position / SAMPLE_RATE, (position + len(samples)) / SAMPLE_RATE
            placed.append((text, (first - before, last + after), (first + start, first + end)))
            before = after
        yield audio, placed
