"""`asr evaluate`: errors counted over manifests."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from toy_model import RATE, ToyOptions, spell, toy_recognizer, write

from asr.metrics import ErrorCounts
from asr.recognizer import Recognizer
from asr.runtime.folder import shipped_model
from pipelines.cli import main
from pipelines.evaluate import evaluate, report


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **chosen: object) -> Recognizer:
        return toy_recognizer(**{"endpoint": chosen["endpoint"]} if "endpoint" in chosen else {})  # type: ignore[arg-type]

    monkeypatch.setattr(Recognizer, "load", load)


def manifest(path: Path, *rows: tuple[str, str], **more: object) -> Path:
    """A manifest whose rows are (said, reference), with their audio beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number, (said, reference) in enumerate(rows):
            audio = write(path.parent / f"{path.stem}-{number}.wav", said)
            row = {
                "audio_filepath": audio.name,
                "text": reference,
                "duration": soundfile.info(audio).duration,
            }
            file.write(json.dumps(row | more) + "\n")
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("network", ["offline", "streaming"])
def test_the_json_of_two_manifests(tmp_path: Path, network: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = manifest(tmp_path / "one.jsonl", ("a long first row", "a long first row"), ("cat sat", "Hat sat on!"))
    two = manifest(tmp_path / "two.jsonl", ("well done", "well"))
    flags = ["--streaming"] if network == "streaming" else []
    assert run(one, two, "--decoding", "greedy", "--json", tmp_path / "out.json", *flags) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert told.keys() == {"results", "total"}
    first, second = told["results"]
    rtf = first.pop("rtf")
    assert 0 < rtf < 10
    assert first.pop("partial_words_changed", None) == (0.0 if network == "streaming" else None)
    assert first == {
        "manifest": str(one), "network": network, "decoding": "greedy", "utterances": 2, "unreadable": 0,
        "words": 7, "substitutions": 1, "deletions": 1, "insertions": 0, "wer": 2 / 7, "cer": 4 / 26,
    }  # fmt: skip
    assert (second["insertions"], second["wer"]) == (1, 1.0)
    total = told["total"]
    assert (total["utterances"], total["words"], total["wer"]) == (3, 8, 3 / 8)
    shown = capsys.readouterr().out
    assert "28.57" in shown
    assert "37.50" in shown


def test_unreadable_rows_are_named_and_their_words_are_deletions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = manifest(tmp_path / "m.jsonl", ("good", "good"), ("lost", "three lost words"), ("last", "last"))
    (tmp_path / "m-1.wav").write_bytes(b"")
    with path.open("a") as file:
        file.write("this is not JSON\n")
    assert run(path, "--json", tmp_path / "out.json") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert any(line.startswith(f"error: {path}:4: ") for line in errors)
    assert any(line.startswith(f"error: {path}:2: ") and "m-1.wav" in line for line in errors)
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (result["utterances"], result["unreadable"]) == (3, 2)
    assert (result["words"], result["deletions"], result["wer"]) == (5, 3, 3 / 5)


@pytest.mark.parametrize("join", [None, 60.0])
def test_the_words_of_bad_rows_are_deletions_where_they_are_known(tmp_path: Path, join: float | None) -> None:
    path = manifest(tmp_path / "m.jsonl", *[("go left stop", "go left stop")] * 2)
    (tmp_path / "m-1.wav").unlink()
    with path.open("a") as file:
        file.write('{"audio_filepath": "m-0.wav", "duration": 0, "text": "Go left, stop!"}\n')
        file.write('{"audio_filepath": "m-0.wav", "text": 5}\n')
    seen: list[tuple[str, str]] = []
    scores, problems = evaluate(
        [path], ToyOptions(), join_seconds=join, on_utterance=lambda o: seen.append((o.reference, o.hypothesis))
    )
    assert (scores[0].utterances, scores[0].unreadable) == (3, 3)
    assert (scores[0].errors.words, scores[0].errors.deletions, scores[0].errors.word_errors) == (9, 6, 6)
    assert {problem.where for problem in problems} == {f"{path}:{line}" for line in (2, 3, 4)}
    assert seen[-1] == ("Go left, stop!", "")


@pytest.mark.parametrize("join", [None, 60.0])
@pytest.mark.parametrize("network", ["offline", "streaming"])
def test_whatever_is_wrong_with_a_recording_its_words_are_deletions(
    tmp_path: Path, network: str, join: float | None
) -> None:
    path = manifest(tmp_path / "m.jsonl", *[("lost words", "lost words")] * 5, ("good", "good"))
    (tmp_path / "m-0.wav").unlink()
    (tmp_path / "m-1.wav").write_bytes(b"RIFF")
    (tmp_path / "m-2.wav").write_text("this is no audio")
    soundfile.write(tmp_path / "m-3.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "m-4.wav", np.zeros(0), RATE)
    seen: list[str] = []
    scores, problems = evaluate(
        [path], ToyOptions(), network=network, join_seconds=join, on_utterance=lambda o: seen.append(o.reference)
    )
    assert scores[0].errors.words == 11
    assert scores[0].errors.deletions == 10
    assert scores[0].utterances == 6
    assert [p.where for p in problems] == [f"{path}:{line}" for line in (1, 2, 3, 4, 5)]
    assert all(f"m-{i}.wav: " in problem.reason for i, problem in enumerate(problems))
    assert scores[0].unreadable == 5
    assert " ".join(seen).split() == ["lost", "words"] * 5 + ["good"]


def test_a_bad_manifest_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = manifest(tmp_path / "good.jsonl", ("yes", "yes"))
    assert run(tmp_path / "none.jsonl", good) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {tmp_path / 'none.jsonl'}: ")
    assert str(good) in out


def test_a_list_without_texts_cannot_be_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.wav", "x")
    (tmp_path / "noise.jsonl").write_text('{"audio_filepath": "a.wav", "label": "rain"}\n')
    assert run(tmp_path / "noise.jsonl") == 1
    assert "no row has a text" in capsys.readouterr().err


def test_hypotheses_belong_to_their_rows_whatever_their_length(tmp_path: Path) -> None:
    texts = [("abc " * (1 + 7 * i % 12)).strip() + " " + "xyz"[: i % 3 + 1] for i in range(40)]
    path = manifest(tmp_path / "m.jsonl", *[(text, text) for text in texts])
    seen: list[tuple[str | None, str]] = []
    scores, problems = evaluate([path], ToyOptions(), on_utterance=lambda o: seen.append((o.row.text, o.hypothesis)))
    assert seen == [(text, text) for text in texts]
    assert problems == []
    assert scores[0].errors.word_errors == 0
    seconds = sum(soundfile.info(audio).duration for audio in tmp_path.glob("*.wav"))
    assert scores[0].audio_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("network", ["offline", "streaming"])
def test_rows_are_scored_uncut_unless_asked(tmp_path: Path, network: str) -> None:
    # two words without a space between them, but a long pause: one word uncut, two when cut
    soundfile.write(tmp_path / "a.wav", np.concatenate([spell("one"), np.zeros(2 * RATE), spell("two")]), RATE)
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "text": "one two"}\n')
    uncut, _ = evaluate([tmp_path / "m.jsonl"], ToyOptions(), network=network)
    cut, _ = evaluate([tmp_path / "m.jsonl"], ToyOptions(), network=network, endpoint=True)
    assert uncut[0].errors.word_errors == 2
    assert cut[0].errors.word_errors == 0


def test_segments_of_one_recording(tmp_path: Path) -> None:
    parts = [spell(text) for text in ("one", "two", "three")]
    soundfile.write(tmp_path / "a.wav", np.concatenate(parts), RATE)
    offset = 0.0
    with (tmp_path / "m.jsonl").open("w") as file:
        for text, part in zip(("one", "two", "three"), parts, strict=True):
            row = {"audio_filepath": "a.wav", "text": text, "offset": offset, "duration": len(part) / RATE}
            file.write(json.dumps(row) + "\n")
            offset += len(part) / RATE
    scores, _ = evaluate([tmp_path / "m.jsonl"], ToyOptions())
    assert scores[0].errors == ErrorCounts(words=3, characters=11)


def test_errors_without_a_word_are_null_in_json(tmp_path: Path) -> None:
    scores, _ = evaluate([manifest(tmp_path / "m.jsonl", ("noise", ""), ("", ""))], ToyOptions())
    told = report(scores)
    json.dumps(told, allow_nan=False)
    assert told["total"]["insertions"] == 1
    assert told["total"]["wer"] is None


def test_show_prints_both_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(manifest(tmp_path / "m.jsonl", ("cat", "Hat")), "--show") == 0
    out = capsys.readouterr().out
    assert "reference:  Hat\n  hypothesis: cat\n" in out


def test_speech_that_is_on_disk_is_scored_in_every_row() -> None:
    dev = Path(__file__).parents[2] / "shared" / "data" / "free_spoken_digits" / "test.jsonl"
    if not dev.exists():
        pytest.skip("needs ../shared/data/free_spoken_digits")
    scores, problems = evaluate([dev], ToyOptions())
    assert (scores[0].utterances, scores[0].unreadable, problems) == (300, 0, [])
    assert scores[0].errors.words == 300


def test_what_cannot_be_fitted_loses_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, figures = tmp_path / "report.html", tmp_path / "figures.json"
    path = manifest(tmp_path / "m.jsonl", ("one", "one"), speaker="a")
    model = shutil.copytree(shipped_model(), tmp_path / "model")
    assert run(path, "--calibrate", "--model", model, "--report", page, "--json", figures) == 2
    assert "error: --calibrate: " in capsys.readouterr().err
    assert page.exists()
    assert json.loads(figures.read_text())["total"]["utterances"] == 1
