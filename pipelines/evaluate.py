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
from asr.manifest import Utterance, read_manifest
from asr.metrics import ErrorCounts, count_errors
from pipelines.transcribe import RecognizerOptions

if TYPE_CHECKING:
    from asr.recognizer import Recognizer

# Rows of one length are read and recognized together: so many, or so many seconds, bound the memory.
_GROUP_UTTERANCES = 16
_GROUP_SECONDS = 320.0
_BLOCK = SAMPLE_RATE // 10  # samples fed to a session at a time, as a microphone would
_ROUNDING_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of one manifest, or of several together.

    Attributes:
        utterances: rows with a text to score against, those with unreadable audio included.
        unreadable: rows that could not be recognized; the words of their texts count as deletions.
        errors: the counts.
        audio_seconds: audio that was recognized.
        processing_seconds: time from file to text (reading, recognizing), the loading of the model aside.
    """

    manifest: str
    network: str
    decoding: str
    utterances: int
    unreadable: int
    errors: ErrorCounts
    audio_seconds: float
    processing_seconds: float

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
        }


def evaluate(
    manifests: Sequence[Path],
    options: RecognizerOptions,
    *,
    network: str = "offline",
    endpoint: bool = False,
    on_utterance: Callable[[Utterance, str], None] | None = None,
) -> tuple[list[Score], list[Problem]]:
    """Score every manifest, and name the rows and manifests that could not be read.

    Args:
        manifests: what `asr.manifest.read_manifest` knows.
        network: "offline" reads whole utterances; "streaming" is fed in blocks, as live audio comes.
        endpoint: cut each row where an utterance seems to end, as `asr transcribe` does; else score it whole.
        on_utterance: is told each row and its hypothesis, in the order of the manifest.

    Raises:
        ModelError: the model cannot be loaded, or lacks the network.
    """
    recognizer = options.load(endpoint=endpoint)
    recognizer.transcribe_batch([np.zeros(SAMPLE_RATE, np.float32)], network=network)  # loads it, untimed
    scores: list[Score] = []
    problems: list[Problem] = []
    for manifest in manifests:
        try:
            rows, bad_rows = read_manifest(manifest)
            with_text = [row for row in rows if row.text is not None]
            if not with_text:
                raise ManifestError(f"{manifest}: no row has a text to score against")
        except ManifestError as error:
            problems.append(Problem(str(manifest), str(error).removeprefix(f"{manifest}: ")))
            continue
        bad_rows += [Problem(row.where, "no text to score against") for row in rows if row.text is None]

        work = _Work(recognizer, network, cut=endpoint)
        hypotheses = work.hypotheses(with_text)
        if on_utterance is not None:
            for row, hypothesis in zip(with_text, hypotheses, strict=True):
                on_utterance(row, hypothesis)
        counts = (count_errors(row.text or "", hyp) for row, hyp in zip(with_text, hypotheses, strict=True))
        scores.append(
            Score(
                manifest=str(manifest),
                network=network,
                decoding=options.decoding,
                utterances=len(with_text),
                unreadable=len(bad_rows) + len(work.problems),
                errors=sum(counts, ErrorCounts()),
                audio_seconds=work.audio_seconds,
                processing_seconds=work.processing_seconds,
            )
        )
        problems += bad_rows + work.problems
    return scores, problems


def total(scores: Sequence[Score]) -> Score:
    """All scores as one: every word counts the same, whichever manifest it is from."""
    return Score(
        manifest="total",
        network=scores[0].network if scores else "",
        decoding=scores[0].decoding if scores else "",
        utterances=sum(s.utterances for s in scores),
        unreadable=sum(s.unreadable for s in scores),
        errors=sum((s.errors for s in scores), ErrorCounts()),
        audio_seconds=sum(s.audio_seconds for s in scores),
        processing_seconds=sum(s.processing_seconds for s in scores),
    )


def report(scores: Sequence[Score]) -> dict[str, Any]:
    """What `--json` writes: {"results": [...], "total": {...}}; wer and cer are fractions."""
    results = [{"manifest": s.manifest, "network": s.network, "decoding": s.decoding, **s.figures()} for s in scores]
    return {"results": results, "total": total(scores).figures()}


def table(scores: Sequence[Score]) -> str:
    """The scores as lines to read, with a line for all where there are several."""
    shown = [*scores, total(scores)] if len(scores) > 1 else list(scores)
    heads = ("utterances", "words", "sub", "del", "ins", "WER %", "CER %", "RTF")
    width = max((len(s.manifest) for s in shown), default=0)
    lines = [" " * width + "".join(f"{head:>{max(len(head), 7) + 2}}" for head in heads)]
    for s in shown:
        e = s.errors
        cells = (
            str(s.utterances), str(e.words), str(e.substitutions), str(e.deletions), str(e.insertions),
            f"{e.wer * 100:.2f}", f"{e.cer * 100:.2f}", f"{s.rtf:.4f}",
        )  # fmt: skip
        lines.append(
            f"{s.manifest:<{width}}"
            + "".join(f"{c:>{max(len(head), 7) + 2}}" for head, c in zip(heads, cells, strict=True))
        )
    return "\n".join(lines) + "\n"


class _Work:
    """Recognizes the rows of one manifest and keeps the time."""

    def __init__(self, recognizer: "Recognizer", network: str, *, cut: bool) -> None:
        self._recognizer = recognizer
        self._network = network
        self._cut = cut
        self.problems: list[Problem] = []
        self.audio_seconds = 0.0
        self.processing_seconds = 0.0

    def hypotheses(self, rows: Sequence[Utterance]) -> list[str]:
        """The texts, in the order of the rows; empty where the audio cannot be read."""
        texts = [""] * len(rows)
        for group in _groups(rows):
            start = time.perf_counter()
            audio = {index: samples for index in group if (samples := self._read(rows[index])) is not None}
            for index, text in zip(audio, self._recognize(list(audio.values())), strict=True):
                texts[index] = text
            self.processing_seconds += time.perf_counter() - start
            self.audio_seconds += sum(len(samples) for samples in audio.values()) / SAMPLE_RATE
        order = {row.where: index for index, row in enumerate(rows)}
        self.problems.sort(key=lambda problem: order[problem.where])
        return texts

    def _read(self, row: Utterance) -> np.ndarray | None:
        # A declared duration is often rounded; from the start of a file (mostly all of it) a little more is
        # read, so that the last sound stays. Inside a long recording that would be the neighbour's first.
        duration = row.duration
        if duration is not None and row.offset is None:
            duration += _ROUNDING_SECONDS
        try:
            return read_audio(row.audio, offset=row.offset or 0.0, duration=duration)
        except AudioError as error:
            self.problems.append(Problem(row.where, str(error)))
            return None

    def _recognize(self, audio: list[np.ndarray]) -> list[str]:
        recognizer = self._recognizer
        if self._network == "streaming":
            return [self._as_it_arrives(samples) for samples in audio]
        if self._cut:
            return [recognizer.transcribe(x, SAMPLE_RATE, network=self._network).text for x in audio]
        return [transcript.text for transcript in recognizer.transcribe_batch(audio, network=self._network)]

    def _as_it_arrives(self, samples: np.ndarray) -> str:
        session = self._recognizer.stream(SAMPLE_RATE)
        for start in range(0, len(samples), _BLOCK):
            session.feed(samples[start : start + _BLOCK])
        return session.finish().text


def _groups(rows: Sequence[Utterance]) -> Iterator[list[int]]:
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
