"""`asr evaluate`: recognizes the utterances of manifests and counts the errors."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asr.audio import SAMPLE_RATE, read_audio
from asr.errors import AudioError, ManifestError, Problem
from asr.manifest import Utterance, read_with_lost
from asr.metrics import ErrorCounts, count_errors
from pipelines.evaluate_live import Joined, Partials, Stability, join
from pipelines.transcribe import RecognizerOptions

if TYPE_CHECKING:
    from asr.network import Transcript
    from asr.recognizer import Recognizer

# Rows of one length are read and recognized together: so many, or so many seconds, bound the memory.
_GROUP_UTTERANCES = 16
_GROUP_SECONDS = 320.0
_BLOCK = SAMPLE_RATE // 10  # samples fed to a session at a time, as a microphone would


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One row and what was recognized in it: `transcript` is None where the row or its audio cannot be read."""

    manifest: str
    row: Utterance | Joined
    transcript: "Transcript | None"

    @property
    def reference(self) -> str:
        """What was said, as the manifest writes it."""
        return self.row.text or ""

    @property
    def speaker(self) -> str | None:
        """Who speaks, where the manifest tells."""
        return (self.row.parts[0] if isinstance(self.row, Joined) else self.row).speaker

    @property
    def hypothesis(self) -> str:
        """What was recognized; nothing where that cannot be read, so that all its words are deletions."""
        return self.transcript.text if self.transcript else ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of one manifest, or of several together.

    Attributes:
        utterances: rows with a text to score against, those that could not be recognized included.
        unreadable: rows that could not be recognized; the words of their texts, where known, count as deletions.
        errors: the counts.
        audio_seconds: audio that was recognized.
        processing_seconds: time from file to text (reading, recognizing), the loading of the model aside.
        stability: of the partial text, where it was read as live audio.
    """

    manifest: str
    network: str
    decoding: str
    utterances: int
    unreadable: int
    errors: ErrorCounts
    audio_seconds: float
    processing_seconds: float
    stability: Stability | None = None

    @property
    def rtf(self) -> float:
        """Real-time factor: seconds of processing for a second of audio; 0 without audio."""
        return self.processing_seconds / self.audio_seconds if self.audio_seconds else 0.0

    def figures(self) -> dict[str, Any]:
        """The counts and rates as JSON holds them; a rate that is infinite (errors, no words) is null."""
        errors = self.errors
        return {
            "utterances": self.utterances,
            "unreadable": self.unreadable,
            "words": errors.words,
            "substitutions": errors.substitutions,
            "deletions": errors.deletions,
            "insertions": errors.insertions,
            "wer": errors.wer if math.isfinite(errors.wer) else None,
            "cer": errors.cer if math.isfinite(errors.cer) else None,
            "rtf": self.rtf,
            **({} if self.stability is None else {"partial_words_changed": self.stability.share}),
        }


def evaluate(
    manifests: Sequence[Path],
    options: RecognizerOptions,
    *,
    network: str = "offline",
    endpoint: bool = False,
    two_pass: bool = False,
    join_seconds: float | None = None,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    on_utterance: Callable[[Outcome], None] | None = None,
    recognizer: "Recognizer | None" = None,
) -> tuple[list[Score], list[Problem]]:
    """Score every manifest, and name the rows and manifests that could not be read.

    Args:
        manifests: what `asr.manifest.read_manifest` knows.
        network: "offline" reads whole utterances; "streaming" is fed in blocks, as live audio comes.
        endpoint: cut each row where an utterance seems to end, as `asr transcribe` does; else score it whole.
        two_pass: with "streaming" and `endpoint`: the offline network reads every segment again.
        join_seconds: score the utterances of each speaker joined to so much audio, with pauses between them.
        change: what is done to the samples of each row, (n,) at 16 kHz, before it is read.
        on_utterance: is told the outcome of each row, in the order of the manifest; of bad rows at the end.
        recognizer: of these options, where it is loaded already.

    Raises:
        ModelError: the model cannot be loaded, or lacks the network.
    """
    recognizer = recognizer or options.load(endpoint=endpoint)
    recognizer.transcribe_batch([np.zeros(SAMPLE_RATE, np.float32)], network=network)  # loads it, untimed
    scores: list[Score] = []
    problems: list[Problem] = []
    for manifest in manifests:
        try:
            rows, bad_rows, lost = read_with_lost(manifest)
            with_text = [row for row in rows if row.text is not None]
            if not with_text and not lost:
                raise ManifestError(f"{manifest}: no row has a text to score against")
        except ManifestError as error:
            problems.append(Problem(str(manifest), str(error).removeprefix(f"{manifest}: ")))
            continue
        bad_rows += [Problem(row.where, "no text to score against") for row in rows if row.text is None]

        work = _Work(recognizer, network, cut=endpoint, two_pass=two_pass, change=change)
        scored = with_text if join_seconds is None else join(with_text, join_seconds)
        outcomes = [
            Outcome(manifest=str(manifest), row=row, transcript=transcript)
            for row, transcript in zip(scored, work.transcripts(scored), strict=True)
        ]
        outcomes += [Outcome(manifest=str(manifest), row=row, transcript=None) for row in lost]
        if on_utterance is not None:
            for outcome in outcomes:
                on_utterance(outcome)
        counts = (count_errors(outcome.reference, outcome.hypothesis) for outcome in outcomes)
        scores.append(
            Score(
                manifest=str(manifest),
                network="two-pass" if two_pass else network,
                decoding=options.decoding,
                utterances=len(with_text) + len(lost),
                unreadable=len(bad_rows) + len(work.problems),
                errors=sum(counts, ErrorCounts()),
                audio_seconds=work.audio_seconds,
                processing_seconds=work.processing_seconds,
                stability=work.stability if network == "streaming" else None,
            )
        )
        problems += bad_rows + work.problems
    return scores, problems


def total(scores: Sequence[Score]) -> Score:
    """All scores as one: every word counts the same, whichever manifest it is from."""
    live = any(s.stability for s in scores)
    return Score(
        manifest="total",
        network=scores[0].network if scores else "",
        decoding=scores[0].decoding if scores else "",
        utterances=sum(s.utterances for s in scores),
        unreadable=sum(s.unreadable for s in scores),
        errors=sum((s.errors for s in scores), ErrorCounts()),
        audio_seconds=sum(s.audio_seconds for s in scores),
        processing_seconds=sum(s.processing_seconds for s in scores),
        stability=sum((s.stability for s in scores if s.stability), Stability()) if live else None,
    )


def report(scores: Sequence[Score]) -> dict[str, Any]:
    """What `--json` writes: {"results": [...], "total": {...}}; wer and cer are fractions."""
    results = [{"manifest": s.manifest, "network": s.network, "decoding": s.decoding, **s.figures()} for s in scores]
    return {"results": results, "total": total(scores).figures()}


def table(scores: Sequence[Score]) -> str:
    """The scores as lines to read, with a line for all where there are several."""
    shown = [*scores, total(scores)] if len(scores) > 1 else list(scores)
    heads = ["utterances", "words", "sub", "del", "ins", "WER %", "CER %", "RTF"]
    if any(s.stability for s in scores):
        heads.append("changed %")
    width = max((len(s.manifest) for s in shown), default=0)
    lines = [" " * width + "".join(f"{head:>{max(len(head), 7) + 2}}" for head in heads)]
    for s in shown:
        e = s.errors
        cells = [
            str(s.utterances), str(e.words), str(e.substitutions), str(e.deletions), str(e.insertions),
            f"{e.wer * 100:.2f}", f"{e.cer * 100:.2f}", f"{s.rtf:.4f}",
        ]  # fmt: skip
        if s.stability:
            cells.append(f"{s.stability.share * 100:.2f}")
        lines.append(
            f"{s.manifest:<{width}}"
            + "".join(f"{c:>{max(len(head), 7) + 2}}" for head, c in zip(heads, cells, strict=True))
        )
    return "\n".join(lines) + "\n"


def read_row(row: Utterance) -> np.ndarray:
    """The audio of a row, float32 (n,) at 16 kHz.

    Raises:
        AudioError: it cannot be read.
    """
    return read_audio(row.audio, offset=row.offset or 0.0, duration=row.seconds_to_read)


class _Work:
    """Recognizes the rows of one manifest and keeps the time."""

    def __init__(
        self,
        recognizer: "Recognizer",
        network: str,
        *,
        cut: bool,
        two_pass: bool,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._recognizer = recognizer
        self._network, self._change = network, change
        self._cut, self._two_pass = cut, two_pass
        self.stability = Stability()
        self.problems: list[Problem] = []
        self.audio_seconds = 0.0
        self.processing_seconds = 0.0

    def transcripts(self, rows: Sequence[Utterance | Joined]) -> "list[Transcript | None]":
        """In the order of the rows; None where the audio cannot be read."""
        transcripts: list[Transcript | None] = [None] * len(rows)
        for group in _groups(rows):
            start = time.perf_counter()
            audio = {index: samples for index in group if (samples := self._read(rows[index])) is not None}
            for index, transcript in zip(audio, self._recognize(list(audio.values())), strict=True):
                transcripts[index] = transcript
            self.processing_seconds += time.perf_counter() - start
            self.audio_seconds += sum(len(samples) for samples in audio.values()) / SAMPLE_RATE
        parts = (part for row in rows for part in (row.parts if isinstance(row, Joined) else [row]))
        order = {part.where: index for index, part in enumerate(parts)}
        self.problems.sort(key=lambda problem: order[problem.where])
        return transcripts

    def _read(self, row: Utterance | Joined) -> np.ndarray | None:
        if isinstance(row, Joined):
            return row.read(self._read)
        try:
            samples = read_row(row)
        except AudioError as error:
            self.problems.append(Problem(row.where, str(error)))
            return None
        if self._change is not None:
            start = time.perf_counter()
            samples = self._change(samples)
            self.processing_seconds -= time.perf_counter() - start  # no part of the recognition
        return samples

    def _recognize(self, audio: list[np.ndarray]) -> "list[Transcript]":
        recognizer = self._recognizer
        if self._network == "streaming":
            return [self._as_it_arrives(samples) for samples in audio]
        if self._cut:
            return [recognizer.transcribe(x, SAMPLE_RATE, network=self._network) for x in audio]
        return recognizer.transcribe_batch(audio, network=self._network)

    def _as_it_arrives(self, samples: np.ndarray) -> "Transcript":
        session = self._recognizer.stream(SAMPLE_RATE, two_pass=self._two_pass)
        partials = Partials()
        for start in range(0, len(samples), _BLOCK):
            partials.show(session.feed(samples[start : start + _BLOCK]))
        transcript = session.finish()
        self.stability += partials.finish(transcript)
        return transcript


def _groups(rows: Sequence[Utterance | Joined]) -> Iterator[list[int]]:
    """Indices of rows in groups of about one length, the shortest first; unknown lengths before all."""
    group: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: rows[i].duration or 0.0):
        seconds = rows[index].duration
        full = seconds is not None and seconds * (len(group) + 1) > _GROUP_SECONDS
        if group and (full or len(group) == _GROUP_UTTERANCES):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
