"""The shipped model: on the shipped samples everywhere, on real speech where it is there."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.audio import SAMPLE_RATE, read_audio
from asr.metrics import ErrorCounts, count_errors
from asr.recognizer import Recognizer
from asr.runtime.folder import shipped_model

SAMPLES = Path(__file__).parents[1] / "scripts" / "samples"


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return Recognizer.load(decoding="greedy")


def samples_of_five_words() -> list[tuple[str, np.ndarray]]:
    rows = [json.loads(line) for line in (SAMPLES / "samples.jsonl").read_text().splitlines()]
    return [(r["text"], read_audio(SAMPLES / r["audio_filepath"])) for r in rows if len(r["text"].split()) >= 5]


def in_chunks(samples: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    start = 0
    for size in [*sizes, len(samples)]:
        yield samples[start : start + size]
        start += size


def test_the_shipped_model_is_small_and_says_what_it_is() -> None:
    folder = shipped_model()

    def size(*parts: str) -> int:
        return sum(p.stat().st_size for part in parts for p in (folder / part).rglob("*"))

    assert all(size(part) > 1_000_000 for part in ("offline", "streaming", "lm")), "something is missing"
    assert size("offline", "streaming") < 20_000_000
    assert size("lm") < 12_000_000
    card = json.loads((folder / "card.json").read_text())
    assert {"name", "data", "accuracy", "command", "licence"} <= card.keys()
    assert card["data"] and all({"name", "licence", "hours"} <= source.keys() for source in card["data"])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 100), st.lists(st.integers(0, 4_000), max_size=20))
def test_live_audio_gives_the_text_of_the_file(pick: int, sizes: list[int]) -> None:
    recognizer = Recognizer.load(decoding="greedy")
    spoken = samples_of_five_words()
    _, samples = spoken[pick % len(spoken)]
    expected = recognizer.transcribe(samples, network="streaming")
    session = recognizer.stream()
    partials = {session.feed(block).partial for block in in_chunks(samples, [*sizes, *[1_600] * 40])}
    assert session.finish() == expected
    assert len(partials) > 3, "the partial text did not grow"
    assert len(expected.text.split()) >= 2


def test_both_networks_read_most_of_the_samples(recognizer: Recognizer) -> None:
    for network in ("offline", "streaming"):
        total = ErrorCounts()
        for text, samples in samples_of_five_words():
            total += count_errors(text, recognizer.transcribe(samples, network=network).text)
        assert total.cer < 0.5, network


def test_silence_and_nothing_have_no_text(recognizer: Recognizer) -> None:
    for network in ("offline", "streaming"):
        assert recognizer.transcribe(np.zeros(0, np.float32), network=network).text == ""
        assert recognizer.transcribe(np.zeros(3 * SAMPLE_RATE, np.float32), network=network).text == ""


def joined_with_room_noise(parts: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    pieces = []
    for part in parts:
        gap = rng.standard_normal(int(rng.uniform(0.3, 1.5) * SAMPLE_RATE)).astype(np.float32)
        pieces += [part, 0.001 * gap]
    return np.concatenate(pieces)


@pytest.mark.parametrize("minutes", [10, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", ["offline", "streaming"])
def test_long_audio_scores_as_its_utterances_do(
    recognizer: Recognizer, shared_speech: Path, minutes: int, network: str
) -> None:
    """Utterances joined by 0.3 to 1.5 s of room noise: within one point of WER of the separate ones."""
    folder = shared_speech / "librispeech_dev_clean_17"
    texts, parts, seconds = [], [], 0.0
    for line in (folder / "dev.jsonl").read_text().splitlines():
        row = json.loads(line)
        parts.append(read_audio(folder / row["audio_filepath"]))
        texts.append(row["text"])
        seconds += len(parts[-1]) / SAMPLE_RATE
        if seconds > minutes * 60:
            break
    whole = recognizer.transcribe(joined_with_room_noise(parts, np.random.default_rng(0)), network=network)
    apart = [recognizer.transcribe(part, network=network).text for part in parts]
    joined_wer = count_errors(" ".join(texts), whole.text).wer
    separate_wer = count_errors(" ".join(texts), " ".join(apart)).wer
    assert joined_wer <= separate_wer + 0.01, f"{joined_wer:.4f} joined, {separate_wer:.4f} apart"
