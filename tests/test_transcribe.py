"""`asr transcribe`: files and folders become text."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from toy_model import RATE, ToyOptions, spell, toy_recognizer, write

from asr.errors import AsrError, ModelError
from asr.recognizer import Recognizer
from pipelines.cli import main
from pipelines.transcribe import RecognizerOptions, find_audio, transcribe


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recognizer, "load", lambda *_, **__: toy_recognizer())


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_one_recording_is_its_text_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write(tmp_path / "ein Vortrag ü.wav", "hello world")) == 0
    out, err = capsys.readouterr()
    assert out == "hello world\n"
    assert err == ""


def test_a_recording_from_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = write(tmp_path / "a.wav", "hello world")
    for given, status, expected in ((recording.read_bytes(), 0, "hello world\n"), (b"", 1, "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert run("-") == status
        out, err = capsys.readouterr()
        assert out == expected
        assert err == ("error: standard input: empty, 0 bytes\n" if status else "")
    assert run("-", recording) == 2
    assert run("-", "--output-dir", tmp_path / "out") == 2
    monkeypatch.setattr(sys, "stdin", None)
    assert run("-") == 1
    assert capsys.readouterr().err.endswith("error: -: there is no standard input\n")


def test_a_pause_ends_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = np.concatenate([spell("one two"), np.zeros(2 * RATE), spell("three")])
    soundfile.write(tmp_path / "a.wav", audio, RATE)
    assert run(tmp_path / "a.wav", "--streaming") == 0
    assert capsys.readouterr().out == "one two\nthree\n"


def test_silence_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    assert run(tmp_path / "a.wav") == 0
    assert capsys.readouterr() == ("", "")


def test_several_come_in_the_order_given_and_a_bad_one_stops_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = write(tmp_path / "z.wav", "last")
    first = write(tmp_path / "a.wav", "first")
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"not audio at all")
    assert run(last, bad, first) == 1
    out, err = capsys.readouterr()
    assert out == f"{last}\tlast\n{first}\tfirst\n"
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {bad}: ")
    assert "2 transcribed, 1 failed" in err
    assert err.splitlines()[-1].startswith(f"  {bad}: ")  # the summary names it again


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.wav") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {tmp_path / 'none.wav'}: ")
    assert err.count("\n") == 1


def test_folders_are_searched_and_their_shape_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "b.wav", "bee")
    write(tmp_path / "in" / "sub" / "b.WAV", "sub bee")
    (tmp_path / "in" / "notes.txt").write_text("no recording")
    assert run(tmp_path / "in", "-o", tmp_path / "out", "-f", "json") == 0
    assert capsys.readouterr().out == ""
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert written == {"b.json", "sub/b.json"}
    assert json.loads((tmp_path / "out" / "sub" / "b.json").read_text())["text"] == "sub bee"


def test_a_folder_without_recordings_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no recordings in this folder")


def test_what_is_finished_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = write(tmp_path / "a.wav", "text")
    out = tmp_path / "out"
    assert run(audio, "-o", out) == 0
    (out / "a.txt").write_text("corrected by hand\n")
    assert run(audio, "-o", out) == 0
    assert (out / "a.txt").read_text() == "corrected by hand\n"
    assert "1 there already (--overwrite" in capsys.readouterr().err
    os.utime(audio, ns=(0, (out / "a.txt").stat().st_mtime_ns + 1))  # a newer recording
    assert run(audio, "-o", out) == 0
    assert (out / "a.txt").read_text() == "text\n"
    (out / "a.txt").write_text("x")
    assert run(audio, "-o", out, "--overwrite") == 0
    assert (out / "a.txt").read_text() == "text\n"


def test_a_reference_beside_its_recording_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = write(tmp_path / "a.wav", "text")
    (tmp_path / "a.txt").write_text("the true words\n")
    os.utime(audio, ns=(0, (tmp_path / "a.txt").stat().st_mtime_ns + 1))
    assert run(tmp_path, "-o", tmp_path) == 1
    assert (tmp_path / "a.txt").read_text() == "the true words\n"
    assert "a.txt: older than" in capsys.readouterr().err
    assert run(tmp_path, "-o", tmp_path, "--overwrite") == 0
    assert (tmp_path / "a.txt").read_text() == "text\n"


def test_links_are_followed_once_and_broken_ones_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a.wav", "one")
    write(tmp_path / "elsewhere" / "b.wav", "two")
    (tmp_path / "in" / "day two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "broken.wav").symlink_to(tmp_path / "gone.wav")
    assert run(tmp_path / "in") == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/in/a.wav\tone\n{tmp_path}/in/day two/b.wav\ttwo\n"
    assert f"error: {tmp_path}/in/broken.wav: no such file" in err


def test_a_name_may_be_as_long_as_names_may_be(tmp_path: Path) -> None:
    name = "録音" * 41  # 246 bytes
    write(tmp_path / f"{name}.wav", "text")
    assert run(tmp_path, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / f"{name}.txt").read_text() == "text\n"


def test_no_recording_overwrites_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wav, flac = write(tmp_path / "x" / "a.wav", "wave"), write(tmp_path / "x" / "a.flac", "flac")
    third = write(tmp_path / "x" / "third.wav", "third").rename(tmp_path / "x" / "a.wav.mp3")
    assert run(wav, flac, third, "-o", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.wav.txt", "a.flac.txt", "a.wav.mp3.txt"}
    other = write(tmp_path / "y" / "a.wav", "other")
    capsys.readouterr()
    assert run(wav, other, "-o", tmp_path / "out2") == 1
    err = capsys.readouterr().err
    assert str(wav) in err
    assert str(other) in err
    assert not (tmp_path / "out2").exists()


def test_recordings_of_one_name_are_told_apart_in_ctm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = [write(tmp_path / folder / "a.wav", "text") for folder in "xy"]
    assert run(*audio, "-f", "ctm") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(set(names)) == 2


def test_subtitles_of_several_need_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.wav", "text")
    assert run(tmp_path, "-f", "srt") == 2
    assert "--output-dir" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file, not a folder")
    assert run(write(tmp_path / "a.wav", "text"), "-o", tmp_path / "out") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_file_names_that_are_not_unicode(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    name = os.fsdecode(b"caf\xe9.wav")
    for folder in ("x", "y"):
        write(tmp_path / folder / "a.wav", "text").rename(tmp_path / folder / name)
    assert run(tmp_path / "x", tmp_path / "y") == 0
    assert b"caf\xe9.wav\ttext\n" in capfdbinary.readouterr().out


def test_a_missing_network_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recognizer, "load", lambda *_, **__: toy_recognizer(["offline"]))
    audio = write(tmp_path / "a.wav", "text")
    assert run(audio, audio, "--streaming") == 1
    assert capsys.readouterr().err == "error: the toy has no streaming network (it has: offline)\n"
    assert run(audio) == 0


def test_without_an_offline_network_the_streaming_one_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recognizer, "load", lambda *_, **__: toy_recognizer(["streaming"]))
    monkeypatch.setattr("asr.runtime.folder.find_networks", lambda _: {"streaming": tmp_path})
    assert run(write(tmp_path / "a.wav", "text")) == 0
    assert capsys.readouterr().out == "text\n"
    assert toy_recognizer(["streaming"]).transcribe(tmp_path / "a.wav").text == "text"


def test_choices_reach_the_recognizer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}

    def load(path: object, **chosen: object) -> Recognizer:
        seen.update(chosen, path=path)
        return toy_recognizer()

    monkeypatch.setattr(Recognizer, "load", load)
    RecognizerOptions(model=Path("m"), engine="torch", precision="fp32", threads=2).load(endpoint=False)
    expected = {"engine": "torch", "precision": "fp32", "threads": 2, "decoding": "greedy", "endpoint": None}
    expected |= {"calibrated": True}
    assert seen == expected | {"path": Path("m")}


def test_found_files_are_sorted_within_a_folder(tmp_path: Path) -> None:
    for name in ("c.wav", "a.ogg", "b/x.flac"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, problems = find_audio([tmp_path])
    assert [short.as_posix() for _, short in found] == ["a.ogg", "b/x.flac", "c.wav"]
    assert problems == []


def test_workers_without_ray_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AsrError, match=r"\[train\]"):
        list(transcribe([write(tmp_path / "a.wav", "text")], ToyOptions(), workers=2))


def test_a_broken_model_is_told_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Recognizer:
        raise ModelError("m: tokens.txt is missing")

    monkeypatch.setattr(Recognizer, "load", broken)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModelError, match=r"tokens\.txt"):
        list(transcribe([write(tmp_path / "a.wav", "text")], RecognizerOptions(), workers=2))
