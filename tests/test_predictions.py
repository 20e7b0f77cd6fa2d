"""`asr transcribe` on manifests: rows become predictions, in order, once, whatever happens on the way."""

import gzip
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from toy_model import RATE, ToyOptions, spell, toy_recognizer, write

from asr.errors import AsrError
from asr.recognizer import Recognizer
from pipelines.cli import main
from pipelines.predictions import is_manifest
from pipelines.transcribe import transcribe

WORDS = ("one", "two", "three", "four", "five")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recognizer, "load", lambda *_, **__: toy_recognizer())


def manifest_of(folder: Path, count: int, name: str = "test.jsonl") -> Path:
    """A manifest of so many rows that repeat a few recordings; row i says WORDS[i % 5]."""
    for word in WORDS:
        write(folder / "audio" / f"{word}.wav", word)
    rows = [
        {
            "audio_filepath": f"audio/{WORDS[i % 5]}.wav",
            "duration": len(spell(WORDS[i % 5])) / RATE,
            "text": f"spoken {i}",
            "number": i,
        }
        for i in range(count)
    ]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def predictions(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_rows_become_predictions_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = manifest_of(tmp_path, 150)
    assert run(manifest, "-o", tmp_path / "out") == 0
    made = predictions(tmp_path / "out" / "test.pred.jsonl")
    assert [row["pred_text"] for row in made] == [WORDS[i % 5] for i in range(150)]
    assert [row["number"] for row in made] == list(range(150))  # what the user put there is still there
    assert made[7]["audio_filepath"] == str(tmp_path / "audio" / "three.wav")
    assert made[7]["text"] == "spoken 7"
    out, err = capsys.readouterr()
    assert out == ""
    assert "150 transcribed, 0 failed" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.pred.jsonl"]


def test_without_a_folder_predictions_go_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = manifest_of(tmp_path, 3)
    assert run(write(tmp_path / "a.wav", "first"), manifest) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'a.wav'}\tfirst"
    assert [json.loads(row)["pred_text"] for row in rows] == ["one", "two", "three"]
    (tmp_path / "audio" / "two.wav").write_bytes(b"not audio at all")
    assert run(manifest) == 1
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [("error" in row, row["pred_text"]) for row in rows] == [(False, "one"), (True, ""), (False, "three")]


def test_a_bad_row_is_one_line_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = manifest_of(tmp_path, 5)
    rows = predictions(manifest)
    rows[1]["audio_filepath"] = "audio/none.wav"
    (tmp_path / "audio" / "three.wav").write_bytes(b"not audio at all")
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    assert run(manifest, "-o", tmp_path / "out") == 1
    made = predictions(tmp_path / "out" / "test.pred.jsonl")
    assert [row["pred_text"] for row in made] == ["one", "", "", "four", "five"]
    assert [("error" in row) for row in made] == [False, True, True, False, False]
    assert made[1]["error"] == "no such file"
    listed = predictions(tmp_path / "out" / "skipped.jsonl")
    assert [problem["where"] for problem in listed] == [f"{manifest}:{line}" for line in (6, 2, 3)]
    assert "no such file" in listed[1]["reason"]
    capsys.readouterr()
    assert run(manifest, "-o", tmp_path / "out") == 1  # tried again, and told
    assert predictions(tmp_path / "out" / "skipped.jsonl") == listed
    assert "0 transcribed, 3 there already" in capsys.readouterr().err
    write(tmp_path / "audio" / "none.wav", "here")
    assert run(manifest, "-o", tmp_path / "out", "--overwrite") == 1
    assert [row["pred_text"] for row in predictions(tmp_path / "out" / "test.pred.jsonl")][1] == "here"


def test_what_failed_of_other_inputs_stays_listed(tmp_path: Path) -> None:
    out, listed = tmp_path / "out", tmp_path / "out" / "skipped.jsonl"
    first, second = manifest_of(tmp_path, 3, "a.jsonl"), manifest_of(tmp_path, 3, "b.jsonl")
    for manifest in (first, second):
        manifest.write_text(manifest.read_text() + "no JSON\n")
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"not audio at all")
    for given, wanted in (
        (first, {f"{first}:4"}),
        (second, {f"{first}:4", f"{second}:4"}),
        (bad, {f"{first}:4", f"{second}:4", str(bad)}),
    ):
        assert run(given, "-o", out) == 1
        assert {row["where"] for row in predictions(listed)} == wanted
    for manifest in (first, second):
        manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    write(bad, "good")
    assert run(first, "-o", out) == 0
    assert {row["where"] for row in predictions(listed)} == {f"{second}:4", str(bad)}
    assert run(second, bad, "-o", out) == 0
    assert not listed.exists()


def test_parts_of_a_recording_are_read_alone(tmp_path: Path) -> None:
    spoken = [spell(word) for word in WORDS]
    soundfile.write(tmp_path / "all.wav", np.concatenate(spoken), RATE)
    starts = np.cumsum([0, *map(len, spoken)]) / RATE
    rows = [
        {"audio_filepath": "all.wav", "offset": start, "duration": end - start}
        for start, end in itertools.pairwise(starts)
    ]
    with gzip.open(tmp_path / "parts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    results = list(transcribe([tmp_path / "parts.jsonl.gz"], ToyOptions()))
    assert [json.loads(result.text)["pred_text"] for result in results] == list(WORDS)
    assert sum(result.seconds for result in results) == pytest.approx(starts[-1])


@pytest.mark.parametrize("told", [True, False])
def test_a_long_row_is_cut_at_silences_and_loses_no_word(tmp_path: Path, told: bool) -> None:
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnop"]
    pieces = [piece for word in words for piece in (spell(word), np.zeros(RATE, np.float32))]
    audio = np.concatenate(pieces)
    assert len(audio) > 60 * RATE
    soundfile.write(tmp_path / "long.wav", audio, RATE)
    row = {"audio_filepath": "long.wav"} | ({"duration": len(audio) / RATE} if told else {})
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    (result,) = transcribe([tmp_path / "long.jsonl"], ToyOptions())
    assert json.loads(result.text)["pred_text"].split() == words
    assert result.seconds == pytest.approx(len(audio) / RATE, abs=0.1)


def test_a_long_row_between_others_takes_none_of_their_texts(tmp_path: Path) -> None:
    said = ["one", "two three " * 60, "four", "five " * 100, "one"]
    for i, text in enumerate(said):
        write(tmp_path / f"{i}.wav", text.strip())
    rows = [{"audio_filepath": f"{i}.wav"} for i in range(len(said))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = list(transcribe([tmp_path / "rows.jsonl"], ToyOptions()))
    texts = [json.loads(result.text)["pred_text"] for result in results]
    assert [text.replace(" ", "") for text in texts] == [text.replace(" ", "") for text in said]


def test_a_job_that_stopped_before_it_named_its_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(tmp_path, 3)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipelines.predictions.os.replace", killed)
        list(transcribe([manifest], ToyOptions(), output_dir=tmp_path / "out"))
    results = list(transcribe([manifest], ToyOptions(), output_dir=tmp_path / "out"))
    assert [result.kept is not None for result in results] == [True] * 3
    assert [row["pred_text"] for row in predictions(tmp_path / "out" / "test.pred.jsonl")] == list(WORDS[:3])


def test_rows_that_could_not_be_recognized_are_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, target = manifest_of(tmp_path, 150), tmp_path / "out" / "test.pred.jsonl"
    (tmp_path / "audio" / "two.wav").rename(tmp_path / "away")
    assert run(manifest, "-o", tmp_path / "out") == 1
    rows = predictions(target)
    assert sum("error" in row for row in rows) == 30
    rows[0]["pred_text"] = "corrected by hand"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "away").rename(tmp_path / "audio" / "two.wav")
    capsys.readouterr()
    assert run(manifest, "-o", tmp_path / "out") == 0
    assert "30 transcribed, 120 there already" in capsys.readouterr().err
    made = predictions(target)
    assert [row["pred_text"] for row in made] == ["corrected by hand", *(WORDS[i % 5] for i in range(1, 150))]
    assert not any("error" in row for row in made)
    assert [row["number"] for row in made] == list(range(150))


def test_two_at_once_do_not_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = manifest_of(tmp_path, 150)
    first = transcribe([manifest], ToyOptions(), output_dir=tmp_path / "out")
    next(first)
    assert run(manifest, "-o", tmp_path / "out") == 1
    assert f"another `asr transcribe` (process {os.getpid()}) is writing it" in capsys.readouterr().err
    assert len(list(first)) == 149
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.pred.jsonl"]
    assert len(predictions(tmp_path / "out" / "test.pred.jsonl")) == 150


def test_predictions_of_other_rows_are_not_taken_for_these(tmp_path: Path) -> None:
    first, second = manifest_of(tmp_path / "a", 3), manifest_of(tmp_path / "b", 3)
    list(transcribe([first], ToyOptions(), output_dir=tmp_path / "out"))
    with pytest.raises(AsrError, match=r"other rows than those of .*b/test\.jsonl"):
        list(transcribe([second], ToyOptions(), output_dir=tmp_path / "out"))
    list(transcribe([second], ToyOptions(), output_dir=tmp_path / "out", overwrite=True))
    told = predictions(tmp_path / "out" / "test.pred.jsonl")
    assert [row["audio_filepath"] for row in told] == [str(tmp_path / f"b/audio/{word}.wav") for word in WORDS[:3]]
    for name in ("dev.clean.jsonl", "dev.other.jsonl"):
        list(transcribe([manifest_of(tmp_path / "a", 1, name)], ToyOptions(), output_dir=tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").glob("dev*")} == {"dev.clean.pred.jsonl", "dev.other.pred.jsonl"}


@pytest.mark.parametrize("after", [0, 1, 64, 100, 199])
def test_a_job_that_stopped_goes_on_behind_what_it_finished(tmp_path: Path, after: int) -> None:
    manifest = manifest_of(tmp_path, 200)
    list(transcribe([manifest], ToyOptions(), output_dir=tmp_path / "undisturbed"))
    out = tmp_path / "stopped"
    results = transcribe([manifest], ToyOptions(), output_dir=out)
    list(itertools.islice(results, after))
    results.close()  # type: ignore[attr-defined]
    assert not (out / "test.pred.jsonl").exists()
    for part in out.glob(".*.part-*"):  # it was killed while it wrote
        part.write_bytes(part.read_bytes()[:-9])
    resumed = list(transcribe([manifest], ToyOptions(), output_dir=out))
    assert len(resumed) == 200
    kept = [result.kept is not None for result in resumed]
    assert kept == sorted(kept, reverse=True)
    assert sum(kept) <= after
    assert sum(kept) > 0 or after <= 64
    names = [path.name for path in out.iterdir()]
    assert names == ["test.pred.jsonl"]
    assert (out / names[0]).read_bytes() == (tmp_path / "undisturbed" / names[0]).read_bytes()


def test_what_other_settings_left_is_not_gone_on_with(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 100)
    results = transcribe([manifest], ToyOptions(), output_dir=tmp_path)
    next(results)
    results.close()  # type: ignore[attr-defined]
    other = list(transcribe([manifest], ToyOptions(threads=2), output_dir=tmp_path))
    assert [result.kept for result in other] == [None] * 100
    assert not list(tmp_path.glob(".*.part-*"))


def test_a_changed_manifest_is_transcribed_again(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 5)

    def kept() -> list[bool]:
        results = transcribe([manifest], ToyOptions(), output_dir=tmp_path / "out")
        return [result.kept is not None for result in results]

    assert kept() == [False] * 5
    assert kept() == [True] * 5
    manifest_of(tmp_path, 6)
    assert kept() == [False] * 6
    assert len(predictions(tmp_path / "out" / "test.pred.jsonl")) == 6


def test_two_manifests_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    both = [manifest_of(tmp_path / folder, 2) for folder in "ab"]
    with pytest.raises(AsrError, match=r"two output folders"):
        list(transcribe(both, ToyOptions(), output_dir=tmp_path / "out"))
    texts = [json.loads(result.text)["pred_text"] for result in transcribe(both, ToyOptions())]
    assert texts == ["one", "two", "one", "two"]


def test_kaldi_and_csv_rows_are_predicted_with_what_is_known(tmp_path: Path) -> None:
    manifest_of(tmp_path, 1)
    (tmp_path / "wav.scp").write_text("u1 audio/two.wav\n")
    (tmp_path / "list.csv").write_text("path,speaker\naudio/three.wav,ann\n")
    results = transcribe([tmp_path / "wav.scp", tmp_path / "list.csv"], ToyOptions())
    assert [json.loads(result.text) for result in results] == [
        {"audio_filepath": str(tmp_path / "audio" / "two.wav"), "pred_text": "two"},
        {"audio_filepath": str(tmp_path / "audio" / "three.wav"), "speaker": "ann", "pred_text": "three"},
    ]


def test_names_tell_manifests_from_recordings() -> None:
    assert all(map(is_manifest, map(Path, ("a.jsonl", "b.jsonl.gz", "c.CSV", "d.tsv", "wav.scp"))))
    assert not any(map(is_manifest, map(Path, ("a.wav", "b.json.mp3", "folder", "c.scp"))))


def test_an_interrupted_overwrite_leaves_the_complete_file(tmp_path: Path) -> None:
    manifest, out = manifest_of(tmp_path, 150), tmp_path / "out"
    assert run(manifest, "-o", out) == 0
    complete = (out / "test.pred.jsonl").read_bytes()
    begun = transcribe([manifest], ToyOptions(), output_dir=out, overwrite=True)
    next(iter(begun))
    del begun  # as an interruption ends it
    assert list(out.glob(".*.part-*"))
    assert run(manifest, "-o", out) == 0
    assert (out / "test.pred.jsonl").read_bytes() == complete and not list(out.glob(".*.part-*"))


def test_the_error_of_an_earlier_prediction_does_not_stay(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 2)
    rows = [json.loads(line) | {"error": "no such file"} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(manifest, "-o", tmp_path / "out") == 0
    made = predictions(tmp_path / "out" / "test.pred.jsonl")
    assert [(row["pred_text"], "error" in row) for row in made] == [("one", False), ("two", False)]
