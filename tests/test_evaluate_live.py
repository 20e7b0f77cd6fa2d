"""Live evaluation: utterances joined to long audio, and how stable partial text is."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import manifest
from toy_model import RATE, TOKENIZER, ToyEngine, ToyOptions

from asr.endpoint import EndpointConfig
from asr.manifest import Utterance
from asr.recognizer import Network, Recognizer, Segment, Transcript, Update
from pipelines.cli import main
from pipelines.evaluate import evaluate
from pipelines.evaluate_live import Partials, Stability, join


def rows(seconds: float, *speakers: str) -> list[Utterance]:
    return [
        Utterance(id=f"u{i}", audio=f"{i}.wav", text=f"text {i}", duration=seconds, speaker=speaker, where=f"m:{i}")
        for i, speaker in enumerate(speakers)
    ]


def test_each_speakers_utterances_are_joined_in_their_order() -> None:
    pieces = join(rows(20, *"abaabbba"), 60)
    assert [(piece.id, [part.speaker for part in piece.parts]) for piece in pieces] == [
        ("u0 to u3", ["a"] * 3), ("u7 to u7", ["a"]), ("u1 to u5", ["b"] * 3), ("u6 to u6", ["b"]),
    ]  # fmt: skip
    assert pieces[2].text == "text 1 text 4 text 5"
    pauses = [pause for piece in pieces for pause in piece.pauses]
    assert all(0.3 <= pause <= 2.5 for pause in pauses)
    assert len(set(pauses)) == 8
    assert pieces[0].duration == pytest.approx(60 + sum(pieces[0].pauses))
    assert join(rows(20, *"abaabbba"), 60) == pieces
    assert join(rows(20, *"abaabbba"), 60, seed=1) != pieces


def test_pauses_sound_like_the_room_and_the_utterances_are_as_they_were() -> None:
    rng = np.random.default_rng(3)
    audio = {f"{i}.wav": rng.normal(0, 0.002, 3 * RATE).astype(np.float32) for i in range(3)}
    for samples in audio.values():
        samples[RATE // 2 : 2 * RATE] *= 50  # the speech
    (piece,) = join(rows(3, *"aaa"), 60)
    read = piece.read(lambda part: audio[part.audio])
    assert read is not None
    assert read.dtype == np.float32
    assert len(read) / RATE == pytest.approx(piece.duration, abs=1e-3)
    at = 0
    for part, pause in zip(piece.parts, piece.pauses, strict=True):
        assert np.array_equal(read[at : at + 3 * RATE], audio[part.audio])
        end = at + 3 * RATE + round(pause * RATE)
        assert 0.0012 < np.std(read[at + 3 * RATE : end]) < 0.0028
        at = end


def test_an_unreadable_part_is_left_out() -> None:
    (piece,) = join(rows(1, *"aaa"), 60)
    read = piece.read(lambda part: None if part.id == "u1" else np.ones(RATE, np.float32))
    assert read is not None
    assert len(read) == 2 * RATE + round(piece.pauses[0] * RATE) + round(piece.pauses[2] * RATE)
    assert piece.read(lambda part: None) is None


@pytest.mark.parametrize("samples", [1, 100, 161])
def test_very_short_utterances_join(samples: int) -> None:
    (piece,) = join(rows(1, *"aa"), 60)
    read = piece.read(lambda part: np.full(samples, 0.1, np.float32))
    assert read is not None
    assert np.isfinite(read).all()


@pytest.mark.parametrize("network", ["offline", "streaming"])
def test_joined_rows_are_scored_and_their_problems_named(tmp_path: Path, network: str) -> None:
    texts = ["one two", "lost", "three", "four five six"]
    path = manifest(tmp_path / "m.jsonl", *[(text, text) for text in texts])
    (tmp_path / "m-1.wav").write_bytes(b"")
    options = ToyOptions(rules=EndpointConfig(trailing_silence=0.2))  # every pause ends a segment, and a word
    scores, problems = evaluate([path], options, network=network, endpoint=True, join_seconds=1000)
    assert (scores[0].utterances, scores[0].unreadable) == (4, 1)
    assert (scores[0].errors.words, scores[0].errors.deletions) == (7, 1)
    assert [problem.where for problem in problems] == [f"{path}:2"]


def shown(*updates: tuple[str, str]) -> Stability:
    """The stability of updates given as (final, partial), the last one's final being the end."""
    partials, segments = Partials(), []
    for final, partial in updates:
        new = (Segment(text=final, start=0, end=1, words=()),) if final else ()
        segments += new
        if partial or final != updates[-1][0]:
            partials.show(Update(partial=partial, final=new))
    text = " ".join(segment.text for segment in segments)
    return partials.finish(Transcript(text=text, words=(), segments=tuple(segments), duration=1))


def test_words_that_grow_are_stable_and_words_that_are_replaced_are_not() -> None:
    assert shown(("", "hel"), ("", "hello wo"), ("hello world", "he"), ("here", "")) == Stability(kept=3)
    assert shown(("", "a cat"), ("", "a hat sat"), ("a hat sat", "")) == Stability(kept=3, changed=1)
    assert shown(("", "one two three"), ("one", "")) == Stability(kept=1, changed=2)
    assert shown(("", "b c"), ("", "a b c"), ("a b c", "")) == Stability(kept=3)  # nothing was taken back
    assert (Stability(kept=3, changed=1) + Stability(kept=4)).share == 1 / 8


class Other(ToyEngine):
    """Writes b where the streaming network writes a."""

    def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        swap = np.arange(len(TOKENIZER))
        a, b = TOKENIZER.encode("ab")
        swap[[a, b]] = b, a
        return [values[:, swap] for values in super().log_probs(batch)]


def test_two_passes_are_scored_and_what_they_change_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = {"streaming": Network(TOKENIZER, ToyEngine), "offline": Network(TOKENIZER, Other)}
    monkeypatch.setattr(Recognizer, "load", lambda *_, **chosen: Recognizer(networks, endpoint=chosen["endpoint"]))
    path = manifest(tmp_path / "m.jsonl", ("cat sat on", "cbt sbt on"), ("it", "it"))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(path), "--two-pass", "--join", "60", "--json", str(tmp_path / "out.json")])
    assert not ended.value.code
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (result["network"], result["words"], result["wer"]) == ("two-pass", 4, 0.0)
    assert result["partial_words_changed"] == pytest.approx(2 / 6)


def test_rules_reach_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[EndpointConfig | None] = []

    def load(*_: object, **chosen: EndpointConfig | None) -> Recognizer:
        given.append(chosen["endpoint"])
        return Recognizer({"offline": Network(TOKENIZER, ToyEngine)}, endpoint=chosen["endpoint"])

    monkeypatch.setattr(Recognizer, "load", load)
    path = manifest(tmp_path / "m.jsonl", ("it", "it"))
    for flags in ([], ["--endpoint", "--rule", "max_segment=12", "--rule", "vad=energy"]):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(path), *flags])
        assert not ended.value.code
    assert given == [None, EndpointConfig(max_segment=12.0)]
