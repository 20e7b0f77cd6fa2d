"""Live evaluation: utterances joined into minutes of audio with pauses, and how stable partial text is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.manifest import Utterance

if TYPE_CHECKING:
    from asr.recognizer import Transcript, Update

_PAUSE_SECONDS = (0.3, 2.5)  # shortest and longest
_FRAME = SAMPLE_RATE // 100  # samples
_UNKNOWN_SECONDS = 10.0  # of a row without a duration


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Utterances of one speaker to be heard one after the other; `pauses` in seconds, one after each."""

    parts: tuple[Utterance, ...]
    pauses: tuple[float, ...]

    @property
    def id(self) -> str:
        """From the first to the last part."""
        return f"{self.parts[0].id} to {self.parts[-1].id}"

    @property
    def where(self) -> str:
        """Where the first part is listed."""
        return self.parts[0].where

    @property
    def text(self) -> str:
        """All that is said."""
        return " ".join(part.text or "" for part in self.parts)

    @property
    def duration(self) -> float:
        """Seconds, the pauses included."""
        return sum(part.duration or _UNKNOWN_SECONDS for part in self.parts) + sum(self.pauses)

    def read(self, read_part: Callable[[Utterance], np.ndarray | None]) -> np.ndarray | None:
        """The audio, float32 (n,) at 16 kHz; parts that cannot be read (None) are left out, None without any."""
        read = [(read_part(part), pause) for part, pause in zip(self.parts, self.pauses, strict=True)]
        there = [(samples, pause) for samples, pause in read if samples is not None and len(samples)]
        return lay_out(there)[0] if there else None


def lay_out(audios: Sequence[tuple[np.ndarray, float]]) -> tuple[np.ndarray, list[int]]:
    """One after the other, each (n,) with a pause in seconds after it, filled with noise as of its room.

    Returns:
        The audio, and the sample at which each begins.
    """
    rng = np.random.default_rng(0)
    parts = [part for x, pause in audios for part in (x, _room(x, round(pause * SAMPLE_RATE), rng))]
    starts = np.cumsum([0] + [len(part) for part in parts])[:-1:2]
    return np.concatenate(parts).astype(np.float32), starts.tolist()


def join(
    rows: Sequence[Utterance], seconds: float, seed: int = 0, pauses: tuple[float, float] = _PAUSE_SECONDS
) -> list[Joined]:
    """Join the utterances of each speaker, in their order, to pieces of at least `seconds`.

    The pauses are as long as `pauses` allows, in seconds, drawn from `seed`. What is left of a speaker makes a shorter
    piece.
    """
    rng = np.random.default_rng(seed)
    speakers: dict[str | None, list[Utterance]] = {}
    for row in rows:
        speakers.setdefault(row.speaker, []).append(row)
    pieces: list[Joined] = []
    for of_speaker in speakers.values():
        pieces += (
            Joined(parts=tuple(parts), pauses=tuple(rng.uniform(*pauses, len(parts)).tolist()))
            for parts in _pieces(of_speaker, seconds, sum(pauses) / 2)
        )
    return pieces


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Words of live text: `kept` are those that it has in the end, `changed` were shown before and taken back.

    A word that only grows ("hel", "hello") is not changed.
    """

    kept: int = 0
    changed: int = 0

    @property
    def share(self) -> float:
        """Of all words that were shown, those that were changed later."""
        return self.changed / (self.kept + self.changed) if self.changed else 0.0

    def __add__(self, other: "Stability") -> "Stability":
        return Stability(kept=self.kept + other.kept, changed=self.changed + other.changed)


class Partials:
    """Watches the text of one session."""

    def __init__(self) -> None:
        self._shown: list[str] = []  # words that are not final
        self._finals = 0  # segments
        self._changed = 0

    def show(self, update: "Update") -> None:
        """Take what a `feed` has brought."""
        self._finals += len(update.final)
        partial = update.partial.split()
        self._replace([word for segment in update.final for word in segment.text.split()] + partial)
        self._shown = partial

    def finish(self, transcript: "Transcript") -> Stability:
        """Take the end, and tell how stable the text was."""
        self._replace([word for segment in transcript.segments[self._finals :] for word in segment.text.split()])
        return Stability(kept=len(transcript.text.split()), changed=self._changed)

    def _replace(self, words: list[str]) -> None:
        """Count the words shown that are not among `words`, which now stand in their place."""
        shown = self._shown.copy()
        if shown and len(shown) <= len(words) and words[len(shown) - 1].startswith(shown[-1]):
            shown[-1] = words[len(shown) - 1]
        if shown != words[: len(shown)]:
            blocks = SequenceMatcher(None, shown, words, autojunk=False).get_matching_blocks()
            self._changed += len(shown) - sum(block.size for block in blocks)


def _pieces(rows: Iterable[Utterance], seconds: float, pause: float) -> Iterator[list[Utterance]]:
    parts: list[Utterance] = []
    length = 0.0
    for row in rows:
        parts.append(row)
        length += (row.duration or _UNKNOWN_SECONDS) + pause
        if length >= seconds:
            yield parts
            parts, length = [], 0.0
    if parts:
        yield parts


def _room(samples: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """So much noise as if from the room of `samples`: with the mean spectrum of their quietest tenth."""
    frames = samples[: max(1, len(samples) // _FRAME) * _FRAME].reshape(-1, min(_FRAME, len(samples)))
    quietest = frames[np.argsort(np.square(frames).sum(axis=1))[: 1 + len(frames) // 10]]
    spectrum = np.sqrt(np.square(np.abs(np.fft.rfft(quietest))).mean(axis=0) / frames.shape[1])
    shape = np.interp(np.linspace(0, 1, length // 2 + 1), np.linspace(0, 1, len(spectrum)), spectrum)
    return np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * shape, length).astype(np.float32)
