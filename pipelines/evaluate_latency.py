"""`asr evaluate --latency`: how soon words are shown and final after they were spoken, and at what word error rate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.decoding import Word
from asr.decoding.calibration import load_calibration
from asr.decoding.sound import levels_of
from asr.errors import AudioError, ConfigError, Problem, TextError
from asr.manifest import Utterance, read_manifest
from asr.metrics import ErrorCounts, align_words, count_errors
from asr.runtime import load_engine
from asr.runtime.folder import find_networks
from asr.runtime.reader import usual_block
from asr.text import Tokenizer, normalize
from pipelines.evaluate import read_row
from pipelines.evaluate_live import Partials, Stability, join, lay_out
from pipelines.transcribe import RecognizerOptions

if TYPE_CHECKING:
    from asr.recognizer import Recognizer

_PIECE_SECONDS = 60.0
_LAST_PAUSE = 3.0  # seconds after a piece, in which its last words become final
_FEED = SAMPLE_RATE // 100  # samples: text is looked at so often
_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)


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
    manifests: Sequence[Path],
    options: RecognizerOptions,
    models: Sequence[Path | None],
    blocks: Sequence[int] | None = None,
) -> tuple[list[Latency], list[Problem]]:
    """Read the joined utterances of each speaker live, with each model and in blocks of each size, in its frames.

    None: one frame, two, as many as a session reads at a time, and twice those.

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
        usual = usual_block(recognizer.stream().engine.samples_per_frame)
        for block in blocks or (1, 2, usual, 2 * usual):
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
        """Each word of the normalised text with its times; none where the text does not fit the audio, (n,) 16 kHz."""
        import torch
        from torchaudio.functional import forced_align

        try:
            tokens = self._tokenizer.encode(text)
        except TextError:
            return []
        log_probs = self._log_probs(np.concatenate([_EDGE, samples, _EDGE]))
        repeats = sum(a == b for a, b in pairwise(tokens))
        if not tokens or len(tokens) + repeats > len(log_probs):
            return []
        path, _ = forced_align(torch.from_numpy(log_probs)[None], torch.tensor([tokens], dtype=torch.int32))
        frame, duration = self._engine.samples_per_frame / SAMPLE_RATE, len(samples) / SAMPLE_RATE
        spans = _token_frames(path[0].numpy())
        assert len(spans) == len(tokens)
        words: list[Word] = []
        position = 0
        for word in normalize(text).split():
            first, after = spans[position][0], spans[position + len(word) - 1][1]
            start, end = (min(max(t * frame - EDGE_SILENCE_SECONDS, 0.0), duration) for t in (first, after))
            words.append(Word(text=word, start=start, end=end, confidence=1.0))
            position += len(word) + 1  # and the space
        return self._calibration.apply(words, 0.0, duration, levels_of(samples))

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
    return [(a, b) for a, b in pairwise(edges) if path[a] != 0]
