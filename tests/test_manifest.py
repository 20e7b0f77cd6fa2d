"""asr.manifest: each format gives the same rows; a bad row is named and the others go on."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import unprivileged

from asr.errors import ManifestError
from asr.manifest import Utterance, names_in, read_manifest, read_with_lost

DATA = Path(__file__).parents[2] / "shared" / "data"


def lines(path: Path, *rows: object) -> Path:
    """Write `rows`: strings as they are, anything else as JSON."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def good(path: Path) -> list[Utterance]:
    utterances, problems = read_manifest(path)
    assert problems == []
    return utterances


def refusal(path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# NeMo's JSON Lines.


def test_nemo(tmp_path):
    path = lines(
        tmp_path / "train.jsonl",
        {"audio_filepath": "audio/a b.opus", "duration": 1.5, "text": "Ünï cödé", "speaker": "s1"},
        "",
        {"audio_filepath": "/far/c.wav", "text": "", "offset": 2, "duration": None},
        {"audio_filepath": "./audio/../d.wav", "duration": 3, "label": "rain"},
        {"audio_filepath": "https://example.org/e.flac", "text": "e", "speaker": 7},
    )
    near, far, url = str(tmp_path / "audio/a b.opus"), "/far/c.wav", "https://example.org/e.flac"
    at = [f"{path}:{number}" for number in (1, 3, 4, 5)]
    assert good(path) == [
        Utterance(id="audio/a b", audio=near, text="Ünï cödé", duration=1.5, speaker="s1", where=at[0]),
        Utterance(id="/far/c", audio=far, text="", offset=2.0, where=at[1]),
        Utterance(id="d", audio=str(tmp_path / "d.wav"), text=None, duration=3.0, where=at[2]),
        Utterance(id="https://example.org/e", audio=url, text="e", speaker="7", where=at[3]),
    ]


def test_paths_do_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    path = lines(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "text": "a"})
    monkeypatch.chdir(tmp_path)
    assert good(Path("m.jsonl")) == good(path)


BAD_ROWS = [
    ("{nonsense", "not JSON"),
    ('["a.wav", "text"]', "not a JSON object"),
    ({"text": "a"}, "lacks the field audio_filepath"),
    ({"audio_filepath": "", "text": "a"}, "lacks the field audio_filepath"),
    ({"audio_filepath": 5, "text": "a"}, "audio_filepath is 5"),
    ({"audio_filepath": "a.wav", "text": 5}, "text is 5"),
    ({"audio_filepath": "a.wav", "speaker": []}, "speaker is []"),
    ({"audio_filepath": "a.wav", "duration": -1.0}, "duration is -1.0"),
    ({"audio_filepath": "a.wav", "duration": 0}, "duration is 0"),
    ({"audio_filepath": "a.wav", "duration": float("nan")}, "duration is nan"),
    ({"audio_filepath": "a.wav", "duration": float("inf")}, "duration is inf"),
    ({"audio_filepath": "a.wav", "duration": "long"}, "duration is 'long'"),
    ({"audio_filepath": "a.wav", "duration": True}, "duration is True"),
    ({"audio_filepath": "a.wav", "duration": 10**400}, "duration is 1000"),
    ({"audio_filepath": "a.wav", "offset": -0.5}, "offset is -0.5"),
    ('{"audio_filepath": "a.wav", "text": "\\ud800"}', "text is not valid UTF-8"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_named_and_the_others_go_on(tmp_path, row, reason):
    fine = {"audio_filepath": "fine.wav", "text": "fine"}
    path = lines(tmp_path / "m.jsonl", fine, row, fine)
    utterances, problems = read_manifest(path)
    assert [u.where for u in utterances] == [f"{path}:1", f"{path}:3"]
    assert [p.where for p in problems] == [f"{path}:2"]
    assert problems[0].reason.startswith(reason)
    assert len(problems[0].reason) < 200


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = b'{"audio_filepath": "a.wav", "text": "a"}\r\n{"audio_filepath": "b.wav", "text": "\xff"}'
    path.write_bytes(b"\xef\xbb\xbf" + rows)
    utterances, problems = read_manifest(path)
    assert [u.id for u in utterances] == ["a"]
    assert str(problems[0]) == f"{path}:2: text is not valid UTF-8"


def test_a_folder_whose_name_is_not_utf8_is_told(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    said = refusal(lines(Path(os.fsdecode(folder)) / "m.jsonl", '{"audio_filepath": "a.wav", "text": "a"}'))
    assert "not valid UTF-8" in said


def test_no_good_row(tmp_path):
    assert "m.jsonl:1: not JSON" in refusal(lines(tmp_path / "m.jsonl", "{", "{"))
    assert "no usable row" in refusal(lines(tmp_path / "empty.jsonl"))
    assert "no such manifest" in refusal(tmp_path / "nowhere.jsonl")
    assert "one JSON object a line" in refusal(lines(tmp_path / "list.json", [{"audio_filepath": "a.wav"}]))
    (tmp_path / "m.jsonl.gz").write_bytes(b"not gzip")
    assert "cannot be read" in refusal(tmp_path / "m.jsonl.gz")
    whole = lines(tmp_path / "n.jsonl.gz", {"audio_filepath": "a.wav"}).read_bytes()
    (tmp_path / "n.jsonl.gz").write_bytes(whole[:-10])
    assert "cannot be read" in refusal(tmp_path / "n.jsonl.gz")
    (tmp_path / "a.wav").write_bytes(b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0" + bytes(range(256)))
    assert "not a manifest" in refusal(tmp_path / "a.wav")


def test_ids(tmp_path):
    names = ["x/a.wav", "a.wav", "x/a.flac", "x/a.wav", "x/a~2.wav"]
    path = lines(tmp_path / "m.jsonl", *({"audio_filepath": name} for name in names))
    assert [u.id for u in good(path)] == ["x/a", "a", "x/a~2", "x/a~3", "x/a~2~2"]
    parts = [("a.wav", 0), ("a.wav", 1.25), ("b.wav", 3), ("a.wav", 1.25)]
    path = lines(tmp_path / "m.jsonl", *({"audio_filepath": name, "offset": at} for name, at in parts))
    assert [u.id for u in good(path)] == ["a#0.000", "a#1.250", "b", "a#1.250~2"]


NAMES = ["a.wav", "a.mp3", "a~2.wav", "a~2~2.wav", "d/a.wav", "a#0.000.wav"]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from([0, 1, 1.0004])), min_size=1))
def test_ids_are_unique_and_the_same_each_time(tmp_path, rows):
    path = lines(tmp_path / "m.jsonl", *({"audio_filepath": name, "offset": at} for name, at in rows))
    ids = [u.id for u in good(path)]
    assert len(set(ids)) == len(ids) == len(rows)
    assert ids == [u.id for u in good(path)]


# The other formats.


def test_kaldi(tmp_path):
    lines(tmp_path / "wav.scp", "r1 wav/r 1.wav", "r2 /far/r2.flac", "r3 sox r3.sph -t wav - |")
    segments = ["r1-a r1 0 1.5", "r1-b\tr1 1.5 -1", "r2-a r2 0.25 2", "r3-a r3 0 1", "r4-a r4 0 1"]
    lines(tmp_path / "segments", *segments)
    texts = ["r1-a hello  there", "r1-b", "r2-a 你好", "r3-a piped", "r4-a lost", "r5-a lost too"]
    lines(tmp_path / "text", *texts)
    lines(tmp_path / "utt2spk", "r1-a ann", "r2-a bob")
    utterances, problems = read_manifest(tmp_path)
    near = str(tmp_path / "wav/r 1.wav")
    assert [(u.id, u.audio, u.text, u.offset, u.duration, u.speaker) for u in utterances] == [
        ("wav/r 1#0.000", near, "hello  there", 0.0, 1.5, "ann"),
        ("wav/r 1#1.500", near, "", 1.5, None, None),
        ("/far/r2", "/far/r2.flac", "你好", 0.25, 1.75, "bob"),
    ]
    assert utterances[0].where == f"{tmp_path}/segments:1"
    assert [(p.where, p.reason.split(",")[0]) for p in problems] == [
        (f"{tmp_path}/segments:4", "audio is a command"),
        (f"{tmp_path}/segments:5", "recording r4 is not in wav.scp"),
        (f"{tmp_path}/text:6", "utterance r5-a has no audio"),
    ]
    assert read_manifest(tmp_path / "wav.scp") == (utterances, problems)


def test_kaldi_without_segments(tmp_path):
    lines(tmp_path / "wav.scp", "a a.wav", "b b.wav", "a c.wav")
    utterances, problems = read_manifest(tmp_path)
    assert [(u.id, u.text, u.where) for u in utterances] == [
        ("a", None, f"{tmp_path}/wav.scp:1"),
        ("b", None, f"{tmp_path}/wav.scp:2"),
    ]
    assert [str(p) for p in problems] == [f"{tmp_path}/wav.scp:3: a is there already"]
    lines(tmp_path / "text", "b bee")
    utterances, problems = read_manifest(tmp_path)
    assert [(u.id, u.text) for u in utterances] == [("a", None), ("b", "bee")]  # it may be there to be recognized


@pytest.mark.parametrize("segment", ["a r", "a r x 1", "a r 2 1", "a r -3 1", "a r 1 1", "a r nan 1"])
def test_kaldi_segments_that_cannot_be(tmp_path, segment):
    lines(tmp_path / "wav.scp", "r r.wav")
    lines(tmp_path / "segments", segment, "b r 0 1")
    utterances, problems = read_manifest(tmp_path)
    assert len(utterances) == 1
    assert [p.where for p in problems] == [f"{tmp_path}/segments:1"]


RECORDING = {
    "id": "r1",
    "sources": [{"type": "file", "channels": [0], "source": "wavs/r1.wav"}],
    "sampling_rate": 16000,
    "num_samples": 160000,
    "duration": 10.0,
    "channel_ids": [0],
}


def supervision(name: str, start: float, duration: float, text: str) -> dict:
    shared = {"recording_id": "r1", "channel": 0, "language": "en", "speaker": "ann"}
    return {"id": name, "start": start, "duration": duration, "text": text, **shared}


def cut(start: float, duration: float, *supervisions: dict, **other: object) -> dict:
    bounds = {"id": "c", "start": start, "duration": duration, "channel": 0}
    return {**bounds, "supervisions": list(supervisions), "recording": RECORDING, "type": "MonoCut", **other}


def recorded(**other: object) -> dict:
    return RECORDING | other


@pytest.mark.parametrize("name", ["cuts.jsonl", "dev_cuts.jsonl.gz"])
def test_lhotse_cuts(tmp_path, name):
    path = lines(
        tmp_path / name,
        cut(1.0, 2.0, supervision("s1", 0, 2.0, "one")),
        cut(0, 10.0, supervision("s2", 3.1, 0.2, "two"), supervision("s3", 6, 1, "three")),
        cut(8.0, 1.0),
    )
    assert [(u.id, u.text, u.offset, u.duration, u.speaker, u.where[-2:]) for u in good(path)] == [
        ("wavs/r1#1.000", "one", 1.0, 2.0, "ann", ":1"),
        ("wavs/r1#3.100", "two", 3.1, 0.2, "ann", ":2"),
        ("wavs/r1#6.000", "three", 6.0, 1.0, "ann", ":2"),
        ("wavs/r1#8.000", None, 8.0, 1.0, None, ":3"),
    ]
    assert good(tmp_path) == good(path)


STEREO = {"type": "file", "channels": [0, 1], "source": "x.wav"}
BAD_CUTS = [
    (cut(0, 1, type="MixedCut"), "a MixedCut is not read"),
    (cut(0, 1, recording=None), "lacks the field recording"),
    (cut(0, 1, recording=recorded(transforms=[{"name": "Speed"}])), "its recording has transforms"),
    (cut(0, 1, recording=recorded(sources=[])), "not a Lhotse cut"),
    (cut(0, 1, recording=recorded(sources=[{"type": "command", "source": "x"}])), "its audio is not one file"),
    (cut(0, 1, recording=recorded(sources=[STEREO])), "takes one channel of several"),
    (cut(0, 1, {"id": "s", "start": 0}), "lacks the field duration"),
    (cut(2, 1, supervision("s", -0.5, 1, "cut off")), "text s reaches out of its cut"),
    (cut(2, 1, supervision("s", 0.5, 1, "cut off")), "text s reaches out of its cut"),
    (cut(-1, 1), "start is -1"),
    (cut(0, 1, supervisions=5), "not a Lhotse cut"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_CUTS)
def test_lhotse_cuts_that_cannot_be(tmp_path, row, reason):
    path = lines(tmp_path / "cuts.jsonl", row, cut(0, 1))
    utterances, problems = read_manifest(path)
    assert len(utterances) == 1
    assert [p.where for p in problems] == [f"{path}:1"]
    assert problems[0].reason.startswith(reason)


def test_lhotse_recordings_with_supervisions(tmp_path):
    lines(tmp_path / "x_recordings_dev.jsonl.gz", RECORDING)
    lost = supervision("s3", 0, 1, "lost") | {"recording_id": "r9"}
    rows = [supervision("s1", 0.5, 1, "one"), supervision("s2", 2, 1, "two"), lost]
    path = lines(tmp_path / "x_supervisions_dev.jsonl.gz", *rows)
    utterances, problems = read_manifest(tmp_path)
    assert [(u.id, u.text, u.offset, u.duration) for u in utterances] == [
        ("wavs/r1#0.500", "one", 0.5, 1.0),
        ("wavs/r1#2.000", "two", 2.0, 1.0),
    ]
    assert [str(p) for p in problems] == [f"{path}:3: recording 'r9' is not in the list of recordings"]
    assert "supervisions" in refusal(tmp_path / "x_recordings_dev.jsonl.gz")
    (tmp_path / "x_recordings_dev.jsonl.gz").unlink()
    with pytest.raises(ManifestError, match=r"x_recordings_dev\.jsonl\.gz: no such manifest"):
        read_manifest(path)


TABLES = {
    "m.csv": 'audio,text,duration,speaker\na.wav,"hello, ""you""",1.5,ann\nb.wav,,,\n',
    "semicolons.csv": 'speaker;AUDIO ;Text;duration\nann;a.wav;"hello, ""you""";1.5\n;b.wav;;\n',
    "m.tsv": 'client_id\tpath\tsentence\tduration\nann\ta.wav\thello, "you"\t1.5\n\tb.wav\t\t\n',
    "m.txt": 'file|transcript|duration|speaker_id\r\na.wav|"hello, ""you"""|1.5|ann\r\n\r\nb.wav|||',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(TABLES[name].encode("utf-8-sig"))
    assert [(u.id, u.audio, u.text, u.duration, u.speaker) for u in good(path)] == [
        ("a", str(tmp_path / "a.wav"), 'hello, "you"', 1.5, "ann"),
        ("b", str(tmp_path / "b.wav"), "", None, None),
    ]


def test_tables_with_bad_rows(tmp_path):
    path = lines(tmp_path / "m.csv", "audio,text,duration", "a.wav,a,-1", "b.wav", 'c.wav,"c,1', "d.wav,d,1")
    utterances, problems = read_manifest(path)
    assert [(u.id, u.where) for u in utterances] == [("d", f"{path}:5")]
    assert [p.where for p in problems] == [f"{path}:{number}" for number in (2, 3, 4)]
    assert "duration" in problems[0].reason and "1 columns, the header 3" in problems[1].reason
    assert "no column" in refusal(lines(tmp_path / "headless.csv", "a.wav,hello", "b.wav,you"))
    assert [u.text for u in good(lines(tmp_path / "audio.csv", "audio", "a.wav"))] == [None]
    late = lines(tmp_path / "late.csv", "", "  ", "audio,text", "", "a.wav,a")
    assert [(u.text, u.where) for u in good(late)] == [("a", f"{late}:5")]


@pytest.mark.parametrize(
    ("name", "mark", "advice"),
    [("m.csv", ",", "put texts with ','"), ("m.txt", ";", "put texts with ';'"), ("m.tsv", "\t", "no tab")],
)
def test_a_text_that_is_cut_apart_is_named(tmp_path, name, mark, advice):
    rows = (["audio_filepath", "text"], ["x.flac", "well", " how are you", " my friend"], ["y.flac", "fine", ""])
    path = lines(tmp_path / name, *map(mark.join, rows))
    utterances, problems = read_manifest(path)
    assert [(u.id, u.text) for u in utterances] == [("y", "fine")]
    assert [p.where for p in problems] == [f"{path}:2"]
    assert problems[0].reason.startswith("has 4 columns, the header 2; ") and advice in problems[0].reason


def test_names_of_hugging_face(tmp_path):
    table = lines(tmp_path / "metadata.csv", "file_name,transcription", "a.wav,hello")
    rows = lines(tmp_path / "m.jsonl", {"file_name": "a.wav", "transcription": "hello"})
    assert [u.text for u in good(table) + good(rows)] == ["hello", "hello"]


def test_the_names_of_what_a_manifest_holds(tmp_path):
    rows = lines(tmp_path / "m.jsonl", "", "{", {"audio": "a.wav", "label": "rain"})
    (tmp_path / "a").mkdir()
    table = lines(tmp_path / "a" / "m.csv", "Path; Words", "a.wav;hello")
    lines(tmp_path / "wav.scp", "a a.wav")
    found = [names_in(path) for path in (rows, table, table.parent, tmp_path, tmp_path / "wav.scp")]
    assert found == [["audio", "label"], ["path", "words"], ["path", "words"], [], []]


def test_the_text_of_a_bad_row_is_kept(tmp_path):
    fine = {"audio_filepath": "a.wav", "text": "fine"}
    bad = [fine | {"duration": 0, "text": "go left", "speaker": "ann"}, {"text": "no audio"}]
    path = lines(tmp_path / "m.jsonl", fine, *bad, fine | {"duration": -1, "text": None}, "{", fine | {"text": 5})
    utterances, problems, lost = read_with_lost(path)
    assert (utterances, problems) == read_manifest(path)
    assert len(problems) == 5
    assert [(u.id, u.text, u.speaker, u.where) for u in lost] == [
        (f"{path}:2", "go left", "ann", f"{path}:2"),
        (f"{path}:3", "no audio", None, f"{path}:3"),
    ]
    cuts = [cut(2, 1, supervision("s", -0.5, 1, "cut off")), cut(0, 1)]
    assert [u.text for u in read_with_lost(lines(tmp_path / "cuts.jsonl", *cuts))[2]] == ["cut off"]
    lines(tmp_path / "wav.scp", "a a.wav", "b sox b.sph |")
    lines(tmp_path / "text", "a one", "b two", "c three")
    assert [u.text for u in read_with_lost(tmp_path / "wav.scp")[2]] == ["two", "three"]


def test_common_voice_keeps_its_recordings_in_clips(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "cv_1.mp3").touch()
    path = lines(tmp_path / "dev.tsv", "client_id\tpath\tsentence", "x\tcv_1.mp3\tHello.")
    assert [u.audio for u in good(path)] == [str(tmp_path / "clips/cv_1.mp3")]


def test_folder_of_recordings(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.wav", "b/ü 1.FLAC", "b/no text.mp3", "bad.ogg", "notes.pdf", "._z.wav"):
        (tmp_path / name).touch()
    (tmp_path / "z.TXT").write_text("  zed \n zed\n")
    (tmp_path / "b/ü 1.txt").write_text("ü", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "README.txt").write_text("no recording")
    utterances, problems = read_manifest(tmp_path)
    assert [(u.id, u.audio, u.text) for u in utterances] == [
        ("z", str(tmp_path / "z.wav"), "zed zed"),
        ("b/ü 1", str(tmp_path / "b/ü 1.FLAC"), "ü"),
    ]
    assert [p.where for p in problems] == [str(tmp_path / "bad.txt"), str(tmp_path / "b/no text.mp3")]
    assert "no text.txt" in problems[1].reason


def test_folders_that_hold_a_manifest(tmp_path):
    assert "NeMo" in refusal(tmp_path)
    path = lines(tmp_path / "train.jsonl", {"audio_filepath": "a.wav"})
    assert good(tmp_path) == good(path)
    lines(tmp_path / "dev.jsonl", {"audio_filepath": "a.wav"})
    assert refusal(tmp_path).endswith("name one of them: dev.jsonl, train.jsonl")


def test_no_permission(tmp_path):
    path = lines(tmp_path / "m.jsonl", {"audio_filepath": "a.wav"})
    path.chmod(0)
    with unprivileged():
        assert "Permission denied" in refusal(path)


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")
def test_the_shared_data():
    counts = {"librispeech_train_clean_5/train.jsonl": 1519, "noise_esc10/noise.jsonl": 808}
    for name, count in counts.items():
        utterances = good(DATA / name)
        assert len(utterances) == count
        assert all(Path(u.audio).is_file() and u.duration for u in utterances)
        assert all((u.text is None) == name.startswith("noise") for u in utterances)


def test_a_folder_of_recordings_without_any_text_is_noise_or_unlabelled_speech(tmp_path: Path) -> None:
    for name in ("b.wav", "a.flac"):
        (tmp_path / name).write_bytes(b"")
    rows, problems = read_manifest(tmp_path)
    assert [(row.id, row.text) for row in rows] == [("a", None), ("b", None)]
    assert problems == []
