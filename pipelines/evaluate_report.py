"""`asr evaluate --report`: one HTML page, for those who decide what to fix next; opens without a network."""

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import soundfile

from asr.audio import SAMPLE_RATE
from asr.errors import AudioError
from asr.metrics import ErrorCounts, align_words, count_errors
from asr.text import normalize
from pipelines.evaluate import Outcome, Score, read_row, total
from pipelines.evaluate_confidence import Reliability, judged
from pipelines.evaluate_live import Joined

_PAGE = Path(__file__).with_name("evaluate_report.html")
_RESAMPLES = 2000
_LENGTHS = (1, 2, 5, 10, 15, 20)  # seconds: borders between the groups
_MOST = 50  # lines of a list of words


def report_page(outcomes: Sequence[Outcome], scores: Sequence[Score], about: str, folder: Path, clips: int = 0) -> str:
    """The page.

    Args:
        outcomes: of all rows of all manifests.
        scores: of the manifests.
        about: what was evaluated, for the head of the page.
        folder: where the page will lie; recordings are linked relative to it.
        clips: so many recordings, those with the most errors, are put into the page, as Ogg Opus.
    """
    counts = [count_errors(outcome.reference, outcome.hypothesis) for outcome in outcomes]
    pairs = [align_words(outcome.reference, outcome.hypothesis) for outcome in outcomes]
    speakers = _speakers(outcomes)
    worst = sorted(range(len(outcomes)), key=lambda i: -counts[i].word_errors)[:clips]
    embedded = {i: clip for i in worst if counts[i].word_errors and (clip := _embedded(outcomes[i])) is not None}
    data = {
        "title": "Recognition report",
        "about": about,
        "total": total(scores).figures(),
        "interval": wer_interval(counts, [speaker or None for speaker in speakers]),
        "interval_note": _interval_note(speakers),
        "manifests": [{"name": score.manifest, **score.figures()} for score in scores],
        "speakers": _grouped(speakers, counts),
        "lengths": _by_length(outcomes, counts),
        **_confusions(pairs, outcomes),
        "confidence": _confidence(outcomes),
        "utterances": [
            _utterance(i, outcomes[i], speakers[i], counts[i], pairs[i], embedded.get(i) or _link(outcomes[i], folder))
            for i in range(len(outcomes))
        ],
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return _PAGE.read_text(encoding="utf-8").replace("__DATA__", text)


def _speakers(outcomes: Sequence[Outcome]) -> list[str]:
    """Who speaks, "" where no manifest tells; where manifests of several folders have the name, of which of them."""
    folders = [o.manifest if os.path.isdir(o.manifest) else os.path.dirname(o.manifest) or "." for o in outcomes]
    names = [outcome.speaker or "" for outcome in outcomes]
    found: dict[str, set[str]] = {}
    for name, folder in zip(names, folders, strict=True):
        found.setdefault(name, set()).add(folder)
    return [
        f"{name} ({folder})" if name and len(found[name]) > 1 else name
        for name, folder in zip(names, folders, strict=True)
    ]


def wer_interval(
    counts: Sequence[ErrorCounts], speakers: Sequence[str | None], seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of the word error rate: how far it would move with other speech of this kind.

    Whole speakers are drawn, since the errors of one are not independent; one without a name counts as one utterance.
    None with fewer than two of them, or without a word.
    """
    units: dict[object, np.ndarray] = {}
    for i, (count, speaker) in enumerate(zip(counts, speakers, strict=True)):
        unit = i if speaker is None else speaker
        units[unit] = units.get(unit, np.zeros(2)) + np.array([count.word_errors, count.words])
    if len(units) < 2 or not any(count.words for count in counts):
        return None
    drawn = np.random.default_rng(seed).multinomial(len(units), np.full(len(units), 1 / len(units)), size=_RESAMPLES)
    errors, words = (drawn @ np.array(list(units.values()))).T
    low, high = np.percentile(errors[words > 0] / words[words > 0], (2.5, 97.5))
    return float(low), float(high)


def _interval_note(speakers: Sequence[str]) -> str:
    named, unnamed = len(set(speakers) - {""}), speakers.count("")
    if named + unnamed < 2:
        return "One speaker alone says nothing of others: there is no interval."
    drawn = " and ".join(
        [f"{named} speakers"] * (named > 0) + [f"{unnamed} utterances without a named speaker"] * (unnamed > 0)
    )
    few = " So few say little: speak of a difference only if it is large." if named + unnamed < 20 else ""
    return f"The interval is a bootstrap over {drawn}, drawn whole {_RESAMPLES} times.{few}"


def _grouped(names: Sequence[str], counts: Sequence[ErrorCounts]) -> list[dict[str, Any]]:
    groups: dict[str, list[ErrorCounts]] = {}
    for name, count in zip(names, counts, strict=True):
        groups.setdefault(name, []).append(count)
    return [
        {"name": name, "utterances": len(group), **_figures(sum(group, ErrorCounts()))}
        for name, group in groups.items()
    ]


def _by_length(outcomes: Sequence[Outcome], counts: Sequence[ErrorCounts]) -> list[dict[str, Any]]:
    edges = [f"under {_LENGTHS[0]}", *(f"{a} to {b}" for a, b in pairwise(_LENGTHS))]
    edges += [f"{_LENGTHS[-1]} and more", "unknown"]
    seconds = [_seconds(outcome) for outcome in outcomes]
    places = [len(edges) - 1 if s is None else int(np.searchsorted(_LENGTHS, s, "right")) for s in seconds]
    groups = _grouped([edges[place] for place in places], counts)
    return sorted(({"order": edges.index(g["name"]), **g} for g in groups), key=lambda g: g["order"])


def _confusions(
    pairs: Sequence[Sequence[tuple[str | None, str | None]]], outcomes: Sequence[Outcome]
) -> dict[str, list[dict[str, Any]]]:
    """Pairs of words and how often each occurs, the most frequent first."""
    found = Counter(pair for row in pairs for pair in row if pair[0] != pair[1])
    said = Counter(word for outcome in outcomes for word in normalize(outcome.reference).split())

    def listed(wanted: Callable[[str | None, str | None], bool]) -> list[dict[str, Any]]:
        chosen = [(pair, n) for pair, n in found.most_common() if wanted(*pair)][:_MOST]
        return [{"said": a, "written": b, "count": n, "all": said[a or ""]} for (a, b), n in chosen]

    return {
        "confused": listed(lambda a, b: a is not None and b is not None),
        "missed": listed(lambda a, b: b is None),
        "added": listed(lambda a, b: a is None),
    }


def _confidence(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    words, right, _ = judged(outcomes)
    if not words:
        return None
    found = Reliability.of(np.array([word.confidence for word in words]), right)
    bins = [{"confidence": confidence, "right": share, "words": n} for confidence, share, n in found.bins]
    return {"words": found.words, "ece": found.ece, "auroc": found.auroc, "bins": bins}


def _utterance(
    number: int,
    outcome: Outcome,
    speaker: str,
    counts: ErrorCounts,
    pairs: Sequence[tuple[str | None, str | None]],
    clip: str | None,
) -> dict[str, Any]:
    """What the page shows of one row; each pair of words has the confidence of the recognized one, or null."""
    words = outcome.transcript.words if outcome.transcript else ()
    confidences = iter([word.confidence for word in words for _ in normalize(word.text).split()])
    return {
        "number": number,
        "id": outcome.row.id,
        "speaker": speaker,
        "seconds": _seconds(outcome),
        "problem": outcome.transcript is None,
        "errors": counts.word_errors,
        **_figures(counts),
        "clip": clip,
        "pairs": [(a, b, None if b is None else round(next(confidences), 3)) for a, b in pairs],
    }


def _figures(counts: ErrorCounts) -> dict[str, Any]:
    return {
        "words": counts.words,
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
        "wer": counts.wer if np.isfinite(counts.wer) else None,
    }


def _seconds(outcome: Outcome) -> float | None:
    return outcome.transcript.duration if outcome.transcript else outcome.row.duration


def _embedded(outcome: Outcome) -> str | None:
    row = outcome.row
    samples = row.read(_readable) if isinstance(row, Joined) else _readable(row)
    if samples is None or not len(samples):
        return None
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="OGG", subtype="OPUS")
    return f"data:audio/ogg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _readable(row: Any) -> np.ndarray | None:
    try:
        return read_row(row)
    except AudioError:
        return None


def _link(outcome: Outcome, folder: Path) -> str | None:
    """Where the page finds the recording; what is joined is nowhere."""
    row = outcome.row
    if isinstance(row, Joined) or outcome.transcript is None:
        return None
    address = row.audio if "://" in row.audio else quote(os.path.relpath(row.audio, folder.absolute()))
    if row.offset is None:
        return address
    end = "" if row.duration is None else f",{row.offset + row.duration:.3f}"
    return f"{address}#t={row.offset:.3f}{end}"
