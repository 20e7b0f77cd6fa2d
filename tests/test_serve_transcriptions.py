"""OpenAI's transcription endpoint, with its own client, and what it refuses."""

import itertools
import json
import os
import socket as sockets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from serving import (
    HTTP,
    PAUSE,
    TALK,
    Served,
    begin,
    dial,
    eventually,
    finished,
    metric,
    post,
    recording,
    s16,
    serving,
    wire,
)
from toy_model import RATE, TOKENIZER, ToyEngine, spell, toy_recognizer

from asr.recognizer import Network, Recognizer
from pipelines.formats import render
from pipelines.serve.limits import Limits

SAMPLE = Path(__file__).parents[1] / "scripts" / "samples" / "audio" / "00000.flac"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.DefaultHttpxClient(trust_env=False, timeout=30) as http:
        yield openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", http_client=http, max_retries=0)


def test_the_openai_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["asr-offline", "asr-streaming"]
    assert client.models.retrieve("asr-streaming").id == "asr-streaming"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-2")


def test_networks_that_cannot_decode_as_the_server_does_are_not_there() -> None:
    """Of the shipped model the streaming network alone has a transducer."""
    with serving(Recognizer.load(decoding="transducer")) as served:
        listed = HTTP.get(f"{served.http}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["asr-streaming"]
        reply = post(served.http, SAMPLE.read_bytes(), {"model": "whisper-1"})
        assert reply.json()["text"] == Recognizer.load(decoding="transducer").transcribe(SAMPLE).text != ""
        with dial(served.native) as socket:
            socket.send('{"type": "start", "two_pass": true}')
            assert json.loads(socket.recv(10))["code"] == "bad_settings"


@pytest.mark.parametrize("model", ["asr-offline", "asr-streaming", "whisper-1"])
def test_the_openai_client_transcribes(client: openai.OpenAI, model: str) -> None:
    reply = client.audio.transcriptions.create(model=model, file=("talk.wav", recording()))
    assert reply.text == "one two three"


def test_the_openai_client_gets_every_format(client: openai.OpenAI) -> None:
    expected = toy_recognizer().transcribe(TALK)

    def create(format: Any) -> Any:
        return client.audio.transcriptions.create(
            model="asr-offline", file=("talk.flac", recording(format="FLAC")), response_format=format
        )

    assert create("json").text == create("verbose_json").text == expected.text
    assert create("text") == f"{expected.text}\n"
    assert create("srt") == render(expected, "srt", "")
    assert create("vtt") == render(expected, "vtt", "")


def test_the_openai_client_gets_word_and_segment_times(client: openai.OpenAI) -> None:
    reply = client.audio.transcriptions.create(
        model="asr-offline",
        file=("talk.wav", recording()),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    expected = toy_recognizer().transcribe(TALK)
    assert reply.words is not None and reply.segments is not None
    told = [(word.text, round(word.start, 3), round(word.end, 3)) for word in expected.words]
    assert [(w.word, w.start, w.end) for w in reply.words] == told
    assert [segment.text.strip() for segment in reply.segments] == ["one two", "three"]
    assert float(reply.duration) == pytest.approx(expected.duration)


@pytest.mark.parametrize("model", ["asr-offline", "asr-streaming"])
def test_the_openai_client_streams(client: openai.OpenAI, model: str) -> None:
    stream = client.audio.transcriptions.create(model=model, file=("talk.wav", recording()), stream=True)
    events = list(stream)
    assert [event.type for event in events] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == "one two three"
    assert events[-1].type == "transcript.text.done" and events[-1].text == "one two three"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"response_format": "doc"}, "verbose_json"),
        ({"response_format": "srt", "stream": "true"}, "stream"),
        ({"timestamp_granularities[]": "word"}, "verbose_json"),
        ({"response_format": "verbose_json", "timestamp_granularities[]": "letter"}, "word or segment"),
        ({"model": "../../etc/passwd"}, "no such model"),
    ],
)
def test_a_wrong_request_is_named(server: Served, fields: dict[str, Any], named: str) -> None:
    reply = post(server.http, recording(), fields)
    assert reply.status_code in (400, 404)
    assert named in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "data", [b"", b"no audio at all", recording()[:200], b"RIFF" + os.urandom(500), b"\xff\xfb" * 90]
)
def test_what_is_no_recording_is_refused_without_a_path(server: Served, data: bytes) -> None:
    reply = post(server.http, data)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert not any(part in reply.text for part in ("/proc", "/tmp", "Traceback", ".py"))


def test_silence_has_an_empty_text(server: Served) -> None:
    assert post(server.http, recording(PAUSE)).json() == {"text": ""}


@pytest.mark.parametrize("charset", ["undefined", "punycode"])
def test_a_charset_that_decodes_nothing_is_refused(server: Served, charset: str) -> None:
    form = b'--x\r\ncontent-disposition: form-data; name="\xff--"; filename="a.wav"\r\n\r\n\r\n--x--\r\n'
    kind = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    reply = HTTP.post(f"{server.http}/v1/audio/transcriptions", content=form, headers=kind)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")


def test_only_post_is_for_this_address(server: Served) -> None:
    answer = httpx.get(f"{server.http}/v1/audio/transcriptions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


# ---- what a recording may cost


def test_too_many_recordings_get_503(monkeypatch: pytest.MonkeyPatch) -> None:
    released, taken = threading.Event(), threading.Event()
    recognizer = toy_recognizer()
    with serving(recognizer, limits=Limits(uploads=1)) as served:
        known = recognizer.transcribe

        def slow(*arguments: Any, **options: Any) -> Any:
            taken.set()
            assert released.wait(20)
            return known(*arguments, **options)

        monkeypatch.setattr(recognizer, "transcribe", slow)
        first: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: first.append(post(served.http, recording())))
        thread.start()
        assert taken.wait(20)
        refused = post(served.http, recording())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"]
        socket = begin(served.native)  # live clients do not wait behind a recording
        socket.send(s16(spell("live")))
        assert [final["text"] for final in finished(socket)] == ["live"]
        released.set()
        thread.join(20)
        assert first[0].json() == {"text": "one two three"}


class Held(ToyEngine):
    """Reads on only while it is let."""

    def __init__(self) -> None:
        self.reading, self.let = threading.Event(), threading.Event()
        self.let.set()
        self.seconds = 0.0  # of audio read

    def hold(self) -> None:
        self.reading.clear()
        self.let.clear()

    def _read(self, samples: np.ndarray) -> np.ndarray:
        self.reading.set()
        assert self.let.wait(20)
        self.seconds += len(samples) / RATE
        return super()._read(samples)


def sent(address: str, data: bytes, fields: dict[str, str] | None = None) -> sockets.socket:
    """The connection of a client that has sent all of its recording, and waits for the text."""
    built = HTTP.build_request("POST", address, files={"file": ("talk", data)}, data=fields or {})
    body = built.read()
    head = f"host: localhost\r\ncontent-type: {built.headers['content-type']}\r\ncontent-length: {len(body)}"
    raw = wire(address)
    raw.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
    return raw


@pytest.mark.parametrize(
    ("model", "stream"), [("asr-offline", "false"), ("asr-streaming", "false"), ("asr-streaming", "true")]
)
def test_a_recording_is_read_no_further_when_its_client_leaves(
    model: str, stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Held()
    recognizer = Recognizer({name: Network(TOKENIZER, lambda: engine) for name in ("offline", "streaming")})
    with serving(recognizer, limits=Limits(uploads=1)) as served:
        engine.hold()
        with sent(served.http, recording(np.zeros(700 * RATE, np.int16), "FLAC"), {"model": model, "stream": stream}):
            assert engine.reading.wait(60)
        assert eventually(lambda: metric(served, 'asr_dropped_total{reason="gone"}') == 1)
        engine.let.set()
        assert post(served.http, recording()).json() == {"text": "one two three"}
        assert engine.seconds < 400, "the offline network reads segments of 300 s together"
    assert '"event": "upload"' in (log := capsys.readouterr().err)
    assert '"code": "gone"' in log


def test_a_recording_that_waits_is_dropped_when_its_client_leaves() -> None:
    engine = Held()
    recognizer = Recognizer({"offline": Network(TOKENIZER, lambda: engine), "streaming": Network(TOKENIZER, ToyEngine)})
    with serving(recognizer, limits=Limits(uploads=2)) as served:
        engine.hold()
        with sent(served.http, recording()) as first:
            assert engine.reading.wait(20)
            with sent(served.http, recording()):
                assert eventually(lambda: post(served.http, recording()).status_code == 503)
                time.sleep(0.2)  # until it waits
            assert eventually(lambda: metric(served, 'asr_dropped_total{reason="gone"}') == 1)
            with sent(served.http, recording()) as third:
                engine.let.set()
                for raw in (first, third):
                    assert raw.recv(65536).startswith(b"HTTP/1.1 200")


def test_an_upload_is_bounded_in_size_and_in_what_it_unpacks_to() -> None:
    bomb = recording(np.zeros(RATE * 300, np.float32), "FLAC")
    assert len(bomb) < 50_000
    with serving(limits=Limits(upload_bytes=60_000, audio_seconds=60)) as served:
        unpacked = post(served.http, bomb)
        assert (unpacked.status_code, unpacked.json()["error"]["code"]) == (413, "too_long")
        large = post(served.http, os.urandom(100_000))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
        head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        endless = HTTP.post(
            f"{served.http}/v1/audio/transcriptions",
            content=itertools.chain([head], (b"x" * 10_000 for _ in range(1000))),
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
        assert endless.status_code == 413
        assert post(served.http, recording(spell("small"))).json() == {"text": "small"}


def test_an_upload_that_trickles_is_cut_off() -> None:
    with serving(limits=Limits(upload_patience=0.5)) as served, wire(served.http) as raw:
        raw.sendall(
            b"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n"
            b"content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        assert raw.recv(65536).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("list_file", ["#EXTM3U\n#EXTINF:1,\n{path}\n", "ffconcat version 1.0\nfile {path}\n"])
@pytest.mark.parametrize("before", [b"", b"ID3\x04\0\0\0\0\0\0"])
def test_a_playlist_does_not_open_files_of_the_server(
    server: Served, tmp_path: Path, list_file: str, before: bytes
) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(recording(spell("secret")))
    reply = post(server.http, before + list_file.format(path=secret).encode())
    assert reply.status_code == 400
    assert "secret" not in reply.text


def test_a_failure_inside_tells_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recognizer = toy_recognizer()
    with serving(recognizer) as served:

        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("/home/secret/model is broken")

        monkeypatch.setattr(recognizer, "transcribe", broken)
        reply = post(served.http, recording())
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert "secret" not in reply.text
        assert metric(served, 'asr_uploads_total{status="500"}') == 1
    log = capsys.readouterr().err
    assert "/home/secret/model is broken" in log
    assert '"event": "upload"' in log


# ---- how it ends


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_recording_that_takes_too_long_is_refused_when_the_server_stops(
    stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Held()
    recognizer = Recognizer({"streaming": Network(TOKENIZER, lambda: engine)})
    with serving(recognizer, limits=Limits(stop_seconds=0.2)) as served:
        engine.hold()
        with sent(served.http, recording(), {"stream": stream}) as raw:
            assert engine.reading.wait(20)
            served.stop()
            reply = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
        engine.let.set()
    head, _, body = reply.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200" if stream == "true" else "HTTP/1.1 503")
    assert '"code":"stopping"' in body
    log = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["code"] for event in log if event["event"] == "upload"] == ["stopping"]
    assert not any("trace" in event for event in log)


def test_a_recording_does_not_hold_up_the_end_of_the_process() -> None:
    program = """
import time
from asr.recognizer import Network, Recognizer
from pipelines.serve.limits import Limits
from pipelines.serve.run import Settings, run
from toy_model import RATE, TOKENIZER, ToyEngine

class Slow(ToyEngine):
    def log_probs(self, batch):
        if sum(map(len, batch)) > RATE:
            print("reading", flush=True)
            time.sleep(60)
        return super().log_probs(batch)

networks = {"offline": Network(TOKENIZER, Slow), "streaming": Network(TOKENIZER, ToyEngine)}
settings = Settings(port=0, limits=Limits(stop_seconds=0.2))
run(Recognizer(networks), settings, lambda addresses: print(addresses.main, flush=True))
"""
    tests = Path(__file__).parent
    search = os.pathsep.join([str(tests), str(tests.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": search}
    )
    try:
        assert process.stdout is not None
        with sent(process.stdout.readline().strip(), recording()) as raw:
            assert process.stdout.readline() == "reading\n"
            process.terminate()
            assert raw.recv(65536).startswith(b"HTTP/1.1 503")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
