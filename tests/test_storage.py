"""pipelines.storage, and `asr prepare` on it: an object store holds what a disk would."""

import json
import logging
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra [train]")
pytest.importorskip("moto", reason="needs the extra [test]")
from moto.server import ThreadedMotoServer
from pyarrow import fs
from test_prepare import content, recordings, write_manifest

from asr.errors import AsrError, ConfigError, ManifestError
from asr.training.shards import ShardDataset
from pipelines.prepare import prepare
from pipelines.storage import Store, local_copies, read_any_manifest, states


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    """An S3 server on loopback with the bucket `speech`, found by what everybody's S3 settings are called."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/speech", method="PUT"), timeout=30).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_REGION", "us-east-1")
        yield url
    server.stop()


def s3() -> fs.FileSystem:
    return fs.FileSystem.from_uri("s3://speech")[0]


def upload(folder: Path, path: str) -> str:
    """Copy a folder into the bucket; its URL."""
    fs.copy_files(str(folder), f"speech/{path}", destination_filesystem=s3())
    return f"s3://speech/{path}"


def download(path: str, folder: Path) -> Path:
    folder.mkdir()
    fs.copy_files(f"speech/{path}", str(folder), source_filesystem=s3())
    return folder


@pytest.mark.parametrize("folder", ["s3://speech/store", "memory://store", "a disk"])
def test_a_file_is_written_whole_and_read_back(folder: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "deep" / "store") if folder == "a disk" else folder)
    with store.held():
        assert store.names() == []
    store.write("b.json", '{"text": "きょう"}')
    with store.writing("a.bin") as path:
        path.write_bytes(b"12345")
    assert store.names() == ["a.bin", "b.json"]
    assert store.read("b.json") == '{"text": "きょう"}'
    assert (store.size("a.bin"), store.size("none")) == (5, None)
    store.write("b.json", "other")
    assert store.read("b.json") == "other"
    store.remove("b.json")
    assert store.names() == ["a.bin"]
    with pytest.raises(OSError):
        store.read("b.json")


def test_what_a_killed_job_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.arrow.tmp-123").touch()
    (tmp_path / "kept.json").touch()
    store = Store(str(tmp_path))
    with store.held():
        assert store.names() == ["kept.json"]


def test_one_job_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    with Store(str(tmp_path)).held(), pytest.raises(AsrError, match=f"another .* {os.getpid()}"):
        Store(str(tmp_path)).held().__enter__()


def test_unknown_stores_are_named() -> None:
    with pytest.raises(ConfigError, match="carrier-pigeon://"):
        Store("carrier-pigeon://loft")


def test_states_tell_whether_a_file_changed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    upload(tmp_path, "states")
    paths = ["s3://speech/states/a", str(tmp_path / "a"), "s3://speech/states/none", str(tmp_path / "none")]
    remote, local, *missing = states(paths)
    assert remote is not None and local is not None
    assert (remote[0], local[0], missing) == (3, 3, [None, None])
    (tmp_path / "a").write_bytes(b"abcd")
    upload(tmp_path, "states")
    changed = states(paths[:1])[0]
    assert changed is not None and changed[0] == 4


def test_copies_are_there_for_the_time_of_the_block(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"abc")
    url = upload(tmp_path, "copies") + "/a.wav"
    with local_copies([url, "/here.wav", "s3://speech/none.wav", url]) as copies:
        assert copies["/here.wav"] == "/here.wav"
        assert str(copies["s3://speech/none.wav"]) == "s3://speech/none.wav: no such file"
        local = Path(str(copies[url]))
        assert (local.suffix, local.read_bytes()) == (".wav", b"abc")
    assert not local.exists()


def test_manifests_of_every_kind_name_their_recordings_by_url(tmp_path: Path) -> None:
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    (kaldi / "wav.scp").write_text("u1 ../audio/a.wav\n")
    (kaldi / "text").write_text("u1 HELLO\n")
    speech = tmp_path / "audio"
    speech.mkdir()
    (speech / "a.wav").write_bytes(b"not read here")
    (speech / "a.txt").write_text("hello there")
    url = upload(tmp_path, "kinds")
    for manifest in (f"{url}/kaldi", f"{url}/kaldi/wav.scp"):
        (row,), problems = read_any_manifest(manifest)
        assert (row.audio, row.text, problems) == (f"{url}/audio/a.wav", "HELLO", [])
    (row,), _ = read_any_manifest(f"{url}/audio")
    assert (row.id, row.audio, row.text, row.where) == (
        "a", f"{url}/audio/a.wav", "hello there", f"{url}/audio/a.txt:1",
    )  # fmt: skip
    with pytest.raises(ManifestError, match=r"^s3://speech/kinds/none\.jsonl: no such manifest"):
        read_any_manifest(f"{url}/none.jsonl")


def test_preparing_in_an_object_store_gives_what_a_disk_gives(tmp_path: Path) -> None:
    rows = recordings(tmp_path / "corpus", 5)
    rows[3]["audio_filepath"] = "none.wav"
    manifest = write_manifest(tmp_path / "corpus", rows)
    url = upload(tmp_path / "corpus", "corpus")
    local = prepare([manifest], tmp_path / "local", workers=0, shard_seconds=1.0)
    remote = prepare([f"{url}/train.jsonl"], "s3://speech/out", workers=0, shard_seconds=1.0)
    assert (remote.utterances, remote.seconds, remote.shards) == (local.utterances, local.seconds, local.shards)
    assert [str(problem) for problem in remote.skipped] == [
        f"{url}/train.jsonl:4: {url}/none.wav: no such file",
    ]
    copied = download("out", tmp_path / "copied")
    for name, data in content(tmp_path / "local").items():
        if name.endswith(".arrow") or name == "dataset.json":
            assert (copied / name).read_bytes() == data, name
    assert ShardDataset(copied).ids == ["000", "001", "002", "004"]

    before = content(copied)
    again = prepare([f"{url}/train.jsonl"], "s3://speech/out", workers=0, shard_seconds=1.0)
    assert again.reused == again.shards
    assert content(download("out", tmp_path / "again")) == before

    late = str(tmp_path / "corpus" / "000.wav")  # the row that was missing is there now
    fs.copy_files(late, "speech/corpus/none.wav", destination_filesystem=s3())
    mended = prepare([f"{url}/train.jsonl"], "s3://speech/out", workers=0, shard_seconds=1.0)
    assert (mended.reused, mended.utterances, mended.skipped) == (again.shards - 1, 5, ())


def test_a_list_here_may_name_recordings_there(tmp_path: Path) -> None:
    rows = recordings(tmp_path / "corpus", 2)
    url = upload(tmp_path / "corpus", "mixed")
    rows[1]["audio_filepath"] = f"{url}/001.wav"
    summary = prepare([write_manifest(tmp_path / "corpus", rows)], tmp_path / "out", workers=0)
    assert (summary.utterances, summary.skipped) == (2, ())


def test_a_bucket_that_is_not_there_is_named(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, recordings(tmp_path, 1))
    with pytest.raises(AsrError, match=r"s3://nowhere/out: cannot write"):
        prepare([manifest], "s3://nowhere/out", workers=0)
    with pytest.raises(ManifestError, match=r"s3://nowhere/x\.jsonl"):
        prepare(["s3://nowhere/x.jsonl"], tmp_path / "out", workers=0)


def test_skipped_rows_are_listed_in_the_store(tmp_path: Path) -> None:
    rows = [{"audio_filepath": "none.wav", "duration": 1.0, "text": "gone"}]
    manifest = write_manifest(tmp_path, rows)
    with pytest.raises(ManifestError, match=r"s3://speech/few/skipped\.jsonl"):
        prepare([manifest], "s3://speech/few", workers=0, max_errors=0)
    (line,) = Store("s3://speech/few").read("skipped.jsonl").splitlines()
    assert json.loads(line)["where"] == f"{manifest}:1"
